"""The whole recipe on a tiny model: what comes out loads everywhere, and every stage resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from compress_samples import small_recipe
from transformers.models.nemotron.modeling_nemotron import NemotronForCausalLM as Upstream
from typer.testing import CliRunner

import minitron
from minitron.checkpoint.fingerprint import fingerprint
from minitron.checkpoint.hf import read_config
from minitron.cli import app
from minitron.compress.recipe import RecipeError, recipe_from
from minitron.compress.run import Compressed, compress
from minitron.compress.stages import RunError
from minitron.prune.plan import PrunePlan
from minitron.report.facts import Report
from minitron.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compress")


@pytest.fixture(scope="module")
def made(base: Path) -> Compressed:
    return compress(recipe_from(small_recipe(base)), base / "run", quiet=True, say=lambda _: None)


def test_the_model_meets_the_budget_and_upstream_computes_the_same(made: Compressed, base: Path) -> None:
    folder = made.models["small"]
    model, tokenizer = minitron.load(folder, dtype="fp32")
    assert tokenizer.model_max_length == load_tokenizer(base / "teacher").model_max_length
    assert 0.95 * 9000 <= model.config.num_non_embedding_parameters() <= 1.05 * 9000
    ids = tokenizer("the cat sat on", return_tensors="pt").input_ids
    theirs = Upstream.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)


def test_the_report_knows_what_happened(made: Compressed, base: Path) -> None:
    report = Report.from_json(made.report.with_suffix(".json"))
    assert [model.name for model in report.models] == ["teacher", "small"]
    assert sum(row.outcome == "chosen" for row in report.candidates) == 1
    assert {stage.name.rsplit("/")[-1] for stage in report.stages} >= {
        "importance",
        "score",
        "rank",
        "prune",
        "distill",
    }
    assert report.hashes["small"] == fingerprint(made.models["small"])
    assert report.curves[0].loss
    recipe = json.loads((base / "run" / "recipe.json").read_text())
    assert recipe_from(recipe) == recipe_from(small_recipe(base))


def test_retraining_by_the_teacher_lowers_its_divergence(made: Compressed) -> None:
    rows = [json.loads(line) for line in (made.models["small"].parent / "metrics.jsonl").read_text().splitlines()]
    kl = [row["kl"] for row in rows if "kl" in row]
    assert kl[-1] < kl[0]
    assert any("heldout/text-heldout/kl" in row for row in rows)


def test_a_moved_run_is_complete_and_a_second_call_computes_nothing(made: Compressed, base: Path) -> None:
    moved = base / "moved"
    shutil.copytree(base / "run", moved)
    said: list[str] = []
    again = compress(recipe_from(small_recipe(base)), moved, quiet=True, say=said.append)
    assert all(text.endswith("done before") for text in said)
    assert fingerprint(again.models["small"]) == fingerprint(made.models["small"])


def test_candidates_that_go_on_from_round_to_round_do_not_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compress(recipe_from(small_recipe(tmp_path)), tmp_path / "run", quiet=True, say=lambda _: None)
    assert "continuing from" not in capsys.readouterr().err


def test_a_run_that_does_not_fit_the_memory_is_refused_before_it_begins(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.train.memory.available_memory", lambda: 100_000)
    with pytest.raises(RecipeError, match=r"train: this needs about .* 0\.0 GB are free: .*fields of train"):
        compress(recipe_from(small_recipe(base)), tmp_path / "run", quiet=True, say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_another_recipe_in_the_same_folder_is_refused(made: Compressed, base: Path) -> None:
    other = small_recipe(base, calibration={"blocks": 3})
    with pytest.raises(RunError, match="made with other inputs"):
        compress(recipe_from(other), base / "run", quiet=True, say=lambda _: None)


def test_several_sizes_are_pruned_from_one_another_with_a_corrected_teacher(base: Path, tmp_path: Path) -> None:
    values = small_recipe(
        base,
        targets=[{"keep": "ffn=48", "name": "large"}, {"keep": "ffn=32,heads=2", "name": "small"}],
        calibration={"blocks": 4, "compensation": True},
        correction={"kind": "norms", "tokens": 256},
    )
    made = compress(recipe_from(values), tmp_path / "run", quiet=True, say=lambda _: None)
    sizes = [minitron.load(folder).model.config.intermediate_size for folder in made.models.values()]
    assert sizes == [48, 32]
    plan = json.loads((tmp_path / "run" / "small" / "prune" / "plan.json").read_text())
    assert plan["source"] == fingerprint(made.models["large"])
    fits = json.loads((tmp_path / "run" / "small" / "prune" / "model" / "compensation.json").read_text())
    assert fits["plan"] == PrunePlan.load(tmp_path / "run" / "small" / "prune" / "plan.json").hash
    assert any(row["accepted"] for row in fits["parts"])


# --- command line ------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["compress", *map(str, arguments)])
    return done.exit_code, done.output


def test_dry_run_prints_every_stage_and_computes_none(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(small_recipe(base, calibration={"blocks": 4, "compensation": True})))
    code, text = invoke("--recipe", recipe, tmp_path / "run", "--dry-run", "--json")
    assert code == 0, text
    rows = {row["name"]: row for row in json.loads(text)["stages"]}
    assert list(rows) == ["small/importance", "small/score", "small/rank", "small/prune", "small/distill"]
    assert all(row["flops"] > 0 and row["hours"] > 0 for row in rows.values())
    assert not (tmp_path / "run" / "small").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--non-embedding-params", "5"], "the nearest has"),
        (["--params", "many"], "--params is 'many'"),
        (["--keep", "heads=3"], "not a multiple of groups"),
        (["--sequence", "100"], "the model's context is 64"),
        (["--tokens", "none"], "is not a number of tokens"),
        (["--data", "nothing.txt"], "nothing.txt"),
    ],
)
def test_bad_input_is_one_sentence(base: Path, tmp_path: Path, options: list[str], says: str) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(small_recipe(base)))
    code, text = invoke("--recipe", recipe, tmp_path / "run", *options)
    assert code == 2, text
    assert says in text
    assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_before_a_run_is_accepted(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({**small_recipe(base), "calibration": {"blocks": 9999, "compensation": False}}))
    run = tmp_path / "new" / "run"
    for options in (["--params", "7"], ["--params", "7", "--dry-run"], ["--device", "cuda:99"], ["--encoding", "hex"]):
        code, _ = invoke("--recipe", recipe, run, *options)
        assert code == 2
        assert not run.parent.exists()
    code, text = invoke("--recipe", recipe, run, "--dry-run")
    assert code == 0, text
    assert "note: calibration: blocks is 9,999; the data has " in text
    assert "and all of them are used" in text
    assert not run.parent.exists()
    code, text = invoke("--recipe", recipe, run, "--dry-run", "--cache", tmp_path / "cache")
    assert code == 0, text
    assert not run.parent.exists()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # A folder with nothing but tokens, which an interrupted command leaves, is free.
    (run / "token-cache").mkdir(parents=True)
    assert invoke("--recipe", recipe, run, "--dry-run")[0] == 0
    for prompts, says in ((["the cat " * 200], "prompts[0] has"), (["a\ud800"], "prompts[0] is not UTF-8 text")):
        recipe.write_text(json.dumps({**small_recipe(base), "prompts": prompts}))
        code, text = invoke("--recipe", recipe, tmp_path / "other")
        assert code == 2
        assert says in text
    assert not (tmp_path / "other").exists()


def test_sizes_are_targets_and_their_former_option_says_so(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(small_recipe(base)))
    whole = read_config(base / "teacher").num_parameters()
    sizes = f"{round(0.95 * whole)},{round(0.8 * whole)}"
    command = ["compress", "--recipe", str(recipe), str(tmp_path / "run"), "--dry-run", "--json"]
    now, former = (CliRunner().invoke(app, [*command, option, sizes]) for option in ("--sizes", "--steps"))
    assert (now.exit_code, former.exit_code) == (0, 0), now.output + former.output
    named = [[row["name"] for row in json.loads(found.stdout)["stages"]] for found in (now, former)]
    assert named[0] == named[1]
    assert list(dict.fromkeys(name.split("/")[0] for name in named[0])) == sizes.split(",")
    notes = [line for line in former.stderr.splitlines() if "deprecated" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: --steps is deprecated, use --sizes")
    assert "deprecated" not in now.stderr
    assert "--steps" not in CliRunner().invoke(app, ["compress", "--help"]).output
    for options, says in (
        (["--sizes", sizes, "--params", "1k"], "a budget or --sizes, not both"),
        (["--sizes", "1k", "--steps", "1k"], "--sizes and --steps"),
    ):
        code, text = invoke("--recipe", recipe, tmp_path / "run", *options)
        assert (code, says in text) == (2, True), text


@pytest.mark.slow
def test_the_laptop_recipe_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = invoke("--recipe", "laptop", tmp_path / "run", "--json")
    assert code == 0, text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    teacher, half = (model["non_embedding"] for model in report["models"])
    assert 0.95 * 1.44e6 <= half <= 1.05 * 1.44e6 < teacher


def test_a_full_folder_of_something_else_is_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    recipe = base / "recipe.json"
    recipe.write_text(json.dumps(small_recipe(base)))
    code, text = invoke("--recipe", recipe, tmp_path)
    assert code == 2
    assert "not the folder of a compression" in text
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
