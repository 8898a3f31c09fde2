"""Does curation help a model? Raw, curated and clean text for equal tokens.

Web-like dirt is mixed into clean documents at known rates (`curation_dirt`). A model of the bundled model's shape is
trained from random weights on the dirty text, on what `minitron curate` makes of it, and on the clean documents. Each
seed has documents, dirt, an order and weights of its own, the same for its three arms.

    python studies/curation.py TEXTS
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import arms
import figures
from arms import Arm, Bench
from curation_dirt import ADDED, MARKED, Document, dirty_corpus
from torch import nn

from minitron.curate.recipe import Recipe, load_recipe
from minitron.curate.run import curate
from minitron.data.documents import Source, read_documents
from minitron.data.token_cache import tokenize
from minitron.prune.architecture import Architecture
from minitron.train.inputs import TrainingTexts, new_model, open_texts
from minitron.train.schedule import TrainConfig

NAME = "curation"
ARMS = ("raw", "curated", "clean")
RATE = 4e-3
STEPS = 256
EVALS = 2
SOURCE = "easy.jsonl"
SHORTEST = 600
"""Characters of a clean document, which Gopher's rules want to have 50 words."""
CHARACTERS_PER_TOKEN = 3.5
"""Of this text by the bundled tokenizer, about."""
SPARE = 1.15
"""Clean text for each token of training, so that no arm sees a document twice."""


class Corpus(Bench):
    """A bench whose text is one of the three corpora of a seed."""

    def __init__(self, options: Any, corpora: Corpora, name: str) -> None:
        super().__init__(options)
        self._corpora, self._name = corpora, name

    def _texts(self, seed: int) -> TrainingTexts:
        config = TrainConfig(steps=1, sequence=self.sequence, seed=seed)
        path = str(self._corpora.path(self._name, seed))
        return open_texts([path], [], 0.0, self.tokenizer, config, self.runs / "token-cache")


class Corpora:
    """The clean, the dirty and the curated documents of each seed, as files."""

    def __init__(self, bench: Bench, steps: int) -> None:
        self._folder = bench.runs / "curation-texts"
        self._tokens = (2 if bench.quick else steps) * bench.tokens_per_step
        path = bench.folder / arms.HELDOUT
        cache = tokenize(Source(str(path)), bench.tokenizer, bench.runs / "token-cache")
        every = max(1, round(len(cache.tokens) / (500 if bench.quick else arms.HELDOUT_TOKENS)))
        self.items = [text for i, text in enumerate(read_documents(path)) if i % every and len(text) >= 200]
        """Evaluation items that leak: documents of the held-out file, none of those that losses are measured on."""
        self._books = [text for text in read_documents(bench.folder / SOURCE) if len(text) >= SHORTEST]
        self.made = lru_cache(maxsize=None)(self._made)
        self._few = bench.few(self.items, 4)

    def _made(self, seed: int) -> tuple[list[str], list[Document]]:
        rng = random.Random(seed)
        clean: list[str] = []
        wanted = SPARE * CHARACTERS_PER_TOKEN * self._tokens
        for text in rng.sample(self._books, len(self._books)):
            clean.append(text)
            wanted -= len(text)
            if wanted < 0 and len(clean) >= 20:
                break
        return clean, dirty_corpus(clean, self._few, rng)

    def path(self, name: str, seed: int) -> Path:
        """The text of an arm; it is made when it is first asked for."""
        folder = self._folder / f"seed{seed}"
        if name == "curated":
            return self.curated(seed) / "shards"
        clean, dirty = self.made(seed)
        return _write(folder / f"{name}.jsonl", clean if name == "clean" else [each.text for each in dirty])

    def curated(self, seed: int) -> Path:
        """The folder of the curation of the dirty text."""
        out = self._folder / f"seed{seed}" / "curated"
        items = _write(self._folder / "items.jsonl", self._few)
        curate([str(self.path("raw", seed))], out, recipe(items), say=lambda _: None)
        return out

    def outcome(self, seed: int) -> dict[str, Any]:
        """What became of each kind of dirt: shares of its documents."""
        clean, dirty = self.made(seed)
        left: dict[int, str] = {}
        for path in sorted((self.curated(seed) / "shards").iterdir()):
            rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            left |= {int(row["place"].split()[1]) - 1: row["text"] for row in rows}
        return outcome(dirty, left, len(clean))


def recipe(items: Path) -> Recipe:
    """FineWeb's rules and what the dirt asks for, without C4's lines: they join paragraphs by single line feeds."""
    values = {
        "normalize": {"repair": True},
        "boilerplate": {},
        "personal_data": {},
        "language": {},
        "c4": False,
        "decontaminate": {"files": [str(items)]},
        "output": {"format": "jsonl"},
    }
    return load_recipe("fineweb", values)


