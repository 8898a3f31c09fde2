"""The command under torchrun: each process reads its own part of the weights, and the losses are those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitron import NemotronConfig, NemotronForCausalLM, bundled_model
from minitron.tokenizer import load_tokenizer

STEPS = 3


def checkpoint(folder: Path, seed: int, **shape: int) -> Path:
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(bundled_model())
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **shape}
    config = NemotronConfig(len(tokenizer), max_position_embeddings=64, initializer_range=0.1, **sizes)  # type: ignore[arg-type]
    NemotronForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that both commands share."""
    where = tmp_path_factory.mktemp("torchrun")
    student = checkpoint(where / "student", 0, hidden_size=36, intermediate_size=50)
    teacher = checkpoint(where / "teacher", 1, hidden_size=48, intermediate_size=96)
    text = where / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Tom had {i} dogs. They ran to the river."}) + "\n" for i in range(60)))
    options = ["--steps", str(STEPS), "--batch", "4", "--micro-batch", "2", "--sequence", "32", "--dtype", "float32", "--device", "cpu"]
    shared = ["distill", str(student), "--teacher", str(teacher), "--data", str(text), "--heldout-share", "0.2"]
    return [*shared, *options, "--hidden", "mse", "--layer-map", "1:1", "--save-every", "0", "--json"]


def run(command: list[str], out: Path) -> dict[str, list[float]]:
    """Numbers of the steps by name, and of the held-out text at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    found = {name: [row[name] for row in steps] for name in ("loss", "kl", "hidden", "grad_norm")}
    heldout = json.loads(done.stdout[done.stdout.index("{") :])["heldout"]
    return {**found, "heldout": [value for scores in heldout.values() for _, value in sorted(scores.items())]}


def test_torchrun_trains_as_one_process(pair: list[str], tmp_path: Path) -> None:
    expected = run([sys.executable, "-m", "minitron", *pair], tmp_path / "one")
    assert len(expected["loss"]) == STEPS
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minitron"]
    found = run([*torchrun, *pair], tmp_path / "two")
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_torchrun_customizes_as_one_process(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "base", 0, hidden_size=36, intermediate_size=50)
    rows = tmp_path / "rows.jsonl"
    texts = [("dogs", f"Tom had {i} dogs.") if i % 2 else ("rivers", f"We ran to {i} rivers at noon.") for i in range(40)]
    rows.write_text("".join(json.dumps({"label": label, "text": text}) + "\n" for label, text in texts))
    options = ["finetune", str(model), "--task", "classify", "--data", str(rows), "--steps", str(STEPS), "--batch", "4"]
    options += ["--sequence", "32", "--dtype", "float32", "--device", "cpu", "--lr", "0.01", "--json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minitron"]
    losses, weights, scores = [], [], []
    for name, start in (("one", [sys.executable, "-m", "minitron"]), ("two", torchrun)):
        out = tmp_path / name
        done = subprocess.run(
            [*start, *options, "--out", str(out)], capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in lines if "loss" in row])
        weights.append(load_file(out / "model" / "model.safetensors"))
        scores.append(json.loads((out / "report.json").read_text())["scores"]["model"]["nats"])
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
