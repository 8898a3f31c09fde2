"""Memory in large pages is torch's own, with the advice that the kernel shows in /proc."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import minitron
from minitron import pages


def flags_of(address: int) -> list[str]:
    """What the kernel notes about the mapping at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    return []


@pytest.mark.parametrize("shape", [(0, 5), (3, 7), (3000, 1001)])
def test_it_is_an_ordinary_tensor(shape: tuple[int, int]) -> None:
    out = pages.empty(shape, torch.bfloat16)
    assert out.shape == shape
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous()
    out.fill_(3)
    assert bool((out == 3).all())


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux only")
def test_the_kernel_is_asked() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this kernel has no large pages")
    out = pages.empty((4, pages.PAGE), torch.uint8)
    assert "hg" in flags_of(out.data_ptr() + 2 * pages.PAGE)


def test_small_models_are_moved_to_cache_lines_and_stay_what_they_are() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 5))
    model[1].weight = model[0].weight  # tied
    memory = torch.randn(40)
    model[0].weight.data = memory[1:16].view(3, 5)  # begins four bytes behind a border
    before = model[0].weight.detach().clone()
    pages.align(model)
    assert all(parameter.data_ptr() % pages.LINE == 0 for parameter in model.parameters())
    assert model[1].weight is model[0].weight
    assert torch.equal(model[0].weight, before)


class Elsewhere(torch.Tensor):
    """A tensor without memory of its own, as sharded and quantized ones are."""

    @staticmethod
    def __new__(cls) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(cls, (3, 5), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return Elsewhere() if func is torch.ops.aten.detach.default else NotImplemented


def test_parameters_without_memory_of_their_own_are_left() -> None:
    model = torch.nn.Linear(5, 3)
    parameter = torch.nn.Parameter(Elsewhere())
    model.weight = parameter
    pages.align(model)
    assert model.weight is parameter


def test_a_model_that_is_loaded_to_run_lies_on_cache_lines() -> None:
    model = minitron.load("bundled-half", device="cpu").model
    assert all(parameter.data_ptr() % pages.LINE == 0 for parameter in model.parameters())
