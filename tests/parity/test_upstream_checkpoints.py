"""Checkpoints go from here to upstream and back, and from any of the five classes to any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_samples import CLASSES, SHAPES, build, pair, token_ids, upstream
from safetensors import safe_open

import minitron

SHARD = {"one file": "5GB", "shards": "20KB"}


@pytest.mark.parametrize("size", SHARD)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_saved_here_loads_in_upstream_and_back(tmp_path: Path, name: str, shape: str, size: str) -> None:
    ours = build(name, **SHAPES[shape])
    ours.save_pretrained(tmp_path / "ours", max_shard_size=SHARD[size])
    assert (size == "shards") == (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    theirs, info = getattr(upstream, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=SHARD[size])
    back, info = getattr(minitron, name).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.state_dict().keys() == ours.state_dict().keys() == back.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], tensor), key
        assert torch.equal(back.state_dict()[key], tensor), key
    for key, value in ours.config.to_dict().items():
        assert key in ("dtype", "_name_or_path", "transformers_version") or back.config.to_dict()[key] == value, key
    ids = token_ids(batch=1)
    with torch.no_grad():
        assert torch.equal(ours(ids)[0], theirs(ids)[0])
        assert torch.equal(ours(ids)[0], back(ids)[0])


@pytest.mark.parametrize("name", CLASSES)
def test_both_write_the_same_tensor_names(tmp_path: Path, name: str) -> None:
    names = []
    for side, model in zip(("ours", "theirs"), pair(name), strict=True):
        model.save_pretrained(tmp_path / side)
        with safe_open(tmp_path / side / "model.safetensors", "pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]


def test_tied_embeddings_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    ours = build(tie_word_embeddings=True)
    ours.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in set(file.keys())
    for cls in (upstream.NemotronForCausalLM, minitron.NemotronForCausalLM):
        model = cls.from_pretrained(tmp_path)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, ours.lm_head.weight)


def backbone(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(getattr(model, "base_model", model).state_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize("source", CLASSES)
@pytest.mark.parametrize("target", CLASSES)
def test_every_class_loads_the_backbone_of_every_other(tmp_path: Path, source: str, target: str) -> None:
    saved = build(source)
    saved.save_pretrained(tmp_path)
    loaded, info = getattr(minitron, target).from_pretrained(tmp_path, output_loading_info=True)
    assert backbone(loaded).keys() == backbone(saved).keys()
    for key, tensor in backbone(saved).items():
        assert torch.equal(backbone(loaded)[key], tensor), key
    head = {"lm_head", "score", "qa_outputs"}
    assert {key.split(".")[0] for key in info["missing_keys"]} <= head
    # and what is loaded is saved under the names of its own class
    loaded.save_pretrained(tmp_path / "again")
    again = getattr(upstream, target).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not again[1]["missing_keys"]
    assert not again[1]["unexpected_keys"]


def test_causal_checkpoint_into_question_answering__upstream_leaves_the_backbone_random(tmp_path: Path) -> None:
    saved = build()
    saved.save_pretrained(tmp_path)
    theirs = upstream.NemotronForQuestionAnswering.from_pretrained(tmp_path)
    assert not torch.equal(theirs.transformer.embed_tokens.weight, saved.model.embed_tokens.weight)


@pytest.mark.parametrize("size", SHARD)
def test_bf16_checkpoint_loads_in_its_own_dtype_in_both(tmp_path: Path, size: str) -> None:
    ours = build().to(torch.bfloat16)
    ours.save_pretrained(tmp_path, max_shard_size=SHARD[size])
    for cls in (minitron.NemotronForCausalLM, upstream.NemotronForCausalLM):
        model = cls.from_pretrained(tmp_path)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        for key, tensor in ours.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key


def test_saved_json_has_the_keys_of_transformers_4_and_5(tmp_path: Path) -> None:
    build(rope_theta=5e4, partial_rotary_factor=0.25).to(torch.bfloat16).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["rope_theta"] == data["rope_parameters"]["rope_theta"] == 5e4
    assert data["partial_rotary_factor"] == data["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert data["torch_dtype"] == data["dtype"] == "bfloat16"
    assert data["architectures"] == ["NemotronForCausalLM"]
    assert data["model_type"] == "nemotron"
    assert "auto_map" not in data


def test_an_incomplete_backbone_is_refused(tmp_path: Path) -> None:
    model = build()
    state = {k: v for k, v in model.state_dict().items() if k != "model.layers.1.mlp.up_proj.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"1 of 23 backbone tensors are missing.*layers\.1\.mlp\.up_proj\.weight"):
        minitron.NemotronForCausalLM.from_pretrained(tmp_path)
