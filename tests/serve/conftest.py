"""The servers that the files of this folder ask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conversations import CHATML
from models import small_config, write_folder
from serving import serving
from tokenizer_folders import CONTROLS, byte_level_json, write_json_tokenizer

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # litellm would fetch one when it is imported


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a template that knows no tools: ChatML, over bytes."""
    config = small_config(vocab_size=260, sliding_window=None, n_layers=1, max_position_embeddings=8192)
    folder = write_folder(tmp_path_factory.mktemp("model") / "chatml", config)
    (folder / "tokenizer.model").unlink()
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    write_json_tokenizer(folder, byte_level_json(CONTROLS), settings)
    return folder


@pytest.fixture(scope="module")
def chatml_url(chatml_folder: Path) -> Iterator[str]:
    """The address of a server of that model."""
    with serving(chatml_folder, "--rows", "4") as (found, _):
        yield found


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    """The address of a server with four rows, one for each file of tests."""
    with serving(model_folder, "--rows", "4") as (found, _):
        yield found
