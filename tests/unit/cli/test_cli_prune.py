"""`minitron prune` from end to end, its sentences for what cannot be, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from model_samples import token_ids, upstream
from safetensors.torch import load_file, save_file
from text_checkpoint import make_text_checkpoint
from typer.testing import CliRunner

import minitron
from minitron.bench.speeds import Speed
from minitron.checkpoint.fingerprint import fingerprint
from minitron.cli.prune import prune
from minitron.prune import pipeline as job
from minitron.prune import steps
from minitron.prune.plan import PrunePlan
from minitron.prune.scores import Scores

QUICK = ["--no-measure", "--sequence", "32", "--samples", "8"]
SHAPE = ["--keep", "heads=2,ffn=32,hidden=24"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_text_checkpoint(tmp_path_factory.mktemp("prune") / "model", max_shard_size="20KB")
    (folder / "LICENSE").write_text("terms")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: terms\nmetrics: x\n---\n# Big\n")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    rows = [{"text": f"the cat {i} sat on the mat and the dog ran to the sea. " * 3} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(*arguments: object) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(prune)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def well(*arguments: object) -> dict[str, Any]:
    code, output, errors = call(*arguments, "--json")
    assert code == 0, errors
    return json.loads(output)


def test_a_shape(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    code, output, errors = call(source, out, *SHAPE, "--calibration", text, *QUICK)
    assert code == 0, errors
    assert "importance on 8 blocks of 32 tokens" in errors
    assert "GB of memory" in errors
    assert "parameters: total" in output
    model = upstream.NemotronForCausalLM.from_pretrained(out).eval()
    ours = minitron.NemotronForCausalLM.from_pretrained(out).eval()
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.head_dim) == (24, 2, 8)
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, ours(token_ids()).logits)
    plan = PrunePlan.load(out / "pruning" / "plan.json")
    assert plan.source == fingerprint(source)
    assert Scores.load(out / "pruning" / "importance.safetensors").num_layers == 2
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: other\nlicense_name: terms\nlibrary_name: minitron\n")
    assert plan.hash in card
    assert str(text) in card
    assert (out / "LICENSE").read_text() == "terms"
    assert (out / "pruning" / "source-card.md").read_text().endswith("# Big\n")
    assert minitron.load(out).tokenizer("hello")["input_ids"]
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    # The card's own commands make the same again.
    again = well(source, tmp_path / "again", "--plan", out / "pruning" / "plan.json", *QUICK)
    assert again["plan"] == plan.hash
    assert fingerprint(tmp_path / "again") == fingerprint(out)
    third = well(source, tmp_path / "third", "--scores", out / "pruning" / "importance.safetensors", *SHAPE, *QUICK)
    assert third["plan"] == plan.hash


def test_a_budget_is_searched_measured_and_reported(source: Path, text: Path, tmp_path: Path) -> None:
    options = ["--non-embedding-params", "9k", "--tolerance", 0.2, "--calibration", text, "--rank", "kl"]
    result = well(source, tmp_path / "small", *options, "--sequence", 32, "--samples", 8)
    assert 7200 <= result["after"]["parameters"]["non_embedding"] <= 9000
    scores = [row["score"] for row in result["candidates"]]
    assert len(scores) > 1
    assert scores == sorted(scores)
    assert result["after"]["loss"] > 0
    assert result["after"]["measured_tokens_per_second"] > 0
    assert result["after"]["predicted_tokens_per_second"] > result["before"]["predicted_tokens_per_second"]
    rows = (tmp_path / "small" / "pruning" / "candidates.jsonl").read_text().splitlines()
    assert len(rows) == len(scores)
    kept = [json.loads(row) for row in rows if json.loads(row)["plan"] == result["plan"]]
    assert kept[0]["score"] == scores[0]
    few = well(source, tmp_path / "few", *options, *QUICK, "--candidates", 2, "--keep", "layers=2")
    assert len(few["candidates"]) == 2
    assert {row["architecture"]["layers"] for row in few["candidates"]} == {2}


def test_doubtful_speeds_are_marked_wherever_they_are_shown(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {name: Speed(rate, (rate, rate), 0.25, "cpu") for name, rate in (("source", 9.7), ("result", 9.1))}
    monkeypatch.setattr(job.costs, "measured_speeds", lambda *_: (speeds, "other programs used 1.8 of 2 cores"))
    command = [source, tmp_path / "small", *SHAPE, "--calibration", text, "--sequence", "32", "--samples", "8"]
    code, output, errors = call(*command)
    assert code == 0, errors
    assert "tokens/s, measured (doubtful, see the notes)" in output
    assert "seconds to the first token" in output
    card = (tmp_path / "small" / "README.md").read_text()
    plan = PrunePlan.load(tmp_path / "small" / "pruning" / "plan.json")
    for place in (output, card, " ".join(plan.notes)):
        assert "Speed of the source: measured on a busy machine: other programs used 1.8 of 2 cores" in place
        assert "Speed of the result: measured on a busy machine" in place
        assert "of the predicted" in place
        assert "9.1 tokens/s is slower than the model it was cut from (9.7)" in place
    fast = {name: Speed(rate, (rate, rate), 0.25, "cpu") for name, rate in (("source", 1e9), ("result", 2e9))}
    monkeypatch.setattr(job.costs, "measured_speeds", lambda *_: (fast, ""))
    code, output, errors = call(*command, "--overwrite")
    assert code == 0, errors
    assert "(doubtful" not in output
    assert PrunePlan.load(tmp_path / "small" / "pruning" / "plan.json").notes == ()


def test_sorted_and_then_a_prefix(source: Path, text: Path, tmp_path: Path) -> None:
    well(source, tmp_path / "sorted", "--sorted", "--calibration", text, *QUICK)
    before, after = (upstream.NemotronForCausalLM.from_pretrained(p).eval() for p in (source, tmp_path / "sorted"))
    with torch.no_grad():
        torch.testing.assert_close(after(token_ids()).logits, before(token_ids()).logits)
    plan = PrunePlan.load(tmp_path / "sorted" / "pruning" / "plan.json")
    assert plan.channels != tuple(range(32))
    tensors = {n: t for p in (tmp_path / "sorted").glob("model*.safetensors") for n, t in load_file(p).items()}
    assert tensors["model.norm.weight"].shape == (32,)


def test_compensation_lowers_the_error_or_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    result = well(source, tmp_path / "small", *SHAPE, "--compensate", "--calibration", text, *QUICK)
    assert any(note.startswith("Compensation: ") for note in result["notes"])
    rows = json.loads((tmp_path / "small" / "compensation.json").read_text())["parts"]
    assert all(row["accepted"] == (row["after"] < row["before"]) for row in rows)
    plain = well(source, tmp_path / "plain", *SHAPE, "--calibration", text, *QUICK)
    assert plain["plan"] == result["plan"]
    assert (fingerprint(tmp_path / "plain") != fingerprint(tmp_path / "small")) == any(row["accepted"] for row in rows)


def test_an_interrupted_run_goes_on(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def measure(*arguments: Any, **options: Any) -> Scores:
        calls.append("importance")
        return real_measure(*arguments, **options)

    def cut(*_: Any, **__: Any) -> None:
        calls.append("cut")
        raise KeyboardInterrupt

    real_measure, real_cut = steps.compute_importance, steps.prune_checkpoint
    monkeypatch.setattr(steps, "compute_importance", measure)
    monkeypatch.setattr(steps, "prune_checkpoint", cut)
    command = [source, tmp_path / "small", *SHAPE, "--calibration", text, *QUICK]
    code, _, errors = call(*command)
    assert code == 130, errors
    assert not (tmp_path / "small").exists()
    monkeypatch.setattr(steps, "prune_checkpoint", real_cut)
    well(*command)
    assert calls == ["importance", "cut"]
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "the size of the result is missing: give one of --params"),
        (["--params", "4B", "--memory", "6GB"], "--params and --memory were given together"),
        (["--params", "many"], "--params is 'many'; expected something like 4B"),
        (["--params", "4B"], "itself, which is within the budget of at most 4.00B parameters; nothing needs to be cut"),
        (["--params", "100"], "no shape of the grid has at most 100 parameters; the nearest has"),
        (["--memory", "1kB"], "no shape of the grid has at most 1.00kB; the nearest has"),
        (["--keep", "heads=3"], "heads is 3, not a multiple of groups (2)"),
        (["--grid", "mine", "--params", "4M"], "--grid is 'mine'; it must be auto, paper-8b, paper-4b"),
        (["--grid", "paper-4b"], "no shape of the grid can be cut out of a model of 2 layers"),
        (["--params", "20k", "--rank", "guess"], "--rank is 'guess'; it must be loss or kl"),
        (["--keep", "hidden=16", "--depth", "age"], "depth is 'age'"),
        (["--keep", "hidden=16", "--calibration", "/none/such.txt"], "no text file there"),
        (["--plan", "/none/plan.json"], "/none/plan.json: no such file"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(source: Path, tmp_path: Path, options: list[str], sentence: str) -> None:
    code, output, errors = call(source, tmp_path / "small", *options, *QUICK)
    assert code == 2, output + errors
    assert sentence in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not (tmp_path / "small").exists()


def test_texts_plans_and_scores_that_do_not_fit(source: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a cat")
    code, _, errors = call(source, tmp_path / "small", *SHAPE, "--calibration", tmp_path / "short.txt", *QUICK)
    assert (code, "fills 1 blocks of 32 tokens; at least 4 are needed" in errors) == (2, True)
    other = make_text_checkpoint(tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["model.norm.bias"] += 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    well(other, tmp_path / "cut", *SHAPE, "--calibration", text, *QUICK)
    for option, file in (("--plan", "plan.json"), ("--scores", "importance.safetensors")):
        extra = SHAPE if option == "--scores" else []
        code, _, errors = call(source, tmp_path / "small", option, tmp_path / "cut" / "pruning" / file, *extra, *QUICK)
        assert code == 2
        assert "made for the checkpoint" in errors or "of another checkpoint" in errors
    code, _, errors = call(source, tmp_path / "cut", *SHAPE, *QUICK)
    assert (code, "is there already; pass --overwrite" in errors) == (2, True)
    code, _, errors = call(tmp_path / "nothing", tmp_path / "small", *SHAPE)
    assert (code, "no such file or folder" in errors) == (2, True)
