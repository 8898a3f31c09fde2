"""The cut, judged by upstream transformers, by masking the big model, and by plain slicing of its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_samples import CLASSES, SHAPES, build, token_ids, upstream
from prune_samples import random_plan, random_scores, silence
from safetensors import safe_open
from safetensors.torch import load_file

import minitron
from minitron.assets import bundled_model
from minitron.checkpoint.fingerprint import fingerprint
from minitron.checkpoint.hf import SIDE_FILES, check_checkpoint
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.tensors import from_tensor
from minitron.files import TargetError
from minitron.prune.architecture import Architecture
from minitron.prune.choose import make_plan, sorted_plan
from minitron.prune.plan import PlanError, keep_all, prefix_plan
from minitron.prune.surgery import prune_checkpoint, select

LAYERS = {"num_hidden_layers": 3}


def saved(folder: Path, name: str = "NemotronForCausalLM", dtype: torch.dtype = torch.float64, **shape: Any) -> Any:
    """One of our models with noise in every parameter, in `folder`."""
    model = build(name, **{**LAYERS, **shape}).to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def smaller(config: Any) -> Architecture:
    """Less of everything: two thirds of the heads where a group has more than one, otherwise half of the groups."""
    shape = Architecture.of(config)
    per_group = shape.heads // shape.groups
    heads, groups = (shape.heads // per_group * (per_group - 1), shape.groups) if per_group > 1 else (2, 2)
    return Architecture(2, 20, heads, groups, 30)


def theirs(name: str, folder: Path) -> Any:
    model, info = getattr(upstream, name).from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@torch.no_grad()
def scores_of(model: Any) -> torch.Tensor:
    outputs = model(token_ids(batch=1))
    return torch.cat([outputs[0], outputs[1]]) if "QuestionAnswering" in type(model).__name__ else outputs[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_surgery_equals_masking(tmp_path: Path, name: str, shape: str) -> None:
    """Upstream's big model with everything that goes set to zero gives the logits of upstream's small model."""
    model = saved(tmp_path / "big", name, **SHAPES[shape])
    plan = random_plan(model.config, smaller(model.config), 1, fingerprint(tmp_path / "big"))
    prune_checkpoint(tmp_path / "big", tmp_path / "small", plan)
    check_checkpoint(tmp_path / "small")
    expected = scores_of(silence(theirs(name, tmp_path / "big"), plan))
    found = scores_of(theirs(name, tmp_path / "small"))
    if name == "NemotronModel":  # hidden states: the channels that stay, in the plan's order
        expected = expected[..., list(plan.channels)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours = getattr(minitron, name).from_pretrained(tmp_path / "small", dtype="auto").eval()
    torch.testing.assert_close(scores_of(ours), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_moving_things_changes_nothing(tmp_path: Path, shape: str) -> None:
    """Neurons, heads within a group, groups and channels in any order: the same logits to 1e-12."""
    model = saved(tmp_path / "big", **SHAPES[shape])
    whole = Architecture.of(model.config)
    plan = random_plan(model.config, whole, 2, fingerprint(tmp_path / "big"))
    layers = tuple(sorted(plan.layers, key=lambda entry: entry.layer))
    plan = type(plan)(plan.source, plan.shape, plan.channels, layers)
    prune_checkpoint(tmp_path / "big", tmp_path / "moved", plan)
    moved = tensors_of(tmp_path / "moved")
    assert not torch.equal(moved["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)
    found = scores_of(theirs("NemotronForCausalLM", tmp_path / "moved"))
    torch.testing.assert_close(found, scores_of(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeping_everything_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    saved(tmp_path / "big", dtype=dtype, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    mark = fingerprint(tmp_path / "big")
    shape = Architecture.of(minitron.NemotronConfig.from_pretrained(tmp_path / "big"))
    report = prune_checkpoint(tmp_path / "big", tmp_path / "same", keep_all(shape, mark))
    assert fingerprint(tmp_path / "same") == mark
    assert report.parameters_after == report.parameters_before
    before, after = tensors_of(tmp_path / "big"), tensors_of(tmp_path / "same")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def test_the_bundled_model_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source = bundled_model()
    config = minitron.NemotronConfig.from_pretrained(source)
    plan = keep_all(Architecture.of(config), fingerprint(source))
    prune_checkpoint(source, tmp_path / "same", plan)
    for name in ("model.safetensors", "config.json", *SIDE_FILES):
        if (source / name).is_file():
            assert (tmp_path / "same" / name).read_bytes() == (source / name).read_bytes(), name


def test_every_smaller_width_is_a_prefix_of_the_sorted_checkpoint(tmp_path: Path) -> None:
    model = saved(tmp_path / "big", **SHAPES["wide"])
    config, mark = model.config, fingerprint(tmp_path / "big")
    scores = random_scores(config, 4)
    prune_checkpoint(tmp_path / "big", tmp_path / "sorted", sorted_plan(config, scores, source=mark))
    target = Architecture(3, 20, 2, 1, 30)
    plan = make_plan(config, scores, target, source=mark, order="importance")
    prune_checkpoint(tmp_path / "big", tmp_path / "cut", plan)
    prefix = prefix_plan(Architecture.of(config), target, fingerprint(tmp_path / "sorted"))
    prune_checkpoint(tmp_path / "sorted", tmp_path / "prefix", prefix)
    assert fingerprint(tmp_path / "prefix") == fingerprint(tmp_path / "cut")
    cut, whole = tensors_of(tmp_path / "cut"), tensors_of(tmp_path / "sorted")
    for name, tensor in cut.items():
        big = whole[name]
        if "q_proj" in name:  # heads: a prefix within each group
            rows = big.reshape(2, 3, 12, -1)[:1, :2, :, :20].reshape(tensor.shape)
        elif "o_proj" in name:
            rows = big.reshape(32, 2, 3, 12)[:20, :1, :2].reshape(tensor.shape)
        else:
            rows = big[tuple(slice(size) for size in tensor.shape)]
        assert torch.equal(rows, tensor), name


def test_merged_heads_follow_the_formula(tmp_path: Path) -> None:
    model = saved(tmp_path / "big", num_attention_heads=4, num_key_value_heads=1, attention_bias=True)
    config = model.config
    plan = make_plan(
        config, random_scores(config), Architecture(3, 20, 3, 1, 48), source=fingerprint(tmp_path / "big"),
        merge_heads=True,
    )  # fmt: skip
    prune_checkpoint(tmp_path / "big", tmp_path / "small", plan)
    before, after = tensors_of(tmp_path / "big"), tensors_of(tmp_path / "small")
    for number, entry in enumerate(plan.layers):
        ((stays, goes),) = entry.merge
        name = f"model.layers.{number}.self_attn.q_proj"
        weight = before[f"{name}.weight"].reshape(4, 8, 32)[:, :, list(plan.channels)]
        bias = before[f"{name}.bias"].reshape(4, 8)
        for place, head in enumerate(entry.heads):
            expected = (weight[head], bias[head])
            if head == stays:
                expected = (2 * weight[stays] - weight[goes], 2 * bias[stays] - bias[goes])
            assert torch.equal(after[f"{name}.weight"].reshape(3, 8, 20)[place], expected[0])
            assert torch.equal(after[f"{name}.bias"].reshape(3, 8)[place], expected[1])


def test_old_weight_files_and_tied_matrices_that_are_stored_twice(tmp_path: Path) -> None:
    model = saved(tmp_path / "st", dtype=torch.bfloat16, tie_word_embeddings=True)
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    state = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert "lm_head.weight" in state
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    plan = random_plan(model.config, smaller(model.config), 3, fingerprint(tmp_path / "st"))
    one = prune_checkpoint(tmp_path / "st", tmp_path / "one", plan)
    two = prune_checkpoint(tmp_path / "bin", tmp_path / "two", plan, check_source=False)
    assert one.parameters_after == two.parameters_after  # frequencies are no parameters
    found, expected = tensors_of(tmp_path / "two"), tensors_of(tmp_path / "one")
    assert "lm_head.weight" not in found
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@given(st.data())
def test_selection_is_indexing(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30))
    values = torch.arange(height * width, dtype=torch.float32).reshape(height, width).bfloat16()
    rows = data.draw(st.none() | st.lists(st.integers(0, height - 1), min_size=1).map(np.array))
    columns = data.draw(st.none() | st.lists(st.integers(0, width - 1), min_size=1).map(np.array))
    chosen = select(from_tensor(values), rows, columns)
    expected = values if rows is None else values[rows]
    expected = expected if columns is None else expected[:, columns]
    assert torch.equal(chosen.load(), expected)
    assert torch.equal(torch.cat(list(chosen.blocks(data.draw(st.integers(1, 400))))), expected)
    assert chosen.shape == tuple(expected.shape)


def test_rows_far_apart_are_not_read_along() -> None:
    read: list[tuple[int, int]] = []
    tensor = from_tensor(torch.zeros(1000, 4096))  # rows of 16 kB

    def rows(start: int, stop: int) -> torch.Tensor:
        read.append((start, stop))
        return tensor.rows(start, stop)

    watched = type(tensor)(tensor.shape, tensor.dtype, rows)
    select(watched, np.array([900, 0, 3, 902]), None).load()
    assert read == [(0, 4), (900, 903)]


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_a_plan_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "big")
    plan = random_plan(model.config, smaller(model.config), source="0123456789abcdef")
    with pytest.raises(PlanError, match=r"made for the checkpoint 0123456789ab, .*big is [0-9a-f]{12}: other weights"):
        prune_checkpoint(tmp_path / "big", tmp_path / "small", plan)
    other = random_plan(build(hidden_size=40).config, Architecture(1, 20, 4, 2, 30))
    with pytest.raises(PlanError, match=r"for a model of 2 layers, hidden 40, .* has 3 layers, hidden 32"):
        prune_checkpoint(tmp_path / "big", tmp_path / "small", other)
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


def test_unknown_tensors_taken_targets_and_the_source_itself(tmp_path: Path) -> None:
    model = saved(tmp_path / "big")
    plan = random_plan(model.config, smaller(model.config), source=fingerprint(tmp_path / "big"))
    with pytest.raises(TargetError, match="is there already"):
        prune_checkpoint(tmp_path / "big", tmp_path / "big", plan)
    with pytest.raises(TargetError, match="source and target are the same"):
        prune_checkpoint(tmp_path / "big", tmp_path / "big", plan, overwrite=True)
    model.lora_A = torch.nn.Linear(2, 2)
    model.save_pretrained(tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"lora_A\.(bias|weight): not a parameter of a Nemotron model"):
        prune_checkpoint(tmp_path / "odd", tmp_path / "small", plan, check_source=False)
    assert not (tmp_path / "small").exists()


def test_a_cut_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    model = saved(tmp_path / "big")
    plan = random_plan(model.config, smaller(model.config), source=fingerprint(tmp_path / "big"))

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(tmp_path / "big", tmp_path / "small", plan, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


def test_further_files_and_the_head_width_in_the_config(tmp_path: Path) -> None:
    model = saved(tmp_path / "big")
    plan = random_plan(model.config, smaller(model.config), source=fingerprint(tmp_path / "big"))
    (tmp_path / "notes").write_text("n")
    files, texts = {"notes.txt": tmp_path / "notes"}, {"README.md": "# small\n"}
    prune_checkpoint(tmp_path / "big", tmp_path / "small", plan, files=files, texts=texts)
    assert (tmp_path / "small" / "notes.txt").read_text() == "n"
    assert (tmp_path / "small" / "README.md").read_text() == "# small\n"
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["head_dim"], config["hidden_size"], config["num_attention_heads"]) == (8, 20, 2)
    assert config["architectures"] == ["NemotronForCausalLM"]
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
