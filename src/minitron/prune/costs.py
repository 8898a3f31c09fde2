"""What a pruning run will take, and how fast models decode on this machine: predicted from memory, or measured."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..checkpoint.tensors import Checkpoint
from ..config import NemotronConfig
from ..engine.measure import decode, random_model, read_bandwidth
from ..engine.models import why_not_model
from ..engine.weights import from_model
from ..loading import load
from .search import BYTES_PER_VALUE, Machine, SearchError

ENGINE_COPIES = 2.5
"""Bytes of a model that the engine needs to load, pack and run it, over those of its weights."""
_PROMPT, _NEW_TOKENS = 16, 24
_FORWARD_SHARE = 0.5
"""Of the speed of large matrix products, what a streamed forward pass reaches."""
_READ_BYTES_PER_SECOND = 1e9
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_IMPORTS = 600e6
"""Bytes that the libraries take."""


@dataclass(frozen=True)
class Estimate:
    """What is ahead."""

    seconds: float
    memory: float
    """Bytes at most."""

    def __str__(self) -> str:
        return f"about {max(1, self.seconds):.0f} s and {self.memory / 1e9:.1f} GB of memory"


def matmul_flops() -> float:
    """FLOP/s of a product of large fp32 matrices here, the best of a few."""
    n = 768
    a, best = torch.randn(n, n), float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def forward_estimate(checkpoint: Checkpoint, tokens: int, length: int, passes: float = 1.0) -> Estimate:
    """Of streamed forward passes in fp32: time by FLOPs and by reading; memory by the largest layer and the stream."""
    config = checkpoint.config
    flops = passes * tokens * config.flops_per_token(length // 2)
    seconds = flops / (_FORWARD_SHARE * matmul_flops()) + passes * checkpoint.nbytes / _READ_BYTES_PER_SECOND
    counts = config.parameter_counts()
    layer = 4 * (counts["attention"] + counts["mlp"]) / max(1, config.num_hidden_layers)
    stream = min(2 * 4 * tokens * config.hidden_size, 1 << 31)
    return Estimate(seconds, _IMPORTS + 2 * layer + stream)


def cut_estimate(bytes_read: int) -> Estimate:
    """Of fingerprint and surgery."""
    return Estimate(2 * bytes_read / _READ_BYTES_PER_SECOND, _IMPORTS + 100e6)


def available_memory() -> float:
    """Bytes that a program can still get; infinity where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        return 1024 * float(line.split()[1])
    except (OSError, StopIteration, ValueError):
        return float("inf")


def runs_in_memory(config: NemotronConfig, bytes_per_value: float) -> bool:
    """Whether the engine can be tried on a model without pushing other programs out."""
    return ENGINE_COPIES * bytes_per_value * config.num_parameters() < 0.8 * available_memory()


def machine_for(
    kind: str | None, config: NemotronConfig, weights: torch.dtype, dtype: str | None = None, context: int | None = None
) -> Machine:
    """What a budget is counted with.

    Args:
        kind: of the budget, one of `search.BUDGETS`; None if there is none.
        config: of the model to prune.
        weights: in which its checkpoint holds them, and the smaller one will.
        dtype: in which they will run; as they are held if None.
        context: tokens in the cache; if None, all that the model can for a budget of memory, else none.

    Raises:
        SearchError: a budget of memory or speed for weights in a dtype that nothing runs in.
    """
    if context is None:
        context = config.max_position_embeddings if kind == "memory" else 0
    if dtype is None and weights not in _DTYPES and kind in ("memory", "speed"):
        known = ", ".join(BYTES_PER_VALUE)
        raise SearchError(f"the weights are in {weights}; --dtype must say what they will run in: {known}")
    return Machine(dtype or _DTYPES.get(weights, "fp32"), context)


def with_bandwidth(machine: Machine) -> Machine:
    """The machine with its measured read bandwidth."""
    return replace(machine, bytes_per_second=1e9 * read_bandwidth())


def with_engine(machine: Machine, config: NemotronConfig) -> Machine:
    """The machine with the dense bytes per second that the engine achieves on random bf16 weights of this shape.

    Half of the neurons of random weights are zero, and their rows are not read, so that this may be more than memory
    gives; trained models of the family have more zeros. The bandwidth stays where the model does not fit.
    """
    if machine.dtype != "bf16" or not runs_in_memory(config, 2):
        return machine
    dense = Machine("bf16", 0, 1.0)
    seconds = 1 / dense.speed(config)  # type: ignore[operator]  # bytes over 1 byte per second
    measured = decode(from_model(random_model(config)), list(range(1, _PROMPT + 1)), _NEW_TOKENS).tokens_per_second
    return replace(machine, bytes_per_second=seconds * measured)


def measured_speed(folder: Path, config: NemotronConfig, bytes_per_value: float) -> tuple[float | None, str]:
    """Tokens per second of the engine on a checkpoint, or None and why it was not tried."""
    if not runs_in_memory(config, bytes_per_value):
        return None, "does not fit the memory that is free"
    if (config.architectures or ["NemotronForCausalLM"])[0] != "NemotronForCausalLM":
        return None, "not a language model"
    model = load(folder, device="cpu").model
    reason = why_not_model(model)
    if reason:
        return None, reason
    generator = torch.Generator().manual_seed(0)
    room = max(4, min(_NEW_TOKENS, config.max_position_embeddings - _PROMPT - 8))
    prompt = torch.randint(config.vocab_size, (_PROMPT,), generator=generator).tolist()
    return decode(from_model(model), prompt, room).tokens_per_second, ""
