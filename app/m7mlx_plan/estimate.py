"""The cost of dividing a model: memory of each machine, bytes and exchanges a token, the speed.

The speed is calculated, not measured. For a token a machine takes the time to read its weights and
cache; an exchange takes the latency of the network for each hop, and the time to send its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from m7mlx.config import ModelConfig
from m7mlx.memory import cache_bytes
from m7mlx.shard import Mode, Shard

# The part of the memory bandwidth that published decoding figures reach (docs/performance.md).
_EFFICIENCY = 0.65


@dataclass(frozen=True)
class Network:
    """The network between the machines.

    latency    seconds that a message takes
    bandwidth  bytes a second
    is_mesh    whether each machine reaches all others at once
    """

    latency: float
    bandwidth: float
    is_mesh: bool = False


# Latencies as reported for macOS 26.2: 300 µs through TCP, 3 to 50 µs by RDMA (Apple TN3205, and
# measurements of users).
NETWORKS = {
    "rdma": Network(10e-6, 7e9, is_mesh=True),
    "thunderbolt": Network(300e-6, 3e9),
    "10gbe": Network(300e-6, 1.1e9),
    "1gbe": Network(300e-6, 0.11e9),
}


@dataclass(frozen=True)
class Estimate:
    """The cost of one way to divide a model.

    weights    bytes of the machine that holds most
    cache      bytes of keys and values of the machine that holds most
    sent       bytes that a machine sends for a token, at most
    exchanges  how often all machines wait for each other, for a token
    seconds    that a token takes
    """

    mode: Mode
    ranks: int
    weights: int
    cache: int
    sent: int
    exchanges: int
    seconds: float


def estimate(
    whole: ModelConfig,
    tensors: Mapping[str, tuple[tuple[int, ...], int]],
    mode: Mode,
    ranks: int,
    network: Network,
    *,
    positions: int,
    rows: int = 1,
    memory_bandwidth: float = 273e9,
) -> Estimate:
    """Return what dividing the model `whole` among `ranks` machines takes.

    tensors           its weights, as {name: (shape, bytes)}
    positions         of each conversation, in 16 bits
    rows              conversations at a time
    memory_bandwidth  bytes a second of each machine

    Raises ConfigError where the model cannot be divided so.
    """
    shards = [Shard(mode, rank, ranks) for rank in range(ranks)]
    caches = [rows * cache_bytes(shard.config(whole), positions) for shard in shards]
    weights = [shard.nbytes(dict(tensors), whole) for shard in shards]
    hidden = rows * whole.hidden_size * 2
    work = [(w + c) / (memory_bandwidth * _EFFICIENCY) for w, c in zip(weights, caches, strict=True)]
    # An all-reduce of the hidden states: messages one after the other, bytes that a machine sends.
    hops = 0 if ranks == 1 else 1 if network.is_mesh else 2 * (ranks - 1)
    share = hidden * (ranks - 1) if network.is_mesh else 2 * hidden * (ranks - 1) / ranks
    if mode == "tensor":  # twice a layer, and once about the token
        exchanges = 2 * whole.n_layers + 1 if ranks > 1 else 0
        sent = 2 * whole.n_layers * share
        seconds = max(work) + exchanges * hops * network.latency + sent / network.bandwidth
    else:  # to the next, from the last to all, and about the token
        exchanges = ranks - 1 + 2 if ranks > 1 else 0
        sent = hidden + share if ranks > 1 else 0
        latency = ((ranks - 1) + 2 * hops) * network.latency
        seconds = sum(work) + latency + ((ranks - 1) * hidden + share) / network.bandwidth
    return Estimate(mode, ranks, max(weights), max(caches), math.ceil(sent), exchanges, seconds)
