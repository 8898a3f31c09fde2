"""Speed and memory of `minitron convert` on a checkpoint of a published shape, against a plain copy of its files.

    python benchmarks/convert.py --folder /somewhere/with/40GB          # Minitron-4B: 8.4 GB in bf16
    python benchmarks/convert.py --smoke                                # seconds; what the tests run

Each conversion is a process of its own, so that its peak memory is its own. The weights are random. Copying is
measured before and after the conversions, in the same run; the faster one counts.
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
from machine import describe

from minitron.checkpoint.hf import write_hf
from minitron.checkpoint.names import hf_shapes
from minitron.checkpoint.tensors import Checkpoint, LazyTensor
from minitron.config import NemotronConfig

MAX_MEMORY = 1_500_000_000
MIN_SHARE_OF_COPY = 0.5
SMOKE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "dtype": "bfloat16"}
SMOKE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def make_source(folder: Path, config: Any) -> int:
    """Random weights, a different stretch of one random block for each row block; returns the bytes of the tensors."""
    noise = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def tensor(shape: tuple[int, ...], shift: int) -> LazyTensor:
        width = 1
        for size in shape[1:]:
            width *= size

        def rows(start: int, stop: int) -> torch.Tensor:
            count, first = (stop - start) * width, (shift * 7919 + start * width) % (1 << 20)
            return noise[first : first + count].view(stop - start, *shape[1:])

        return LazyTensor(shape, torch.bfloat16, rows)

    tensors = {name: tensor(shape, number) for number, (name, shape) in enumerate(hf_shapes(config).items())}
    checkpoint = Checkpoint(config, tensors)
    write_hf(checkpoint, folder)
    return checkpoint.nbytes


def copy(source: Path, target: Path) -> float:
    """Seconds of copying all files of a folder by the operating system's own means."""
    begin = time.perf_counter()
    shutil.copytree(source, target)
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def convert(source: Path, target: Path, *options: str) -> dict[str, Any]:
    """One conversion in a process of its own; its report."""
    command = [sys.executable, "-m", "minitron", "convert", str(source), str(target), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def measure(folder: Path, config: NemotronConfig, *, verify: bool) -> dict[str, Any]:
    """All conversions; figures by name."""
    size = make_source(folder / "source", config)
    os.sync()
    before = copy(folder / "source", folder / "copy")
    flag = "--verify" if verify else "--no-verify"
    steps = {
        "hf -> nemo": (folder / "source", folder / "m.nemo", []),
        "nemo -> hf": (folder / "m.nemo", folder / "back", []),
        "hf -> gguf q8_0": (folder / "source", folder / "m.gguf", ["--quantize", "q8_0"]),
    }
    results = {}
    for name, (source, target, options) in steps.items():
        report = convert(source, target, flag, *options)
        results[name] = {key: report[key] for key in ("seconds", "seconds_verify", "peak_memory", "bytes_written")}
        if name != "hf -> nemo":
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        if name == "nemo -> hf":
            source.unlink()
        os.sync()
    after = copy(folder / "source", folder / "copy")
    return {"bytes": size, "copy_seconds": [before, after], "conversions": results}


def judge(figures: dict[str, Any]) -> list[str]:
    """What misses its goal."""
    fastest = min(figures["copy_seconds"])
    missed = []
    for name, result in figures["conversions"].items():
        result["bytes_per_second"] = figures["bytes"] / result["seconds"]
        result["share_of_copy"] = fastest / result["seconds"]
        if result["share_of_copy"] < MIN_SHARE_OF_COPY:
            missed.append(f"{name}: {result['share_of_copy']:.2f} of the speed of a copy, goal {MIN_SHARE_OF_COPY}")
        if result["peak_memory"] > MAX_MEMORY:
            missed.append(f"{name}: {result['peak_memory'] / 1e9:.2f} GB of memory, goal {MAX_MEMORY / 1e9}")
    return missed


def _config(preset: str, layers: int | None) -> NemotronConfig:
    return NemotronConfig.preset(preset, **({"num_hidden_layers": layers} if layers else {}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; needs four times the size of the checkpoint")
    parser.add_argument("--preset", default="minitron-4b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--no-verify", action="store_true", help="leave out the reading back")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, and no goals")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    config = NemotronConfig(**SMOKE) if options.smoke else _config(options.preset, options.layers)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=options.folder) as place:
        figures = measure(Path(place), config, verify=not options.no_verify)
    missed = judge(figures)
    missed = [] if options.smoke else missed
    figures = {"machine": {} if options.smoke else describe(), "load": os.getloadavg(), "missed": missed, **figures}
    copies = ", ".join(f"{figures['bytes'] / seconds / 1e9:.2f} GB/s" for seconds in figures["copy_seconds"])
    print(f"{figures['bytes'] / 1e9:.2f} GB of weights; plain copy {copies}; load {figures['load'][0]:.1f}")
    for name, result in figures["conversions"].items():
        print(
            f"{name:16} {result['seconds']:7.1f} s  {result['bytes_per_second'] / 1e9:5.2f} GB/s  "
            f"{result['share_of_copy']:5.2f} of a copy  peak {result['peak_memory'] / 1e9:.2f} GB  "
            f"(verification {result['seconds_verify']:.1f} s more)"
        )
    for sentence in missed:
        print("missed:", sentence)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
