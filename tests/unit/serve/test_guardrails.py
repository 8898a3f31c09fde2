"""The configuration of NeMo Guardrails: what stands in it, and options that cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from minitron.cli import app
from minitron.files import TargetError
from minitron.serve.guardrails import GuardOptions, render, write_guardrails


def config(**options: object) -> dict:
    return yaml.safe_load(render(GuardOptions(**options))["config.yml"])  # type: ignore[arg-type]


def test_everything_stands_in_it() -> None:
    found = config(
        server="http://127.0.0.1:9000/", model="m:1", classifier='it\'s "odd"', labels=("spam", "toxic: yes"),
        threshold=0.9, embeddings="e", similarity=0.6, self_check=True,
    )  # fmt: skip
    main, embeddings = found["models"]
    assert main == {
        "type": "main", "engine": "openai", "model": "m:1",
        "parameters": {"base_url": "http://127.0.0.1:9000/v1", "api_key": "none"},
    }  # fmt: skip
    assert embeddings["model"] == "e"
    assert found["rails"]["config"]["hf_classifier"]["guard"] == {
        "engine": "vllm", "model": 'it\'s "odd"', "base_url": "http://127.0.0.1:9000", "threshold": 0.9,
        "blocked_labels": ["spam", "toxic: yes"],
    }  # fmt: skip
    assert found["rails"]["input"]["flows"] == [
        "regex check input", 'hf classifier check input $classifier="guard"', "self check input"
    ]  # fmt: skip
    assert found["rails"]["output"]["flows"] == [
        "regex check output", 'hf classifier check output $classifier="guard"', "self check output"
    ]  # fmt: skip
    assert found["rails"]["dialog"]["user_messages"]["embeddings_only_similarity_threshold"] == 0.6


def test_what_is_not_asked_for_is_not_there() -> None:
    files = render(GuardOptions(dialog=False))
    assert sorted(files) == ["config.yml", "run.py"]
    found = yaml.safe_load(files["config.yml"])
    assert [model["type"] for model in found["models"]] == ["main"]
    assert set(found["rails"]) == {"config", "input", "output"}
    assert set(found["rails"]["config"]) == {"regex_detection"}


def test_a_key_is_named_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAILS_KEY", "sesame")
    files = render(
        GuardOptions(server="https://models.example", classifier="c", labels=("x",), key_variable="RAILS_KEY")
    )
    assert "sesame" not in "".join(files.values())
    found = yaml.safe_load(files["config.yml"])
    assert found["models"][0]["api_key_env_var"] == "RAILS_KEY"
    assert found["rails"]["config"]["hf_classifier"]["guard"]["api_key_env_var"] == "RAILS_KEY"
    assert 'os.environ["OPENAI_API_KEY"] = os.environ["RAILS_KEY"]' in files["run.py"]


@pytest.mark.parametrize("options", [{}, {"self_check": True, "key_variable": "K"}, {"dialog": False}])
def test_run_py_switches_telemetry_off_before_the_import(options: dict) -> None:
    text = render(GuardOptions(**options))["run.py"]
    compile(text, "run.py", "exec")
    for variable in ("NEMO_GUARDRAILS_NO_USAGE_STATS", "DO_NOT_TRACK"):
        assert 0 < text.index(f'os.environ["{variable}"] = "1"') < text.index("from nemoguardrails")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server": "localhost:8000"}, "--server is 'localhost:8000'; it must be an address"),
        ({"server": "http://localhost:8000/v1"}, "give it without a path, such as http://localhost:8000"),
        ({"threshold": 1.5}, "--threshold is 1.5; it must be between 0 and 1"),
        ({"similarity": float("nan")}, "--similarity is nan"),
        ({"classifier": "c"}, "--classifier needs --block"),
        ({"labels": ("x",)}, "name it with --classifier"),
        ({"key_variable": "A-B"}, "--api-key-env is 'A-B'"),
        ({"classifier": "c", "labels": ("x",), "key_variable": "K"}, "over https only"),
    ],
)
def test_options_that_cannot_be_meant(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        GuardOptions(**options)


def test_the_command_writes_all_or_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["guard", "init", str(tmp_path / "rails"), "--self-check"])
    assert done.exit_code == 0, done.output
    assert {"config.yml", "prompts.yml", "rails.co", "run.py"} <= {path.name for path in (tmp_path / "rails").iterdir()}
    again = CliRunner().invoke(app, ["guard", "init", str(tmp_path / "rails")])
    assert again.exit_code == 2
    assert str(tmp_path / "rails") in again.output
    (tmp_path / "rails" / "config.yml").write_text("mine")
    with pytest.raises(TargetError):
        write_guardrails(tmp_path / "rails", GuardOptions(), overwrite=True)
    bad = CliRunner().invoke(app, ["guard", "init", str(tmp_path / "other"), "--threshold", "2"])
    assert (bad.exit_code, (tmp_path / "other").exists()) == (2, False)