def outcome(dirty: list[Document], left: dict[int, str], clean: int) -> dict[str, Any]:
    """Shares of what was planted that are gone, and of the clean documents that have a version left.

    A family is a clean document with its copies. Of a family one version stays; each further one is a copy too many.
    """
    made: dict[str, Any] = {}
    for kind in MARKED:
        rows = [i for i, each in enumerate(dirty) if each.kind == kind]
        gone = [not any(mark in left[i] for mark in dirty[i].marks) for i in rows if i in left]
        made[kind] = {
            "planted": len(rows),
            "removed or cleaned": (sum(gone) + len(rows) - len(gone)) / max(1, len(rows)),
        }
    for kind in ADDED:
        rows = [i for i, each in enumerate(dirty) if each.kind == kind]
        if not kind.endswith("copies"):
            made[kind] = {"planted": len(rows), "removed": sum(i not in left for i in rows) / max(1, len(rows))}
    families = Counter(dirty[i].origin for i in left if _is_of_family(dirty[i]))
    copies = sum(each.kind.endswith("copies") for each in dirty)
    surplus = sum(count - 1 for count in families.values())
    made["copies, exact and near"] = {"planted": copies, "removed": 1 - surplus / max(1, copies)}
    made["clean documents with a version left"] = {"planted": clean, "kept": len(families) / clean}
    return made


def _is_of_family(document: Document) -> bool:
    return document.kind in ("clean", *MARKED) or document.kind.endswith("copies")


def _write(path: Path, texts: Iterable[str]) -> Path:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft")
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        draft.write_text("".join(lines), encoding="utf-8")
        draft.replace(path)
    return path


def summary(results: dict[str, list[dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(rows of the table, points of the plot) of the results of each arm, seed by seed."""
    clean = list(map(arms.final, results["clean"]))
    rows: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for name, found in results.items():
        values = list(map(arms.final, found))
        rows[name] = {"held-out loss": arms.mean_and_spread(values)}
        if name != "clean":
            rows[name]["above clean"] = arms.paired(values, clean)
        curves[name] = [
            {"tokens": points[0]["tokens"], **arms.mean_and_spread(point["loss"] for point in points)}
            for points in zip(*(result["curve"] for result in found), strict=True)
        ][1:]
    return rows, curves


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = arms.parser(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each arm")
    options = parser.parse_args(argv)
    bench = Bench(options)
    corpora = Corpora(bench, options.steps)
    shape = Architecture.of(bench.teacher_config)
    start: Callable[[Arm], nn.Module] = lambda arm: new_model(bench.teacher_config, arm.seed)  # noqa: E731
    benches = {name: Corpus(options, corpora, name) for name in ARMS}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for seed in range(options.seeds):  # a whole seed first, so that a study that is cut short has pairs
        for name in ARMS:
            arm = Arm(f"curation-{name}", "ce", RATE, options.steps, seed, shape, EVALS)
            results[name].append(benches[name].run(arm, start))
    rows, curves = summary(results)
    outcomes = [corpora.outcome(seed) for seed in range(options.seeds)]
    share = "removed or cleaned", "removed", "kept"
    dirt = {
        kind: {
            "planted": outcomes[0][kind]["planted"],
            **{key: arms.mean_and_spread(o[kind][key] for o in outcomes) for key in share if key in found},
        }
        for kind, found in outcomes[0].items()
    }
    facts = {
        "data": {"training": SOURCE, "heldout": arms.HELDOUT, "heldout_tokens": bench.heldout.num_scored},
        "shape": shape.as_dict(), "learning_rate": RATE, "tokens": options.steps * bench.tokens_per_step,
        "dirt": {"in clean documents": MARKED, "added": ADDED}, "outcome": dirt,
        "corpora": [_sizes(corpora, benches, seed) for seed in range(options.seeds)],
        "rows": rows, "curves": curves,
    }  # fmt: skip
    arms.write_result(options, bench, NAME, facts)
    figures.draw(options.plots / f"{NAME}.png", curves, {"tokens": "tokens of training"})
    print(figures.table(rows))
    print(json.dumps(dirt, indent=1))


def _sizes(corpora: Corpora, benches: dict[str, Corpus], seed: int) -> dict[str, Any]:
    """Documents and tokens of each corpus."""
    made: dict[str, Any] = {}
    for name, bench in benches.items():
        cache = tokenize(Source(str(corpora.path(name, seed))), bench.tokenizer, bench.runs / "token-cache")
        made[name] = {"documents": int(cache.num_documents), "tokens": len(cache.tokens)}
    return made


if __name__ == "__main__":
    main()
