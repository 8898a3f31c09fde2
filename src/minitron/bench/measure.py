"""How fast decoding is, beside the memory bandwidth and other programs in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import ModelConfig, NemotronConfig
from ..engine.engines import open_engine
from ..engine.weights import EngineWeights
from ..families import family_of
from ..family_models import causal_lm_class
from ..heads import NemotronForCausalLM
from .peers import Peer

BANDWIDTH_BYTES = 1 << 30
READS = 5
"""Bandwidth measurements before each turn of the engine, and after it."""

Result = TypeVar("Result")


@dataclass
class Decoding:
    """One measurement."""

    seconds_per_token: float
    """Mean over the tokens after the first."""
    bytes_per_token: float
    """Weights that were read, counting only rows of neurons that were not zero. Keys and values are not counted."""
    zero_fraction: float
    prefill_seconds: float
    """Time of the whole prompt and the first token."""
    tokens: list[int]
    """The new ones, greedy."""

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second, without the prompt."""
        return 1 / self.seconds_per_token

    @property
    def gb_per_second(self) -> float:
        """Bytes of weights read per second, decimal units."""
        return self.bytes_per_token / self.seconds_per_token / 1e9


def read_bandwidth(repeats: int = 5) -> float:
    """GB/s at which torch's threads sum 1 GiB, at best: what this machine gives a program that only reads."""
    return max(_read_rates(_bandwidth_data(), repeats))


def _bandwidth_data() -> Tensor:
    return torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64)


