"""The table of architectures against the classes of transformers that define them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from family_samples import CONFIGS, KINDS, MODELS, kind_config, small_config, small_model
from torch import nn

from minitron.families import FAMILIES, family_of


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_names_upstreams_classes_and_defaults(name: str) -> None:
    family = FAMILIES[name]
    assert family.model_type == CONFIGS[name].model_type
    assert MODELS[name].__name__ == family.architecture
    assert CONFIGS[name]().tie_word_embeddings is family.tied


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensor_parallel_plan_is_upstreams(name: str) -> None:
    assert FAMILIES[name].tensor_parallel_plan == CONFIGS[name].base_model_tp_plan


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_modules_that_have_parameters(kind: str) -> None:
    model = small_model(kind_config(kind))
    family = family_of(model.config)
    for layer in model.model.layers:
        owners = {name for name, module in layer.named_modules() if list(module.parameters(recurse=False))}
        assert owners == {part.name for part in family.layer}
    assert family.gated == hasattr(model.model.layers[0].mlp, "gate_proj")


@pytest.mark.parametrize("name", CONFIGS)
def test_gain_and_kind_of_the_norm_are_what_upstream_computes(name: str) -> None:
    config = small_config(name)
    family, norm = FAMILIES[name], small_model(config).model.norm
    x = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(0))
    centred = x - x.mean(-1, keepdim=True) if family.norm.kind == "layernorm1p" else x
    eps = getattr(config, family.norm.eps)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    expected = normed * (norm.weight + family.norm.offset) + (norm.bias if family.norm.bias else 0)
    assert torch.allclose(norm(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_of_a_gated_mlp_is_down_of_a_product(name: str) -> None:
    model = small_model(small_config(name))
    mlp: nn.Module = model.model.layers[0].mlp
    family = FAMILIES[name]
    x = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    up = mlp.up_proj(x)
    inner = mlp.act_fn(mlp.gate_proj(x)) * up if family.gated else mlp.act_fn(up)
    assert torch.allclose(mlp(x), mlp.down_proj(inner), atol=1e-6)


def test_another_architecture_is_refused_with_those_in_the_table() -> None:
    class Other:
        model_type = "gpt2"

    with pytest.raises(ValueError, match=r"'gpt2'.*NemotronForCausalLM, LlamaForCausalLM, Mistral.*Qwen3ForCausalLM"):
        family_of(Other())
    with pytest.raises(ValueError, match="model_type is None"):
        family_of(object())


def test_a_role_that_a_family_lacks_is_named() -> None:
    assert not FAMILIES["nemotron"].has("gate")
    with pytest.raises(KeyError, match="Nemotron has no gate"):
        FAMILIES["nemotron"].part("gate")
    assert FAMILIES["qwen3"].part("query_norm").name == "self_attn.q_norm"


def test_the_table_needs_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, minitron.families, minitron.shapes, minitron.supported; print(*(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
