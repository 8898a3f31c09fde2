"""The activation of a unit as one number: over the tokens of a sample first, then over the samples.

P1 is "Compact Language Models via Pruning and Knowledge Distillation" (arXiv 2407.14679). Its section 2.2 takes each
of the two steps from {mean of absolute values, L2 norm, variance}. One pass gives all nine pairs here: a sample
leaves three numbers per unit, and of those only count, mean and sum of squared deviations are kept, which merge.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["mean", "l2", "variance"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


def over_tokens(values: Tensor) -> Tensor:
    """Mean of absolute values, L2 norm and variance over the tokens of one sample: (T, units) to (3, units).

    Sums run in fp32 (float64 for float64 values), whatever the dtype of `values`; the result is float64.
    """
    x = values if values.dtype == torch.float64 else values.float()
    mean_abs = x.abs().mean(0)
    l2 = x.square().sum(0).sqrt()
    variance = (x - x.mean(0)).square_().mean(0)  # around the mean: no difference of large numbers
    return torch.stack((mean_abs, l2, variance)).to("cpu", torch.float64)


class Moments:
    """Count, mean and sum of squared deviations of `over_tokens` over samples, per unit, in float64.

    The sum of two is the moments of all samples (Chan, Golub and LeVeque 1979), so batches and processes may be summed
    in any grouping; the results agree to float64 rounding.
    """

    def __init__(self, units: int) -> None:
        self.count = 0
        self.mean = torch.zeros(3, units, dtype=torch.float64)
        self.squares = torch.zeros(3, units, dtype=torch.float64)

    def add(self, sample: Tensor) -> None:
        """Count one sample, as `over_tokens` made it."""
        self.count += 1
        delta = sample - self.mean
        self.mean += delta / self.count
        self.squares += delta * (sample - self.mean)

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of samples."""
        both = Moments(self.mean.shape[1])
        both.count = self.count + other.count
        if both.count:
            delta = other.mean - self.mean
            both.mean = self.mean + delta * (other.count / both.count)
            both.squares = self.squares + other.squares + delta.square() * (self.count * other.count / both.count)
        return both

    def score(self, batch: Aggregation, sequence: Aggregation) -> Tensor:
        """Aggregate over samples by `batch` what was aggregated over tokens by `sequence`: (units,) float64.

        Raises:
            ValueError: an unknown aggregation, or no sample was counted.
        """
        for name, value in (("batch", batch), ("sequence", sequence)):
            if value not in AGGREGATIONS:
                raise ValueError(f"{name} aggregation is {value!r}; it must be one of {', '.join(AGGREGATIONS)}")
        if not self.count:
            raise ValueError("no sample was counted")
        row = AGGREGATIONS.index(sequence)
        mean, squares = self.mean[row], self.squares[row]
        if batch == "mean":  # the samples' numbers are never negative, so their absolute values are themselves
            return mean.clone()
        if batch == "l2":
            return (squares + self.count * mean.square()).sqrt()
        return squares / self.count

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Tensors that `from_state` reads."""
        count = torch.tensor([self.count], dtype=torch.int64)
        return {f"{prefix}.count": count, f"{prefix}.mean": self.mean, f"{prefix}.squares": self.squares}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], prefix: str) -> Moments:
        """The moments that `state` wrote."""
        made = cls(0)
        made.count = int(tensors[f"{prefix}.count"])
        made.mean, made.squares = tensors[f"{prefix}.mean"], tensors[f"{prefix}.squares"]
        return made
