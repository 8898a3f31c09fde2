"""`minitron train` from a folder of text to a checkpoint, and its sentences for what cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from text_checkpoint import save_byte_tokenizer
from typer.testing import CliRunner

from minitron import NemotronForCausalLM
from minitron.cli.train import train

SHAPE = [*("--layers", "1", "--hidden-size", "16", "--intermediate-size", "32"), *("--heads", "2", "--kv-heads", "1")]
LENGTH = ["--steps", "3", "--batch", "2", "--sequence", "32", "--warmup", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text in `text/` and a byte-level tokenizer in `tokenizer/`."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text").mkdir()
    rows = [{"text": f"Story {i}. A cat sat on mat number {i} and slept. " * (i % 3 + 1)} for i in range(30)]
    (folder / "text" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text" / "b.txt").write_text("It was a long day, and nothing happened at all. " * 9)
    save_byte_tokenizer(folder / "tokenizer")
    return folder


def call(*arguments: object) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(train)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_from_text_to_a_checkpoint_and_on_from_there(texts: Path, tmp_path: Path) -> None:
    source = ["--data", f"{texts / 'text' / 'a.jsonl'}:2"]
    fresh = ["--tokenizer", texts / "tokenizer", *SHAPE, "--heldout-share", 0.2, "--heldout", texts / "text" / "b.txt"]
    code, output, errors = call(*source, *fresh, *LENGTH, "--out", tmp_path / "run", "--json")
    assert code == 0, errors
    assert "tokens/s" in errors
    result = json.loads(output)
    assert result["step"] == 3
    assert set(result["heldout"]) == {"a-heldout", "b"}
    assert result["estimate"]["peak_bytes"] > 0
    model = NemotronForCausalLM.from_pretrained(result["checkpoint"])
    assert model.config.vocab_size == 259
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 0)

    code, output, errors = call(*source, *fresh, *LENGTH, "--out", tmp_path / "run")
    assert code == 0, errors
    assert f"continuing from {result['checkpoint']}" in errors
    code, output, errors = call(*source, "--model", result["checkpoint"], *LENGTH, "--out", tmp_path / "more")
    assert code == 0, errors
    assert "checkpoint: " in output
    code, output, errors = call(
        *source, "--model", result["checkpoint"], *LENGTH, "--lr", 1, "--out", tmp_path / "more"
    )
    assert code == 2
    assert errors.strip().splitlines()[-1].endswith("train lr was 0.002, is 1.0")


def test_what_cannot_be_is_one_sentence_and_exit_code_2(texts: Path, tmp_path: Path) -> None:
    data = ["--data", texts / "text" / "a.jsonl"]
    vocabulary = ["--tokenizer", texts / "tokenizer"]
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    (tmp_path / "config.json").write_text("{")
    cases = [
        ([*data, *vocabulary, *LENGTH], "give exactly one of --model, --config, --preset"),
        ([*data, *vocabulary, *SHAPE, "--preset", "minitron-4b", *LENGTH], "give exactly one of --model"),
        ([*data, *SHAPE, *LENGTH], "a new model needs --tokenizer"),
        ([*data, *vocabulary, "--layers", 2, *LENGTH], "also needs hidden_size, intermediate_size"),
        ([*data, *vocabulary, *SHAPE], "give exactly one of steps, tokens and hours"),
        ([*data, *vocabulary, *SHAPE, *LENGTH, "--heldout-share", 1.5], "held-out share is 1.5"),
        (["--data", tmp_path / "binary.txt", *vocabulary, *SHAPE, *LENGTH], "binary.txt: holds NUL bytes"),
        (
            ["--data", texts / "text" / "b.txt", *vocabulary, *SHAPE, *LENGTH, "--heldout-share", 0.1],
            "b.txt: held-out share",
        ),
        (["--data", tmp_path / "none", *vocabulary, *SHAPE, *LENGTH], "no text file there"),
        ([*data, "--tokenizer", tmp_path, *SHAPE, *LENGTH], "no tokenizer"),
        ([*data, *vocabulary, "--config", tmp_path / "config.json", *LENGTH], "config.json: not JSON"),
        ([*data, "--model", tmp_path, "--tokenizer", texts / "tokenizer", *LENGTH], str(tmp_path)),
        ([*data, *vocabulary, *SHAPE[:-2], "--kv-heads", 3, *LENGTH], "not a multiple of num_key_value_heads"),
    ]
    for arguments, says in cases:
        code, _, errors = call(*arguments, "--out", tmp_path / "run")
        last = errors.strip().splitlines()[-1]
        assert (code, last[:7]) == (2, "error: "), (arguments, errors)
        assert says in last
        assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_bad_text_is_listed_at_once_and_a_refused_run_leaves_nothing(texts: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(3):
        (corpus / f"windows{number}.txt").write_bytes(f"It was a \u201clong\u201d day {number}. ".encode("cp1252") * 9)
    (corpus / "GOOD.TXT").write_bytes(b"\xef\xbb\xbfNothing happened at all.\r\n" * 9)
    (corpus / "rows.jsonl").write_text('{"text": null}\n{"text": "A cat sat on a mat. It slept."}\n{"body": "x"}\n')
    (corpus / "notes.docx").write_text("")
    (corpus / "._GOOD.TXT").write_bytes(b"\0")
    there = ["--data", corpus, "--tokenizer", texts / "tokenizer", *SHAPE, *LENGTH, "--out", tmp_path / "runs" / "a"]
    code, _, errors = call(*there)
    assert code == 2
    lines = errors.strip().splitlines()
    assert lines[0] == "error: 5 documents in 4 files cannot be used:"
    assert [line.split("corpus/")[1].split(":")[0] for line in lines[1:6]] == [
        "rows.jsonl, line 1", "rows.jsonl, line 3", "windows0.txt", "windows1.txt", "windows2.txt"
    ]  # fmt: skip
    assert "--skip-bad skips them; --encoding names" in lines[6]
    assert not (tmp_path / "runs").exists()
    # Windows-1252 is named and two rows are skipped.
    code, _, errors = call(*there, "--encoding", "cp1252", "--skip-bad", "--json")
    assert code == 0, errors
    assert "skipped: 1 .docx, 1 hidden" in errors
    assert "note: 2 bad documents in 1 file were skipped: " in errors
    (meta,) = (tmp_path / "runs" / "token-cache").glob("*/meta.json")
    assert json.loads(meta.read_text())["documents"] == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sequence", 100_000], "sequence is 100000; the model's max_position_embeddings is"),
        (["--heldout-share", 0.99999], "leaves no document to train on"),
        (["--optimizer", "offload"], "the model is on the CPU already"),
        (["--extend"], "holds no run that could be lengthened"),
    ],
)
def test_nothing_is_written_before_a_run_is_accepted(
    texts: Path, tmp_path: Path, options: list[object], says: str
) -> None:
    data = ["--data", texts / "text" / "a.jsonl", "--model", "bundled", *LENGTH]
    code, _, errors = call(*data, *options, "--out", tmp_path / "new" / "run")
    assert code == 2, errors
    assert says in errors
    assert not (tmp_path / "new").exists()


def test_the_page_on_training_runs_from_python(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "my-tokenizer").symlink_to(texts / "tokenizer")
    (tmp_path / "stories").symlink_to(texts / "text")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("steps=1000, batch=16", "steps=2, batch=2"), names)
    assert (tmp_path / "runs" / "first" / "step-2" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "smoothed" / "step-2" / "model.safetensors").is_file()


def test_the_page_on_training_names_no_option_that_is_not_there() -> None:
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    known = set(re.findall(r"--[a-z][a-z-]+", " ".join(call("--help")[1].split())))
    named = set(re.findall(r"--[a-z][a-z-]+", page)) - {"--logdir", "--no-deps"}
    named -= {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"}  # of torchrun
    assert named <= known
