"""What is missing, as sentences. The devices are made up: no test here needs one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import minitron
from minitron import NemotronConfig, loading
from minitron.engine import memory
from minitron.engine.cuda.device import free_memory, why_no_cuda, why_no_device, why_not_dtype

GPU = torch.device("cuda")


def on_a_machine_with(monkeypatch: pytest.MonkeyPatch, count: int, **functions: Any) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    given = {"is_available": lambda: count > 0, "device_count": lambda: count, **functions}
    for name, function in given.items():
        monkeypatch.setattr(torch.cuda, name, function)


def refuse(message: str) -> Any:
    def zeros(*_: Any, **__: Any) -> Any:
        raise RuntimeError(message)

    return zeros


def test_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_no_cuda() == (
        f"torch {torch.__version__} is a build without CUDA; install one with it (pytorch.org/get-started)"
    )
    with pytest.raises(ValueError, match=r"^device 'cuda:0' cannot be used: torch \S+ is a build without CUDA"):
        minitron.load("bundled-half", device="cuda:0")


def test_a_driver_that_is_too_old_and_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine_with(monkeypatch, 0)
    old = "The NVIDIA driver on your system is too old\n(found version 11040)."
    monkeypatch.setattr(torch, "zeros", refuse(old))
    assert why_no_cuda() == (
        "the NVIDIA driver is too old for CUDA 12.8: The NVIDIA driver on your system is too old (found version 11040)."
    )
    monkeypatch.setattr(torch, "zeros", refuse("No CUDA GPUs are available"))
    assert why_no_cuda() == "torch was built for CUDA 12.8, and there is no usable GPU: No CUDA GPUs are available"


def test_a_device_that_the_machine_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine_with(monkeypatch, 2)
    assert why_no_device(GPU) == why_no_device(torch.device("cuda:1")) == ""
    assert why_no_device(torch.device("cuda:2")) == "this machine has 2 CUDA devices, the last one is cuda:1"


@pytest.mark.parametrize(("capability", "lacks"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], lacks: bool) -> None:
    on_a_machine_with(monkeypatch, 1, get_device_capability=lambda _: capability, get_device_name=lambda _: "Tesla T4")
    found = why_not_dtype(torch.bfloat16, GPU)
    assert found == ("Tesla T4 has no bf16 arithmetic; load the model with dtype fp16 or fp32" if lacks else "")
    assert why_not_dtype(torch.float16, GPU) == why_not_dtype(torch.bfloat16, torch.device("cpu")) == ""


def test_a_model_that_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine_with(
        monkeypatch,
        1,
        mem_get_info=lambda _: (4 * 10**9, 8 * 10**9),
        memory_reserved=lambda _: 2 * 10**9,
        memory_allocated=lambda _: 10**9,
    )
    assert free_memory(GPU) == 5 * 10**9
    config = NemotronConfig.preset("minitron-4b")
    with pytest.raises(
        ValueError, match=r"^m takes 8\.38 GB of memory in bf16, and 5\.00 GB are free on cuda; with "
    ) as e:
        memory.require_device_memory("m", config, "bf16", False, GPU)
    assert str(e.value).endswith("with --format int8 (4.45 GB), int4 (2.75 GB) it would fit")
    memory.require_device_memory("m", config, "int8", True, GPU)
    with pytest.raises(ValueError, match="no format fits; try --device cpu"):
        memory.require_device_memory("m", NemotronConfig.preset("nemotron-4-15b"), "bf16", False, GPU)


def test_formats_and_devices_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "pick_device", lambda _: GPU)
    with pytest.raises(
        ValueError, match="format bf12 is for the CPU; on cuda it must be one of bf16, fp16, fp32, int8"
    ):
        minitron.load("bundled-half", device="cuda", format="bf12")
    monkeypatch.setattr(loading, "pick_device", lambda _: SimpleNamespace(type="mps"))
    with pytest.raises(ValueError, match="format int8 was given with device 'mps'; it must be cpu or cuda"):
        minitron.load("bundled-half", device="mps", format="int8")
