"""Weights that are NaN or infinite: every way to generate or train names the model and the tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import build
from small_distillation import small_teacher
from small_run import small_config, small_model, small_stream
from text_checkpoint import make_text_checkpoint
from torch import nn

import minitron
from minitron.evaluate.run import evaluate
from minitron.finite import NotFiniteError, check_attention, check_logits, weights_not_finite
from minitron.loading import Loaded
from minitron.train.run_folder import TrainError

PLACES = {
    "model.embed_tokens.weight": (7, 1),
    "model.layers.0.self_attn.k_proj.weight": (0, 0),
    "model.layers.1.mlp.down_proj.weight": (3, 2),
    "model.layers.0.input_layernorm.bias": (4,),
    "model.norm.weight": (0,),
    "lm_head.weight": (9, 0),
}


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    return minitron.load(make_text_checkpoint(tmp_path / "tiny"), dtype="fp32")


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("engine", ["auto", "off"])
@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": True}, {"do_sample": False, "repetition_penalty": 1.2}]
)
def test_generate_names_the_tensor(loaded: Loaded, name: str, engine: str, how: dict[str, Any]) -> None:
    loaded.model.state_dict()[name][PLACES[name]] = math.nan
    with pytest.raises(NotFiniteError, match=rf"(nan: 1 of the [\d,]+|some) numbers of {name} are NaN"):
        loaded.model.generate(torch.tensor([[5, 7, 8]]), max_new_tokens=6, engine=engine, eos_token_id=None, **how)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_a_score_that_torch_loses_is_named(loaded: Loaded, name: str) -> None:
    """With AVX-512 torch's attention gives finite outputs for scores that are NaN."""
    check_attention(loaded.model)
    loaded.model.state_dict()["model.layers.0.self_attn.v_proj.weight"][0, 0] = math.nan  # which the logits show
    check_attention(loaded.model)
    loaded.model.state_dict()[name][0, 1] = math.inf
    with pytest.raises(NotFiniteError, match=f"1 of the .* numbers of {name} are NaN or infinite"):
        check_attention(loaded.model)


def test_evaluation_names_a_score_that_torch_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = minitron.load(make_text_checkpoint(tmp_path / "tiny"), dtype="fp32")
    damaged.model.state_dict()["model.layers.0.self_attn.k_proj.weight"][0, 0] = math.nan
    monkeypatch.setattr("minitron.evaluate.run.load", lambda *_: damaged)
    monkeypatch.setattr("minitron.evaluate.run._all_tasks", lambda *_: {})
    with pytest.raises(NotFiniteError, match=r"layers\.0\.self_attn\.k_proj"):
        evaluate([str(tmp_path / "tiny")], [], "nemotron")


def test_infinite_weights(loaded: Loaded) -> None:
    loaded.model.model.norm.weight.data[2] = math.inf
    with pytest.raises(NotFiniteError, match=r"model\.norm\.weight are NaN or infinite"):
        loaded.model.generate(torch.tensor([[5, 7, 8]]), max_new_tokens=6)


def test_speculation(loaded: Loaded) -> None:
    loaded.model.lm_head.weight.data[2] = math.nan
    for draft in ("lookup", loaded.model.__class__(loaded.model.config).eval()):
        with pytest.raises(NotFiniteError, match=r"lm_head\.weight"):
            loaded.model.generate(torch.tensor([[5, 7, 8]]), max_new_tokens=6, draft=draft)


def test_numbers_between_finite_weights_that_overflow(loaded: Loaded) -> None:
    model = loaded.model
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1e30)
    with pytest.raises(NotFiniteError, match="all weights are finite, so the activations are too large"):
        model.generate(torch.tensor([[5, 7, 8]]), max_new_tokens=6)


def test_masked_logits_are_no_error() -> None:
    logits = torch.full((2, 9), -math.inf)
    logits[:, 3] = -1e30
    check_logits(logits)
    with pytest.raises(NotFiniteError, match="-inf"):
        check_logits(logits.fill_(-math.inf))


def test_the_command_line_says_so(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from typer.testing import CliRunner

    from minitron.cli import app

    folder = make_text_checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.bias"][0] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for options in (["--temperature", "0"], ["--json"], ["--format", "bf16"]):
        done = CliRunner().invoke(app, ["generate", str(folder), "-p", "the cat", "-n", "5", *options])
        assert done.exit_code == 2, done.output
        assert "the largest logit is nan" in done.output


def test_what_has_no_numbers_is_passed_over() -> None:
    with torch.device("meta"):
        assert weights_not_finite(nn.Linear(3, 2)) == ""
    assert weights_not_finite(build()) == ""


@pytest.mark.parametrize("who", ["the teacher", "the student", "the model"])
@pytest.mark.parametrize("corrected", [False, True])
def test_training_names_the_model(tmp_path: Path, who: str, corrected: bool) -> None:
    from minitron.distill.correction import CorrectedTeacher
    from minitron.distill.recipe import distill
    from minitron.distill.targets import OnlineTeacher
    from minitron.train.loop import train

    student, teacher = small_model(), small_teacher()
    broken = teacher if who == "the teacher" else student
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    targets = (CorrectedTeacher if corrected else OnlineTeacher)(teacher)

    def run() -> None:
        if who == "the model":
            train(broken, small_stream(), small_config(3), tmp_path / "run", quiet=True)
        else:
            distill(student, targets, small_stream(), small_config(3), tmp_path / "run", quiet=True)

    with pytest.raises(NotFiniteError, match=rf"^{who} cannot be used: 1 of the [\d,]+ numbers of model.layers.0.mlp"):
        run()
    assert not (tmp_path / "run" / "train.json").exists()


@pytest.mark.parametrize("who", ["the teacher", "the student"])
def test_a_first_step_that_overflows_is_not_blamed_on_the_learning_rate(tmp_path: Path, who: str) -> None:
    from minitron.distill.recipe import distill
    from minitron.distill.targets import OnlineTeacher

    student, teacher = small_model(), small_teacher()
    broken = teacher if who == "the teacher" else student
    broken.model.layers[0].mlp.up_proj.weight.data.fill_(1e30)
    with pytest.raises(TrainError, match=f"step 1: .*No update was made yet.*: {who} computes NaN"):
        distill(student, OnlineTeacher(teacher), small_stream(), small_config(3), tmp_path / "run", quiet=True)
