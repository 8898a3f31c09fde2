"""Least squares from sums over blocks of tokens, for a linear layer or a norm after a cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties tried, as multiples of the mean square of an input; the one with the least held-out error is taken."""


@dataclass(frozen=True)
class Fit:
    """What a fit does on tokens that it was not made from."""

    before: float
    """Squared error without it, over the squares of the target."""
    after: float
    """With the best fit."""
    ridge: float

    @property
    def accepted(self) -> bool:
        """Whether the fit helps."""
        return self.after < self.before


class LinearFit:
    """Sums for the change D of a weight matrix W that minimizes |X (W + D)^T - Y|^2 + ridge |D|^2.

    Only the Gram matrix of the inputs (n, n) and their product with the error of W (n, m) are kept, once for fitting
    and once for the held-out check, in float64. The penalty is on the change, so that a strong one gives back W.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.gram = torch.zeros(2, inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(2, inputs, outputs, dtype=torch.float64)
        self.error = torch.zeros(2, dtype=torch.float64)
        self.target = torch.zeros(2, dtype=torch.float64)

    def add(self, x: Tensor, error: Tensor, target: Tensor, *, heldout: bool) -> None:
        """Count tokens: inputs (T, n), the error of the output (T, m), and its target (T, m)."""
        row = int(heldout)
        self.gram[row] += (x.T @ x).to("cpu", torch.float64)
        self.cross[row] += (x.T @ error).to("cpu", torch.float64)
        self.error[row] += error.double().square().sum().cpu()
        self.target[row] += target.double().square().sum().cpu()

    def solve(self) -> tuple[Tensor, Fit]:
        """The change (m, n) with the least held-out error, float64, and that error."""
        scale = float(self.gram[0].diagonal().mean()) or 1.0
        norm = float(self.target[1]) or 1.0
        best = torch.zeros_like(self.cross[0])
        least, penalty = float("inf"), float("inf")
        for ridge in RIDGES:
            system = self.gram[0].clone()
            system.diagonal().add_(ridge * scale)
            factor, failed = torch.linalg.cholesky_ex(system)
            if int(failed):
                continue
            change = torch.cholesky_solve(self.cross[0], factor)
            left = self.error[1] - 2 * (change * self.cross[1]).sum() + (change * (self.gram[1] @ change)).sum()
            if float(left) < least:
                best, least, penalty = change, float(left), ridge
        return best.T, Fit(float(self.error[1]) / norm, least / norm, penalty)


class NormFit:
    """Sums for gain g and offset b of every channel that minimize |g z + b - y|^2, z being the normalized input.

    Args:
        channels: of the norm.
        bias: whether the norm has an offset; b is 0 otherwise.
    """

    def __init__(self, channels: int, bias: bool = True) -> None:
        self.bias = bias
        self.sums = torch.zeros(2, 5, channels, dtype=torch.float64)
        self.count = [0, 0]

    def add(self, z: Tensor, y: Tensor, *, heldout: bool) -> None:
        """Count tokens: normalized inputs (T, D) and wanted outputs (T, D)."""
        z, y = z.double(), y.double()
        row = int(heldout)
        self.sums[row] += torch.stack([z.sum(0), y.sum(0), (z * z).sum(0), (z * y).sum(0), (y * y).sum(0)]).cpu()
        self.count[row] += len(z)

    def solve(self, gain: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Fit]:
        """Gain and offset (D,), float64, and the held-out error against that of the given ones.

        The slope is shrunk towards the given gain by a thousandth of the spread of z.
        """
        count = max(1, self.count[0])
        z, y, zz, zy, _ = self.sums[0] / count
        if not self.bias:
            z, y = torch.zeros_like(z), torch.zeros_like(y)
        spread = zz - z * z
        ridge = RIDGES[1] * spread.mean() + torch.finfo(torch.float64).tiny
        new_gain = (zy - z * y + ridge * gain.double()) / (spread + ridge)
        new_offset = y - new_gain * z
        norm = float(self.sums[1, 4].sum()) or 1.0
        before, after = (
            float(self._left(g, b)) / norm for g, b in ((gain.double(), offset.double()), (new_gain, new_offset))
        )
        return new_gain, new_offset, Fit(before, after, RIDGES[1])

    def _left(self, gain: Tensor, offset: Tensor) -> Tensor:
        """Held-out squared error."""
        z, y, zz, zy, yy = self.sums[1]
        return (
            gain.square() * zz + self.count[1] * offset.square() + yy + 2 * gain * offset * z
            - 2 * gain * zy - 2 * offset * y
        ).sum()  # fmt: skip
