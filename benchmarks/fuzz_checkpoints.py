"""Mutate checkpoint files of every format and read them: no crash, no hang, no memory blow-up, always a sentence.

    python benchmarks/fuzz_checkpoints.py --cases 10000          # per format; minutes
    python benchmarks/fuzz_checkpoints.py --format gguf --seed 7

A case is one mutated copy of a small checkpoint. It is read whole; every fortieth one is also converted. What is
allowed: success, or `CheckpointError` with a message. Everything else is a failure and is printed with its seed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from checkpoint_samples import random_state, save_reference, tiny_config

from minitron.checkpoint.gguf.write import write_gguf
from minitron.checkpoint.hf import check_checkpoint
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.nemo.write import write_nemo
from minitron.checkpoint.sources import open_checkpoint
from minitron.checkpoint.tensors import Checkpoint, from_tensor
from minitron.convert import ConversionOptions, convert

CONVERT_EVERY = 40
MAX_SECONDS = 20
_EXTREMES = [
    b"\xff" * 8,
    b"\x00" * 8,
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x00" * 7 + b"\x80",
    b"\x00\x00\x00\x00\x00\x01\x00\x00",
]


@dataclass
class Result:
    """What became of the cases of one format."""

    format: str
    cases: int = 0
    read: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    memory_growth_mb: float = 0.0
    seconds: float = 0.0


class TooSlow(BaseException):
    """Raised by the alarm; not an Exception, so that no reader swallows it."""


def build_samples(folder: Path) -> dict[str, Path]:
    """A small checkpoint of each format."""
    config = tiny_config(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=2, head_dim=8,
                         num_key_value_heads=1)  # fmt: skip
    state = random_state(config)
    tensors = {name: from_tensor(tensor) for name, tensor in state.items()}
    tokenizer = {"type": "BPE", "vocab": {chr(65 + i): i for i in range(60)}, "merges": []}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    values = {"version": "1.0", "added_tokens": [], "model": tokenizer, "pre_tokenizer": step}
    texts = {"tokenizer.json": json.dumps(values)}
    checkpoint = Checkpoint(config, tensors, texts=texts)
    samples = {"hf": save_reference(folder / "hf", config, state)}
    write_nemo(checkpoint, folder / "dist.nemo")
    write_nemo(checkpoint, folder / "nemo2", form="nemo2")
    write_gguf(checkpoint, folder / "model.gguf", quantization="q8_0")
    samples |= {"nemo": folder / "dist.nemo", "nemo2": folder / "nemo2", "gguf": folder / "model.gguf"}
    legacy = folder / "legacy"
    legacy.mkdir()
    with tarfile.open(folder / "dist.nemo") as tar:
        (legacy / "model_config.yaml").write_bytes(tar.extractfile("./model_config.yaml").read())  # type: ignore[union-attr]
    with open_checkpoint(folder / "nemo2", folder) as opened:
        assert opened.tensors.keys() == state.keys()
    from minitron.checkpoint.nemo.write import megatron_stacks

    flat = {}
    for name, layers in megatron_stacks(checkpoint).items():
        for number, tensor in enumerate(layers):
            flat["model." + name.replace("decoder.layers.", f"decoder.layers.{number}.")] = tensor.load().clone()
    torch.save(flat, legacy / "model_weights.ckpt")
    samples["nemo folder"] = legacy
    with tarfile.open(folder / "plain.tar", "w") as tar:
        tar.add(legacy, arcname="./")
    with gzip.open(folder / "legacy.nemo", "wb", compresslevel=1) as out:
        out.write((folder / "plain.tar").read_bytes())
    samples["nemo gzip"] = folder / "legacy.nemo"
    samples["zarr"] = _zarr(folder / "zarr", legacy / "model_config.yaml", checkpoint)
    return samples


def _zarr(folder: Path, settings: Path, checkpoint: Checkpoint) -> Path:
    from minitron.checkpoint.nemo.write import megatron_stacks

    folder.mkdir()
    shutil.copy(settings, folder)
    for name, layers in megatron_stacks(checkpoint).items():
        stacked = name.startswith("decoder.layers.")
        shape = [len(layers), *layers[0].shape] if stacked else list(layers[0].shape)
        place = folder / "model_weights" / f"model.{name}"
        place.mkdir(parents=True)
        header = {"chunks": [1, *shape[1:]] if stacked else shape, "compressor": None, "dtype": "<f4", "filters": None,
                  "order": "C", "shape": shape, "zarr_format": 2}  # fmt: skip
        (place / ".zarray").write_text(json.dumps(header))
        for number, tensor in enumerate(layers):
            index = [number, *[0] * (len(shape) - 1)] if stacked else [0] * len(shape)
            (place / ".".join(map(str, index))).write_bytes(tensor.load().numpy().tobytes())
    (folder / "model_weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    return folder


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four changes, mostly near the start and the end, where headers and directories are."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if not out:
            break
        spot = rng.random()
        near = min(len(out), 4096)
        at = (
            rng.randrange(near)
            if spot < 0.5
            else rng.randrange(len(out))
            if spot < 0.75
            else len(out) - 1 - rng.randrange(near)
        )
        kind = rng.randrange(7)
        if kind <= 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at] = rng.choice(b'\x00\xff\x7f\x80/.{}[]"-0123456789')
        elif kind == 3:
            out[at : at + 8] = rng.choice(_EXTREMES)
        elif kind == 4:
            del out[at : at + rng.choice([1, 8, 512, 1 << 20])]
        elif kind == 5:
            out[at:at] = out[at : at + rng.choice([1, 8, 512])]
        else:
            out[at : at + 4] = rng.randbytes(4)
    return bytes(out)


@contextlib.contextmanager
def mutated(copy: Path, rng: random.Random) -> Iterator[None]:
    """One file of a checkpoint changed (or, rarely, missing), and put back at the end."""
    victim = copy if copy.is_file() else rng.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
    data = victim.read_bytes()
    if copy.is_dir() and rng.random() < 0.05:
        victim.unlink()
    else:
        victim.write_bytes(mutate(data, rng))
    try:
        yield
    finally:
        victim.write_bytes(data)


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def read_whole(path: Path, scratch: Path) -> None:
    if path.is_dir() and (path / "config.json").is_file():
        check_checkpoint(path)
    with open_checkpoint(path, scratch) as checkpoint:
        for tensor in checkpoint.tensors.values():
            for _ in tensor.blocks():
                pass
        for data in checkpoint.files.values():
            data.read()


def one_case(source: Path, room: Path, rng: random.Random, *, also_convert: bool) -> tuple[str, str]:
    """Outcome ("read", "refused" or "failure") and what to say about it."""
    target, scratch = room / "out", room / "scratch"
    scratch.mkdir(parents=True)
    try:
        with deadline(MAX_SECONDS):
            if also_convert:
                convert(source, target, ConversionOptions(verify=rng.random() < 0.3))
                check_checkpoint(target)
            else:
                read_whole(source, scratch)
        outcome, words = "read", ""
    except CheckpointError as error:
        outcome, words = ("refused", "") if str(error).strip() else ("failure", "CheckpointError without a message")
        if target.exists():
            outcome, words = "failure", f"half-written target: {error}"
    except TooSlow:
        outcome, words = "failure", f"more than {MAX_SECONDS} s"
    except BaseException as error:
        outcome, words = "failure", f"{type(error).__name__}: {error}"[:300]
    left = [str(path) for path in room.rglob("*") if path != scratch and target not in (path, *path.parents)]
    if left and outcome != "failure":
        outcome, words = "failure", f"left behind: {left[:3]}"
    return outcome, words


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(name: str, sample: Path, cases: int, seed: int, folder: Path) -> Result:
    """`cases` mutations of one sample."""
    result, begin, memory = Result(name), time.perf_counter(), peak_mb()
    copy, room = folder / f"copy-{sample.name}", folder / "room"
    shutil.copytree(sample, copy) if sample.is_dir() else shutil.copy(sample, copy)
    for number in range(cases):
        rng = random.Random(seed + number)
        start = time.perf_counter()
        with mutated(copy, rng):
            outcome, words = one_case(copy, room, rng, also_convert=number % CONVERT_EVERY == CONVERT_EVERY - 1)
        result.slowest_seconds = max(result.slowest_seconds, time.perf_counter() - start)
        shutil.rmtree(room)
        result.cases += 1
        result.read += outcome == "read"
        result.refused += outcome == "refused"
        if outcome == "failure":
            result.failures.append(f"seed {seed + number}: {words}")
    result.memory_growth_mb = round(peak_mb() - memory, 1)
    result.slowest_seconds = round(result.slowest_seconds, 3)
    result.seconds = round(time.perf_counter() - begin, 1)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="per format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", help="one of them only")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for result in run(options.cases, options.seed, options.format):
        results.append(result)
        print(
            f"{result.format:12} {result.cases:6} cases: {result.read:6} read, {result.refused:6} refused, "
            f"{len(result.failures)} failures; slowest {result.slowest_seconds:.2f} s, "
            f"memory +{result.memory_growth_mb:.0f} MB, {result.seconds:.0f} s in all",
            flush=True,
        )
        for failure in result.failures[:20]:
            print("   ", failure)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return int(any(result.failures for result in results))


def run(cases: int, seed: int = 0, only: str | None = None) -> Iterator[Result]:
    """Fuzz every format, or one; a result as soon as there is one."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place)
        (folder / "samples").mkdir()
        samples = build_samples(folder / "samples")
        # Imports are not to be counted as a slow case or as memory that a case took.
        convert(samples["hf"], folder / "warm-up")
        for name, path in samples.items():
            if only in (None, name):
                yield fuzz(name, path, cases, seed, folder)


if __name__ == "__main__":
    sys.exit(main())
