"""The choice of tokens on the device. The rules, their order and their arithmetic are those of `engine.sampling`.

Random numbers are a function of the request's seed, the row, the position of the new token and the token's id, not a
stream: a token does not depend on the requests beside it, on how many steps run at once, or on whether it was checked
as a draft. They are not those of torch's generators, so a seed gives another text than on the CPU engine; the
distribution of the text is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...sampling_parameters import SamplingParameters
from ..draws import Draws
from ..sampling import Array

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Choice:
    """How the next token of each row is chosen: tensors (M, 1) on the device, one number for each row."""

    seeds: Tensor
    """int64."""
    temperature: Tensor
    """float64; 0 takes the most probable token."""
    top_p: Tensor
    """float64."""
    min_p: Tensor
    """float64."""
    top_k: Tensor
    """int64; the size of the vocabulary where it does not apply."""
    penalty: Tensor
    """float32."""
    sorts: bool
    """Whether top-k or top-p applies to any row."""
    draws: bool
    """Whether any row's temperature is greater than 0."""


def choice_of(
    parameters: Sequence[SamplingParameters], seeds: Sequence[int], vocabulary: int, device: object
) -> Choice:
    """The parameters and seeds of M rows as a `Choice`."""

    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype)[:, None].to(device)  # type: ignore[call-overload]

    ks = [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in parameters]
    return Choice(
        seeds=torch.tensor([_signed(seed) for seed in seeds])[:, None].to(device),  # type: ignore[call-overload]
        temperature=column([p.temperature for p in parameters], torch.float64),
        top_p=column([p.top_p for p in parameters], torch.float64),
        min_p=column([p.min_p for p in parameters], torch.float64),
        top_k=torch.tensor(ks)[:, None].to(device),  # type: ignore[call-overload]
        penalty=column([p.repetition_penalty for p in parameters], torch.float32),
        sorts=any(k < vocabulary or p.top_p < 1 for k, p in zip(ks, parameters, strict=True)),
        draws=any(p.temperature > 0 for p in parameters),
    )


def choose(logits: Tensor, positions: Tensor, choice: Choice, seen: Tensor | None = None) -> Tensor:
    """The next tokens (M,) for logits (M, V) fp32, without waiting for the device.

    Args:
        positions: (M,) int64, of the new tokens.
        choice: how.
        seen: (M, V) bool, the tokens that the repetition penalty counts.
    """
    if seen is not None:
        penalized = torch.where(logits < 0, logits * choice.penalty, logits / choice.penalty)
        logits = torch.where(seen, penalized, logits)
    likeliest = logits.argmax(-1)
    if not choice.draws:
        return likeliest
    ids, p = kept_tokens(logits, choice)
    scores = p / exponentials(choice.seeds, positions[:, None], ids)
    drawn = ids.expand_as(scores).gather(-1, scores.argmax(-1, keepdim=True))[:, 0]
    return torch.where(choice.temperature[:, 0] > 0, drawn, likeliest)


