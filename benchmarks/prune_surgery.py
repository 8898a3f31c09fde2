"""Speed and memory of cutting a checkpoint of the 15B shape down to the 8B shape, against a plain copy of its files.

    python benchmarks/prune_surgery.py --folder /somewhere/with/25GB           # 8 of 32 layers: 12.5 GB in bf16
    python benchmarks/prune_surgery.py --layers 32 --folder /somewhere/with/80GB
    python benchmarks/prune_surgery.py --smoke                                 # seconds; what the tests run

The weights and the importance scores are random, so that what stays is scattered over every axis: nothing is a long
run of neighbours. Each cut is a process of its own, so that its peak memory is its own. Copying is measured before and
after, in the same run; the faster one counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from convert import SMOKE, copy, make_source
from machine import describe, peak_resident

from minitron.checkpoint.fingerprint import fingerprint
from minitron.config import NemotronConfig
from minitron.prune.architecture import Architecture
from minitron.prune.baselines import random_scores
from minitron.prune.choose import make_plan, sorted_plan
from minitron.prune.plan import PrunePlan
from minitron.prune.surgery import prune_checkpoint

MAX_MEMORY = 3_000_000_000
MIN_SHARE_OF_COPY = 0.5


def cut(source: Path, out: Path, plan: PrunePlan) -> dict[str, Any]:
    """One cut in a process of its own."""
    plan.save(source.parent / "plan.json")
    command = [sys.executable, __file__, "--child", str(source), str(out), str(source.parent / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


def child(source: str, out: str, plan: str) -> None:
    """What that process does."""
    torch.set_num_threads(1)  # reading and writing overlap by threads of their own
    begin = time.perf_counter()
    loaded = PrunePlan.load(plan)
    seconds_plan = time.perf_counter() - begin
    report = prune_checkpoint(Path(source), Path(out), loaded, check_source=False)
    print(
        json.dumps(
            {
                "seconds": report.seconds,
                "seconds_reading_plan": round(seconds_plan, 3),
                "peak_memory": peak_resident(),
                "bytes_written": report.bytes_after,
                "parameters": report.parameters_after,
            }
        )
    )


def measure(folder: Path, config: NemotronConfig, target: Architecture) -> dict[str, Any]:
    """The cut to `target`, and everything kept but sorted, which moves every row and column."""
    source = folder / "source"
    size = make_source(source, config)
    os.sync()
    before = copy(source, folder / "copy")
    begin = time.perf_counter()
    mark = fingerprint(source)
    seconds = time.perf_counter() - begin
    scores = random_scores(config, 0)
    results = {"cut": cut(source, folder / "cut", make_plan(config, scores, target, source=mark))}
    os.sync()
    results["sorted"] = cut(source, folder / "sorted", sorted_plan(config, scores, source=mark))
    os.sync()
    after = copy(source, folder / "copy")
    return {"bytes": size, "copy_seconds": [before, after], "fingerprint_seconds": seconds, "results": results}


def judge(figures: dict[str, Any]) -> list[str]:
    """What misses its goal. Speed is in bytes of the source, which have to be read whatever stays of them."""
    missed = []
    for name, result in figures["results"].items():
        result["share_of_copy"] = min(figures["copy_seconds"]) / result["seconds"]
        if name == "cut" and result["share_of_copy"] < MIN_SHARE_OF_COPY:
            missed.append(f"{name}: {result['share_of_copy']:.2f} of the speed of a copy, goal {MIN_SHARE_OF_COPY}")
        if result["peak_memory"] > MAX_MEMORY:
            missed.append(f"{name}: {result['peak_memory'] / 1e9:.2f} GB of memory, goal {MAX_MEMORY / 1e9}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make and delete the checkpoints")
    parser.add_argument("--layers", type=int, default=8, help="of both; memory does not depend on it")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, and no goals")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return 0
    if options.smoke:
        config, target = NemotronConfig(**SMOKE), Architecture(2, 48, 4, 2, 80)
    else:
        config = NemotronConfig.preset("nemotron-4-15b", num_hidden_layers=options.layers)
        target = Architecture.of(NemotronConfig.preset("minitron-8b", num_hidden_layers=options.layers))
    with tempfile.TemporaryDirectory(prefix="surgery-", dir=options.folder) as place:
        figures = measure(Path(place), config, target)
    missed = judge(figures)
    missed = [] if options.smoke else missed
    figures = {
        "machine": {} if options.smoke else describe(),
        "weights": "random",
        "from": Architecture.of(config).as_dict(),
        "to": target.as_dict(),
        "missed": missed,
        **figures,
    }
    copies = ", ".join(f"{figures['bytes'] / seconds / 1e9:.2f} GB/s" for seconds in figures["copy_seconds"])
    print(f"{figures['bytes'] / 1e9:.2f} GB of random weights, {config.num_hidden_layers} layers; plain copy {copies}")
    print(f"fingerprint: {figures['fingerprint_seconds']:.1f} s")
    for name, result in figures["results"].items():
        speed = figures["bytes"] / result["seconds"] / 1e9
        print(
            f"{name:8} {result['seconds']:6.1f} s  {speed:5.2f} GB/s of the source ({result['share_of_copy']:.2f} of a "
            f"copy)  writes {result['bytes_written'] / 1e9:.2f} GB  peak {result['peak_memory'] / 1e9:.2f} GB"
        )
    for sentence in missed:
        print("missed:", sentence)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
