"""`kill -9` at random moments of a compression, and going on: the model is that of a run without interruption."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from compress_samples import small_recipe

from minitron.checkpoint.fingerprint import fingerprint

PROGRAM = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from minitron.compress.recipe import recipe_from
from minitron.compress.run import compress
print("ready", flush=True)
recipe = recipe_from(json.loads(sys.argv[1]))
made = compress(recipe, Path(sys.argv[2]), quiet=True, say=lambda text: print(text, flush=True))
print("MODEL", *made.models.values(), flush=True)
"""
KILLS = int(os.environ.get("MINITRON_KILLS", "3"))
RECIPE = os.environ.get("MINITRON_KILL_RECIPE")
"""A recipe to be killed in place of the tiny one, read from the repository's root."""


def start(values: str, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, values, str(run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def model_in(output: str) -> Path:
    return Path(output.split("MODEL ")[1].strip())


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_model(tmp_path: Path) -> None:
    if RECIPE:
        values = json.dumps(yaml.safe_load(Path(RECIPE).read_text(encoding="utf-8")))
    else:
        values = json.dumps(small_recipe(tmp_path, calibration={"blocks": 4, "compensation": True}))
    begin = time.monotonic()
    whole = start(values, tmp_path / "whole")
    output = whole.communicate()[0]
    assert whole.returncode == 0, output
    stage = max(1.0, (time.monotonic() - begin) / 6)
    expected = fingerprint(model_in(output))
    moments = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        process = start(values, tmp_path / "killed")
        assert process.stdout is not None
        for _ in range(moments.randint(1, 6)):  # it tells of each stage
            process.stdout.readline()
        time.sleep(moments.uniform(0.0, stage))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed
    last = start(values, tmp_path / "killed")
    output = last.communicate()[0]
    assert last.returncode == 0, output
    assert fingerprint(model_in(output)) == expected
