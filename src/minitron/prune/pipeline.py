"""A pruning run from a checkpoint and a goal to a smaller checkpoint with its plan, scores and card.

State is kept in a hidden folder next to the target, so that finished scores and candidates are not computed again
after an interruption. The target appears when it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..bench.speeds import Speed
from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.hf import open_hf
from ..config import ModelConfig
from ..data.packing import Batch
from ..data.token_cache import TokenFolder
from ..files import check_target, locked, new_folder, require_folder_name, writing
from ..files.links import leads_inside
from ..shapes import describe
from . import costs
from .architecture import Architecture, parse_axes
from .card import AFTER, BEFORE, CANDIDATES, CARD, FOLDER, PLAN, SCORES, Facts, model_card, text_table, with_doubts
from .choose import make_plan, scores_hash, sorted_plan
from .compensation import CompensatedPart
from .head_loss import judge
from .plan import PlanError, PrunePlan
from .rank import Ranked, walk_through
from .scores import Scores
from .search import (
    BUDGETS,
    BYTES_PER_VALUE,
    PAPER_GRIDS,
    TOLERANCE,
    Budget,
    Candidate,
    Grid,
    Machine,
    SearchError,
    thin_out,
)
from .steps import cut, find_candidates, measure_importance, rank_zero_shot
from .streaming import StreamedModel, batch_digest
from .surgery import check_fingerprint
from .texts import PruningTexts, open_text


@dataclass(frozen=True)
class PruneOptions:
    """Options of `minitron prune`. One goal: a plan, a shape, a budget, a paper's grid, or everything sorted."""

    plan: Path | None = None
    keep: str | None = None
    """The shape, as in "heads=24,ffn=9216"; beside a budget, the axes that the search keeps."""
    params: str | None = None
    non_embedding_params: str | None = None
    memory: str | None = None
    speed: str | None = None
    grid: str = "auto"
    """"auto", "paper-4b" or "paper-8b"; the latter two include a budget."""
    sort: bool = False
    tolerance: float = TOLERANCE
    dtype: str | None = None
    """Of the weights, for budgets of memory and speed; the checkpoint's own if None."""
    context: int | None = None
    """Tokens in the cache, for budgets of memory (all that the model can, if None) and speed (none)."""
    rank: str = "loss"
    candidates: int | None = None
    depth: str = "influence"
    contiguous: bool = False
    merge_heads: bool = False
    compensate: bool = False
    """Fit norms and output projections to the source on the calibration text; see `compensation`."""
    calibration: str | None = None
    heldout: str | None = None
    scores: Path | None = None
    samples: int = 128
    sequence: int = 512
    seed: int = 0
    measure: bool = True
    """Compare losses and speeds of source and result."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        goals = [*budgets, *(["plan"] if self.plan else []), *(["sorted"] if self.sort else [])]
        if len(goals) > 1:
            raise SearchError(f"--{' and --'.join(goals).replace('_', '-')} were given together; give one of them")
        if not goals and self.keep is None and self.grid == "auto":
            names = ", ".join(f"--{name.replace('_', '-')}" for name in BUDGETS)
            raise SearchError(
                f"the size of the result is missing: give one of {names}, --keep, --plan, --grid or --sorted"
            )
        if self.grid != "auto" and self.grid not in PAPER_GRIDS:
            raise SearchError(f"--grid is {self.grid!r}; it must be auto, {', '.join(PAPER_GRIDS)}")
        if self.rank not in ("loss", "kl"):
            raise SearchError(f"--rank is {self.rank!r}; it must be loss or kl")

    @property
    def searches(self) -> bool:
        """Whether there are candidates to choose from."""
        return self.grid != "auto" or any(getattr(self, name) is not None for name in BUDGETS)


@dataclass(frozen=True)
class Result:
    """What a run did."""

    out: str
    plan: str
    """Hash."""
    before: Facts
    after: Facts
    candidates: list[dict[str, Any]]
    """Those that were ranked, best first."""
    seconds: float
    """Of the cut."""
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Before and after, for a terminal."""
        return text_table(self.before, self.after)


Say = Callable[[str], object]
Progress = Callable[[str, int, int], None]


