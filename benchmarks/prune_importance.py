"""Time and memory of scoring a model of a published shape, against the bare forward pass over the same blocks.

    python benchmarks/prune_importance.py --folder /with/4GB/free --out benchmarks/results/prune_importance.json
    python benchmarks/prune_importance.py --smoke                     # seconds; what the tests run

Random weights. Layers are all alike, so a few of them are measured (`--layers`), each loaded once and then run bare
and watched in turn. Memory is that of a process of its own that scores the shortened model; the rest of the model
would add its statistics, 1.2 MB a layer at the 4B shape.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from convert import SMOKE, make_source
from machine import describe, peak_resident

from minitron.config import NemotronConfig
from minitron.data.packing import Batch
from minitron.prune.importance import collect_statistics
from minitron.prune.observe import LayerStatistics, turning, watching
from minitron.prune.streaming import Step, StreamedModel, Walk, token_counts

MOST_TIME, MOST_MEMORY = 1.3, 4e9


def random_blocks(count: int, tokens: int, vocabulary: int) -> Batch:
    """Blocks without padding, of one document each."""
    ids = torch.randint(5, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = -100
    return Batch(ids, torch.arange(tokens).expand(count, -1).contiguous(), labels, count * (tokens - 1))


def bare(step: Step) -> float:
    begin = time.perf_counter()
    for _ in step.run():
        pass
    return time.perf_counter() - begin


def watched(step: Step, counts: list[int]) -> float:
    """As in `importance.collect_statistics`."""
    begin = time.perf_counter()
    found = LayerStatistics()
    with watching(step, counts, found):
        for rows, before, after in step.run():
            turning(before, after, counts[rows.start : rows.stop])
    return time.perf_counter() - begin


def layer_times(folder: Path, blocks: Batch) -> list[dict[str, float]]:
    """Seconds of each layer: reading it, running it bare, running it watched."""
    walk = Walk(StreamedModel(folder), blocks)
    counts = token_counts(blocks)
    rows = []
    begin = time.perf_counter()
    for step in walk.steps():
        load = time.perf_counter() - begin
        if not rows:
            bare(step)  # warm up
        first, second = bare(step), watched(step, counts)
        again, last = watched(step, counts), bare(step)
        rows.append({"load": load, "bare": (first + last) / 2, "watched": (second + again) / 2})
        begin = time.perf_counter()
    return rows


def peak_of(folder: Path, count: int, tokens: int) -> dict[str, float]:
    """Peak memory and seconds of scoring, in a process of its own."""
    command = [sys.executable, __file__, "--score", str(folder), "--blocks", str(count), "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def score(folder: Path, count: int, tokens: int) -> None:
    """What that process does."""
    libraries = peak_resident()
    begin = time.perf_counter()
    found = collect_statistics(folder, random_blocks(count, tokens, StreamedModel(folder).config.vocab_size))
    found.scores()
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_resident(), "of_which_libraries": libraries}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the random checkpoint goes")
    parser.add_argument("--preset", default="minitron-4b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, and no goals")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.score:
        score(args.score, args.blocks, args.tokens)
        return 0
    if args.smoke:
        args.blocks, args.tokens = 2, 16
    shape = SMOKE if args.smoke else {"num_hidden_layers": args.layers}
    config = NemotronConfig(**shape) if args.smoke else NemotronConfig.preset(args.preset, **shape)
    with tempfile.TemporaryDirectory(prefix="importance-", dir=args.folder) as place:
        folder = Path(place) / "model"
        size = make_source(folder, config)
        rows = layer_times(folder, random_blocks(args.blocks, args.tokens, config.vocab_size))
        memory = peak_of(folder, args.blocks, args.tokens)
    ratio = statistics.median(row["watched"] / row["bare"] for row in rows)
    facts: dict[str, Any] = {
        "weights": "random",
        "machine": {} if args.smoke else describe(),
        "load": os.getloadavg(),
        "layers_of_the_model": config.num_hidden_layers,
        "checkpoint_bytes": size,
        "blocks": [args.blocks, args.tokens],
        "layers": rows,
        "watched_over_bare": ratio,
        "scoring": memory,
    }
    bare_seconds, load_seconds = (statistics.median(row[key] for row in rows) for key in ("bare", "load"))
    print(
        f"a layer: read {load_seconds:.2f} s, bare forward {bare_seconds:.2f} s, watched {ratio:.2f} times that; "
        f"scoring {config.num_hidden_layers} layers: {memory['seconds']:.1f} s, {memory['peak_bytes'] / 1e9:.2f} GB"
    )
    if args.out:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    missed = not args.smoke and (ratio > MOST_TIME or memory["peak_bytes"] > MOST_MEMORY)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
