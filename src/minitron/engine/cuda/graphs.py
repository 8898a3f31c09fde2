"""Decode steps with fixed shapes: memory that keeps its place, and on a GPU one CUDA graph for each shape.

A step is captured for a number of rows out of `BATCHES` and a span, the number of positions that attention looks at,
when it is first needed. A graph reads its tokens from fixed memory and leaves there the most probable next token, so
that steps follow each other without the host; what they chose is in a history that is read once. On the CPU the same
function runs without being captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..kv import KeyValues
from ..parts import EngineWeights
from .steps import Rows, TorchSteps, decode_step

BATCHES = (1, 2, 4, 8, 16, 32)
"""Numbers of rows that a step can have."""
LEAST_SPAN = 256
"""Spans are powers of two from here on."""
HISTORY = 64
"""Steps that can follow each other before the host reads what they have chosen."""


class StepGraphs:
    """The steps of one model over one KV cache. All methods return before the device has computed anything."""

    def __init__(self, weights: EngineWeights, kv: KeyValues, steps: TorchSteps, compiled: str | None = None) -> None:
        """Allocate the memory of the steps.

        Args:
            weights: on the device.
            kv: on the same device.
            steps: the pieces of a step.
            compiled: a backend of `torch.compile` for the step; None runs it as it is.
        """
        self._weights, self._kv, self._steps = weights, kv, steps
        self._step = decode_step
        if compiled is not None:
            self._step = torch.compile(decode_step, backend=compiled, dynamic=False)
        self.device: torch.device = weights.embed.data.device
        most, device = BATCHES[-1], self.device
        self._inputs = torch.zeros(5, most, dtype=torch.long, device=device)
        self.tokens, self.positions, self._slots, self._ends, self._advance = self._inputs
        self._index = torch.zeros(1, dtype=torch.long, device=device)
        self.chosen = torch.zeros(HISTORY, most, dtype=torch.long, device=device)
        """The most probable token of each row after each step since `begin`."""
        self.tops = torch.zeros(HISTORY, most, device=device)
        """Their logits."""
        self.hidden = torch.zeros(HISTORY, most, weights.hidden_size, device=device)
        """The last hidden states."""
        self.active = torch.zeros(HISTORY, most, dtype=torch.long, device=device)
        """MLP neurons that were not zero; 0 where they are not counted."""
        self.logits = torch.empty(0, device=device)
        """(rows, V) fp32 of the last step."""
        self._graphs: dict[tuple[int, int, bool], Callable[[], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def forget(self) -> None:
        """Drop what was captured over memory of the cache that is used no longer."""
        self._graphs.clear()

    def begin(self, tokens: Sequence[int], slots: Sequence[int]) -> None:
        """Let the next step append each token to the sequence of its slot, in order.

        Args:
            tokens: at most `BATCHES[-1]`.
            slots: of the tokens.
        """
        ends = list(self._kv.lengths)
        columns = []
        for token, slot in zip(tokens, slots, strict=True):
            columns.append((token, ends[slot], slot, ends[slot] + 1, 1))
            ends[slot] += 1
        self._rows = len(columns)
        self._batch = next(size for size in BATCHES if size >= self._rows)
        self._in_order = list(slots) == list(range(self._batch))
        self._end = max(ends)
        columns += [(tokens[0], self._kv.capacity, slots[0], 1, 0)] * (self._batch - self._rows)
        self._inputs[:, : self._batch] = torch.tensor(columns).T.to(self.device)
        self._index.zero_()

    def run(self) -> None:
        """The next step, whose most probable tokens the step after it appends."""
        span = min(LEAST_SPAN, self._kv.capacity)
        while span < self._end:
            span = min(2 * span, self._kv.capacity)
        with self._current_device():
            self.logits = self._graph(self._batch, span, self._in_order)()[: self._rows]
        self._end += 1

    def prepare(self, rows: int) -> None:
        """Capture the step of so many rows over the shortest span, without a change to any sequence."""
        batch = next(size for size in BATCHES if size >= rows)
        self._inputs[:, :batch] = torch.tensor([0, self._kv.capacity, 0, 1, 0], device=self.device)[:, None]
        self._index.zero_()
        with self._current_device():
            self._graph(batch, min(LEAST_SPAN, self._kv.capacity), batch <= len(self._kv.lengths))

    def _current_device(self) -> AbstractContextManager[Any]:
        """Graphs and kernels run on torch's current device, which may be another one than that of the weights."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _graph(self, batch: int, span: int, in_order: bool) -> Callable[[], Tensor]:
        key = (batch, span, in_order)
        if key not in self._graphs:
            self._graphs[key] = self._captured(*key) if self._pool is not None else lambda: self._body(*key)
        return self._graphs[key]

    def _body(self, batch: int, span: int, in_order: bool) -> Tensor:
        parts = (self.tokens, self.positions, self._slots, self._ends)
        rows = Rows(*(part[:batch] for part in parts), span=span, in_order=in_order)
        hidden, logits, active = self._step(self._steps, self._weights, self._kv, rows)
        tops, best = logits.max(-1)
        self.hidden[:, :batch].index_copy_(0, self._index, hidden[None])
        self.tops[:, :batch].index_copy_(0, self._index, tops[None])
        self.chosen[:, :batch].index_copy_(0, self._index, best[None])
        if active is not None:
            self.active[:, :batch].index_copy_(0, self._index, active[None])
        rows.tokens.copy_(best)
        rows.positions.add_(self._advance[:batch])
        rows.ends.add_(self._advance[:batch])
        self._index.add_(1)
        return logits

    def _captured(self, batch: int, span: int, in_order: bool) -> Callable[[], Tensor]:
        """The step as a CUDA graph. It is run before, because libraries allocate memory in their first calls."""
        state = self._inputs.clone(), self._index.clone()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._body(batch, span, in_order)
                self._restore(state)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._body(batch, span, in_order)

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def _restore(self, state: tuple[Tensor, Tensor]) -> None:
        self._inputs.copy_(state[0])
        self._index.copy_(state[1])
