"""How fast decoding is, beside what memory allows in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch

from ..config import NemotronConfig
from ..model import NemotronForCausalLM
from .generation import open_engine, weights_of

BANDWIDTH_BYTES = 1 << 30
WARM_UP_TOKENS = 4


@dataclass
class Decoding:
    """One measurement; times are medians over single tokens."""

    seconds_per_token: float
    bytes_per_token: float
    """Weights that were read, counting only rows of neurons that were not zero. Keys and values are not counted."""
    zero_fraction: float
    prefill_tokens: int
    prefill_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens, the prompt left out."""
        return 1 / self.seconds_per_token

    @property
    def gb_per_second(self) -> float:
        """Bytes of weights read per second, decimal units."""
        return self.bytes_per_token / self.seconds_per_token / 1e9


def read_bandwidth(repeats: int = 5) -> float:
    """GB/s at which torch's threads sum 1 GiB: what this machine gives a program that only reads."""
    data = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return BANDWIDTH_BYTES / best / 1e9


def random_model(
    config: NemotronConfig, zeros: float = 0.5, dtype: torch.dtype = torch.bfloat16
) -> NemotronForCausalLM:
    """A model of random weights of which a declared share of MLP neurons is zero; good for timing and nothing else.

    Random pre-activations are normal around 0, so half of them are zero after the activation. Other shares are made
    with a bias on `up_proj`, which real checkpoints do not have and which is too small to matter for speed.
    """
    if not 0 <= zeros < 1:
        raise ValueError(f"zeros is {zeros}; it must be from 0 up to, but not including, 1")
    config = NemotronConfig.from_dict({**config.to_dict(), "mlp_bias": True, "dtype": str(dtype).split(".")[1]})  # type: ignore[assignment]
    with torch.device("meta"):
        model = NemotronForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu").eval()  # type: ignore[reportArgumentType]
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    std = config.initializer_range
    # Billions of normal numbers take minutes; the same few millions over and over are as good for timing.
    block = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * std).to(dtype)
    spread = std * config.hidden_size**0.5
    threshold = spread * NormalDist().inv_cdf(max(zeros, 1e-6))
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() == 2:
            for start in range(0, flat.numel(), block.numel() - 1):  # not a multiple of any width
                part = flat[start : start + block.numel() - 1]
                part.copy_(block[: part.numel()])
        else:
            flat.fill_(-threshold if name.endswith("up_proj.bias") else 0.0)
    return model


def decode(model: NemotronForCausalLM, prompt: list[int], new_tokens: int) -> Decoding:
    """Read `prompt` and decode greedily, token by token."""
    weights = weights_of(model)
    engine = open_engine(weights, len(prompt) + WARM_UP_TOKENS + new_tokens)
    try:
        start = time.perf_counter()
        engine.read(prompt[:-1])
        token = int(engine.step([prompt[-1]])[0].argmax())
        prefill = time.perf_counter() - start
        times = []
        for _ in range(WARM_UP_TOKENS - 1 + new_tokens):
            start = time.perf_counter()
            token = int(engine.step([token])[0].argmax())
            times.append(time.perf_counter() - start)
    finally:
        engine.close()
    active = engine.active_neurons / max(1, engine.seen_neurons)
    seconds = statistics.median(times[WARM_UP_TOKENS - 1 :])
    return Decoding(seconds, weights.bytes_per_token(active), 1 - active, len(prompt), prefill)


def interleaved(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Results of each of `works`, `rounds` times, in turn; each goes first in every other round."""
    results: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds):
        for name in sorted(works, reverse=bool(round_ % 2)):
            results[name].append(works[name]())
    return results


def transformers_seconds_per_token(model: object, prompt: list[int], new_tokens: int) -> float:
    """Seconds per token of a model's `generate` without the engine, the prompt and a first token left out."""
    ids = torch.tensor([prompt])
    off = {"engine": "off"} if isinstance(model, NemotronForCausalLM) else {}

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(  # type: ignore[attr-defined]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **off,
        )
        return time.perf_counter() - start

    first = seconds(1)
    return (seconds(1 + new_tokens) - first) / new_tokens