def kept_tokens(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Ids (M, V) or (1, V) and the probabilities (M, V) float64 with which they are drawn, up to a factor for each row;
    0 for tokens that are not kept."""
    if choice.sorts:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    else:
        ids = torch.arange(logits.shape[-1], device=logits.device)[None]
    top = logits.amax(-1, keepdim=True).double()
    p = ((logits.double() - top) / choice.temperature.where(choice.temperature > 0, 1.0)).exp()
    if choice.sorts:
        p = p * (logits >= logits.gather(-1, choice.top_k - 1))
        p = p / p.sum(-1, keepdim=True)
        p = p * ((p.cumsum(-1) - p < choice.top_p) | (choice.top_p >= 1))
    return ids, p * (p >= choice.min_p * p.amax(-1, keepdim=True))


def exponentials(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Exponentially distributed numbers, float64, one for each (seed, position, id), all int64 and broadcast."""
    key = _mixed(seeds + _signed(_GOLDEN) * positions)
    bits = _shifted(_mixed(key + _signed(_GOLDEN) * (ids + 1)), 12)
    return -((bits.double() + 0.5) * 2.0**-52).log()


def _mixed(z: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al. 2014) on int64, whose products wrap around."""
    z = (z ^ _shifted(z, 30)) * _signed(_FACTORS[0])
    z = (z ^ _shifted(z, 27)) * _signed(_FACTORS[1])
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, count: int) -> Tensor:
    """z shifted to the right as an unsigned number."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of a number modulo 2**64."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


class DeviceDraws(Draws):
    """A `Draws` whose random numbers are computed on the device from a seed.

    torch's generator gives the seed and is not needed after that, so no step uses up any of its numbers: `per_step` is
    0 and there is no state to go back to.
    """

    def __init__(
        self, parameters: SamplingParameters, vocabulary: int, seen: Sequence[Array], seed: int, device: torch.device
    ) -> None:
        """Choose tokens for `len(seen)` texts.

        Args:
            parameters: of which temperature, top-k, top-p, min-p and the repetition penalty apply.
            vocabulary: number of tokens.
            seen: for each text the ids (T,) that the penalty counts.
            seed: of the request; each text has random numbers of its own.
            device: where tokens are chosen.
        """
        self.parameters, self.vocabulary, self.per_step = parameters, vocabulary, 0
        self._all = choice_of(
            [parameters] * len(seen), [seed + row * _FACTORS[0] for row in range(len(seen))], vocabulary, device
        )
        self._seen: Tensor | None = None
        if parameters.repetition_penalty != 1:
            self._seen = torch.zeros(len(seen), vocabulary, dtype=torch.bool, device=device)
            self.see(seen)

    def see(self, seen: Sequence[Array]) -> None:
        """Let the penalty count these ids (T,) of each text and no others. Tokens that are chosen join them."""
        if self._seen is not None:
            table = np.zeros(self._seen.shape, np.bool_)
            for row, ids in zip(table, seen, strict=True):
                row[ids] = True
            self._seen.copy_(torch.from_numpy(table))

    @property
    def state(self) -> None:  # type: ignore[override]
        """There is none."""
        return None

    @state.setter
    def state(self, twister: object) -> None:
        pass

    def rewind(self, steps: int) -> None:
        """Nothing to go back to."""

    def next_tokens(self, logits: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """The next tokens (M,) of the texts `rows` (M,) for logits (M, V) fp32; they join those that are seen.

        Args:
            positions: (M,) of the new tokens.
        """
        if self._seen is None:
            return choose(logits, positions, self._of(rows))
        tokens = choose(logits, positions, self._of(rows), self._seen[rows])
        self._seen[rows, tokens] = True
        return tokens

    def after(self, logits: Tensor, positions: Tensor, group: Sequence[int]) -> Tensor:
        """The tokens (M,) that follow each of a group of tokens of the only text, if those before it are as given.

        Args:
            logits: (M, V) fp32, after each of them.
            positions: (M,) of the new tokens.
            group: M tokens, of which the first one is in the text already.
        """
        only = torch.zeros(len(group), dtype=torch.long, device=logits.device)
        seen = None if self._seen is None else self._seen[only]
        if seen is not None:
            for m, token in enumerate(group[1:], 1):
                seen[m:, token] = True
        return choose(logits, positions, self._of(only), seen)

    def join(self, tokens: Sequence[int]) -> None:
        """Let the penalty count tokens that were chosen for the only text."""
        if self._seen is not None and tokens:
            self._seen[0, list(tokens)] = True

    def _of(self, rows: Tensor) -> Choice:
        every = self._all
        parts = (every.seeds, every.temperature, every.top_p, every.min_p, every.top_k, every.penalty)
        return Choice(*(part[rows] for part in parts), sorts=every.sorts, draws=every.draws)
