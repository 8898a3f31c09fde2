"""What a pruning run costs, and how fast models decode on this machine: predicted from memory, or measured."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..bench.measure import decode, random_model, read_bandwidth
from ..bench.speeds import Speed, measure_speeds
from ..checkpoint.tensors import Checkpoint
from ..config import ModelConfig
from ..dtypes import dtype_name
from ..engine.models import why_not_model
from ..engine.weights import from_model
from ..families import family_of
from ..loading import load
from ..memory import available_memory
from ..shapes import describe
from .search import BYTES_PER_VALUE, Machine, SearchError

ENGINE_COPIES = 2.5
"""Bytes of a model that the engine needs to load, pack and run it, over those of its weights."""
_PROMPT, _NEW_TOKENS = 16, 24
_FORWARD_SHARE = 0.5
"""Share of the speed of large matrix products that a streamed forward pass reaches."""
_READ_BYTES_PER_SECOND = 1e9
_IMPORTS = 600e6
"""Bytes that the libraries take."""


@dataclass(frozen=True)
class CostEstimate:
    """Time and memory of a step before it begins."""

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


def forward_estimate(checkpoint: Checkpoint, tokens: int, length: int, passes: float = 1.0) -> CostEstimate:
    """Of streamed forward passes in fp32: time by FLOPs and by reading; memory by the largest layer and the stream."""
    shape = describe(checkpoint.config)
    flops = passes * tokens * shape.flops_per_token(length // 2)
    seconds = flops / (_FORWARD_SHARE * matmul_flops()) + passes * checkpoint.nbytes / _READ_BYTES_PER_SECOND
    counts = shape.parameter_counts()
    layer = 4 * (counts["attention"] + counts["mlp"]) / max(1, shape.layers)
    stream = min(2 * 4 * tokens * shape.hidden, 1 << 31)
    return CostEstimate(seconds, _IMPORTS + 2 * layer + stream)


def cut_estimate(bytes_read: int) -> CostEstimate:
    """Of fingerprint and surgery."""
    return CostEstimate(2 * bytes_read / _READ_BYTES_PER_SECOND, _IMPORTS + 100e6)


def runs_in_memory(configs: Iterable[ModelConfig], bytes_per_value: float) -> bool:
    """Whether the engine can be tried on all these models at once without evicting other programs."""
    values = sum(describe(config).num_parameters() for config in configs)
    free = available_memory()
    return free is None or ENGINE_COPIES * bytes_per_value * values < 0.8 * free


def machine_for(
    kind: str | None, config: ModelConfig, weights: torch.dtype, dtype: str | None = None, context: int | None = None
) -> Machine:
    """What a budget is counted with.

    Args:
        kind: of the budget, one of `search.BUDGETS`; None if there is none.
        config: of the model to prune.
        weights: in which its checkpoint holds them, and the smaller one will.
        dtype: in which they will run; as they are held if None.
        context: tokens in the cache; if None, all that the model can for a budget of memory, else none.

    Raises:
        SearchError: a budget of memory or speed for weights in a dtype without an engine.
    """
    if context is None:
        context = int(config.max_position_embeddings) if kind == "memory" else 0
    held = dtype_name(weights)
    if dtype is None and held is None and kind in ("memory", "speed"):
        known = ", ".join(BYTES_PER_VALUE)
        raise SearchError(f"the weights are in {weights}; --dtype must say what they run in: {known}")
    return Machine(dtype or held or "fp32", context)


def with_bandwidth(machine: Machine) -> Machine:
    """The machine with its measured read bandwidth."""
    return replace(machine, bytes_per_second=1e9 * read_bandwidth())


def with_engine(machine: Machine, config: ModelConfig) -> Machine:
    """The machine with the dense bytes per second that the engine achieves on random bf16 weights of this shape.

    Half of the neurons of random weights are zero and their rows are not read, so this may exceed the bandwidth;
    trained models of the family have more zeros. The bandwidth stays where the model does not fit.
    """
    if machine.dtype != "bf16" or not runs_in_memory([config], 2):
        return machine
    dense = Machine("bf16", 0, 1.0)
    seconds = 1 / dense.speed(config)  # type: ignore[operator]  # bytes over 1 byte per second
    model = random_model(config)
    if why_not_model(model):
        return machine
    measured = decode(from_model(model), list(range(1, _PROMPT + 1)), _NEW_TOKENS).tokens_per_second
    return replace(machine, bytes_per_second=seconds * measured)


def measured_speeds(
    folders: Mapping[str, Path], configs: Mapping[str, ModelConfig], bytes_per_value: float
) -> tuple[dict[str, Speed], str]:
    """Decoding of checkpoints, in turn where all fit the memory, and what else the machine ran meanwhile.

    Returns:
        Speeds by name, without models that were skipped, and the load as a clause; see `bench.speeds`.
    """
    if not folders:
        return {}, ""
    if runs_in_memory([configs[name] for name in folders], bytes_per_value):
        return _measured(folders, configs)
    speeds: dict[str, Speed] = {}
    loads: list[str] = []
    for name, folder in folders.items():
        if runs_in_memory([configs[name]], bytes_per_value):
            found, load = _measured({name: folder}, configs)
            speeds |= found
            loads.append(load)
    return speeds, next(filter(None, loads), "")


def why_not_measured(config: ModelConfig, bytes_per_value: float) -> str:
    """Why the speed of a checkpoint cannot be measured; empty if it can."""
    if (config.architectures or [family_of(config).architecture])[0] != family_of(config).architecture:
        return "not a language model"
    return "" if runs_in_memory([config], bytes_per_value) else "does not fit the memory that is free"


def _measured(folders: Mapping[str, Path], configs: Mapping[str, ModelConfig]) -> tuple[dict[str, Speed], str]:
    vocabulary = min(configs[name].vocab_size for name in folders)
    context = min(configs[name].max_position_embeddings for name in folders)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (max(2, min(_PROMPT, context // 2)),), generator=generator).tolist()
    models = {name: load(folder, device="cpu").model for name, folder in folders.items()}
    return measure_speeds(models, prompt)
