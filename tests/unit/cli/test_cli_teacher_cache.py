"""`minitron teacher-cache`: a cache that serves a run over the same text, and one sentence for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from typer.testing import CliRunner

import minitron
from minitron.checkpoint.fingerprint import fingerprint
from minitron.cli.teacher_cache import teacher_cache
from minitron.distill.teacher_cache import open_targets
from minitron.tokenizer import load_tokenizer
from minitron.train.inputs import open_texts
from minitron.train.schedule import TrainConfig


def call(*arguments: object) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(teacher_cache)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_a_cache_of_the_bundled_model(tmp_path: Path) -> None:
    folder = minitron.bundled_model()
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"Tom saw {i} red balls. He was very happy."}) + "\n" for i in range(20))
    )
    command = [
        folder,
        "--data",
        text,
        "--sequence",
        32,
        "--kind",
        "sampled",
        "--samples",
        20,
        "--out",
        tmp_path / "out",
    ]
    code, output, errors = call(*command, "--json")
    assert code == 0, errors
    assert "bytes per token" in errors
    found = json.loads(output)
    settings = TrainConfig(steps=1, sequence=32)
    stream = open_texts([str(text)], [], 0.0, load_tokenizer(folder), settings, tmp_path / "token-cache").stream
    assert found["blocks"] == len(stream)
    cache = open_targets(tmp_path / "out", stream, fingerprint(Path(folder)))
    for batch in stream.batches(0, len(stream), 2):
        cache.targets_for(batch)
    code, _, errors = call(*command[:-3], 30, "--out", tmp_path / "out")
    assert code == 2
    assert "holds another cache; choose another folder: codec was" in errors.strip().splitlines()[-1]
    code, _, errors = call(folder, "--data", text, "--kind", "all", "--out", tmp_path / "b")
    assert code == 2
    assert errors.strip() == "error: kind is 'all'; it must be one of hidden, sampled, topk"
    assert not (tmp_path / "b").exists()
