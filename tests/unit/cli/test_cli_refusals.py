"""Models that no verb works with are refused by each verb with one sentence and exit code 2, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from family_samples import kind_config, small_model
from text_checkpoint import make_text_checkpoint, save_byte_tokenizer
from typer.testing import CliRunner

from minitron.cli import app

VERBS = {
    "generate": "generate {model} -p cat",
    "generate, in a format": "generate {model} -p cat --format int8",
    "generate, as a draft": "generate {good} -p cat --speculate {model}",
    "chat": "chat {model}",
    "inspect": "inspect {model}",
    "convert": "convert {model} {out}",
    "prune": "prune {model} {out} --keep ffn=8 --no-measure",
    "train": "train --model {model} --data {text} --steps 1 --out {out}",
    "finetune": "finetune {model} --task chat --data {text} --steps 1 --out {out}",
    "predict": "predict {model} {text}",
    "distill, a student": "distill {model} --teacher {good} --data {text} --steps 1 --out {out}",
    "distill, a teacher": "distill {good} --teacher {model} --data {text} --steps 1 --out {out}",
    "teacher-cache": "teacher-cache {model} --data {text} --out {out}",
    "compress": "compress {model} {out} --params 1k --data {text} --tokens 1000 --heldout-share 0.2",
    "bench": "bench {model} --rounds 1 --peers none",
    "eval": "eval {model} --suite quick --data {text}",
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown architecture": ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
    "experts": ({"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts (num_local_experts is 8)"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_text_checkpoint(tmp_path_factory.mktemp("refusals") / "good")
    small_model(kind_config("smollm", vocab_size=512)).save_pretrained(folder)
    return folder


def call(line: str, **paths: Path) -> Any:
    return CliRunner().invoke(app, line.format(**paths).split(), input="hello\n/quit\n")


@pytest.mark.parametrize("case", REFUSED)
def test_each_verb_refuses_what_it_cannot_read(tmp_path: Path, good: Path, case: str) -> None:
    changes, sentence = REFUSED[case]
    model, out, text = tmp_path / "model", tmp_path / "out", tmp_path / "text.jsonl"
    model.mkdir()
    for path in good.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "config.json").write_text(json.dumps(json.loads((good / "config.json").read_text()) | changes))
    text.write_text("".join(json.dumps({"text": "the cat sat on the mat " * 8}) + "\n" for _ in range(20)))
    for verb, line in VERBS.items():
        done = call(line, model=model, good=good, out=out, text=text)
        assert done.exit_code == 2, (verb, done.output)
        assert sentence in done.stderr, verb
        assert "LlamaForCausalLM" in done.stderr, verb
        assert not out.exists() or not any(out.rglob("*.safetensors")), verb


def test_a_budget_that_no_shape_meets_names_the_nearest(tmp_path: Path, good: Path) -> None:
    done = call("prune {good} {out} --non-embedding-params 100 --no-measure", good=good, out=tmp_path / "out")
    assert done.exit_code == 2
    assert "no shape of the grid has at most 100 parameters without embeddings; the nearest has" in done.stderr
    assert "hidden" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_shape_that_the_family_cannot_have_names_those_it_can(tmp_path: Path, good: Path) -> None:
    done = call("prune {good} {out} --keep hidden=32 --no-measure", good=good, out=tmp_path / "out")
    assert done.exit_code == 2
    assert "hidden is 32, not a multiple of heads (6)" in done.stderr
    assert "hidden=30 or hidden=36 would do" in done.stderr


def test_a_tokenizer_without_a_chat_template_cannot_chat(tmp_path: Path) -> None:
    small_model(kind_config("smollm", vocab_size=save_byte_tokenizer(tmp_path))).save_pretrained(tmp_path)
    done = call("chat {model}", model=tmp_path)
    assert done.exit_code == 2
    assert "the tokenizer has no chat template" in done.stderr
    assert "use `minitron generate`" in done.stderr
