"""How the children of the SmolLM2 study are made: text, importance, shape, cut, training, and what that costs.

Each method makes what is missing in the study's folder and reads what is there, so a killed process loses little.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from smollm2_inputs import ROOT, Inputs

from minitron.checkpoint.fingerprint import fingerprint
from minitron.checkpoint.hf import read_config
from minitron.compress.costs import compensation_flops, training_flops
from minitron.data.packing import Batch
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.targets import OnlineTeacher
from minitron.distill.teacher_cache import make_codec, open_targets, plan_cache, write_cache
from minitron.files import write_json
from minitron.prune.architecture import Architecture
from minitron.prune.baselines import magnitude_scores, random_scores
from minitron.prune.choose import make_plan
from minitron.prune.importance import collect_statistics
from minitron.prune.scores import Scores as Importance
from minitron.prune.search import Budget, Grid, enumerate_architectures, thin_out
from minitron.prune.steps import cut, rank_zero_shot
from minitron.shapes import describe
from minitron.tokenizer import load_tokenizer
from minitron.train.inputs import new_model, open_texts, saved_model
from minitron.train.loop import RUN_FILE, train
from minitron.train.machine import keep_freed_memory
from minitron.train.resume import list_steps
from minitron.train.schedule import TrainConfig

sys.path.insert(0, str(ROOT / "benchmarks"))

SPEED = ": speed"
"""Steps with this in their names are done by `--only` alone: they need a machine that does nothing else."""
PARENT = "parent"
OURS = "ours"
SIZES = {"75%": 0.75, "50%": 0.5}
ROUNDING = 1.001
"""So much more than a size its shape may have: norms stay whole."""
CRITERIA = ("magnitude", "taylor", "hessian")
WAYS = {
    OURS: "importance, compensated",
    "importance": "importance, not compensated",
    "depth": "depth only, by Block Influence (ShortGPT)",
    "random": "random units",
    "magnitude": "magnitude of weights",
    **{f"torch-pruning-{name}": f"torch-pruning, {name}" for name in CRITERIA},
    "scratch": "random weights, for equal FLOPs",
}
"""How a child begins, by the names of its files."""
TRAINED = (OURS, "depth", "random", "magnitude", "torch-pruning", "scratch")
"""Of torch-pruning the criterion that is best after the cut."""
LR, SCRATCH_LR = 5e-4, 1e-3
CHUNK = 40
"""Steps between checkpoints of a training run: writing one and going on from it takes as long as six steps."""
CACHED_TOKENS = 300_000
"""Longest training for which the teacher's answers are kept on disk, for all children."""


@dataclass(frozen=True)
class Round:
    """How much is measured and trained before the next round."""

    pieces: int
    """Of each held-out text."""
    documents: int
    """Of each task, for the children."""
    tokens: int
    """Of distillation."""
    parent_documents: int
    """Of each task, for the parent."""


GRID = Grid((26, 30), (9,), (3,), (504, 576), ffn=tuple(range(512, 1537, 64)))


@dataclass(frozen=True)
class Settings:
    """Numbers that differ between a study and its smoke test."""

    rounds: tuple[Round, ...] = (
        Round(3, 20, 8_192, 20),
        Round(16, 100, 32_768, 1_000),
        Round(64, 200, 131_072, 1_000),
        Round(128, 1_000, 524_288, 1_000),
        Round(128, 1_000, 2_097_152, 1_000),
        Round(128, 1_000, 8_388_608, 1_000),
    )
    sequence: int = 512
    batch: int = 2
    warmup: int = 2
    calibration: int = 8
    """Blocks."""
    ranking: int = 1
    """Blocks that shapes are compared on."""
    shapes: int = 4
    megabytes: float = 40.0
    grid: Grid = GRID
    formats: tuple[str, ...] = ("bf16", "int8", "int4")
    new_tokens: int = 48
    turns: int = 3


SMOKE = Settings(
    rounds=(Round(1, 2, 128, 2),), sequence=32, batch=2, warmup=1, calibration=2, ranking=1, shapes=2, megabytes=0.05,
    grid=Grid((3, 4), (9,), (3,), (72,), ffn=(32, 64, 96, 128, 160, 192)), formats=(), new_tokens=4, turns=1,
)  # fmt: skip


class OutOfTimeError(Exception):
    """The minutes are over."""


