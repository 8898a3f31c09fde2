"""Run every verb of an installed minitron, small, in an empty folder: what a wheel must be able to do by itself.

    python scripts/try_verbs.py .venv/bin/minitron

Fails if a verb of `minitron --help` has no trial here. Nothing of the checkout is read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

STORY = "The old dog ran to the sea and the little bird sang about rain, wind and snow all day. "
TRIALS: dict[str, str] = {
    "inspect": "inspect minitron-4b",
    "doctor": "doctor --no-measure",
    "generate": "generate -p 'Once upon a time' -n 5",
    "chat": "chat bundled",
    "demo": "demo -n 8",
    "bench": "bench --rounds 1 -n 4 --prompt-tokens 8 --peers none",
    "eval": "eval bundled bundled-half --suite quick --limit 1",
    "convert": "convert bundled bundled-fp32 --dtype fp32",
    "curate": "curate text.jsonl -o clean",
    "train": "train --data clean/shards --tokenizer bundled --layers 1 --hidden-size 32 --intermediate-size 64 "
    "--heads 2 --steps 2 --batch 2 --sequence 32 --out runs/train",
    "prune": "prune bundled runs/small --params 3.5M --samples 2 --sequence 64 --candidates 1 --no-measure",
    "distill": "distill runs/small --teacher bundled --data text.jsonl --steps 1 --batch 2 --sequence 32 "
    "--out runs/distill",
    "teacher-cache": "teacher-cache bundled --data text.jsonl --sequence 32 --out runs/targets",
    "compress": "compress --recipe laptop runs/laptop --tokens 2048 --candidates 1",
    "finetune": "finetune bundled --task classify --data rows.jsonl --epochs 1 --batch 4 --tune head --out runs/labels",
    "predict": "predict runs/labels/model rows.jsonl --out labels.jsonl",
    "guard": "guard init rails",
    "serve": "serve bundled --port 0",
}
"""In this order: later ones use what earlier ones made."""
TYPED = {"chat": "Hello\n/exit\n"}
SECONDS = 1800
"""The longest time of a verb: the first one that generates compiles the kernels."""


def main() -> int:
    """Try all verbs; 0 if each did its work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="the installed command")
    given = parser.parse_args()
    program = str(given.program.absolute())
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1"}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        environment["MINITRON_CACHE"] = f"{folder}/cache"
        write_inputs(Path(folder))
        listed = subprocess.run(
            [program, "--help"], env=environment, cwd=folder, capture_output=True, text=True, check=True
        )
        verbs = set(re.findall(r"^  ([a-z][a-z-]*)  ", listed.stdout.partition("Commands:")[2], re.MULTILINE))
        if verbs != set(TRIALS):
            print(f"verbs without a trial, or trials without a verb: {sorted(verbs ^ set(TRIALS))}")
            return 1
        for verb, words in TRIALS.items():
            start = time.perf_counter()
            command = [program, *shlex.split(words)]
            problem = (try_server if verb == "serve" else try_verb)(verb, command, folder, environment)
            print(f"{verb:14} {time.perf_counter() - start:6.1f} s  {problem or 'ok'}", flush=True)
            if problem:
                failed.append(verb)
    print(f"failed: {', '.join(failed)}" if failed else f"{len(TRIALS)} verbs work")
    return bool(failed)


def write_inputs(folder: Path) -> None:
    """Text, and rows with labels."""
    texts = [{"text": STORY * (3 + number % 5) + f"Number {number}."} for number in range(40)]
    rows = [{"text": f"{'rain and wind' if n % 2 else 'dogs and birds'} {n}", "label": "ab"[n % 2]} for n in range(40)]
    for name, values in (("text.jsonl", texts), ("rows.jsonl", rows)):
        (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def try_verb(verb: str, command: list[str], folder: str, environment: dict[str, str]) -> str | None:
    """What went wrong, None if nothing."""
    done = subprocess.run(
        command, input=TYPED.get(verb), env=environment, cwd=folder, capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    if done.returncode:
        return f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
    return None if done.stdout.strip() or verb == "guard" else "printed nothing"


def try_server(verb: str, command: list[str], folder: str, environment: dict[str, str]) -> str | None:
    """Start it, ask it once, end it by SIGTERM."""
    server = subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert server.stdout is not None
    try:
        line = next((line for line in server.stdout if "listening on " in line), None)
        if line is None:
            return "ended before it listened"
        address = line.split("listening on ")[1].split()[0]
        body = json.dumps({"model": "bundled", "prompt": "The old dog", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            if not json.load(answer)["choices"][0]["text"]:
                return "answered nothing"
        server.send_signal(signal.SIGTERM)
        return None if server.wait(60) == 0 else f"exit code {server.returncode} after SIGTERM"
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
