"""Pruning models of every family, judged by the classes of transformers that define them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_samples import CONFIGS, KINDS, configs, kind_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_samples import random_plan, random_scores, silence, with_exact_norms
from transformers import AutoModelForCausalLM

from minitron.checkpoint.fingerprint import fingerprint
from minitron.checkpoint.hf import check_checkpoint, read_config
from minitron.data.packing import Batch
from minitron.prune.architecture import Architecture, ArchitectureError
from minitron.prune.choose import make_plan, sorted_plan
from minitron.prune.compensation import compensate
from minitron.prune.importance import compute_importance
from minitron.prune.plan import keep_all, prefix_plan
from minitron.prune.rank import walk_through
from minitron.prune.streaming import StreamedModel
from minitron.prune.surgery import prune_checkpoint


def a_batch(config: Any, blocks: int, seed: int = 0) -> Batch:
    """Blocks of 16 random tokens, each one document."""
    ids = torch.randint(5, config.vocab_size, (blocks, 16), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(16).expand(blocks, 16).contiguous()
    return Batch(ids, positions, ids.clone(), blocks * 15)


def saved(folder: Path, config: Any, dtype: torch.dtype = torch.float64) -> Any:
    model = small_model(config, dtype=dtype)
    model.save_pretrained(folder)
    return model


def stock(folder: Path) -> Any:
    """The model of a folder as transformers loads it, without this package."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def token_ids(config: Any) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(token_ids(model.config), use_cache=False).logits


