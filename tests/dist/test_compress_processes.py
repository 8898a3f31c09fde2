"""A whole compression in two processes against the same one in one process, and what they say when one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_samples import small_recipe
from safetensors.torch import load_file

from minitron import NemotronForCausalLM
from minitron.prune.plan import PrunePlan
from minitron.prune.scores import Scores

# Only the order of sums differs: gradients and losses in fp32, statistics of importance in float64.
LOSS = {"rel": 1e-4}
WEIGHT = {"rtol": 1e-3, "atol": 1e-5}
STAGES = ["correct", "small/importance", "small/score", "small/rank", "small/prune", "small/distill", "evaluate"]
WORKER = str(Path(__file__).with_name("compress_worker.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER]


def call(command: list[str], *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, "compress", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage there is, in fp32."""
    folder = tmp_path_factory.mktemp("recipe")
    values = small_recipe(
        folder,
        correction={"kind": "full", "tokens": 256, "lr": 1e-4},
        calibration={"blocks": 5, "compensation": True},
    )
    values["train"]["dtype"] = "float32"
    path = folder / "recipe.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, command in {"one": [sys.executable, WORKER], "two": TORCHRUN}.items():
        done = call(command, "--recipe", recipe, folder / name, "--device", "cpu", "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["models"] == {"small": str(folder / name / "small/distill/run/model")}
        messages = [line for line in done.stderr.splitlines() if line.endswith((": begins", ": done before"))]
        assert messages == [f"{stage}: begins" for stage in STAGES]
    return {name: folder / name for name in ("one", "two")}


def facts(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "stage.json").read_text())["facts"]


def numbers(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def test_every_stage_finds_the_same(runs: dict[str, Path]) -> None:
    one, two = runs["one"], runs["two"]
    assert facts(two, "correct")["heldout"]["text-heldout"] == pytest.approx(
        facts(one, "correct")["heldout"]["text-heldout"], **LOSS
    )
    ours, theirs = (Scores.load(run / "small/importance/importance.safetensors") for run in (one, two))
    for name in ("neurons", "heads", "groups"):
        for left, right in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(right, left, rtol=1e-3, atol=1e-6)
    scored = [{str(r["shape"]): r["loss"] for r in facts(run, "small/score")["candidates"]} for run in (one, two)]
    assert scored[1] == pytest.approx(scored[0], **LOSS)
    ranked = [facts(run, "small/rank") for run in (one, two)]
    assert ranked[1]["order"] == ranked[0]["order"]
    for label, losses in ranked[0]["losses"].items():
        assert ranked[1]["losses"][label] == pytest.approx(losses, **LOSS)
    for name in ("chosen", "student_blocks", "teacher_blocks", "flops"):
        assert ranked[1][name] == ranked[0][name], name
    plans = [PrunePlan.load(run / "small/prune/plan.json") for run in (one, two)]
    assert (plans[1].channels, plans[1].layers) == (plans[0].channels, plans[0].layers)
    quality = [{(r["model"], r["text"], r["measure"]): r["value"] for r in facts(run, "evaluate")["quality"]} for run in (one, two)]
    assert quality[1].keys() == quality[0].keys()
    for key, value in quality[0].items():
        if "runs of 4 tokens" not in key[2]:  # of greedy text, where a tie may fall either way
            assert quality[1][key] == pytest.approx(value, rel=1e-2, abs=1e-4), key


def test_the_models_are_the_same_and_load_anywhere(runs: dict[str, Path]) -> None:
    for stage in ("correct", "small/distill"):
        one, two = (runs[name] / stage / "run" for name in ("one", "two"))
        for name in ("loss", "grad_norm"):
            assert numbers(two, name) == pytest.approx(numbers(one, name), **LOSS), (stage, name)
        left, right = (load_file(run / "model" / "model.safetensors") for run in (one, two))
        assert left.keys() == right.keys()
        for name, value in left.items():
            torch.testing.assert_close(right[name], value, **WEIGHT, msg=f"{stage} {name}")
    folder = runs["two"] / "small/distill/run"
    assert not NemotronForCausalLM.from_pretrained(folder / "model", output_loading_info=True)[1]["missing_keys"]
    assert list(folder.glob("step-*/sharded")), "the student was not sharded"
    assert numbers(folder, "heldout/text-heldout/kl"), "no divergence from the teacher on held-out text"


def test_one_process_continues_what_two_have_done(runs: dict[str, Path], recipe: Path) -> None:
    done = call([sys.executable, WORKER], "--recipe", recipe, runs["two"], "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stderr.splitlines() if line] == [f"{stage}: done before" for stage in STAGES]


@pytest.mark.parametrize(
    ("options", "failing", "says"),
    [
        (["--keep", "heads=3"], "", "error: heads is 3, not a multiple of groups"),
        (["--lr", "-1"], "", "lr is -1.0; it must be greater than 0"),
        ([], "1", "error: the floor is wet"),
        ([], "0", "error: the floor is wet"),
    ],
)
def test_an_error_ends_all_processes_with_one_sentence(
    recipe: Path, tmp_path: Path, options: list[str], failing: str, says: str
) -> None:
    done = call(TORCHRUN, "--recipe", recipe, tmp_path / "run", "--device", "cpu", *options, FAILS_IN=failing)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert says in errors[0]
