"""Peak memory of `minitron.load(folder, format=...)`, beside the bytes that the weights take in that format.

    python benchmarks/load_memory.py                                  the 4B shape with two layers, random weights
    python benchmarks/load_memory.py --layers 8 --formats int8
    python benchmarks/load_memory.py --smoke                          a small shape: does it run?

Each format is loaded in a process of its own, after the bundled model in the same format, which imports and compiles
what is needed. `above_imports` is the peak of resident memory (VmHWM) less what was resident before the call, `process`
the peak of the whole process, both as multiples of the bytes of the weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import peak_resident, reset_peak

import minitron
from minitron import NemotronConfig
from minitron.checkpoint.hf import write_hf
from minitron.checkpoint.names import hf_shapes
from minitron.checkpoint.tensors import Checkpoint, LazyTensor
from minitron.engine.matrix import FORMATS


def write_random(config: NemotronConfig, folder: Path) -> None:
    """A checkpoint in bf16 with the bundled tokenizer; each tensor repeats a few random numbers, written in blocks."""
    numbers = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()

    def tensor(shape: tuple[int, ...]) -> LazyTensor:
        width = shape[-1] if len(shape) > 1 else 1

        def rows(start: int, stop: int) -> torch.Tensor:
            count = (stop - start) * width
            return numbers.repeat(-(-count // len(numbers)))[:count].view(stop - start, *shape[1:])

        return LazyTensor(shape, torch.bfloat16, rows)

    config.dtype = torch.bfloat16  # type: ignore[assignment]
    bundled = minitron.bundled_model()
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    tensors = {name: tensor(shape) for name, shape in hf_shapes(config).items()}
    texts = {name: (bundled / name).read_text(encoding="utf-8") for name in names}
    write_hf(Checkpoint(config, tensors, texts=texts), folder)


def load_here(folder: str, format: str) -> None:
    """Load in this process and print what it took."""
    from minitron.engine import model_weights

    minitron.load(format=format)
    reset_peak()
    before = peak_resident()
    start = time.perf_counter()
    model = minitron.load(folder, format=format).model
    seconds, peak = time.perf_counter() - start, peak_resident()
    size = model_weights.weights_of(model).nbytes
    ratios = {"above_imports": round((peak - before) / size, 3), "process": round(peak / size, 3)}
    print(json.dumps({"format": format, "weight_bytes": size, **ratios, "seconds": round(seconds, 1)}))


def main() -> None:
    """Write a checkpoint, and load it in each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minitron-4b")
    parser.add_argument("--layers", type=int, default=2, help="layers of the preset")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--folder", type=Path, help="a checkpoint, instead of a random one")
    parser.add_argument("--smoke", action="store_true", help="a small shape")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load_here(*arguments.load)
        return
    small = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8192} if arguments.smoke else {}
    config = NemotronConfig.preset(arguments.preset, num_hidden_layers=arguments.layers, **small)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if arguments.folder is None:
            write_random(config, folder)
        for format in arguments.formats.split(","):
            subprocess.run([sys.executable, __file__, "--load", str(folder), format], check=True)


if __name__ == "__main__":
    main()
