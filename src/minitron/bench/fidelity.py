"""What a weight format costs: the model's predictions on a text, against those of its own bf16 or fp32 weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.engines import open_engine
from ..engine.matrix import Format
from ..engine.reference import ReferenceEngine
from ..engine.weights import EngineWeights, from_model
from ..heads import NemotronForCausalLM

Predict = Callable[[Sequence[int]], torch.Tensor]
"""Token ids to logits after each of them, (T, V)."""

PIECE = 8
"""Tokens in one step of the engine."""


@dataclass(frozen=True)
class Fidelity:
    """Means over all predicted tokens of a text."""

    format: str
    nbytes: int
    """Bytes of all matrices; 0 for a peer."""
    kl: float
    """KL divergence from the plain weights' distribution to this one's, nats per token."""
    perplexity: float
    same_best: float
    """Share of positions at which both have the same most probable token."""
    tokens: int


def fidelity(
    model: NemotronForCausalLM,
    pieces: Sequence[Sequence[int]],
    formats: Sequence[Format],
    peers: Mapping[str, Predict] | None = None,
) -> list[Fidelity]:
    """Decode texts with the model's own weights and in each format.

    Args:
        model: on the CPU, in a dtype that the engine reads.
        pieces: token ids of texts, each of at least two tokens and within the model's context.
        formats: to compare.
        peers: other programs by name, compared in the same way.

    Returns:
        the plain weights first (a KL of 0), then each format, then each peer.
    """
    plain = from_model(model)
    candidates: list[EngineWeights] = [plain, *(from_model(model, name) for name in formats)]
    names = [(weights.format, weights.nbytes) for weights in candidates] + [(name, 0) for name in peers or {}]
    works: list[Predict] = [_engine(weights) for weights in candidates] + list((peers or {}).values())
    sums = torch.zeros((len(works), 3), dtype=torch.float64)
    count = 0
    for piece in pieces:
        targets = torch.tensor(piece[1:])
        count += len(targets)
        own = None
        for row, predict in enumerate(works):
            found = predict(piece[:-1]).double().log_softmax(-1)
            own = found if own is None else own
            sums[row, 0] += (own.exp() * (own - found)).sum()
            sums[row, 1] -= found.gather(1, targets[:, None]).sum()
            sums[row, 2] += (own.argmax(-1) == found.argmax(-1)).sum()
    means = (sums / count).tolist()
    return [
        Fidelity(name, nbytes, kl, math.exp(loss), same, count)
        for (name, nbytes), (kl, loss, same) in zip(names, means, strict=True)
    ]


@dataclass(frozen=True)
class Difference:
    """A position at which the engine's most probable token is not the reference's."""

    prompt: int
    position: int
    """Of the new tokens, from 0."""
    gap: float
    """Between the reference's logits of the two tokens, relative to its largest logit: 0 is a tie."""


def greedy_differences(
    model: NemotronForCausalLM, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Difference]:
    """Continue prompts greedily with the engine and with the reference in fp32 on the same weights.

    Both follow the reference's tokens, so that one difference does not cause others.

    Args:
        model: on the CPU, in a dtype that the engine reads; it is fp32 afterwards.
        prompts: token ids.
        new_tokens: compared for each.
    """
    weights, wide = from_model(model), from_model(model.float())
    found = []
    for number, prompt in enumerate(prompts):
        engine = open_engine(weights, len(prompt) + new_tokens)
        reference = ReferenceEngine(wide, len(prompt) + new_tokens)
        try:
            engine.prefill(list(prompt[:-1]))
            reference.prefill(list(prompt[:-1]))
            token = prompt[-1]
            for position in range(new_tokens):
                expected, other = reference.step([token])[0], int(engine.step([token])[0].argmax())
                token = int(expected.argmax())
                if other != token:
                    gap = (expected[token] - expected[other]) / expected.abs().max()
                    found.append(Difference(number, position, float(gap)))
        finally:
            engine.close()
    return found


@dataclass(frozen=True)
class LoopDifference:
    """The first position at which the engine's text and that of transformers' loop differ, judged in float64."""

    prompt: int
    position: int
    """Of the new tokens, from 0."""
    gap: float
    """Exact logit of the engine's token less that of transformers' token; above 0 the engine is right."""
    noise: float
    """Root mean square error of transformers' logits at this position, in the model's dtype."""

    @property
    def near_tie(self) -> bool:
        """Whether rounding in the model's dtype can decide between the two tokens."""
        return abs(self.gap) <= 4 * self.noise


def loop_differences(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, rows: int = 8
) -> list[LoopDifference]:
    """Continue prompts greedily by the engine and by transformers' own loop, on the same model.

    After their first difference two texts are no longer comparable, so it alone counts.

    Args:
        model: of `minitron.load`, on the CPU.
        prompts: token ids.
        new_tokens: of each text; the end-of-text token is not chosen before.
        rows: prompts in a batch, padded on the left.
    """
    exact = copy.deepcopy(model).double()
    found = []
    for start in range(0, len(prompts), rows):
        batch = prompts[start : start + rows]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        ours, theirs = (
            model.generate(ids, attention_mask=mask, **options, engine=engine)[:, longest:].tolist()
            for engine in ("auto", "off")
        )
        for row, prompt in enumerate(batch):
            if ours[row] != theirs[row]:
                at = next(n for n in range(new_tokens) if ours[row][n] != theirs[row][n])
                pair = ours[row][at], theirs[row][at]
                found.append(_judged(model, exact, [*prompt, *ours[row][:at]], pair, start + row, at))
    return found


def _judged(
    model: Any, exact: Any, prefix: list[int], tokens: tuple[int, int], prompt: int, position: int
) -> LoopDifference:
    with torch.inference_mode():
        right, own = (each(torch.tensor([prefix])).logits[0, -1].double() for each in (exact, model))
    noise = float((own - right).square().mean().sqrt())
    return LoopDifference(prompt, position, float(right[tokens[0]] - right[tokens[1]]), noise)


def _engine(weights: EngineWeights) -> Predict:
    def predict(tokens: Sequence[int]) -> torch.Tensor:
        engine = open_engine(weights, len(tokens))
        try:
            parts = [list(tokens[start : start + PIECE]) for start in range(0, len(tokens), PIECE)]
            return torch.cat([engine.step(part).clone() for part in parts])
        finally:
            engine.close()

    return predict
