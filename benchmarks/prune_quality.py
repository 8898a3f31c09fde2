"""Loss of the bundled model after pruning to half of its non-embedding parameters, without any retraining.

    python benchmarks/prune_quality.py --books FOLDER --out benchmarks/results/prune_quality.json
    python benchmarks/prune_quality.py --smoke --out x.json            # seconds; what the tests run

Arms: the nine pairs of aggregations of P1's Table 11 (arXiv 2407.14679), random, weight magnitude, Taylor, and the
criteria of torch-pruning. Each is a ranking; the cut is the same for all (`prune.surgery`). Calibration blocks are
drawn from the text that the model was trained on, anew for each seed; the loss is measured on text that it was not
trained on (`scripts/bundled_text.py`). FOLDER holds the books that script reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch_pruning_scores import CRITERIA, torch_pruning_scores

from minitron import NemotronForCausalLM
from minitron.assets import bundled_model
from minitron.checkpoint.fingerprint import fingerprint
from minitron.checkpoint.hf import open_hf
from minitron.data.documents import Source
from minitron.data.packing import Batch, PackedBlocks, collate
from minitron.data.token_cache import tokenize
from minitron.prune.architecture import Architecture
from minitron.prune.baselines import magnitude_scores, random_scores, taylor_scores
from minitron.prune.choose import make_plan
from minitron.prune.compensation import compensate
from minitron.prune.importance import collect_statistics, draw_blocks
from minitron.prune.scores import Scores
from minitron.prune.statistics import AGGREGATIONS
from minitron.prune.surgery import prune_checkpoint, pruned
from minitron.tokenizer import load_tokenizer

OURS, BOTH = "(l2, mean)", "norms and projections"
COMPENSATED = (OURS, "random", "magnitude", "torch-pruning taylor")
COMPENSATIONS = {"norms": ("norms",), "projections": ("linear",), BOTH: ("norms", "linear")}
ROOT = Path(__file__).parents[1]
BLOCK = 512
# What stays of 4 layers, hidden 256, 4 heads in 2 groups, MLP 1024: half of the parameters outside the embeddings.
SHAPES = {
    "all axes": "hidden=192,heads=2,ffn=672",
    "heads and neurons": "heads=2,ffn=448",
}
SMOKE_TEXT = "Once upon a time there was a {} who lived in a house near the {}, and one day the {} went away.\n"
WORDS = ("girl", "boy", "king", "fox", "hen", "wolf", "forest", "river", "sea", "hill")


def texts(books: Path | None, folder: Path) -> tuple[Path, Path]:
    """(calibration, held-out) text files."""
    if books is None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, shift in (("easy", 0), ("heldout_simple", 3)):
            lines = [
                SMOKE_TEXT.format(*(WORDS[(i * k + shift) % len(WORDS)] for k in (1, 3, 7))) * 12 for i in range(12)
            ]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    else:
        script = ROOT / "scripts" / "bundled_text.py"
        subprocess.run([sys.executable, str(script), str(books), str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder / "easy.jsonl", folder / "heldout_simple.jsonl"


def packed(path: Path, tokenizer: Any, block: int) -> PackedBlocks:
    """The text in blocks."""
    return PackedBlocks(tokenize(Source(str(path)), tokenizer, path.parent / "tokens"), block)


@torch.no_grad()
def loss_of(model: NemotronForCausalLM, heldout: list[Batch]) -> float:
    """Mean nats per token over all held-out labels."""
    nats = tokens = 0.0
    for batch in heldout:
        out = model(batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False)
        nats, tokens = nats + out.loss.item() * batch.num_items, tokens + batch.num_items
    return nats / tokens


def cut(folder: Path, scores: Scores, shape: str, source: str) -> NemotronForCausalLM:
    """The pruned model in memory."""
    checkpoint = open_hf(folder)
    target = Architecture.parse(shape, checkpoint.config)
    small = pruned(checkpoint, make_plan(checkpoint.config, scores, target, source=source))
    model = NemotronForCausalLM(small.config).float().eval()
    model.load_state_dict({name: tensor.load().float() for name, tensor in small.tensors.items()})
    return model


def rankings(folder: Path, blocks: Batch, seed: int) -> Iterator[tuple[str, Scores]]:
    """Every arm's scores with one seed's calibration blocks."""
    collected = collect_statistics(folder, blocks)
    for over_batch, over_sequence in product(AGGREGATIONS, AGGREGATIONS):
        yield f"({over_batch}, {over_sequence})", collected.scores(over_batch, over_sequence)
    yield "(l2, mean), neurons before the activation", collected.scores("l2", "mean", "before")
    yield "(mean, mean), neurons before the activation", collected.scores("mean", "mean", "before")
    yield "random", random_scores(open_hf(folder).config, seed)
    yield "magnitude", magnitude_scores(folder)
    yield "taylor", taylor_scores(folder, blocks)
    for criterion in CRITERIA:
        yield f"torch-pruning {criterion}", torch_pruning_scores(folder, blocks, criterion)


def compensated(folder: Path, scores: Scores, shape: str, source: str, blocks: Batch, parts: tuple[str, ...]) -> Any:
    """The pruned model after compensation with the calibration blocks, and how many fits were rejected."""
    config = open_hf(folder).config
    plan = make_plan(config, scores, Architecture.parse(shape, config), source=source)
    with tempfile.TemporaryDirectory(prefix="prune-quality-") as place:
        prune_checkpoint(folder, Path(place) / "small", plan, check_source=False)
        fits = compensate(folder, Path(place) / "small", plan, blocks, Path(place) / "better", parts=parts)
        model = NemotronForCausalLM.from_pretrained(Path(place) / "better", dtype=torch.float32).eval()
    return model, sum(not part.fit.accepted for part in fits)


def measure(folder: Path, calibration: PackedBlocks, heldout: list[Batch], args: argparse.Namespace) -> dict:
    """Losses by shape and arm, one for each seed."""
    source = fingerprint(folder)
    whole = NemotronForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses: dict[str, dict[str, list[float]]] = {shape: {} for shape in SHAPES}
    refused: dict[str, list[int]] = {}
    before = loss_of(whole, heldout)
    for seed in args.seeds:
        blocks = draw_blocks(calibration, args.blocks, seed)
        for arm, scores in rankings(folder, blocks, seed):
            if args.only and arm not in args.only:
                continue
            for name, shape in SHAPES.items():
                loss = loss_of(cut(folder, scores, shape, source), heldout)
                losses[name].setdefault(arm, []).append(loss)
            said = [f"seed {seed}: {arm}: " + ", ".join(f"{losses[n][arm][-1]:.3f}" for n in SHAPES)]
            for label, parts in COMPENSATIONS.items() if arm in COMPENSATED else ():
                for name, shape in SHAPES.items():
                    if label != BOTH and (arm != OURS or name != "all axes"):
                        continue  # the parts alone are looked at in one place
                    better, count = compensated(folder, scores, shape, source, blocks, parts)
                    losses[name].setdefault(f"{arm} + {label}", []).append(loss_of(better, heldout))
                    refused.setdefault(f"{name}: {arm} + {label}", []).append(count)
                    said.append(f"{label}: {losses[name][f'{arm} + {label}'][-1]:.3f}")
            print("; ".join(said), flush=True)
    return {"loss_before": before, "losses": losses, "fits_rejected": refused}


def spread(values: list[float]) -> str:
    """Mean and, where there are several, standard deviation."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def table(losses: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: arms, best first by the first shape; mean and standard deviation over seeds."""
    lines = ["| ranking | " + " | ".join(losses) + " |", "| --- |" + " --- |" * len(losses)]
    first = next(iter(losses.values()))
    for arm in sorted(first, key=lambda a: statistics.mean(first[a])):
        cells = [spread(x[arm]) if arm in x else "" for x in losses.values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, help="folder of books; needed unless --smoke")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--blocks", type=int, default=64, help="calibration blocks of 512 tokens")
    parser.add_argument("--heldout-blocks", type=int, default=32)
    parser.add_argument("--only", nargs="*", help="rankings to run, by the names in the table; all if left out")
    parser.add_argument("--smoke", action="store_true", help="a few lines of text, one seed")
    parser.add_argument("--out", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.books is None and not args.smoke:
        parser.error("--books is needed, or --smoke")
    block = 64 if args.smoke else BLOCK
    if args.smoke:
        args.seeds, args.blocks, args.heldout_blocks = [0], 4, 2
    begin = time.perf_counter()
    folder = bundled_model()
    tokenizer: Any = load_tokenizer(folder)
    with tempfile.TemporaryDirectory(prefix="prune-quality-") as place:
        text, held = texts(None if args.smoke else args.books, Path(place) / "text")
        calibration, heldout = packed(text, tokenizer, block), packed(held, tokenizer, block)
        count = min(args.heldout_blocks, len(heldout))
        parts = [collate([heldout.pieces(j) for j in range(i, min(i + 4, count))], block) for i in range(0, count, 4)]
        figures = measure(folder, calibration, parts, args)
    facts = {
        "weights": "the bundled model",
        "machine": {} if args.smoke else describe(),
        "calibration_blocks": args.blocks,
        "heldout_tokens": sum(part.num_items for part in parts),
        "shapes": SHAPES,
        "seconds": round(time.perf_counter() - begin),
        **figures,
    }
    print(f"before pruning: {facts['loss_before']:.3f} nats per token\n\n{table(figures['losses'])}")
    if args.out:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
