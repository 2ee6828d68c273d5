"""m7mlx-plan: what it says of memory is what shards take.

What it says of time follows from the link.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from m7mlx_plan.cli import main
from m7mlx_plan.estimate import NETWORKS, Network, estimate
from m7mlx_plan.weights import list_weights
from models import small_config, write_folder

from m7mlx.files.published import PUBLISHED
from m7mlx.loading import load
from m7mlx.shard import MODES, Mode, Shard

NONE = Network(0.0, float("inf"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config(n_kv_heads=4, n_layers=4, vocab_size=32000)
    return write_folder(tmp_path_factory.mktemp("plan") / "model", config)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_weights_and_cache_are_those_of_the_shards(folder: Path, mode: Mode, ranks: int) -> None:
    config, tensors = list_weights(str(folder), None)
    found = estimate(config, tensors, mode, ranks, NONE, positions=11, rows=3)
    shards = [load(folder, shard=Shard(mode, rank, ranks))[0] for rank in range(ranks)]
    assert found.weights == max(shard.nbytes for shard in shards)
    caches = [
        3 * 2 * shard.config.n_layers * shard.config.n_kv_heads * shard.config.head_dim * 11 * 2 for shard in shards
    ]
    assert found.cache == max(caches)


@pytest.mark.parametrize(
    ("alias", "billions"),
    [
        ("mistral", 7.25),
        ("ministral-3b", 3.43),
        ("ministral-8b", 8.49),
        ("ministral-14b", 13.5),
        ("mistral-nemo", 12.25),
        ("mistral-small", 23.57),
        ("devstral-small", 23.57),
    ],
)
def test_models_with_an_alias_need_not_be_here(alias: str, billions: float) -> None:
    config, tensors = list_weights(alias, None)
    assert config.n_weights == pytest.approx(billions * 1e9, rel=0.002)
    # A download may have a vision tower of 0.84 GB besides.
    beside = PUBLISHED[alias].nbytes - sum(size for _, size in tensors.values())
    assert -0.05e9 < beside < 1e9


def test_networks_decide_where_dividing_pays() -> None:
    config, tensors = list_weights("mistral", 4)

    def seconds(mode: Mode, ranks: int, network: Network) -> float:
        return estimate(config, tensors, mode, ranks, network, positions=4096).seconds

    alone = seconds("tensor", 1, NONE)
    assert seconds("pipeline", 1, NETWORKS["1gbe"]) == alone  # nothing to exchange
    assert alone / seconds("tensor", 4, NONE) > 3
    assert seconds("tensor", 2, NETWORKS["rdma"]) < alone < seconds("tensor", 2, NETWORKS["thunderbolt"])
    assert seconds("pipeline", 4, NETWORKS["10gbe"]) < seconds("tensor", 4, NETWORKS["10gbe"])
    two = estimate(config, tensors, "tensor", 2, NETWORKS["10gbe"], positions=4096)
    # Twice a layer, a hidden state in 16 bits.
    assert (two.sent, two.exchanges) == (2 * 32 * 4096 * 2, 65)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    assert main([str(folder), "--ranks", "1", "2", "3", "--memory", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "tensor × 2" in out and "4 KV heads cannot be divided among 3" in out and "does not fit" in out
    assert main(["mistral", "--json", "--bits", "16"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 8
    assert lines[0]["weights"] == pytest.approx(14.5e9, rel=0.01)
    for options, reason in (
        (["evil/none"], "not on this machine"),
        (["org/name/x.gguf"], "make one of a GGUF file: m7mlx-convert org/name/x.gguf"),
        ([str(gguf)], f"make one of a GGUF file: m7mlx-convert {gguf}"),
        (["--ranks", "0"], "--ranks"),
        (["--bandwidth", "nan"], "--bandwidth"),
        (["--tokens", "-1"], "--tokens"),
    ):
        assert main(options) == 2
        assert reason in capsys.readouterr().err
