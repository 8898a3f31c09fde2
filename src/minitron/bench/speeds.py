"""How fast several models decode, measured in turn, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from ..engine.models import why_not_model
from ..engine.weights import from_model
from ..heads import NemotronForCausalLM
from ..load_meter import LoadMeter
from .measure import decode, interleaved

FEWEST_TOKENS, MOST_TOKENS = 8, 64
"""Tokens decoded in one call: as many as take `SECONDS`, within these limits."""
SECONDS = 0.2
"""Least time of decoding in a round; a small model decodes `MOST_TOKENS` in the time of one interruption."""
ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """The speed of one model; medians over rounds."""

    tokens_per_second: float
    """After the first token."""
    quartiles: tuple[float, float]
    first_token_seconds: float
    """Prefill and one token, after everything is compiled."""
    engine: str
    """What decoded: "cpu", "cuda" or "transformers"."""


_Once = Callable[[int], tuple[float, float]]
"""From a number of tokens to the seconds of decoding all but the first, and the seconds to the first."""


class _Turn(NamedTuple):
    rate: float
    first_token_seconds: float


def measure_speeds(
    models: Mapping[str, NemotronForCausalLM], prompt: Sequence[int], rounds: int = ROUNDS
) -> tuple[dict[str, Speed], str]:
    """Greedy decoding of each model in turn, after a round that compiles and does not count.

    Args:
        models: by name, in evaluation mode; all must take the ids of `prompt`.
        prompt: at least 2 ids, and few enough to leave room in every context.
        rounds: at least 2.

    Returns:
        The speed of each model, and a clause on other load on the machine; empty if there was none that matters.
    """
    works: dict[str, Callable[[], _Turn]] = {}
    engines: dict[str, str] = {}
    for name, model in models.items():
        most = max(2, min(MOST_TOKENS, model.config.max_position_embeddings - len(prompt) - 1))
        engines[name], once = _work(model, list(prompt))
        few = min(FEWEST_TOKENS, most)
        once(few)  # compiles
        seconds, _ = once(few)
        enough = round(SECONDS * (few - 1) / seconds)
        works[name] = partial(_repeated, once, max(few, min(most, enough)))
    with LoadMeter(torch.get_num_threads()) as load:
        turns = interleaved(works, rounds)
    speeds = {}
    for name in models:
        low, middle, high = statistics.quantiles([turn.rate for turn in turns[name]], n=4)
        first = statistics.median(turn.first_token_seconds for turn in turns[name])
        speeds[name] = Speed(middle, (low, high), first, engines[name])
    on_cpu = all(model.device.type == "cpu" for model in models.values())
    return speeds, load.reason if on_cpu else ""


def _work(model: NemotronForCausalLM, prompt: list[int]) -> tuple[str, _Once]:
    """The engine where it serves the model, else transformers' own path."""
    if why_not_model(model):
        return "transformers", partial(_generate, model, prompt)
    if model.device.type == "cuda":
        return "cuda", partial(_generate, model, prompt)
    weights = from_model(model)

    def once(tokens: int) -> tuple[float, float]:
        found = decode(weights, prompt, tokens)
        return found.seconds_per_token * (tokens - 1), found.prefill_seconds

    return "cpu", once


def _repeated(once: _Once, tokens: int) -> _Turn:
    """One turn: repeated until `SECONDS` of decoding have passed."""
    decoding, firsts = 0.0, []
    while decoding < SECONDS:
        seconds, first = once(tokens)
        decoding += seconds
        firsts.append(first)
    return _Turn(len(firsts) * (tokens - 1) / decoding, statistics.median(firsts))


def _generate(model: NemotronForCausalLM, prompt: list[int], tokens: int) -> tuple[float, float]:
    ids = torch.tensor([prompt], device=model.device)
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    times = []
    for count in (1, tokens):
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, **settings)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        times.append(time.perf_counter() - start)
    first, whole = times
    return max(whole - first, 1e-9), first