def _read_rates(data: Tensor, repeats: int) -> list[float]:
    """GB/s of each of several sums."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        rates.append(BANDWIDTH_BYTES / (time.perf_counter() - start) / 1e9)
    return rates


def random_model(
    config: ModelConfig, zeros: float = 0.5, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Any:
    """A model of random weights of which a declared share of MLP neurons is zero; good for timing and nothing else.

    Random pre-activations are normal around 0, so half of them are zero after the activation. Other shares are made
    with a bias on `up_proj`, which real checkpoints do not have and which is too small to matter for speed. `zeros`
    has no effect on a gated MLP, whose neurons are hardly ever zero.
    """
    if not 0 <= zeros < 1:
        raise ValueError(f"zeros is {zeros}; it must be from 0 up to, but not including, 1")
    family = family_of(config)
    changed = (
        {"dtype": str(dtype).split(".")[1]} if family.gated else {"mlp_bias": True, "dtype": str(dtype).split(".")[1]}
    )
    config = type(config).from_dict({**config.to_dict(), **changed})
    with torch.device("meta"):
        model = causal_lm_class(family)(config)
    model = model.to(dtype).to_empty(device=device).eval()  # type: ignore[reportArgumentType]
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    std = config.initializer_range
    # Billions of normal numbers take minutes; the same few millions over and over are as good for timing.
    block = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * std).to(device, dtype)
    spread = std * config.hidden_size**0.5
    threshold = spread * NormalDist().inv_cdf(max(zeros, 1e-6))
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() == 2:
            for start in range(0, flat.numel(), block.numel() - 1):  # not a multiple of any width
                part = flat[start : start + block.numel() - 1]
                part.copy_(block[: part.numel()])
        else:
            gain = 1 - family.norm.offset if name.endswith("norm.weight") else 0.0
            flat.fill_(-threshold if name.endswith("up_proj.bias") and not family.gated else gain)
    return model


@torch.no_grad()
def widened(model: NemotronForCausalLM, times: int) -> NemotronForCausalLM:
    """A larger model that computes the same function: its channels, heads and neurons are repeated.

    It has the texts, the zeros and the quantization errors of the small model, and as many weights as a large one: for
    measuring what depends on both. It says nothing about the quality of a large model.

    Args:
        model: without biases in its projections.
        times: a power of two, so that dividing by it is exact.

    Raises:
        ValueError: the model has biases, or `times` is not a power of two.
    """
    config = model.config
    if times < 1 or times & (times - 1):
        raise ValueError(f"times is {times}; it must be a power of two")
    if config.attention_bias or config.mlp_bias:
        raise ValueError("the model has biases in its projections, which are not widened")
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    larger = {**config.to_dict(), **{name: times * getattr(config, name) for name in sizes}}
    with torch.device("meta"):
        wide = NemotronForCausalLM(NemotronConfig.from_dict(larger))  # type: ignore[arg-type]
    wide = wide.to(model.dtype).to_empty(device="cpu").eval()  # type: ignore[reportArgumentType]
    wide.model.rotary_emb = type(wide.model.rotary_emb)(wide.config)
    parameters = dict(model.named_parameters())
    for name, parameter in wide.named_parameters():
        source = parameters[name]
        if parameter.dim() == 2 and "embed_tokens" not in name:  # sums over inputs that are repeated
            source = source / times
        repeats = [new // old for new, old in zip(parameter.shape, source.shape, strict=True)]
        parameter.copy_(source.repeat(repeats))
    return wide


def shortened(config: ModelConfig, layers: int) -> ModelConfig:
    """The shape with so many layers and a vocabulary reduced by the same factor, so that each part keeps its share.

    Raises:
        ValueError: the shape has fewer layers.
    """
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"layers is {layers}; it must be from 1 to the shape's {config.num_hidden_layers}")
    vocabulary = -(-config.vocab_size * layers // config.num_hidden_layers // 64) * 64
    values = {**config.to_dict(), "num_hidden_layers": layers, "vocab_size": vocabulary}
    if (values.get("pad_token_id") or 0) >= vocabulary:  # torch refuses an embedding without the token of padding
        values["pad_token_id"] = None
    if values.get("layer_types") is not None:  # all layers are of one kind
        values["layer_types"] = values["layer_types"][:layers]
    return type(config).from_dict(values)  # type: ignore[return-value]


def decode(weights: EngineWeights, prompt: list[int], new_tokens: int) -> Decoding:
    """Prefill `prompt` and decode `new_tokens` (at least 2) greedily."""
    engine = open_engine(weights, len(prompt) + new_tokens)
    try:
        start = time.perf_counter()
        engine.prefill(prompt[:-1], more=True)
        tokens = engine.greedy(prompt[-1:], 1)
        first = time.perf_counter()
        tokens += engine.greedy(tokens[0], new_tokens - 1)
        chosen = [row[0] for row in tokens]
        seconds = (time.perf_counter() - first) / (new_tokens - 1)
    finally:
        engine.close()
    active = engine.active_neurons / max(1, engine.seen_neurons)
    return Decoding(seconds, weights.bytes_per_token(active), 1 - active, first - start, chosen)


def tuning_of(weights: EngineWeights, again: bool = False) -> dict[str, Any] | None:
    """How the compiled engine reads these weights on this machine, and what was measured for that.

    Args:
        weights: of a model.
        again: measure even if an earlier measurement was kept.

    Returns:
        `origin`, `chosen` and `measured` of an `engine.cpu.tuning.Report`; None where the engine is not compiled.
    """
    engine = open_engine(weights, 1)
    try:
        tune = getattr(engine, "tune", None)
        return None if tune is None else tune(again).as_json()
    finally:
        engine.close()


def compare(
    weights: EngineWeights, peers: dict[str, Peer], prompt: list[int], new_tokens: int, rounds: int
) -> dict[str, Any]:
    """The engine and its peers in turn on one prompt, after a warm-up round.

    Ratios are medians of the rounds' own ratios; above 1 the engine is faster. On a shared machine the bandwidth
    changes within seconds, so it is measured right before and after each of the engine's turns, and the share of it is
    a ratio like the others.
    """
    data = _bandwidth_data()
    bandwidths: list[float] = []

    def own_turn() -> Decoding:
        rates = _read_rates(data, READS)
        found = decode(weights, prompt, new_tokens)
        bandwidths.append(statistics.median(rates + _read_rates(data, READS)))
        return found

    runs: dict[str, list[Any]] = {}
    works: dict[str, Callable[[], Any]] = {"engine": own_turn}
    works |= {name: lambda peer=peer: peer.run(prompt, new_tokens) for name, peer in peers.items()}
    first = {name: work().tokens for name, work in works.items()}
    bandwidths.clear()
    runs = interleaved(works, rounds)
    ours: list[Decoding] = runs["engine"]
    seconds = statistics.median(run.seconds_per_token for run in ours)
    read, dense = statistics.median(run.bytes_per_token for run in ours), weights.bytes_per_token()
    shares = [run.gb_per_second / bandwidth for run, bandwidth in zip(ours, bandwidths, strict=True)]
    result: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "read_bandwidth_gb_per_s": statistics.median(bandwidths),
        "read_bandwidth_range": [min(bandwidths), max(bandwidths)],
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "prefill_tokens_per_s": len(prompt) / statistics.median(run.prefill_seconds for run in ours),
        "tokens_per_s": 1 / seconds,
        "zero_fraction": statistics.median(run.zero_fraction for run in ours),
        "bytes_per_token": read,
        "dense_bytes_per_token": dense,
        "gb_per_s": read / seconds / 1e9,
        "of_bandwidth": statistics.median(shares),
        "of_bandwidth_range": [min(shares), max(shares)],
        "of_dense_floor": statistics.median(
            share * dense / run.bytes_per_token for share, run in zip(shares, ours, strict=True)
        ),
        "peers": {},
    }
    for name in peers:
        pairs = list(zip(ours, runs[name], strict=True))
        ratios = [theirs.seconds_per_token / run.seconds_per_token for run, theirs in pairs]
        result["peers"][name] = {
            "tokens_per_s": 1 / statistics.median(theirs.seconds_per_token for _, theirs in pairs),
            "times": statistics.median(ratios),
            "times_range": [min(ratios), max(ratios)],
            "prefill_tokens_per_s": len(prompt) / statistics.median(theirs.prefill_seconds for _, theirs in pairs),
            "prefill_times": statistics.median(theirs.prefill_seconds / run.prefill_seconds for run, theirs in pairs),
            "equal_tokens": _equal_beginning(first["engine"], first[name]),
        }
    return result


def _equal_beginning(a: list[int], b: list[int]) -> int:
    return next(
        (index for index, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b))
    )


def interleaved(works: dict[str, Callable[[], Result]], rounds: int, pause: float = 0.0) -> dict[str, list[Result]]:
    """Results of each of `works`, `rounds` times, in turn; each goes first in every other round.

    Args:
        works: what is measured, by name.
        rounds: how often.
        pause: seconds before each: threads of the one before may spin for some milliseconds after its end.
    """
    results: dict[str, list[Result]] = {name: [] for name in works}
    for round_ in range(rounds):
        for name in sorted(works, reverse=bool(round_ % 2)):
            time.sleep(pause)
            results[name].append(works[name]())
    return results
