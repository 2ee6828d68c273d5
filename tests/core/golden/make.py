"""Make the golden files from Hugging Face's MistralForCausalLM.

Run it as `python tests/core/golden/make.py` (extra `oracle`). Each case is a random checkpoint
(float16 values, computed in float32, eager attention), the logits of a prompt several windows long,
and its greedy continuation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MistralConfig, MistralForCausalLM

HERE = Path(__file__).parent
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
}
CASES: dict[str, dict[str, Any]] = {
    "sliding": {"sliding_window": 6},
    "full": {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "odd": {"sliding_window": 9, "head_dim": 10, "num_key_value_heads": 1, "tie_word_embeddings": True},
}


def make(name: str, changes: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    config = MistralConfig.from_dict(SMALL | changes | {"initializer_range": 0.3}, attn_implementation="eager")
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # not model.half(): it would round RoPE's frequencies as well
            parameter.copy_(parameter.half())
    prompt = torch.randint(0, config.vocab_size, (1, 40))
    with torch.no_grad():
        logits = model(prompt).logits[0]
        ids = prompt
        for _ in range(40):  # without a cache: the plainest form of the oracle
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    weights = {k: v.numpy().astype(np.float16) for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    np.savez_compressed(HERE / f"{name}.npz", logits=logits.numpy(), **weights)
    written = {"config": config.to_dict(), "prompt": prompt[0].tolist(), "continuation": ids[0, 40:].tolist()}
    (HERE / f"{name}.json").write_text(json.dumps(written) + "\n")


if __name__ == "__main__":
    for seed, (case, changes) in enumerate(CASES.items()):
        make(case, changes, seed)
