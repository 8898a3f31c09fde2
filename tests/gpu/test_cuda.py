"""What only a CUDA device can show: kernels there agree with the CPU, in fp32 and bf16, values and gradients."""

from __future__ import annotations

import pytest
import torch
from model_samples import build, rms, token_ids

import minitron
from minitron.ops.loss import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; `make gpu` runs this"),
]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_logits_and_gradients_agree_with_the_cpu(attn: str) -> None:
    ids = token_ids(length=33)
    grads, logits = [], []
    for device in ("cpu", "cuda"):
        model = build(attn=attn).to(device)
        out = model(ids.to(device), labels=ids.to(device))
        out.loss.backward()
        logits.append(out.logits.cpu())
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad.cpu())
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_bf16_error_is_that_of_bf16() -> None:
    ids = token_ids(length=33)
    exact = build().double()(ids).logits
    rounded = build().to("cuda", torch.bfloat16)(ids.cuda()).logits.cpu()
    assert rms(rounded - exact) < 0.03 * rms(exact)


def test_layer_norm_parameters_stay_fp32_under_autocast() -> None:
    model = build().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        normed = model.model.norm(torch.randn(2, 3, 32, device="cuda"))
    assert normed.dtype == torch.float32


def test_chunked_loss_over_more_values_than_int32_holds() -> None:
    # 8,400 rows of 256,000 logits are more than 2**31 values, where 32-bit offsets break.
    torch.manual_seed(0)
    hidden = torch.randn(8400, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(256_000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 256_000, (8400,), device="cuda")
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    rows = [0, 4200, 8399]
    last = torch.nn.functional.cross_entropy(hidden[rows].double() @ weight.double().T, targets[rows])
    alone = linear_cross_entropy(hidden[rows], weight, targets[rows])
    torch.testing.assert_close(alone.double(), last, rtol=1e-2, atol=1e-2)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_generate_and_continuous_batching() -> None:
    model = build().cuda()
    model.generation_config.pad_token_id = 0
    ids = token_ids(batch=1).cuda()
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    static = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    torch.testing.assert_close(plain, static)


def test_compiled_forward_without_graph_breaks() -> None:
    model = build().cuda()
    ids = token_ids().cuda()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_preset_fits_and_runs_one_token() -> None:
    config = minitron.NemotronConfig.preset("minitron-4b", num_hidden_layers=2)
    with torch.device("cuda"):
        model = minitron.NemotronForCausalLM(config).to(torch.bfloat16)
    assert model(torch.tensor([[2]], device="cuda")).logits.shape == (1, 1, 256_000)
