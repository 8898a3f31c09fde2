"""`minitron distill` from two checkpoints to a third, and its sentences for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from text_checkpoint import save_byte_tokenizer
from typer.testing import CliRunner

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.cli.distill import distill
from minitron.cli.teacher_cache import teacher_cache
from minitron.cli.train import train

LENGTH = ["--steps", "4", "--batch", "4", "--micro-batch", "2", "--sequence", "32", "--warmup", "1", "--lr", "3e-3"]
EXACT = ["--dtype", "float32", "--peak-tflops", "0.1"]


def save_model(folder: Path, seed: int, extra: int = 0, **shape: int) -> Path:
    """A small checkpoint with a byte-level tokenizer, whose vocabulary `extra` makes another one."""
    size = save_byte_tokenizer(folder, extra)
    torch.manual_seed(seed)
    values = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = NemotronConfig(
        **{**values, **shape},  # type: ignore[arg-type]
        vocab_size=size,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    NemotronForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, `student`, `other` (another tokenizer) and `text.jsonl`."""
    where = tmp_path_factory.mktemp("distill")
    save_model(where / "teacher", 0, hidden_size=24, num_hidden_layers=4, num_attention_heads=3)
    save_model(where / "student", 1)
    save_model(where / "other", 1, extra=1)
    rows = [{"text": f"Story {i}. A cat sat on mat number {i} and slept. " * (i % 3 + 1)} for i in range(30)]
    (where / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where


def call(verb, *arguments: object) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(verb)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_from_two_checkpoints_to_a_third(folder: Path, tmp_path: Path) -> None:
    pair = [folder / "student", "--teacher", folder / "teacher", "--data", folder / "text.jsonl"]
    run = ["--heldout-share", 0.2, *LENGTH, *EXACT, "--out", tmp_path / "run"]
    code, output, errors = call(distill, *pair, *run, "--json")
    assert code == 0, errors
    result = json.loads(output)
    assert result["step"] == 4
    assert result["stopped_by"] is None
    heldout = result["heldout"]["text-heldout"]
    assert heldout["kl"] > 0
    assert set(heldout) == {"nats_per_token", "bits_per_byte", "kl", "top1"}
    assert "of the given 0.1 TFLOP/s" in errors
    assert result["estimate"]["seconds_per_step"] > 0
    model = NemotronForCausalLM.from_pretrained(result["model"], dtype="auto")
    assert model.dtype == torch.bfloat16  # as the student's checkpoint
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "kl", "ce", "top1", "mfu", "tokens_per_second"} <= rows[0].keys()
    assert rows[0]["loss"] == pytest.approx(rows[0]["kl"])

    code, output, errors = call(distill, *pair, *run)
    assert code == 0, errors
    assert f"continuing from {result['checkpoint']}" in errors
    assert "model: " in output
    # The teacher's content is part of what the run is.
    again = save_model(tmp_path / "another", 5, hidden_size=24, num_hidden_layers=4, num_attention_heads=3)
    code, _, errors = call(distill, folder / "student", "--teacher", again, *pair[3:], *run)
    assert code == 2
    assert "holds another run" in errors
    assert "checkpoints" in errors


def test_every_option_of_the_losses_reaches_them(folder: Path, tmp_path: Path) -> None:
    pair = [folder / "student", "--teacher", folder / "teacher", "--data", folder / "text.jsonl"]
    more = ["--hidden", "mse", "--layer-map", "2:0", "--layer-map", "3:1", "--embeddings", "--ce-weight", 0.5]
    more += ["--loss", "jsd", "--temperature", 2, "--correct-teacher", "--optimizer", "adamw", "--recompute", "mlp"]
    code, _, errors = call(distill, *pair, *more, *LENGTH, *EXACT, "--out", tmp_path / "run")
    assert code == 0, errors
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"jsd", "ce", "hidden", "alpha", "teacher_ce", "teacher_grad_norm"} <= rows[0].keys()
    about = json.loads((tmp_path / "run" / "train.json").read_text())["loss"]
    assert about["loss"]["layer_map"] == [[2, 0], [3, 1]]