def smaller(config: Any) -> Architecture:
    """Less of everything: two thirds of the heads where a group has more than one, otherwise half of the groups."""
    shape = Architecture.of(config)
    per_group = shape.heads // shape.groups
    heads, groups = (
        (shape.groups * (per_group - 1), shape.groups) if per_group > 1 else (shape.heads // 2, shape.groups // 2)
    )
    return Architecture(2, 5 * heads, heads, groups, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_equals_masking(tmp_path: Path, kind: str) -> None:
    """The big model with everything that goes set to zero gives the logits of the small one, in float64."""
    config = kind_config(kind, num_hidden_layers=3)
    saved(tmp_path / "big", config)
    plan = random_plan(config, smaller(config), 1, fingerprint(tmp_path / "big"))
    prune_checkpoint(tmp_path / "big", tmp_path / "small", plan)
    check_checkpoint(tmp_path / "small")
    expected = logits(silence(stock(tmp_path / "big"), plan))
    found = logits(with_exact_norms(stock(tmp_path / "small")))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert expected.abs().max() > 0.1


@given(data=st.data(), config=configs(tuple(CONFIGS)))
@settings(max_examples=25, deadline=None)
def test_cutting_equals_masking_whatever_the_shape(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, config: Any
) -> None:
    folder = tmp_path_factory.mktemp("any")
    saved(folder / "big", config)
    shape = Architecture.of(config)
    groups = data.draw(st.integers(1, shape.groups))
    heads = groups * data.draw(st.integers(1, shape.heads // shape.groups))
    hidden = data.draw(st.integers(1, shape.hidden // heads)) * heads if heads <= shape.hidden else shape.hidden
    target = Architecture(
        data.draw(st.integers(1, shape.layers)), hidden, heads, groups, data.draw(st.integers(1, shape.ffn))
    )
    plan = random_plan(config, target, data.draw(st.integers(0, 99)), fingerprint(folder / "big"))
    prune_checkpoint(folder / "big", folder / "small", plan)
    found = logits(with_exact_norms(stock(folder / "small")))
    torch.testing.assert_close(found, logits(silence(stock(folder / "big"), plan)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_keeps_every_bit(tmp_path: Path, kind: str) -> None:
    config = kind_config(kind)
    saved(tmp_path / "big", config, torch.bfloat16)
    mark = fingerprint(tmp_path / "big")
    prune_checkpoint(tmp_path / "big", tmp_path / "same", keep_all(Architecture.of(config), mark))
    assert fingerprint(tmp_path / "same") == mark
    assert torch.equal(logits(stock(tmp_path / "same")), logits(stock(tmp_path / "big")))


@pytest.mark.parametrize("kind", KINDS)
def test_sorting_changes_nothing_and_prefixes_are_what_importance_keeps(tmp_path: Path, kind: str) -> None:
    config = kind_config(kind, num_hidden_layers=3)
    model = saved(tmp_path / "big", config)
    scores = random_scores(config)
    mark = fingerprint(tmp_path / "big")
    prune_checkpoint(tmp_path / "big", tmp_path / "sorted", sorted_plan(config, scores, source=mark))
    whole = logits(with_exact_norms(model))
    torch.testing.assert_close(logits(with_exact_norms(stock(tmp_path / "sorted"))), whole, rtol=0, atol=1e-11)
    target = smaller(config)
    target = Architecture(3, target.hidden, target.heads, target.groups, target.ffn)
    prune_checkpoint(tmp_path / "big", tmp_path / "direct", make_plan(config, scores, target, source=mark))
    plan = prefix_plan(Architecture.of(config), target, fingerprint(tmp_path / "sorted"))
    prune_checkpoint(tmp_path / "sorted", tmp_path / "prefix", plan)
    found = [logits(with_exact_norms(stock(tmp_path / name))) for name in ("direct", "prefix")]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_pass_ends_in_the_models_hidden_states(tmp_path: Path, kind: str) -> None:
    config = kind_config(kind)
    model = saved(tmp_path / "big", config, torch.float32)
    blocks = a_batch(config, blocks=2)
    walk = walk_through(StreamedModel(tmp_path / "big"), blocks)
    with torch.no_grad():
        expected = model.model(blocks.input_ids, position_ids=blocks.position_ids, use_cache=False).last_hidden_state
        found = walk.model.norm()(walk.at[()].get(range(2)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_activations_that_hooks_see(tmp_path: Path, kind: str) -> None:
    """Neurons at the input of the down projection, heads at that of the output projection, channels after the norms."""
    config = kind_config(kind)
    model = saved(tmp_path / "big", config, torch.float32)
    blocks = a_batch(config, blocks=3)
    scores = compute_importance(tmp_path / "big", blocks)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("down_proj", "o_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        if name.endswith(("layernorm", "model.norm")):
            module.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        model.model(blocks.input_ids, position_ids=blocks.position_ids, use_cache=False)

    def score(values: torch.Tensor) -> torch.Tensor:
        return values.double().abs().mean(1).square().sum(0).sqrt()

    channels = sum(score(seen[name]) for name in seen if "norm" in name)
    torch.testing.assert_close(scores.channels, channels, rtol=1e-4, atol=1e-5)
    for layer in range(config.num_hidden_layers):
        neurons = score(seen[f"model.layers.{layer}.mlp.down_proj"])
        torch.testing.assert_close(scores.neurons[layer], neurons, rtol=1e-4, atol=1e-5)
        attended = seen[f"model.layers.{layer}.self_attn.o_proj"]
        heads = score(attended.unflatten(-1, (config.num_attention_heads, -1)).norm(dim=-1))
        torch.testing.assert_close(scores.heads[layer], heads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_compensation_lowers_the_error_of_the_residual_stream(tmp_path: Path, kind: str) -> None:
    config = kind_config(kind)
    saved(tmp_path / "big", config, torch.float32)
    shape = Architecture.of(config)
    target = Architecture(shape.layers, shape.hidden, shape.heads, shape.groups, shape.ffn // 2)
    blocks = a_batch(config, blocks=12)
    scores = compute_importance(tmp_path / "big", blocks)
    plan = make_plan(config, scores, target, source=fingerprint(tmp_path / "big"))
    prune_checkpoint(tmp_path / "big", tmp_path / "cut", plan)
    parts = compensate(tmp_path / "big", tmp_path / "cut", plan, blocks, tmp_path / "fitted")
    assert any(part.fit.accepted for part in parts if part.name.endswith("down_proj.weight"))
    new = a_batch(config, blocks=4, seed=9)
    states = {
        name: walk_through(StreamedModel(tmp_path / name), new).at[()].get(range(4))
        for name in ("big", "cut", "fitted")
    }
    errors = {name: float((states[name] - states["big"]).square().sum()) for name in ("cut", "fitted")}
    assert errors["fitted"] < errors["cut"]
    assert stock(tmp_path / "fitted").config.intermediate_size == target.ffn


def test_llama_shapes_that_transformers_refuses_are_refused_with_the_nearest() -> None:
    config = kind_config("llama")
    with pytest.raises(ArchitectureError, match=r"hidden is 30, not a multiple of heads \(4\).*hidden=28 or hidden=32"):
        Architecture.parse("hidden=30", config)
    assert Architecture.parse("hidden=28", config).hidden == 28
    assert Architecture.parse("hidden=30", kind_config("qwen3")).hidden == 30


def test_the_pruned_configuration_says_the_head_size(tmp_path: Path) -> None:
    config = kind_config("qwen2", num_key_value_heads=2)
    saved(tmp_path / "big", config)
    plan = prefix_plan(Architecture.of(config), Architecture(2, 20, 2, 2, 30), fingerprint(tmp_path / "big"))
    prune_checkpoint(tmp_path / "big", tmp_path / "small", plan)
    found = read_config(tmp_path / "small")
    assert (found.head_dim, found.hidden_size, found.layer_types) == (8, 20, ["full_attention"] * 2)
