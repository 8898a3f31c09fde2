"""`minitron compress` of a sequence classifier: importance and score on its own texts, then distillation of labels.

importance -> candidates -> choice -> pruning (the head stays) -> distillation of the labels' logits -> report. The run
folder is that of `stages`; `model` in it is the result. The unpruned classifier is the teacher.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.hf import check_checkpoint, read_config
from ..data.examples import Examples, Labelled, RowFormat, labelled, read_examples, split_examples
from ..data.packing import Batch, best_fit, collate
from ..files import is_empty, locked, require_apart, require_folder_name, write_json, write_text
from ..prune.architecture import Architecture
from ..prune.choose import make_plan
from ..prune.scores import Scores
from ..prune.search import Budget, Candidate, Machine, SearchError, enumerate_architectures, parse_quantity, thin_out
from ..prune.steps import cut, measure_importance
from ..prune.surgery import prune_checkpoint
from ..registration import register
from ..shapes import describe
from ..tokenizer import load_tokenizer
from ..train.loop import train
from ..train.schedule import TrainConfig
from ..tune.card import card
from ..tune.encoding import encoder_of
from ..tune.label_job import LabelMeasure, label_report
from ..tune.labels import DistilledLabelLoss, LabelSet, label_rows, predict_logits
from ..tune.models import pad_id, saved_head, store_temperature
from ..tune.rows import Row, RowStream
from ..tune.scores import score
from .stages import RunError, Stages, StoppedError

BUDGETS = ("params", "non_embedding_params", "memory", "keep")
SETTINGS_FILE = "classifier.json"
SCORED_ROWS = 256
"""Rows that candidates are compared on."""
Say = Callable[[str], object]


@dataclass(frozen=True)
class ClassifierRecipe:
    """How a classifier is compressed."""

    model: Path
    """Folder of the sequence classifier: what is pruned, and the teacher."""
    data: tuple[str, ...]
    """Labelled rows to learn from."""
    budget: tuple[str, str]
    """(kind, text): one of `BUDGETS`, as in ("params", "50%") or ("keep", "ffn=1024")."""
    test: tuple[str, ...] = ()
    """Rows of the report; a share of `data` if empty."""
    share: float = 0.1
    """Of `data` for validation, and for the test where that has no files."""
    rows: RowFormat = field(default_factory=RowFormat)
    candidates: int = 8
    """Shapes that are cut and scored before one is chosen."""
    calibration_rows: int = 1024
    """Training rows that importance is measured on."""
    epochs: float = 3.0
    """Passes over the training rows, unless `train` has a length."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig` for the distillation."""

    def config(self, rows: int, positions: int) -> TrainConfig:
        """The settings of the distillation.

        Args:
            rows: that are trained on.
            positions: of the model.
        """
        values = {"batch": 16, "sequence": 512, "lr": 1e-4, "schedule": "cosine", "weight_decay": 0.01,
                  "eval_every": 0, "save_every": 200, **self.train}  # fmt: skip
        if values.get("tokens") is None and values.get("hours") is None:
            values["steps"] = max(1, math.ceil(self.epochs * rows / values["batch"]))
            values["warmup"] = min(20, values["steps"] // 5)
        return TrainConfig(**{**values, "sequence": min(values["sequence"], positions)})


@dataclass(frozen=True)
class Task:
    """The rows of a run as the classifier reads them."""

    labels: LabelSet
    tokenizer: Any
    pad: int
    train: Examples[Labelled]
    test: Examples[Labelled]
    train_rows: list[Row]
    valid_rows: list[Row]
    test_rows: list[Row]

    @cached_property
    def digest(self) -> str:
        """Of all rows."""
        parts = (self.train_rows, self.valid_rows, self.test_rows)
        return " ".join(RowStream(part, self.pad, 0, 0).key["rows"][:16] for part in parts)


def compress_classifier(
    recipe: ClassifierRecipe, out: Path, *, device: Any = "cpu", quiet: bool = False, dry: bool = False,
    say: Say = lambda _: None,
) -> Path | None:  # fmt: skip
    """Make a smaller classifier in the run folder `out`, or continue where an earlier call was interrupted.

    Args:
        recipe: what to do.
        out: run folder. `model` in it is the result, `report.json` its scores beside the teacher's and baselines.
        device: where models run.
        quiet: no progress bars.
        dry: check everything, say what would be done, and stop.
        say: called with messages.

    Returns:
        The folder of the result; None after a dry run.

    Raises:
        ValueError: what is wrong with the rows, the budget, the checkpoint or the run folder; nothing is written then.
        StoppedError: SIGTERM or Ctrl-C, with everything saved.
    """
    require_folder_name(out)
    require_apart(out, [recipe.model, *map(Path, (*recipe.data, *recipe.test))])
    if out.exists() and not is_empty(out) and not (out / SETTINGS_FILE).is_file():
        raise RunError(f"{out} is not empty and is not the folder of such a run (no {SETTINGS_FILE}); choose another")
    check_checkpoint(recipe.model)
    register()
    config: Any = read_config(recipe.model)
    task = _open_task(recipe, config)
    training = recipe.config(len(task.train_rows), config.max_position_embeddings)
    found = _candidates(recipe, config, task.labels)
    shapes = f"{len(found)} shapes of {found[0].parameters:,} to {found[-1].parameters:,} parameters"
    say(f"{recipe.model}: {_size(config, task.labels):,} parameters; within the budget: {shapes}")
    say(f"{len(task.train_rows):,} rows to learn from, {len(task.valid_rows):,} to choose by, {len(task.test_rows):,} "
        f"to test on; {training.steps or 'as many'} steps of {training.batch} rows")  # fmt: skip
    if dry:
        return None
    with locked(out):
        return _Run(recipe, out, device, quiet, say, task, training, found).all_stages()


def _open_task(recipe: ClassifierRecipe, config: Any) -> Task:
    labels = LabelSet.of_config(config)
    tokenizer: Any = load_tokenizer(recipe.model, vocab_size=config.vocab_size)
    sequence = min(recipe.train.get("sequence", 512), config.max_position_embeddings)
    convert, seed = labelled(labels.problem), recipe.train.get("seed", 0)
    whole = read_examples(recipe.data, "classify", convert, recipe.rows)
    test = read_examples(recipe.test, "classify", convert, recipe.rows) if recipe.test else None
    if not recipe.share:
        raise ValueError("--heldout-share is 0; candidates are compared on rows that are not trained on, so give some")
    train, valid, rest = split_examples(whole, [recipe.share, 0.0 if test is not None else recipe.share], seed)
    test = rest if test is None else test
    encode = encoder_of(config)
    rows = [label_rows(tokenizer, part, labels, sequence, encode) for part in (train, valid, test)]
    pad = pad_id(tokenizer) if config.pad_token_id is None else config.pad_token_id
    return Task(labels, tokenizer, pad, train, test, *rows)


def _size(config: Any, labels: LabelSet) -> int:
    """Parameters of a classifier: there is no LM head, whatever the configuration says of one."""
    return describe(_without_head(config)).num_parameters() + len(labels.names) * config.hidden_size


def _without_head(config: Any) -> Any:
    return type(config)(**{**config.to_dict(), "tie_word_embeddings": True})


def _candidates(recipe: ClassifierRecipe, config: Any, labels: LabelSet) -> list[Candidate]:
    """The shapes that are compared, by their size.

    Raises:
        SearchError, ArchitectureError: the budget is malformed or cannot be met.
    """
    kind, text = recipe.budget
    counted, machine = _without_head(config), Machine("fp32")
    if kind == "keep":
        return [Candidate.of(Architecture.parse(text, config), counted, machine)]
    own = len(labels.names) * config.hidden_size  # of the head, which a shape does not count
    size = Budget(kind, 1, 2).measure(counted, machine)
    if text.strip().endswith("%"):
        limit = _share(kind, text) * (size + own * (4 if kind == "memory" else 1))
    else:
        limit = parse_quantity(kind, text)
    if kind == "params":
        limit -= own
    if kind == "memory":
        limit -= 4 * own
    if limit <= 0:
        raise SearchError(f"--{kind.replace('_', '-')} is {text!r}; the head alone has {own:,} parameters")
    return thin_out(enumerate_architectures(counted, Budget.parse(kind, str(limit))), recipe.candidates)


def _share(kind: str, text: str) -> float:
    try:
        share = float(text.strip()[:-1]) / 100
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise SearchError(f"--{kind.replace('_', '-')} is {text!r}; a share must be more than 0% and less than 100%")
    return share


@dataclass
class _Run:
    """The stages of one run, in their order."""

    recipe: ClassifierRecipe
    out: Path
    device: Any
    quiet: bool
    say: Say
    task: Task
    training: TrainConfig
    candidates: list[Candidate]

    def all_stages(self) -> Path:
        """Do what is not done yet; the folder of the result."""
        write_json(self.out / SETTINGS_FILE, {"model": str(self.recipe.model), "budget": list(self.recipe.budget)})
        self.stages = Stages(self.out, self.say)  # type: ignore[arg-type]
        self.mark = fingerprint(self.recipe.model)
        self.config: Any = read_config(self.recipe.model)
        self.inputs = {"model": self.mark, "rows": self.task.digest}
        shape = self.choose(self.importance())
        pruned = self.prune(shape)
        self.distill(pruned)
        self.report(pruned)
        return self.out / "model"

    @cached_property
    def blocks(self) -> Batch:
        """Training rows that importance is measured on, several in a block, none of which sees another."""
        rows = [np.asarray(row.ids) for row in self.task.train_rows[: self.recipe.calibration_rows]]
        length = max(map(len, rows))
        return collate(
            [[rows[i] for i in members] for members in best_fit(np.array([*map(len, rows)]), length)], length
        )

    def importance(self) -> Scores:
        """Importance of every unit on the texts of the task."""
        path = self.out / "importance" / "importance.safetensors"

        def work(folder: Path) -> dict[str, Any]:
            measure_importance(self.recipe.model, self.blocks, path, work=folder / "work", device=self.device)
            return {"rows": min(len(self.task.train_rows), self.recipe.calibration_rows)}

        self.stages.run("importance", {**self.inputs, "most": self.recipe.calibration_rows}, work)
        return Scores.load(path)

    def choose(self, scores: Scores) -> Architecture:
        """The candidate with the least loss of the task right after the cut."""
        shapes = [candidate.architecture for candidate in self.candidates]

        def work(folder: Path) -> dict[str, Any]:
            if len(shapes) == 1:
                return {"shape": shapes[0].as_dict(), "scores": []}
            found = []
            for shape in shapes:
                plan = make_plan(self.config, scores, shape, source=self.mark)
                prune_checkpoint(self.recipe.model, folder / "cut", plan, check_source=False, overwrite=True)
                loss = self.loss_of(folder / "cut")
                found.append({"shape": shape.as_dict(), "loss": loss})
                self.say(f"{shape}: {loss:.4f} right after the cut")
            shutil.rmtree(folder / "cut")
            best = min(found, key=lambda row: row["loss"] if math.isfinite(row["loss"]) else math.inf)
            return {"shape": best["shape"], "scores": found}

        facts = self.stages.run("choice", {**self.inputs, "shapes": [s.as_dict() for s in shapes]}, work)
        return Architecture.from_dict(facts["shape"], "shape")

    def loss_of(self, folder: Path) -> float:
        """The loss of the task on rows that are not trained on."""
        rows, problem = self.task.valid_rows[:SCORED_ROWS], self.task.labels.problem
        model = saved_head(folder, "sequence-classification", torch.float32, self.device)
        logits = torch.from_numpy(predict_logits(model, rows, self.task.pad))
        targets = torch.tensor([row.targets["labels"] for row in rows])
        return float(DistilledLabelLoss(problem).of_logits(logits, targets).mean())

    def prune(self, shape: Architecture) -> Path:
        """Cut the chosen shape out, and compensate what stays for what goes."""
        place = self.out / "prune" / "model"

        def work(folder: Path) -> dict[str, Any]:
            scores = Scores.load(self.out / "importance" / "importance.safetensors")
            plan = make_plan(self.config, scores, shape, source=self.mark)
            plan.save(folder / "plan.json")
            cut(self.recipe.model, plan, place, calibration=self.blocks, device=self.device)
            return {"shape": shape.as_dict(), "plan": plan.hash}

        self.stages.run("prune", {**self.inputs, "shape": shape.as_dict()}, work)
        return place

    def distill(self, pruned: Path) -> None:
        """Train the pruned model on the labels and on the teacher's logits of the same rows."""
        task, config = self.task, self.training

        def work(folder: Path) -> dict[str, Any]:
            teacher = saved_head(self.recipe.model, "sequence-classification", torch.float32, self.device)
            self.say(f"the teacher's logits of {len(task.train_rows):,} rows, once")
            logits = predict_logits(teacher, task.train_rows, task.pad).tolist()
            del teacher
            taught = [replace(row, targets={**row.targets, "teacher": t})
                      for row, t in zip(task.train_rows, logits, strict=True)]  # fmt: skip
            student = saved_head(pruned, "sequence-classification", torch.float32, self.device)
            result = train(
                student, RowStream(taught, task.pad, config.seed, config.sequence), config, folder / "run",
                heldout={"validation": LabelMeasure(task.valid_rows, task.labels, task.pad)},
                loss=DistilledLabelLoss(task.labels.problem), identity={"task": "compress", "teacher": self.mark},
                tokenizer=task.tokenizer, quiet=self.quiet,
            )  # fmt: skip
            if result.model is None:
                raise StoppedError(result.stopped_by)
            shutil.rmtree(self.out / "model", ignore_errors=True)
            os.replace(result.model, self.out / "model")
            return {"steps": result.step, "validation": result.heldout.get("validation")}

        inputs = {**self.inputs, "pruned": fingerprint(pruned), "config": vars(config)}
        self.stages.run("distill", inputs, work)

    def report(self, pruned: Path) -> None:
        """`report.json`, the card and the calibrating temperature of the result."""
        task = self.task
        models = {"model": self.out / "model", "parent": self.recipe.model, "right after pruning": pruned}
        loaded = {name: saved_head(path, "sequence-classification", torch.float32, self.device)
                  for name, path in models.items()}  # fmt: skip
        self.say(f"measuring {len(task.test_rows):,} test rows and the baselines")
        found = label_report(loaded["model"], task.pad, task.labels, task.train, task.test, task.test_rows,
                             task.valid_rows)  # fmt: skip
        targets = np.array([row.targets["labels"] for row in task.test_rows])
        rest = {name: score(predict_logits(model, task.test_rows, task.pad), targets, task.labels.problem)
                for name, model in loaded.items() if name != "model"}  # fmt: skip
        own = found["scores"].pop("model")
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in loaded.items()}
        report = {"task": "classify", "problem": task.labels.problem, "labels": list(task.labels.names),
                  "train_rows": len(task.train), **found, "scores": {"model": own, **rest, **found["scores"]},
                  "parameters": sizes, "base": self.recipe.model.name}  # fmt: skip
        store_temperature(self.out / "model", report.get("temperature"))
        settings = {"compressed": f"from {sizes['parent']:,} to {sizes['model']:,} parameters", "lr": self.training.lr,
                    "batch": self.training.batch, "steps": self.training.steps}  # fmt: skip
        write_text(self.out / "model" / "README.md", card(self.recipe.model.name, report, settings))
        write_json(self.out / "report.json", report)
