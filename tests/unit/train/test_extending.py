"""A run made longer: bit for bit the longer run where the learning rate allows it, and a sentence where it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import small_config, small_model, small_stream

from minitron.train.loop import TrainError, train
from minitron.train.schedule import TrainConfig


def run(folder: Path, config: TrainConfig, **how: Any) -> Any:
    return train(small_model(), small_stream(), config, folder, quiet=True, **how)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def config_of(steps: int, **changes: Any) -> TrainConfig:
    return small_config(steps, **{"warmup": 2, "save_every": 0, "eval_every": 0, "dtype": "float32", **changes})


@pytest.mark.parametrize(
    ("changes", "step"),
    [({"schedule": "constant"}, 10), ({"schedule": "wsd", "decay": 0.3}, 8)],
    ids=["constant", "wsd"],
)
def test_a_longer_run_is_what_it_would_have_been(
    tmp_path: Path, changes: dict[str, Any], step: int, capfd: pytest.CaptureFixture[str]
) -> None:
    short, long = config_of(10, **changes), config_of(14, **changes)
    whole = run(tmp_path / "whole", long)
    run(tmp_path / "run", short)
    finished = weights(tmp_path / "run" / "model")
    with pytest.raises(TrainError, match=r"holds a run of 10 steps, 14 steps are asked for; --extend lengthens it$"):
        run(tmp_path / "run", long)
    capfd.readouterr()
    train(small_model(), small_stream(), long, tmp_path / "run", extend=True, until=12)
    said = capfd.readouterr().err
    assert f"lengthened from 10 steps to 14 steps, continuing from step {step}" in said
    assert "so far it is the same as a run of 14 steps" in said
    assert not (tmp_path / "run" / "model").exists()  # not that of another length while the run is going on
    kept = weights(tmp_path / "run" / "model-step-10")
    assert all(torch.equal(kept[name], finished[name]) for name in finished)
    # The same command goes on after an interruption.
    result = run(tmp_path / "run", long, extend=True)
    assert result.step == whole.step == 14
    assert same(result.checkpoint, whole.checkpoint)
    assert same(tmp_path / "run" / "model", tmp_path / "whole" / "model")
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("run", "whole")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    record = json.loads((tmp_path / "run" / "train.json").read_text())["extended"]
    assert record == [{"from": "10 steps", "to": "14 steps", "step": step, "as_from_the_start": True}]
    # A second time, in tokens.
    longer = replace(long, steps=None, tokens=16 * long.tokens_per_step)
    assert run(tmp_path / "run", longer, extend=True).step == 16
    assert len(json.loads((tmp_path / "run" / "train.json").read_text())["extended"]) == 2


def test_a_cosine_goes_on_and_says_that_it_is_another_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", config_of(6, schedule="cosine"))
    first = weights(tmp_path / "run" / "step-6")
    long = config_of(9, schedule="cosine", lr=1e-3)
    with pytest.raises(TrainError, match=r"holds another run; .* train lr was"):
        run(tmp_path / "run", long, extend=True)
    train(small_model(), small_stream(), config_of(9, schedule="cosine"), tmp_path / "run", extend=True)
    said = capfd.readouterr().err
    assert "continuing from step 6; its steps so far had the learning rates of 6 steps" in said
    assert "the result is not that of a run of 9 steps from the start" in said
    record = json.loads((tmp_path / "run" / "train.json").read_text())["extended"]
    assert record[0]["as_from_the_start"] is False
    kept = weights(tmp_path / "run" / "model-step-6")
    assert all(torch.equal(kept[name], first[name]) for name in first)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "lr" in row] == list(range(1, 10))


def test_an_interrupted_run_can_be_lengthened(tmp_path: Path) -> None:
    changes = {"schedule": "wsd", "decay": 0.5}
    run(tmp_path / "run", config_of(10, **changes), until=4)
    run(tmp_path / "run", config_of(12, **changes), extend=True)
    whole = run(tmp_path / "whole", config_of(12, **changes))
    assert same(tmp_path / "run" / "model", whole.model)
    assert not (tmp_path / "run" / "model-step-4").exists()


def test_what_cannot_be_lengthened_is_a_sentence_and_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="holds no run that could be lengthened"):
        run(tmp_path / "run", config_of(4), extend=True)
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", config_of(4))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for config, says in (
        (config_of(3), "holds a run of 4 steps, 3 steps are asked for; a run can be lengthened, not shortened"),
        (replace(config_of(4), steps=None, hours=1.0), "a run that counts in hours is lengthened in hours"),
    ):
        with pytest.raises(TrainError, match=says):
            run(tmp_path / "run", config, extend=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(TrainError, match="is not empty and is not the folder of a run"):
        run(tmp_path / "other", config_of(4), extend=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_a_run_without_a_checkpoint_begins_anew_with_other_settings(tmp_path: Path) -> None:
    """A first step that fails must not make its folder useless for the corrected command."""
    with pytest.raises(TrainError, match="so training stopped"):
        run(
            tmp_path / "run",
            config_of(4, lr=1e-3),
            loss=lambda model, batch: (next(model.parameters()).sum() * float("nan"), {}),
        )
    assert (tmp_path / "run" / "train.json").is_file()
    assert run(tmp_path / "run", config_of(4, lr=1e-4)).step == 4
    assert json.loads((tmp_path / "run" / "train.json").read_text())["train"]["lr"] == 1e-4


def test_an_optimizer_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"the model is on the CPU already|needs torchao"):
        run(tmp_path / "run", config_of(4, optimizer="offload"))
    assert not (tmp_path / "run").exists()
