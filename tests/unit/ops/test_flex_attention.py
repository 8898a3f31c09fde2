"""Attention over packed documents by torch's `flex_attention`; its forward pass, since a CPU has no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_samples import kind_config, small_model
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from minitron.data.packing import collate
from minitron.ops import flex_attention as flex
from minitron.ops.packed_attention import packed_attention_in
from minitron.train.objective import next_token_loss


@pytest.mark.parametrize("kind", ["nemotron", "qwen3"])
@pytest.mark.parametrize("autocast", [False, True])
def test_documents_of_a_row_do_not_attend_to_each_other(kind: str, autocast: bool) -> None:
    model = small_model(kind_config(kind)).eval()
    batch = collate([[torch.randint(0, 90, (n,)).numpy() for n in (20, 11)], [torch.randint(0, 90, (31,)).numpy()]], 32)
    seen: list[Any] = []
    flex.register()
    # Compiled it computes the same, half a minute later.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), torch.autocast("cpu", torch.bfloat16, autocast):
        expected = next_token_loss(model, batch)[0]
        model.set_attn_implementation(flex.NAME)
        hook = model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        found = next_token_loss(model, batch)[0]
        hook.remove()
    assert isinstance(seen[0], flex.BlockMask)
    torch.testing.assert_close(found, expected, rtol=2e-3 if autocast else 1e-5, atol=1e-6)


def test_other_masks_are_for_torch_s_own_attention() -> None:
    module: Any = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False)
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    out, weights = flex.flex_attention(module, q, k, v, None)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert weights is None


def on_gpu(**settings: Any) -> Any:
    config = {"_attn_implementation": "sdpa", "attention_dropout": 0.0, "head_dim": 64, **settings}
    changes: list[str] = []
    return SimpleNamespace(
        config=SimpleNamespace(**config),
        parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]),
        set_attn_implementation=changes.append,
        changes=changes,
    )


@pytest.mark.parametrize(
    ("settings", "serves"),
    [
        ({}, True),
        ({"_attn_implementation": "eager"}, False),
        ({"attention_dropout": 0.1}, False),
        ({"head_dim": 8}, False),
        ({"head_dim": None, "hidden_size": 64, "num_attention_heads": 4}, True),
    ],
)
def test_which_models_on_a_gpu_it_is_for(settings: dict[str, Any], serves: bool) -> None:
    assert flex.serves(on_gpu(**settings)) == serves


def test_compiled_models_on_a_gpu_use_it_while_they_train() -> None:
    model = on_gpu()
    with packed_attention_in(model, compiled=True):
        assert model.changes == [flex.NAME]
    assert model.changes == [flex.NAME, "sdpa"]
    plain = on_gpu()
    with packed_attention_in(plain):
        assert plain.changes == []


def test_under_autocast_all_of_it_is_in_one_dtype() -> None:
    """Rotated queries and keys are wider than values there."""
    module: Any = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False)
    q, k, v = torch.randn(3, 1, 2, 8, 16)
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, 1, None, 8, 8, device="cpu")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), torch.autocast("cpu", torch.bfloat16):
        out, _ = flex.flex_attention(module, q, k, v.bfloat16(), mask)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
