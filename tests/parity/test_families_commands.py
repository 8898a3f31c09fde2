"""Every verb on models of other families, in the order in which a user calls them; transformers loads the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compress_samples import WORDS, small_recipe, write_text
from family_samples import kind_config, small_model
from text_checkpoint import make_text_checkpoint
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from minitron.cli import app
from minitron.families import FAMILIES

SHAPES = {
    "smollm": "heads=4,ffn=32,hidden=32",
    "qwen3": "heads=2,ffn=32,hidden=24",
}
"""What is cut out of a kind."""
RUN = "--steps 2 --batch 2 --sequence 32 --eval-every 0"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}assistant:"


def text_checkpoint(folder: Path, kind: str, template: str | None = TEMPLATE) -> Path:
    """A small model of a kind with a tokenizer that reads English."""
    make_text_checkpoint(folder)
    small_model(kind_config(kind, vocab_size=512, max_position_embeddings=256)).save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def call(line: str, *more: str, text: str | None = None, code: int = 0) -> str:
    """What a command prints on stdout; on stderr if it fails as expected. `more` has arguments with spaces."""
    result = CliRunner().invoke(app, [*line.split(), *more], input=text)
    assert result.exit_code == code, result.stderr
    return result.stderr if code else result.stdout


def facts(line: str, *more: str) -> dict[str, Any]:
    return json.loads(call(line, *more, "--json"))


def stock(folder: Path, family: str) -> Any:
    """The model as transformers loads it, of the family and with every tensor."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__name__ == FAMILIES[family].architecture
    return model.eval()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "a.jsonl", documents=40)


@pytest.mark.parametrize("kind", SHAPES)
def test_pruned_distilled_and_run(tmp_path: Path, text: Path, kind: str) -> None:
    """inspect, prune, distill by a teacher that runs and by its stored outputs, generate plainly and in a format."""
    source, family = text_checkpoint(tmp_path / "source", kind), kind_config(kind).model_type
    small, cache = tmp_path / "small", tmp_path / "cache"
    assert facts(f"inspect {source}")["weights"] == "complete"
    line = f"prune {source} {small} --keep {SHAPES[kind]} --calibration {text} --sequence 32 --samples 4 --no-measure"
    cut = facts(line)["after"]["parameters"]
    assert cut["total"] == sum(p.numel() for p in stock(small, family).parameters())
    hidden = "--hidden cosine --layer-map 0:0"
    call(f"distill {small} --teacher {source} --data {text} {RUN} {hidden} --out {tmp_path / 'kd'}")
    call(f"teacher-cache {source} --data {text} --sequence 32 --blocks 4 --out {cache}")
    call(f"distill {small} --teacher-cache {cache} --data {text} {RUN} --out {tmp_path / 'stored'}")
    call(f"distill {small} --teacher {source} --data {text} {RUN} --out {tmp_path / 'running'}")
    stored, running = (stock(tmp_path / name / "model", family).state_dict() for name in ("stored", "running"))
    for name in stored:
        torch.testing.assert_close(stored[name], running[name], rtol=1e-3, atol=1e-4)
    for options in ("", "--format int8"):
        answer = facts(f"generate {tmp_path / 'kd' / 'model'} -n 6 --temperature 0 {options}", "-p", "the cat")
        assert answer["engine"] == "cpu"
        assert answer["new_tokens"] > 0


@pytest.mark.parametrize("kind", ["smollm"])
def test_trained_customized_measured_and_asked(tmp_path: Path, text: Path, kind: str) -> None:
    source, family = text_checkpoint(tmp_path / "source", kind), kind_config(kind).model_type
    call(f"train --model {source} --data {text} {RUN} --out {tmp_path / 'more'}")
    stock(tmp_path / "more" / "model", family)
    turns = [("user", "the cat"), ("assistant", "sat on the mat")]
    chats = [{"messages": [{"role": who, "content": f"{said} {word}"} for who, said in turns]} for word in WORDS]
    write_rows(tmp_path / "chats.jsonl", chats)
    tune = "--steps 2 --batch 2"
    tuned = facts(f"finetune {source} --task chat --data {tmp_path / 'chats.jsonl'} {tune} --out {tmp_path / 'chat'}")
    stock(Path(tuned["model"]), family)
    rows = [{"text": f"the {word}", "label": "ab"[n % 2]} for n, word in enumerate(WORDS)]
    write_rows(tmp_path / "rows.jsonl", rows)
    for way in ("full", "lora"):
        line = f"finetune {source} --task classify --data {tmp_path / 'rows.jsonl'} {tune} --tune {way}"
        tuned = facts(f"{line} --out {tmp_path / way}")
        assert call(f"predict {tuned['model']} {tmp_path / 'rows.jsonl'}").strip()
    scores = facts(f"eval {source} {tmp_path / 'more' / 'model'} --suite quick --data {text}")
    assert "bits_per_byte" in json.dumps(scores)
    measured = facts(f"bench {source} --prompt-tokens 8 -n 4 --rounds 1 --peers none")
    assert measured["tokens_per_s"] > 0
    assert call(f"chat {source} -n 4 --temperature 0", text="hello\n/quit\n").endswith("\n")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["smollm"])
def test_compressed_by_a_recipe(tmp_path: Path, kind: str) -> None:
    recipe = small_recipe(tmp_path)
    source = text_checkpoint(tmp_path / "source", kind)
    recipe |= {"model": str(source), "targets": [{"keep": SHAPES[kind], "name": "small"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    call(f"compress --recipe {tmp_path / 'recipe.yaml'} {tmp_path / 'run'}")
    models = [path.parent for path in (tmp_path / "run").rglob("config.json") if path.parent.name == "model"]
    shapes = {stock(path, kind_config(kind).model_type).config.intermediate_size for path in models}
    assert shapes == {32}
    assert (tmp_path / "run" / "report.html").is_file()


def test_teacher_and_student_of_different_families(tmp_path: Path, text: Path) -> None:
    teacher, student = (text_checkpoint(tmp_path / kind, kind) for kind in ("qwen3", "smollm"))
    call(f"distill {student} --teacher {teacher} --data {text} {RUN} --out {tmp_path / 'kd'}")
    stock(tmp_path / "kd" / "model", "llama")


def test_there_and_back_as_gguf(tmp_path: Path) -> None:
    source = text_checkpoint(tmp_path / "source", "smollm")
    refused = call(f"convert {source} {tmp_path / 'model.nemo'}", code=2)
    assert "NeMo is written for Nemotron only" in refused
    call(f"convert {source} {tmp_path / 'model.gguf'} --quantize f32")
    call(f"convert {tmp_path / 'model.gguf'} {tmp_path / 'back'}")
    before, after = (stock(tmp_path / name, "llama").state_dict() for name in ("source", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