class Children:
    """The children of one parent, in one folder.

    Args:
        parent: folder of the parent.
        run: folder of the study.
        inputs: text and documents.
        settings: lengths.
        seed: of text order, random scores and random weights.
    """

    def __init__(self, parent: Path, run: Path, inputs: Inputs, settings: Settings, seed: int = 0) -> None:
        self.parent, self.run, self.inputs, self.settings, self.seed = parent, run, inputs, settings, seed
        self.deadline = math.inf
        self.config = read_config(parent)
        self.whole = describe(self.config).num_non_embedding_parameters()
        keep_freed_memory()

    # --- text --------------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """The parent's."""
        found: Any = load_tokenizer(self.parent)
        found.model_max_length = sys.maxsize
        return found

    @cached_property
    def texts(self) -> Any:
        """Training text in its order."""
        path = self.inputs.training(self.run / "text" / "train.jsonl", self.settings.megabytes)
        config = TrainConfig(steps=1, sequence=self.settings.sequence, seed=self.seed)
        return open_texts([str(path)], [], 0.0, self.tokenizer, config, self.run / "text" / "tokens")

    @cached_property
    def calibration(self) -> Batch:
        """The first blocks of the training text: of importance, compensation and gradients alike."""
        count = self.settings.calibration
        return self.texts.stream.batches(0, count, count)[0]

    @cached_property
    def ranking(self) -> Batch:
        """The blocks behind them, on which shapes are compared."""
        count = self.settings.ranking
        return self.texts.stream.batches(self.settings.calibration, count, count)[0]

    # --- cutting -----------------------------------------------------------------------------------------------------

    def importance(self, way: str) -> Importance:
        """Scores of the parent's units."""
        path = self.run / "importance" / f"{way}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._score(way).save(path)
        return Importance.load(path)

    def _score(self, way: str) -> Importance:
        if way == "random":
            return random_scores(self.config, self.seed)
        if way == "magnitude":
            return magnitude_scores(self.parent)
        if way.startswith("torch-pruning"):
            from torch_pruning_scores import torch_pruning_scores  # type: ignore[reportMissingImports]

            return torch_pruning_scores(self.parent, self.calibration, way.removeprefix("torch-pruning-"))
        return collect_statistics(self.parent, self.calibration, work=self.run / "importance" / "work").scores()

    def shape(self, size: str) -> Architecture:
        """The best of a few shapes of that size, by the loss right after the cut."""
        path = self.run / "shapes" / f"{size}.json"
        if not path.is_file():
            budget = Budget.parse("non_embedding_params", str(round(ROUNDING * SIZES[size] * self.whole)), 0.03)
            found = enumerate_architectures(self.config, budget, self.settings.grid)
            chosen = thin_out(found, self.settings.shapes)
            ranked = rank_zero_shot(
                self.parent, chosen, lambda shape: self._plan(shape, OURS), self.ranking,
                path.with_suffix(".jsonl"),
            )  # fmt: skip
            rows = [{**x.candidate.as_dict(), "loss": x.score} for x in ranked]
            write_json(path, {"shape": ranked[0].candidate.architecture.as_dict(), "ranked": rows})
        return Architecture.from_dict(json.loads(path.read_text(encoding="utf-8"))["shape"], str(path))

    def shape_of(self, way: str, size: str) -> Architecture:
        """The shape of a child: with depth only, as many whole layers as the size allows."""
        if way != "depth":
            return self.shape(size)
        whole = Architecture.of(self.config)
        layers = round(SIZES[size] * whole.layers - 0.01)
        return Architecture(layers, whole.hidden, whole.heads, whole.groups, whole.ffn)

    def _plan(self, shape: Architecture, way: str) -> Any:
        ranked_by = {OURS: "importance", "depth": "importance"}.get(way, way)
        return make_plan(self.config, self.importance(ranked_by), shape, source=self.mark)

    @cached_property
    def mark(self) -> str:
        """Fingerprint of the parent."""
        return fingerprint(self.parent)

    def start(self, way: str, size: str) -> Path:
        """The folder of a child before training."""
        out = self.run / "models" / f"{way}-{size}-0"
        if not out.is_dir():
            out.parent.mkdir(parents=True, exist_ok=True)
            plan = self._plan(self.shape_of(way, size), way)
            cut(self.parent, plan, out, calibration=self.calibration if way == OURS else None)
        return out

    # --- training ----------------------------------------------------------------------------------------------------

    def tokens(self, way: str, size: str, tokens: int) -> int:
        """What a child is trained on; from random weights more, since there is no teacher to run."""
        if way != "scratch":
            return tokens
        child = self.shape(size).config(self.config)
        with_teacher, alone = (training_flops(child, t, 1, self.settings.sequence) for t in (self.config, None))
        return round(tokens * with_teacher / alone)

    def trained_path(self, way: str, size: str, tokens: int) -> Path:
        """The folder of a trained child, whether it is there or not."""
        return self.run / "models" / f"{way}-{size}-{tokens}"

    def train(self, way: str, size: str, tokens: int) -> Path:
        """The folder of a child that was trained on so many tokens, or as many as are equal in FLOPs.

        Raises:
            OutOfTimeError: the minutes are over; what was trained is kept.
        """
        out = self.trained_path(way, size, tokens)
        if out.is_dir():
            return out
        run = self.run / "training" / f"{way}-{size}"
        scratch = way == "scratch"
        config = TrainConfig(
            tokens=self.tokens(way, size, tokens), batch=self.settings.batch, sequence=self.settings.sequence,
            lr=SCRATCH_LR if scratch else LR, warmup=self.settings.warmup, seed=self.seed, eval_every=0, save_every=0,
            keep=1,
        )  # fmt: skip
        loss = {} if scratch else {"loss": self._loss(way, size, tokens)}
        model = new_model(self.shape(size).config(self.config), self.seed) if scratch else saved_model(
            self.start(way, size)
        )  # fmt: skip
        while True:
            done = max((step for step, _ in list_steps(run)), default=0)
            ended = train(
                model, self.texts.stream, config, run, tokenizer=self.tokenizer, quiet=True,
                extend=(run / RUN_FILE).is_file(), identity={"way": way, "size": size}, export_dtype=torch.bfloat16,
                until=done + CHUNK, **loss,
            )  # fmt: skip
            if ended.model is not None:
                break
            if not (ended.stopped_by or "").startswith("until"):
                raise SystemExit(f"stopped by {ended.stopped_by}; the same command goes on")
            if time.monotonic() > self.deadline:
                raise OutOfTimeError
        ended.model.replace(out)
        for _, folder in list_steps(run)[1:]:  # a longer run begins at the first, from before the decay
            shutil.rmtree(folder)
        return out

    def _loss(self, way: str, size: str, tokens: int) -> DistillLoss:
        teacher = saved_model(self.parent).eval().requires_grad_(False)
        targets: Any = OnlineTeacher(teacher)
        if tokens <= CACHED_TOKENS:
            folder = self.run / "teacher" / str(tokens)
            blocks = math.ceil(tokens / (self.settings.batch * self.settings.sequence)) * self.settings.batch
            plan = plan_cache(self.texts.stream, teacher, make_codec("hidden", teacher), self.mark, blocks=blocks)
            write_cache(folder, plan, self.texts.stream, teacher)
            targets = open_targets(folder, self.texts.stream, self.mark)
        return DistillLoss(targets, DistillOptions(), self.shape_of(way, size).config(self.config))

    # --- costs -------------------------------------------------------------------------------------------------------

    def flops(self, way: str, size: str, tokens: int) -> float:
        """Of making a child: importance or gradients, compensation, and training with the teacher's passes."""
        child = self.shape_of(way, size).config(self.config)
        sequence = self.settings.sequence
        calibrated = self.settings.calibration * sequence
        passes = {"random": 0, "magnitude": 0, "scratch": 0}.get(way, 3 if way.startswith("torch") else 1)
        total = calibrated * passes * describe(self.config).flops_per_token(sequence // 2)
        if way == OURS:
            total += compensation_flops(self.config, child, calibrated, sequence)
        teacher = None if way == "scratch" else self.config
        return total + training_flops(child, teacher, self.tokens(way, size, tokens), sequence)


def smoke_parent(folder: Path) -> Path:
    """A Llama with random weights and the bundled tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from minitron import bundled_model

    if not folder.is_dir():
        tokenizer: Any = load_tokenizer(bundled_model())
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=72, intermediate_size=192, num_hidden_layers=4,
            num_attention_heads=9, num_key_value_heads=3, head_dim=8, tie_word_embeddings=True,
            max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
