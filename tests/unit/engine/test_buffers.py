"""Scratch memory and caches: zeros of every kind, aligned, and without the threads of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minitron.engine.buffers import NUMPY_DTYPES, address, zeros
from minitron.pages import LINE


@pytest.mark.parametrize("kind", NUMPY_DTYPES)
@pytest.mark.parametrize("like", [np.zeros(1, np.float32), torch.zeros(1)], ids=["numpy", "torch"])
def test_zeros_are_of_the_sort_that_is_asked_for(kind: str, like: np.ndarray | torch.Tensor) -> None:
    found = zeros((3, 5), kind, like)
    assert type(found) is type(like)
    assert tuple(found.shape) == (3, 5)
    assert address(found) % LINE == 0
    assert not np.asarray(found.view(torch.uint8) if isinstance(found, torch.Tensor) else found).any()
    found[1, 2] = 1
    assert int((found != 0).sum()) == 1


def test_zeros_on_the_cpu_start_no_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(1)
    monkeypatch.setattr(torch, "zeros", None)  # it fills memory by threads, which spin afterwards
    assert zeros((2, 2), "bf16", like).dtype == torch.bfloat16
