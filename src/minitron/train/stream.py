"""What the loop asks of its data and of its held-out sets, so that packed text is one kind among others.

`data.packing.BlockStream` and `heldout.HeldoutText` are the kinds for text. Labelled rows and conversations bring
their own: any object with these methods trains in the same loop, with the same checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, Self

import torch
from torch import nn


class TrainingBatch(Protocol):
    """Examples of one forward pass. What else it holds is between the stream and the loss."""

    @property
    def num_items(self) -> int:
        """Scored labels of the whole optimizer step, of which this batch may be a part: the divisor of the loss."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass, padding included; they are counted for the speed."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The batch on a device."""
        ...


class Stream(Protocol):
    """An endless sequence of examples, in an order that depends on nothing but the stream itself.

    A run continues bit for bit because the position in the data is one number, how many examples were used:
    `batches` must give the same examples for the same arguments in every process and after every restart.
    """

    def __len__(self) -> int:
        """Examples in an epoch."""
        ...

    @property
    def key(self) -> Mapping[str, Any]:
        """What tells this data from other data (digests, weights, seed), as JSON values; a run with another key is
        another run."""
        ...

    @property
    def origins(self) -> list[dict[str, Any]]:
        """Where the data comes from, to explain a difference of keys: of each source, `weight` and `files`; may be
        empty."""
        ...

    def check(self, vocab_size: int, sequence: int) -> None:
        """Refuse a model or settings that the data does not fit.

        Args:
            vocab_size: tokens of the model.
            sequence: the most tokens that an example may have, `TrainConfig.sequence`.

        Raises:
            ValueError: says what does not fit.
        """
        ...

    def batches(
        self, start: int, count: int, at_once: int, *, share: tuple[int, int] = (0, 1)
    ) -> Iterable[TrainingBatch]:
        """Examples `start` to `start + count`, one optimizer step, in batches of `at_once`.

        Args:
            start: position of the first example in the stream, over all epochs.
            count: examples of the step.
            at_once: examples of a forward pass.
            share: (number, of how many): of several processes each takes its own part of `count`; all must get the
                same number of batches.
        """
        ...


Measure = Callable[[nn.Module], Mapping[str, float]]
"""(model) -> numbers by name: how good the model is on one held-out set.

It is called in evaluation mode, without gradients, under the autocast of the run, and by every process of it; each must
run the model equally often and return the same numbers. It may have the method `check` of `Stream`."""
