"""Speed and memory of cutting a checkpoint of a published shape, against a plain copy of its files.

    python benchmarks/prune_surgery.py --folder /somewhere/with/25GB           # 8 of 32 layers: 12.5 GB in bf16
    python benchmarks/prune_surgery.py --layers 32 --folder /somewhere/with/80GB
    python benchmarks/prune_surgery.py --shape llama-3.1-8b --layers 32 --folder /somewhere/with/35GB
    python benchmarks/prune_surgery.py --smoke                                 # seconds; what the tests run

"nemotron-4-15b" is cut down to the 8B shape, "llama-3.1-8b" to Llama-3.1-Minitron-4B-Width: 4.5B parameters.

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
from transformers import LlamaConfig

from minitron.checkpoint.fingerprint import fingerprint
from minitron.config import NemotronConfig
from minitron.prune.architecture import Architecture
from minitron.prune.baselines import random_scores
from minitron.prune.choose import make_plan, sorted_plan
from minitron.prune.plan import PrunePlan
from minitron.prune.surgery import prune_checkpoint

LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
MAX_MEMORY = 3_000_000_000
MIN_SHARE_OF_COPY = 0.5


def cut(source: Path, out: Path, plan: PrunePlan) -> dict[str, Any]:
    """One cut in a process of its own."""
    plan.save(out.parent / "plan.json")
    command = [sys.executable, __file__, "--child", str(source), str(out), str(out.parent / "plan.json")]
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


def shapes(name: str, layers: int) -> tuple[Any, Architecture]:
    """The configuration of the source and the shape that is cut out of it, with so many layers each."""
    if name == "llama-3.1-8b":
        return LlamaConfig(**LLAMA, num_hidden_layers=layers), Architecture(layers, 3072, 32, 8, 9216)
    target = Architecture.of(NemotronConfig.preset("minitron-8b", num_hidden_layers=layers))
    return NemotronConfig.preset("nemotron-4-15b", num_hidden_layers=layers), target


def measure(
    folder: Path, config: Any, target: Architecture, kept: Path | None = None, cut_only: bool = False
) -> dict[str, Any]:
    """The cut to `target`, and everything kept but sorted, which moves every row and column.

    Args:
        folder: for all files; emptied by the caller.
        config: of the source.
        target: what is cut out.
        kept: the source, which is made here if it does not exist, and stays.
        cut_only: leave out the sorted one.
    """
    source = kept or folder / "source"
    size = sum(path.stat().st_size for path in source.glob("*.safetensors")) or make_source(source, config)
    os.sync()
    before = copy(source, folder / "copy")
    begin = time.perf_counter()
    mark = fingerprint(source)
    seconds = time.perf_counter() - begin
    scores = random_scores(config, 0)
    results = {"cut": cut(source, folder / "cut", make_plan(config, scores, target, source=mark))}
    os.sync()
    if not cut_only:
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
    parser.add_argument("--shape", choices=("nemotron-4-15b", "llama-3.1-8b"), default="nemotron-4-15b")
    parser.add_argument("--layers", type=int, default=8, help="of both; memory does not depend on it")
    parser.add_argument("--source", type=Path, help="keep the source here, and use it again for the same shape")
    parser.add_argument("--cut-only", action="store_true", help="do not measure keeping everything, sorted")
    parser.add_argument("--make-only", action="store_true", help="make --source and stop")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, and no goals")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return 0
    if options.smoke:
        small = LlamaConfig if options.shape.startswith("llama") else NemotronConfig
        config, target = small(**SMOKE), Architecture(2, 48, 4, 2, 80)
    else:
        config, target = shapes(options.shape, options.layers)
    if options.make_only:
        make_source(options.source, config)
        return 0
    with tempfile.TemporaryDirectory(prefix="surgery-", dir=options.folder) as place:
        figures = measure(Path(place), config, target, options.source, options.cut_only)
    missed = judge(figures)
    missed = [] if options.smoke else missed
    figures = {
        "machine": {} if options.smoke else describe(),
        "weights": "random",
        "shape": options.shape,
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