def test_what_cannot_be_is_one_sentence_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    pair = [folder / "student", "--teacher", folder / "teacher"]
    data = ["--data", folder / "text.jsonl"]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    cases = [
        ([folder / "student", *data, *LENGTH], "give --teacher"),
        ([folder / "other", "--teacher", folder / "teacher", *data, *LENGTH], "has vocab_size 260 and"),
        ([*pair, *data, *LENGTH, "--loss", "l2"], "kind is 'l2'; it must be one of"),
        ([*pair, *data, *LENGTH, "--layer-map", "last"], "--layer-map is 'last'; it must be TEACHER:STUDENT"),
        ([*pair, *data, *LENGTH, "--hidden", "mse", "--layer-map", "9:0"], "layer map 9:0 does not fit"),
        ([*pair, *data], "give exactly one of steps, tokens and hours"),
        ([*pair, *data, *LENGTH, "--tensor-parallel", 2], "with one process it must be 1"),
        ([*pair, *data, *LENGTH, "--optimizer", "sgd"], "optimizer is 'sgd'; it must be adamw, adamw8bit or offload"),
        ([*pair, *data, *LENGTH, "--sequence", 128], "max_position_embeddings is 64"),
        ([*pair, "--data", tmp_path / "empty.txt", *LENGTH], "empty.txt: no text in it"),
        ([*pair, "--data", tmp_path / "binary.txt", *LENGTH], "binary.txt: holds NUL bytes"),
        ([tmp_path, "--teacher", folder / "teacher", *data, *LENGTH], str(tmp_path)),
        ([folder / "student", "--teacher", tmp_path, *data, *LENGTH], str(tmp_path)),
    ]
    for arguments, says in cases:
        code, _, errors = call(distill, *arguments, *EXACT, "--out", tmp_path / "run")
        last = errors.strip().splitlines()[-1]
        assert (code, last[:7]) == (2, "error: "), (arguments, errors)
        assert says in last
        assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tune", ["norms", "lora"])
def test_a_teacher_is_corrected_before_the_distillation(folder: Path, tmp_path: Path, tune: str) -> None:
    before = {**NemotronForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).state_dict()}
    start = ["--init", folder / "teacher", "--tune", tune, "--lora-rank", 2, "--data", folder / "text.jsonl"]
    run = ["--heldout", folder / "text.jsonl", *LENGTH, *EXACT, "--out", tmp_path / "run", "--json"]
    code, output, errors = call(train, *start, *run)
    assert code == 0, errors
    model = NemotronForCausalLM.from_pretrained(json.loads(output)["model"])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    matrices = {name for name in before if "_proj" in name}
    assert changed == ({name for name in before if "norm" in name} if tune == "norms" else matrices)
    # The file computes what was trained and measured.
    heldout = json.loads(output)["heldout"]["text"]["nats_per_token"]
    code, output, errors = call(train, *start, *run)  # a finished run is measured again, from its checkpoint
    assert code == 0, errors
    assert json.loads(output)["heldout"]["text"]["nats_per_token"] == pytest.approx(heldout, rel=1e-6)
    plain = ["--init", tmp_path / "run" / "model", "--data", folder / "text.jsonl", "--heldout", folder / "text.jsonl"]
    code, output, errors = call(train, *plain, *LENGTH, *EXACT, "--lr", 1e-30, "--out", tmp_path / "b", "--json")
    assert code == 0, errors
    assert json.loads(output)["heldout"]["text"]["nats_per_token"] == pytest.approx(heldout, rel=1e-5)


def test_from_a_cache_of_the_teachers_answers(folder: Path, tmp_path: Path) -> None:
    """The exact cache gives the run that the teacher itself would, and another teacher's is refused."""
    data = ["--data", folder / "text.jsonl", "--heldout-share", 0.2, "--sequence", 32, "--dtype"]
    code, _, errors = call(teacher_cache, folder / "teacher", *data, "fp32", "--out", tmp_path / "targets")
    assert code == 0, errors
    run = [*data, "float32", *(x for x in LENGTH if x not in ("--sequence", "32")), "--peak-tflops", 0.1]
    rows = {}
    for name, teacher in (
        ("online", ["--teacher", folder / "teacher"]),
        ("cached", ["--teacher-cache", tmp_path / "targets"]),
    ):
        code, _, errors = call(distill, folder / "student", *teacher, *run, "--out", tmp_path / name)
        assert code == 0, errors
        rows[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    losses = {name: [row["loss"] for row in part if "loss" in row] for name, part in rows.items()}
    assert losses["cached"] == pytest.approx(losses["online"], rel=1e-4)
    other = save_model(tmp_path / "other", 7, hidden_size=24, num_hidden_layers=4, num_attention_heads=3)
    both = ["--teacher", other, "--teacher-cache", tmp_path / "targets"]
    code, _, errors = call(distill, folder / "student", *both, *run, "--out", tmp_path / "refused")
    assert code == 2
    assert "made by another teacher" in errors
    both = ["--teacher", folder / "teacher", "--teacher-cache", tmp_path / "targets", "--correct-teacher"]
    code, _, errors = call(distill, folder / "student", *both, *run, "--out", tmp_path / "refused")
    assert code == 2
    assert "cannot be trained; give either --correct-teacher or --teacher-cache" in errors
    assert not (tmp_path / "refused").exists()
