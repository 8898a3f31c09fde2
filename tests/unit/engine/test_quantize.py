"""Weight formats: bf12 bit for bit, the scaled ones within half a step, against formulas written anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.engine.matrix import BYTES_PER_BLOCK, GROUP, row_bytes
from minitron.engine.quantize import quantize, quantize_blocks


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def every_number() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("shape", [(256, 256), (1, 65536), (65536, 1), (1024, 64)])
def test_bf12_keeps_every_bf16_number(shape: tuple[int, int]) -> None:
    for order in (torch.arange(65536), torch.randperm(65536, generator=torch.Generator().manual_seed(0))):
        w = every_number()[order].view(shape)
        assert torch.equal(bits(quantize(w, "bf12").dense(torch.bfloat16)), bits(w))


SPECIAL = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 200), st.integers(0, 255), st.floats(0, 1), st.integers(0, 2**32 - 1), st.data()
)
def test_bf12_is_exact(N: int, K: int, exponent: int, share: float, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    near = torch.randint(0, 20, (N, K), generator=generator) + exponent
    w = near.clamp(max=255) << 7 | torch.randint(0, 128, (N, K), generator=generator)
    w |= torch.randint(0, 2, (N, K), generator=generator) << 15
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (N, K), generator=generator)]
    w = torch.where(torch.rand((N, K), generator=generator) < share, special, w).to(torch.int16).view(torch.bfloat16)
    cut = data.draw(st.integers(0, N))
    matrix = quantize_blocks([part for part in (w[:cut], w[cut:]) if len(part)], (N, K), "bf12")
    assert torch.equal(bits(matrix.dense(torch.bfloat16)), bits(w))
    start = data.draw(st.integers(0, N - 1))
    assert torch.equal(bits(matrix.dense(torch.bfloat16, start, N)), bits(w[start:]))


def test_bf12_of_weights_as_they_are_takes_three_quarters() -> None:
    w = (torch.randn((512, 1024), generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    assert quantize(w, "bf12").nbytes < 0.76 * 2 * w.numel()


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["int8", "int4"]), st.integers(1, 20), st.integers(1, 200), st.integers(-30, 30), st.integers(0, 99)
)
def test_scaled_formats_are_within_half_a_step(format: str, N: int, K: int, power: int, seed: int) -> None:
    w = torch.randn((N, K), generator=torch.Generator().manual_seed(seed)) * 2.0**power
    matrix = quantize(w, format)  # type: ignore[arg-type]
    assert matrix.data.shape == (N, row_bytes(format, K)) == (N, -(-K // 64) * BYTES_PER_BLOCK[format])
    error = torch.nn.functional.pad((matrix.dense(torch.float32) - w).abs(), (0, -K % GROUP))
    most = torch.nn.functional.pad(w.abs(), (0, -K % GROUP)).view(N, -1, GROUP).amax(-1)
    # int8: half a step, and what rounding the scale to bf16 adds at the largest weights. int4 may cut the largest one.
    allowed = most * (1 / 254 + 2.0**-8) if format == "int8" else most * 0.28
    assert (error.view(N, -1, GROUP) <= allowed[..., None] * (1 + 1e-5)).all()


def test_int4_is_closer_than_llama_cpps_q4_0() -> None:
    w = torch.randn((256, 1024), generator=torch.Generator().manual_seed(0))
    groups = w.view(-1, 32)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scale = (largest / -8).half().float()
    q4_0 = ((groups / scale + 8.5).floor().clamp(0, 15) - 8) * scale
    ours = quantize(w, "int4").dense(torch.float32).view(-1, 32)
    assert (ours - groups).square().mean() < 0.95 * (q4_0 - groups).square().mean()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(format: str, bad: float) -> None:
    w = torch.ones((2, 70))
    w[1, 3] = bad
    with pytest.raises(ValueError, match=f"infinite or NaN, which {format} cannot hold; bf16 and bf12 can"):
        quantize(w, format)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["int8", "int4", "bf12"])
def test_zeros_stay_zeros(format: str) -> None:
    assert not quantize(torch.zeros((3, 100)), format).dense(torch.float32).any()  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["bf12", "int8", "int4"]),
    st.integers(1, 40),
    st.integers(1, 200),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    st.integers(0, 99),
)
def test_compiled_packing_is_that_of_torch(format: str, N: int, K: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn((N, K), generator=generator) * 2.0 ** torch.randint(-9, 9, (N, 1), generator=generator)
    w[torch.rand((N, K), generator=generator) < 0.05] = 0
    compiled = quantize(w.to(dtype), format)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minitron.engine.quantize.importlib.util.find_spec", lambda name: None)
        plain = quantize(w.to(dtype), format)  # type: ignore[arg-type]
    if format == "int4":  # sums in another order: now and then another scale that is as good
        error = [(x.dense(torch.float64) - w.to(dtype)).norm() for x in (compiled, plain)]
        assert abs(error[0] - error[1]) <= 1e-3 * error[1]
    else:
        assert torch.equal(compiled.data, plain.data)
    assert (compiled.extras is None and plain.extras is None) or torch.equal(compiled.extras, plain.extras)
