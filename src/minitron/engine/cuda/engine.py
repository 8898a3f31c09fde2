"""Decoding on a CUDA device. The same code runs on the CPU, without CUDA graphs: that is how it is tested everywhere.

What a request computes does not depend on the tokens beside it, but its last bits depend on the number of rows of a
step, for which cuBLAS has different kernels. Greedy tokens are therefore the same alone and in a batch unless two
logits are equal but for rounding; the CPU engine has no such exception.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from ...finite import NotFiniteError
from ...sampling_parameters import SamplingParameters
from ..base import DecodeEngine, rows_of
from ..draws import Array, Draws
from ..kv import KeyValues
from ..matrix import CUDA_FORMATS
from ..parts import EngineWeights
from .cache import DeviceKeyValues
from .graphs import BATCHES, HISTORY, StepGraphs
from .prefill import Prefill
from .sampling import DeviceDraws, choice_of, choose
from .steps import TorchSteps
from .triton_steps import steps_for


class CudaEngine(DecodeEngine):
    """A `DecodeEngine` of CUDA graphs."""

    name = "cuda"
    chooses = draws_each = True
    drafts_batches = False
    most_rows = BATCHES[-1]

    def __init__(
        self,
        weights: EngineWeights,
        capacity: int,
        slots: int = 1,
        kv: KeyValues | None = None,
        steps: TorchSteps | None = None,
        compiled: str | None = None,
    ) -> None:
        """Allocate the cache for `capacity` tokens in each of `slots` slots.

        Args:
            weights: of the model, on the device.
            capacity: largest length of a sequence.
            slots: number of sequences.
            kv: a cache of another such engine with the same layers, to share instead; it must not grow.
            steps: the pieces of a step; those that suit the weights if None.
            compiled: a backend of `torch.compile` for the step, such as "inductor"; None runs it as it is.

        Raises:
            ValueError: the weights are in a format that the engine does not read, or the cache does not fit.
        """
        if weights.format not in CUDA_FORMATS:
            raise ValueError(f"weights are {weights.format}; the CUDA engine reads {', '.join(CUDA_FORMATS)}")
        assert kv is None or isinstance(kv, DeviceKeyValues), "a cache of another engine"
        self.weights = weights
        self.kv = DeviceKeyValues(weights, capacity, slots) if kv is None else kv
        chosen = steps or getattr(weights, "steps", None) or steps_for(weights)
        self._graphs = StepGraphs(weights, self.kv, chosen, compiled)
        self._prefill = Prefill(weights, self.kv)
        self._active = self._seen = 0
        self._last = (0, 0)
        """Where the hidden states of the last call are in the history: the step, and how many rows."""

    @property
    def device(self) -> torch.device:
        """That of the weights."""
        return self._graphs.device

    @property
    def active_neurons(self) -> int:
        """MLP neurons that were not zero, over all decoded tokens and layers; 0 where they are not counted."""
        return self._active

    @property
    def seen_neurons(self) -> int:
        """All MLP neurons, over all decoded tokens and layers; 0 where zeros are not counted."""
        return self._seen

    @property
    def hidden(self) -> Array:  # type: ignore[override]
        """See `DecodeEngine`. Asking for it waits for the device."""
        step, rows = self._last
        return self._graphs.hidden[step, :rows].cpu().numpy()

    def reserve(self, capacity: int) -> None:
        """Let each slot hold at least `capacity` tokens; see `DecodeEngine.reserve`."""
        if self.kv.grow(capacity):
            self._graphs.forget()

    def reset(self) -> None:
        """Forget all sequences and counts."""
        for slot in range(len(self.kv.lengths)):
            self.kv.release(slot)
        self._active = self._seen = 0

    @torch.no_grad()
    def prepare(self, prompt: int | None = None) -> None:
        """Capture the steps that the first calls need."""
        for rows in BATCHES:
            if rows <= len(self.kv.lengths):
                self._graphs.prepare(rows)

    @torch.no_grad()
    def prefill(self, tokens: list[int], slot: int = 0, more: bool = False) -> None:
        """Append tokens to a slot's sequence."""
        self._prefill.append(tokens, slot)

    @torch.no_grad()
    def step(self, tokens: list[int], slot: int = 0) -> Tensor:
        """Append tokens to a slot's sequence; logits (len(tokens), V) fp32 after each.

        The tensor may be the engine's own memory, which the next step overwrites.
        """
        self._run(tokens, [slot] * len(tokens))
        return self._graphs.logits

    @torch.no_grad()
    def decode(self, tokens: list[int], slots: list[int]) -> Tensor:
        """Append one token to the sequence of each slot; logits (len(tokens), V) fp32 on the device."""
        assert len(set(slots)) == len(slots), f"a slot twice in {slots}"
        if len(tokens) <= self.most_rows:
            self._run(tokens, slots)
            return self._graphs.logits.clone()
        parts = []
        for first in range(0, len(tokens), self.most_rows):
            some = slice(first, first + self.most_rows)
            self._run(tokens[some], slots[some])
            parts.append(self._graphs.logits.clone())
        return torch.cat(parts)

    @torch.no_grad()
    def greedy(
        self, tokens: list[int], count: int, stops: Collection[int] = (), slots: Sequence[int] = (0,)
    ) -> list[list[int]]:
        """Append one token to the sequence of each slot and then more, each the most probable.

        As `CpuEngine.greedy`, for at most `most_rows` sequences. Steps after a stop token may run, and are forgotten.
        """
        return self._choose(tokens, count, stops, slots, None)

    @torch.no_grad()
    def draw(
        self, tokens: list[int], count: int, draws: Draws, stops: Collection[int] = (), slots: Sequence[int] = (0,)
    ) -> list[list[int]]:
        """As `greedy`, with tokens chosen by `draws`, which `draws_of` has made."""
        assert isinstance(draws, DeviceDraws), "draws of another engine"
        rows = torch.tensor(list(slots), device=self.device)

        def draw(logits: Tensor, positions: Tensor) -> Tensor:
            return draws.next_tokens(logits, positions, rows)

        return self._choose(tokens, count, stops, slots, draw)

    @torch.no_grad()
    def draw_each(
        self,
        tokens: list[int],
        count: int,
        parameters: Sequence[SamplingParameters],
        stops: Collection[int] = (),
        slots: Sequence[int] = (0,),
    ) -> list[list[int]]:
        """As `greedy`, with tokens drawn for each sequence by its own parameters, of which the repetition penalty does
        not apply. A sequence's tokens depend on its seed and on positions alone; a greedy one needs no seed."""
        assert all(one.seed is not None or one.greedy for one in parameters), "a sequence that is drawn without a seed"
        choice = choice_of(parameters, [one.seed or 0 for one in parameters], self.weights.vocab_size, self.device)

        def draw(logits: Tensor, positions: Tensor) -> Tensor:
            return choose(logits, positions, choice)

        return self._choose(tokens, count, stops, slots, draw)

    @torch.no_grad()
    def verify(
        self, groups: Sequence[list[int]], slots: Sequence[int] = (0,), draws: Sequence[Draws | None] = (None,)
    ) -> list[list[int]]:
        """Append the first token of each group and those further ones that are chosen; see `DecodeEngine.verify`."""
        assert len(draws) == len(groups), f"{len(groups)} groups and {len(draws)} draws"
        begins = [self.kv.lengths[slot] for slot in slots]
        self._run(*rows_of(groups, slots))
        total = sum(map(len, groups))
        best, row = self._graphs.chosen[0, :total].clone(), 0
        for group, begin, how in zip(groups, begins, draws, strict=True):
            if isinstance(how, DeviceDraws):
                rows = slice(row, row + len(group))
                positions = torch.arange(begin + 1, begin + 1 + len(group), device=self.device)
                best[rows] = how.after(self._graphs.logits[rows], positions, group)
            row += len(group)
        tokens, tops = best.tolist(), self._graphs.tops[0, :total].tolist()
        found, row = [], 0
        for group, slot, begin, how in zip(groups, slots, begins, draws, strict=True):
            chosen = tokens[row : row + len(group)]
            differing = (at for at, (one, given) in enumerate(zip(chosen, group[1:], strict=False)) if one != given)
            chosen = chosen[: next(differing, len(group) - 1) + 1]
            _check(tops[row : row + len(chosen)])
            self.kv.truncate(begin + len(chosen), slot)
            if isinstance(how, DeviceDraws):
                how.join(chosen)
            row += len(group)
            found.append(chosen)
        return found

    def draws_of(self, parameters: SamplingParameters, seen: Sequence[Array], steps: int = 4) -> Draws:
        """How tokens of texts are chosen, with a seed from torch's generator; see `DecodeEngine.draws_of`."""
        seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
        return DeviceDraws(parameters, self.weights.vocab_size, seen, seed, self.device)

    def close(self) -> None:
        """No threads to end."""

    def _choose(
        self,
        tokens: list[int],
        count: int,
        stops: Collection[int],
        slots: Sequence[int],
        draw: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> list[list[int]]:
        """As `greedy`; `draw` chooses tokens (M,) for logits (M, V) and the positions (M,) of the new tokens."""
        M, found, last = len(tokens), [], set(stops)
        assert len(set(slots)) == len(slots) == M, f"{M} tokens for slots {slots}"
        room = self.kv.capacity - max(self.kv.lengths[slot] for slot in slots)
        assert 0 < count <= room, f"{count} tokens where {room} of {self.kv.capacity} are left"
        while len(found) < count and not (found and last & set(found[-1])):
            steps = min(HISTORY, count - len(found))
            self._begin(tokens, slots)
            for step in range(steps):
                self._graphs.run()
                if draw is not None:
                    chosen = draw(self._graphs.logits, self._graphs.positions[:M])
                    self._graphs.chosen[step, :M] = chosen
                    self._graphs.tokens[:M] = chosen
            fresh = self._graphs.chosen[:steps, :M].tolist()
            used = next((at for at, row in enumerate(fresh, 1) if last & set(row)), steps)
            _check(self._graphs.tops[:used, :M].flatten().tolist())
            for slot in slots:
                self.kv.lengths[slot] += used
            self._count(used, M)
            found += fresh[:used]
            tokens = found[-1]
        return found

    def _run(self, tokens: list[int], slots: Sequence[int]) -> None:
        """Append each token to the sequence of its slot, in order."""
        self._begin(tokens, slots)
        self._graphs.run()
        for slot in slots:
            self.kv.lengths[slot] += 1
        self._count(1, len(tokens))

    def _begin(self, tokens: list[int], slots: Sequence[int]) -> None:
        assert 0 < len(tokens) <= self.most_rows, f"{len(tokens)} tokens in one step"
        known = range(self.weights.vocab_size)
        assert min(tokens) in known, f"token {min(tokens)} is not in the vocabulary"
        assert max(tokens) in known, f"token {max(tokens)} is not in the vocabulary"
        longest = max(self.kv.lengths[slot] + list(slots).count(slot) for slot in set(slots))
        assert longest <= self.kv.capacity, f"{longest} tokens in a cache of {self.kv.capacity}"
        self._graphs.begin(tokens, slots)

    def _count(self, steps: int, rows: int) -> None:
        self._last = steps - 1, rows
        if self.device.type == "cpu":  # elsewhere nobody counts: see `steps.TorchSteps.norm_up`
            self._active += int(self._graphs.active[:steps, :rows].sum())
            self._seen += steps * rows * len(self.weights.layers) * self.weights.constants.intermediate_size


def _check(tops: Sequence[float]) -> None:
    """Refuse a largest logit that is NaN or infinite.

    Raises:
        NotFiniteError: there is one.
    """
    wrong = next((top for top in tops if not np.isfinite(top)), None)
    if wrong is not None:
        raise NotFiniteError(f"the largest logit is {wrong}")
