"""LoRA adapters merged from disk, against peft's own merge in memory."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from family_samples import kind_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import build
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import minitron
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.sources import open_checkpoint
from minitron.loading import checkpoint_folder

IDS = torch.tensor([[5, 17, 2, 60, 33, 8]])


def adapted(tmp_path: Path, seed: int = 0, **settings: Any) -> tuple[Path, Any]:
    """A base checkpoint and an adapter of it on disk, all of whose weights are random; the adapter's folder, and what
    peft makes of both in memory."""
    base = build(tie_word_embeddings=settings.pop("tied", False))
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.merge_and_unload().eval()


SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 12},
    "all linear": {"target_modules": "all-linear", "r": 2, "lora_alpha": 5},
    "rank-stabilized": {"target_modules": ["up_proj", "down_proj"], "r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj"],
        "r": 4,
        "rank_pattern": {"layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "o_proj": 32},
    },
    "anchored patterns": {
        "target_modules": ["q_proj", "o_proj"],
        "r": 4,
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "^q_proj": 9, "o_proj": 7, "self_attn.o_proj": 32},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 4},
    "whole modules": {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["lm_head"]},
    "tied": {"target_modules": ["k_proj"], "r": 3, "tied": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_a_merged_adapter_gives_the_logits_of_pefts_merge(settings: dict[str, Any], tmp_path: Path) -> None:
    folder, expected = adapted(tmp_path, **settings)
    with open_checkpoint(folder, tmp_path) as merged:
        found = {name: tensor.load() for name, tensor in merged.tensors.items()}
    model = build()
    if merged.config.tie_word_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    model.load_state_dict(found)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)
    assert any("merged into" in note for note in merged.notes)


@pytest.mark.parametrize("kind", ["smollm", "llama-biased", "mistral", "qwen2-tied", "qwen3"])
def test_an_adapter_of_another_family_is_merged_as_peft_merges_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate too, and the folder that `load` makes of the adapter is of the family of its base."""
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    base = small_model(kind_config(kind))
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, lora_alpha=5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    assert any("gate_proj.lora_A" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().eval()
    found = AutoModelForCausalLM.from_pretrained(checkpoint_folder(tmp_path / "adapter"))
    assert found.config.model_type == base.config.model_type
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is set"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
        ({"base_model_name_or_path": "nowhere-at-all"}, "no such file or folder"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "is a regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern is a list"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern: 'q_proj' is nan"),
        ({"rank_pattern": [1]}, "rank_pattern is a list"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern: 'q_proj' is '2'"),
        ({"r": 2.5}, "r is 2.5; it must be a whole number"),
        ({"r": 10**400}, "r is 1000"),
        ({"r": 100_000}, "q_proj has rank 2, adapter_config.json says 100000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"use_rslora": "false"}, "use_rslora is 'false'; it must be true or false"),
        ({"base_model_name_or_path": "x" * 1_000_000}, "base_model_name_or_path is 'xxx"),
        ({"base_model_name_or_path": "x" * 300}, "base_model_name_or_path: "),
        ({"base_model_name_or_path": "\0"}, "base_model_name_or_path: "),
        ({"base_model_name_or_path": "~nobody-at-all/x"}, "base_model_name_or_path: "),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is ['a']"),
        ({"base_model_name_or_path": "loop"}, "base_model_name_or_path: "),
    ],
)
def test_an_adapter_that_cannot_be_merged_exactly_is_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder, _ = adapted(tmp_path, target_modules=["q_proj"], r=2)
    edit(folder, **values)
    (folder / "loop").symlink_to(folder / "pool")
    (folder / "pool").symlink_to(folder / "loop")
    with pytest.raises(CheckpointError, match=re.escape(said)), open_checkpoint(folder, tmp_path):
        pass


FIELDS = sorted({*LoraConfig().to_dict(), "lora_bias", "base_model_name_or_path"})
ODD: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=5), st.just("LORA")
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def small_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapted(tmp_path_factory.mktemp("small"), target_modules=["q_proj"], r=2)[0]


@settings(max_examples=150, deadline=None)
@given(values=st.dictionaries(st.sampled_from(FIELDS), ODD, min_size=1, max_size=2))
def test_odd_settings_are_taken_or_refused(values: dict[str, Any], small_adapter: Path) -> None:
    path = small_adapter / "adapter_config.json"
    before = path.read_text()
    try:
        edit(small_adapter, **values)
        with contextlib.suppress(CheckpointError), open_checkpoint(small_adapter, small_adapter) as merged:
            assert merged.tensors
    finally:
        path.write_text(before)


def test_patterns_in_target_modules_are_never_run(tmp_path: Path) -> None:
    folder, _ = adapted(tmp_path, target_modules=["q_proj"], r=2)
    edit(folder, target_modules="(([a-z_.0-9]+)+)+!", exclude_modules="((.*)*)*x")
    with open_checkpoint(folder, tmp_path) as merged:
        assert merged.tensors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(32)},
         "belongs to nothing in the base model"),
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "has lora_A only"),
        (lambda t: {k: v[:1] if "lora_A" in k else v for k, v in t.items()}, "do not fit the weight"),
        (lambda t: {k.replace("q_proj", "z_proj"): v for k, v in t.items()}, "has no model.layers.0.self_attn.z_proj"),
        (lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}, "does not begin with"),
        (lambda t: t | {k.removesuffix(".weight"): v.clone() for k, v in t.items()}, "appears twice"),
        (lambda t: t | {k.replace("lora_", "lora_embedding_"): v + 1 for k, v in t.items()}, "expected one of them"),
        (lambda t: {k: v.long() for k, v in t.items()}, "is torch.int64, expected floating-point"),
        (lambda t: {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in t.items()}, "has rank 0"),
        (lambda t: {k: v.sum() for k, v in t.items()}, r"lora_A \[\] and lora_B \[\] do not fit"),
        (lambda t: {k: v[None] for k, v in t.items()}, "do not fit the weight"),
        (lambda t: {f"base_model.model.m{i}.lora_A.weight": torch.zeros(0) for i in range(100_000)}, "lora_A only"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_belong_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    folder, _ = adapted(tmp_path, target_modules=["q_proj"], r=2)
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(CheckpointError, match=said), open_checkpoint(folder, tmp_path):
        pass


def test_an_adapter_of_an_adapter_is_refused(tmp_path: Path) -> None:
    folder, _ = adapted(tmp_path, target_modules=["q_proj"], r=2)
    edit(folder, base_model_name_or_path=".")
    with pytest.raises(CheckpointError, match="is an adapter itself"), open_checkpoint(folder, tmp_path):
        pass


def test_a_base_beside_the_adapter_is_found_from_anywhere(tmp_path: Path) -> None:
    folder, expected = adapted(tmp_path, target_modules=["q_proj"], r=2)
    edit(folder, base_model_name_or_path="../base")
    with open_checkpoint(folder, tmp_path) as merged:
        weight = merged.get("model.layers.0.self_attn.q_proj.weight").load()
    torch.testing.assert_close(weight, expected.model.layers[0].self_attn.q_proj.weight.detach())


def test_the_base_may_be_the_bundled_model(tmp_path: Path) -> None:
    loaded = minitron.load()
    model = get_peft_model(loaded.model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    model.save_pretrained(tmp_path)
    edit(tmp_path, base_model_name_or_path="bundled")
    with open_checkpoint(tmp_path, tmp_path) as merged:
        assert "tokenizer.json" in merged.files