class PruneJob:
    """One run; `run` does it all.

    Args:
        source: checkpoint folder in the Hugging Face layout.
        out: folder to make.
        options: see `PruneOptions`.
        say: called with a sentence before each long part.
        progress: called with (stage, done, total).
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        options: PruneOptions,
        say: Say = lambda _: None,
        progress: Progress = lambda *_: None,
    ) -> None:
        read = (source, options.plan, options.scores, options.calibration, options.heldout)
        self.sources = [Path(path) for path in read if path is not None]
        require_folder_name(out)
        check_target(out, folder=True, overwrite=options.overwrite, sources=self.sources)
        self.source, self.out, self.options = source, out, options
        self.say, self.progress = say, progress
        self.checkpoint = open_hf(source)
        self.config: ModelConfig = self.checkpoint.config
        place = Path(os.path.realpath(out))
        self.work = place.with_name(f".{place.name}.pruning")
        self.notes: list[str] = []
        self._load = ""

    def run(self) -> Result:
        """Make the plan, cut, measure, write the card.

        Raises:
            ValueError: one sentence that says what is wrong and what would be right.
            WriteError: the disk is full or refuses.
        """
        with locked(self.work), writing(self.out):
            return self._run()

    def _run(self) -> Result:
        ranked: list[Ranked] = []
        if self.options.plan is not None:
            plan = PrunePlan.load(self.options.plan)
            plan.check_config(self.config, self.source)
            check_fingerprint(self.source, plan)
        elif self.options.sort:
            plan = sorted_plan(self.config, self.scores(()), source=self.mark)
        elif self.options.searches:
            plan, ranked = self.search()
        else:
            plan = self.plan_of(Architecture.parse(self.options.keep or "", self.config))
        self.say(plan.describe())
        return self.cut(plan, ranked)

    # --- choosing ----------------------------------------------------------------------------------------------------

    @cached_property
    def mark(self) -> str:
        """Fingerprint of the source."""
        return fingerprint(self.source)

    @cached_property
    def _held(self) -> torch.dtype:
        """Dtype of the source's weights."""
        return next(x.dtype for name, x in self.checkpoint.tensors.items() if name.endswith("embed_tokens.weight"))

    @cached_property
    def machine(self) -> Machine:
        """Dtype and context of the budget; the bandwidth where a speed is asked for or shown."""
        kind = next((name for name in BUDGETS if getattr(self.options, name) is not None), None)
        machine = costs.machine_for(kind, self.config, self._held, self.options.dtype, self.options.context)
        wanted = self.options.speed is not None or self.options.measure
        return costs.with_bandwidth(machine) if wanted else machine

    @cached_property
    def texts(self) -> PruningTexts:
        """Calibration, ranking and held-out blocks."""
        options = self.options
        length = min(options.sequence, self.config.max_position_embeddings)
        with TokenFolder(self.work / "tokens") as store:  # nothing stays of text that is refused
            texts = open_text(
                self.source, self.config.vocab_size, text=options.calibration, heldout=options.heldout,
                samples=options.samples, length=length, seed=options.seed, cache=store,
            )  # fmt: skip
        self.say(texts.about)
        self.notes += texts.notes
        return texts

    def scores(self, depths: tuple[int, ...]) -> Scores:
        """Importance for models of `depths` layers: given, kept from an interrupted run, or measured now."""
        windows = ()
        if self.options.contiguous:
            windows = tuple(sorted({n for n in (self.config.num_hidden_layers - d for d in depths) if n > 1}))
        if self.options.scores is not None:
            scores = Scores.load(self.options.scores)
            scores.check_fits(self.config)
            made_from = scores.about.get("checkpoint")
            if made_from is not None and made_from != self.mark:
                raise PlanError(f"{self.options.scores}: the scores are of another checkpoint than {self.source}")
            return scores
        path = self.work / SCORES
        if path.is_file():
            scores = Scores.load(path)
            if self._are_wanted(scores, windows):
                self.say("importance: measured before")
                return scores
        blocks = self.texts.calibration
        passes = 1 if self.options.depth == "influence" else 1 + self.config.num_hidden_layers / 2
        ahead = costs.forward_estimate(self.checkpoint, blocks.input_ids.numel(), blocks.input_ids.shape[1], passes)
        self.say(f"importance: {ahead}")
        scores = measure_importance(
            self.source, blocks, path, depth=self.options.depth, windows=windows, work=self.work / "importance",
            progress=lambda done, total: self.progress("importance", done, total),
        )  # fmt: skip
        self.notes += scores.about.get("notes", [])
        return scores

    def _are_wanted(self, scores: Scores, windows: tuple[int, ...]) -> bool:
        about = scores.about
        same = about.get("checkpoint") == self.mark and about.get("depth") == self.options.depth
        return (
            same
            and about.get("calibration") == batch_digest(self.texts.calibration)
            and set(windows) <= set(scores.windows)
        )

    def plan_of(self, shape: Architecture, scores: Scores | None = None) -> PrunePlan:
        """The plan for one shape."""
        return make_plan(
            self.config,
            scores or self.scores((shape.layers,)),
            shape,
            source=self.mark,
            depth="contiguous" if self.options.contiguous else "single",
            merge_heads=self.options.merge_heads,
        )

    def search(self) -> tuple[PrunePlan, list[Ranked]]:
        """The best of the shapes within the budget, and all that were ranked."""
        found = self.candidates()
        chosen = found if self.options.candidates is None else thin_out(found, self.options.candidates)
        scores = self.scores(tuple(candidate.architecture.layers for candidate in chosen))
        blocks = self.texts.ranking
        size = chosen[len(chosen) // 2].parameters / describe(self.config).num_parameters()
        ahead = costs.forward_estimate(
            self.checkpoint, blocks.input_ids.numel(), blocks.input_ids.shape[1], len(chosen) * size
        )
        skipped = f", spread evenly over {len(found)}" if len(chosen) < len(found) else ""
        self.say(f"ranking {len(chosen)} candidates{skipped} by {self.options.rank}: {ahead}")
        ranked = rank_zero_shot(
            self.source,
            chosen,
            lambda shape: self.plan_of(shape, scores),
            blocks,
            self.work / CANDIDATES,
            measure=self.options.rank,  # type: ignore[arg-type]
            progress=lambda _, done: self.progress("ranking", done, len(chosen)),
        )
        self.notes.append(
            f"Best of {len(chosen)} candidates{skipped} by {self.options.rank} without retraining; ranks may change "
            f"when the candidates are retrained for some hundred steps (arXiv:2407.14679, Figure 9)."
        )
        return self.plan_of(ranked[0].candidate.architecture, scores), ranked

    def candidates(self) -> list[Candidate]:
        """Every shape within the budget."""
        options = self.options
        grid, budget = PAPER_GRIDS.get(options.grid, (Grid.around(self.config), None))
        for kind in BUDGETS:
            if getattr(options, kind) is not None:
                budget = Budget.parse(kind, getattr(options, kind), options.tolerance)
        assert budget is not None
        if options.keep is not None:
            grid = grid.fixed(**parse_axes(options.keep))
        found = find_candidates(self.config, budget, self.machine, grid)
        self.machine, self._load = found.machine, found.doubt
        self.notes += found.notes
        return found.candidates

    # --- cutting -----------------------------------------------------------------------------------------------------

    def cut(self, plan: PrunePlan, ranked: list[Ranked]) -> Result:
        """Write the checkpoint, measure it, and add the card and the other files."""
        self.say(f"cut: {costs.cut_estimate(self.checkpoint.nbytes)}")
        blocks = self._compensation_blocks()
        config = plan.target.config(self.config)
        values = sum(x.nbytes // x.dtype.itemsize for x in self.checkpoint.tensors.values())
        total = round(self.checkpoint.nbytes * describe(config).num_parameters() / max(1, values))
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            self.progress("cutting", min(done, total), total)

        draft = self.work / "checkpoint"
        shutil.rmtree(draft, ignore_errors=True)  # of an interrupted run, with further files in it
        made = cut(
            self.source, plan, draft, calibration=blocks, cutting=progress,
            compensating=lambda done, total: self.progress("compensation", done, total),
        )  # fmt: skip
        self.notes += _about_compensation(made.compensated)
        speeds, load = self._speeds(draft, config)
        before = self._facts(self.source, self.config, made.report.bytes_before, speeds.get(BEFORE))
        after = self._facts(draft, config, made.report.bytes_after, speeds.get(AFTER))
        before, after = with_doubts(before, after, self._predictions(config), load)
        sides = ((BEFORE, before), (AFTER, after))
        doubts = [f"Speed of the {name}: {side.doubt}." for name, side in sides if side.doubt]
        self.notes += doubts
        plan = replace(plan, notes=(*filter(None, [self._load]), *doubts))
        rows = [{**r.candidate.as_dict(), "plan": r.plan, "score": _number(r.score)} for r in ranked]
        self._add_files(draft, plan, before, after)
        with new_folder(self.out, overwrite=self.options.overwrite, sources=self.sources) as final:
            draft.replace(final)
        shutil.rmtree(self.work)
        return Result(str(self.out), plan.hash, before, after, rows, made.report.seconds, self.notes)

    def _compensation_blocks(self) -> Batch | None:
        """The text on which what stays is compensated, if that was asked for."""
        if not self.options.compensate:
            return None
        blocks = self.texts.calibration
        ahead = costs.forward_estimate(self.checkpoint, blocks.input_ids.numel(), blocks.input_ids.shape[1], 3)
        self.say(f"compensation: {ahead}, more where the MLP is wide")
        return blocks

    def _copy_terms(self, draft: Path) -> None:
        """Copy the licence files of the source, and its card."""
        terms = [path for pattern in ("LICENSE*", "LICENCE*", "NOTICE*") for path in self.source.glob(pattern)]
        places = {path: draft / path.name for path in terms} | {self.source / CARD: draft / FOLDER / "source-card.md"}
        for path, place in places.items():
            if path.is_file() and leads_inside(path, self.source):
                shutil.copyfile(path, place)
            elif path.is_symlink():
                self.notes.append(f"`{path.name}` of the source links to another folder and was not copied.")

    def _speeds(self, draft: Path, config: ModelConfig) -> tuple[dict[str, Speed], str]:
        """Decoding speeds of source and result, and what else the machine ran meanwhile."""
        if not self.options.measure:
            return {}, ""
        folders, configs = {BEFORE: self.source, AFTER: draft}, {BEFORE: self.config, AFTER: config}
        per_value = max(2.0, BYTES_PER_VALUE.get(self.machine.dtype, 4.0))
        for name, each in configs.items():
            reason = costs.why_not_measured(each, per_value)
            if reason:
                self.notes.append(f"Speed of the {name} not measured: {reason}.")
                del folders[name]
        return costs.measured_speeds(folders, configs, per_value)

    def _predictions(self, config: ModelConfig) -> tuple[float | None, float | None]:
        """Speeds of source and result in the dtype of the checkpoint, which is the one that is measured."""
        machine = replace(self.machine, dtype=costs.machine_for(None, config, self._held).dtype, context=0)
        return machine.speed(self.config), machine.speed(config)

    def _facts(self, folder: Path, config: ModelConfig, weight_bytes: int, speed: Speed | None) -> Facts:
        loss = None
        if self.options.measure:
            model = StreamedModel(folder)
            if model.has_head:
                loss = judge(walk_through(model, self.texts.heldout), [])[()].loss
        return Facts.of(config, weight_bytes, self.machine, loss, speed)

    def _add_files(self, draft: Path, plan: PrunePlan, before: Facts, after: Facts) -> None:
        place = draft / FOLDER
        place.mkdir(exist_ok=True)
        plan.save(place / PLAN)
        self._copy_terms(draft)
        scores = self.options.scores or self.work / SCORES
        if scores.is_file() and plan.scores == scores_hash(Scores.load(scores)):
            shutil.copyfile(scores, place / SCORES)
        if (self.work / CANDIDATES).is_file():
            shutil.copyfile(self.work / CANDIDATES, place / CANDIDATES)
        settings = {name: value for name, value in asdict(self.options).items() if value not in (None, False)}
        if "texts" in self.__dict__:
            settings["text"] = self.texts.about
            settings["calibration_hash"] = batch_digest(self.texts.calibration)
        card = model_card(self.source, plan, before, after, settings, self.notes)
        (draft / CARD).write_text(card, encoding="utf-8")


def _about_compensation(parts: list[CompensatedPart]) -> list[str]:
    if not parts:
        return []
    accepted = sum(part.fit.accepted for part in parts)
    return [
        f"Compensation: {accepted} of {len(parts)} norms and output projections were fitted to the source on "
        f"calibration text, the others would have been worse on blocks held out; `compensation.json` lists them."
    ]


def _number(score: float) -> float | None:
    return score if score == score else None
