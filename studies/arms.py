"""What the studies share: arms that are trained once and measured alike, and their results as JSON.

An arm is a shape, a start (random weights, or the bundled model cut to that shape in some way), a loss, a learning
rate, a length and a seed. A seed decides the order of the text, the calibration blocks (the first of that text), and
random weights; all arms of a seed see the same text, so that they differ in pairs. An arm that two studies ask for is
trained once, and a study that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from minitron import NemotronForCausalLM, bundled_model
from minitron.checkpoint.fingerprint import fingerprint
from minitron.checkpoint.hf import read_config
from minitron.compress.costs import training_flops
from minitron.compress.ranking import SharedTargets
from minitron.compress.select import short_name
from minitron.data.documents import Source
from minitron.data.packing import Batch, PackedBlocks
from minitron.data.token_cache import tokenize
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.targets import OnlineTeacher
from minitron.prune.architecture import Architecture
from minitron.prune.baselines import magnitude_scores, random_scores
from minitron.prune.choose import make_plan
from minitron.prune.compensation import compensate
from minitron.prune.importance import collect_statistics
from minitron.prune.observe import Statistics
from minitron.prune.scores import Scores
from minitron.prune.surgery import prune_checkpoint
from minitron.tokenizer import load_tokenizer
from minitron.train.heldout import heldout_loss
from minitron.train.inputs import TrainingTexts, new_model, open_texts, saved_model
from minitron.train.loop import train
from minitron.train.machine import autocast, keep_freed_memory
from minitron.train.schedule import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from machine import describe  # pyright: ignore[reportMissingImports]  # noqa: E402

# The mixture that the bundled model was trained on, as its card states it.
MIXTURE = ("easy.jsonl:2", "adventure.jsonl:0.5", "plain_books.jsonl:0.5", "storybooks.jsonl:4")
HELDOUT = "heldout_simple.jsonl"
HELDOUT_TOKENS = 20_000
CALIBRATION_BLOCKS = 128
SHAPE = Architecture(layers=3, hidden=224, heads=4, groups=2, ffn=704)
"""Half of the bundled model without its embeddings: the shape that `recipes/bundled.yaml` finds."""
BEST = "l2-mean+compensation"
"""The package's way to cut: the paper's importance, then norms and output projections compensated."""
RESULT = "result.json"
SHARED_STEPS = 200
"""Steps whose answers of the teacher are kept on disk for all arms of a seed."""
LOSSES: dict[str, DistillOptions | None] = {
    "ce": None,
    "kl": DistillOptions(),
    "reverse kl": DistillOptions("reverse_kl"),
    "kl + ce": DistillOptions(ce_weight=1.0),
    "kl + cosine": DistillOptions(hidden="cosine"),
    "kl + mse": DistillOptions(hidden="mse"),
}


@dataclass(frozen=True)
class Arm:
    """One training run."""

    start: str
    """"scratch" for random weights; else how units are ranked: "random", "magnitude", or aggregations over samples and
    tokens as in "l2-mean"; "+compensation" adds compensation."""
    loss: str
    """A key of `LOSSES`."""
    lr: float
    steps: int
    seed: int
    shape: Architecture = SHAPE
    evals: int = 1
    """Held-out losses along the run, the last at its end."""

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        evals = "" if self.evals == 1 else f"-evals{self.evals}"
        name = f"{short_name(self.shape)}-{self.start}-{self.loss}-lr{self.lr:g}-{self.steps}{evals}-seed{self.seed}"
        return name.replace(" ", "")


class Bench:
    """Teacher, texts and settings of the studies, and what trains and measures an arm.

    Args:
        options: of `parser`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder, self.runs, self.quick = options.texts, options.runs, options.quick
        self.finished = options.finished
        self.source = bundled_model()
        self.teacher_config = read_config(self.source)
        self.sequence, self.batch = (64, 2) if self.quick else (256, 8)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: Any = load_tokenizer(self.source)
        self.tokenizer.model_max_length = sys.maxsize
        self.texts = lru_cache(maxsize=None)(self._texts)
        self.calibration = lru_cache(maxsize=None)(self._calibration)
        self.statistics = lru_cache(maxsize=None)(self._statistics)
        self.shared = lru_cache(maxsize=None)(self._shared)
        self._teacher: NemotronForCausalLM | None = None
        keep_freed_memory()
        self.runs.mkdir(parents=True, exist_ok=True)
        self.heldout = self.some_heldout(500 if self.quick else HELDOUT_TOKENS)

    # --- texts -------------------------------------------------------------------------------------------------------

    def few(self, items: Sequence[Any], count: int = 1) -> list[Any]:
        """All of them, or in a quick run the first ones."""
        return list(items[:count] if self.quick else items)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, padding included."""
        return self.batch * self.sequence

    def _texts(self, seed: int) -> TrainingTexts:
        """Training text in the order of a seed."""
        names = [text for text in MIXTURE if (self.folder / text.split(":")[0]).is_file()]
        data = [str(self.folder / text) for text in names]
        config = TrainConfig(steps=1, sequence=self.sequence, seed=seed)
        return open_texts(data, [], 0.0, self.tokenizer, config, self.runs / "token-cache")

    def some_heldout(self, tokens: int) -> PackedBlocks:
        """Every n-th document of the held-out text, about so many tokens in all."""
        path = self.folder / HELDOUT
        if not path.is_file():
            raise SystemExit(f"{self.folder}: no {HELDOUT} in it; make the folder with scripts/bundled_text.py")
        cache = tokenize(Source(str(path)), self.tokenizer, self.runs / "token-cache")
        every = max(1, round(len(cache.tokens) / tokens))
        return PackedBlocks(cache, self.sequence, np.arange(0, cache.num_documents, every))

    def _calibration(self, seed: int) -> Batch:
        """The first blocks of the training text."""
        blocks = 4 if self.quick else CALIBRATION_BLOCKS
        return self.texts(seed).stream.batches(0, blocks, blocks)[0]

    def measure(self, model: nn.Module) -> float:
        """Held-out loss, nats per token."""
        context = autocast(self.device, "auto")
        return heldout_loss(model.to(self.device), self.heldout, 2 * self.batch, context)["nats_per_token"]

    # --- teacher -----------------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> NemotronForCausalLM:
        """The bundled model in fp32, in evaluation mode."""
        if self._teacher is None:
            model = saved_model(self.source).eval().requires_grad_(False)
            self._teacher = model.to(self.device)  # type: ignore[arg-type]
        return self._teacher

    def _shared(self, seed: int) -> SharedTargets:
        """The teacher's answers on the first steps of a seed's text, computed when they are first asked for."""
        blocks = SHARED_STEPS * self.batch
        return SharedTargets(OnlineTeacher(self.teacher), self.runs / f"teacher-{seed}.bin", blocks)

    def close(self) -> None:
        """Delete the teacher's answers."""
        for path in self.runs.glob("teacher-*.bin"):
            path.unlink()

    # --- cutting -----------------------------------------------------------------------------------------------------

    def _statistics(self, seed: int) -> Statistics:
        """What the bundled model's units do on a seed's calibration blocks."""
        return collect_statistics(self.source, self.calibration(seed))

    def scores(self, ranking: str, seed: int) -> Scores:
        """Importance in the bundled model."""
        if ranking == "random":
            return random_scores(self.teacher_config, seed)
        if ranking == "magnitude":
            return magnitude_scores(self.source)
        samples, tokens = ranking.split("-")
        return self.statistics(seed).scores(samples, tokens)  # type: ignore[arg-type]

    def cut(self, source: Path, scores: Scores, shape: Architecture, out: Path, compensation: Batch | None) -> Path:
        """`out`: a checkpoint cut to a shape and, with blocks to do it on, compensated."""
        if not out.is_dir():
            plan = make_plan(read_config(source), scores, shape, source=fingerprint(source))
            if compensation is None:
                prune_checkpoint(source, out, plan, check_source=False)
                return out
            draft = out.with_name(f"{out.name}.draft")
            prune_checkpoint(source, draft, plan, check_source=False, overwrite=True)
            compensate(source, draft, plan, compensation, out)
            shutil.rmtree(draft)
        return out

    def start(self, arm: Arm) -> nn.Module:
        """The initial model of an arm."""
        if arm.start == "scratch":
            return new_model(arm.shape.config(self.teacher_config), arm.seed)
        ranking, _, compensation = arm.start.partition("+")
        out = self.runs / "starts" / f"{short_name(arm.shape)}-{arm.start}-seed{arm.seed}"
        blocks = self.calibration(arm.seed) if compensation else None
        if not out.is_dir():
            self.cut(self.source, self.scores(ranking, arm.seed), arm.shape, out, blocks)
        return saved_model(out)

    # --- training ----------------------------------------------------------------------------------------------------

    def config(self, arm: Arm) -> TrainConfig:
        """The settings of an arm's run: the paper's cosine, here down to 0."""
        steps = 2 if self.quick else arm.steps
        return TrainConfig(
            steps=steps, batch=self.batch, sequence=self.sequence, lr=arm.lr, schedule="cosine",
            warmup=min(50, steps // 5), seed=arm.seed, eval_every=0 if arm.evals == 1 else max(1, steps // arm.evals),
            save_every=100, keep=1,
        )  # fmt: skip

    def loss(self, arm: Arm) -> dict[str, Any]:
        """The keywords of `train` for an arm's loss."""
        options = LOSSES[arm.loss]
        if options is None:
            return {}
        shared = options.hidden is None and arm.steps <= SHARED_STEPS
        targets = self.shared(arm.seed) if shared else OnlineTeacher(self.teacher)
        torch.manual_seed(arm.seed)  # of the projection of hidden states
        return {"loss": DistillLoss(targets, options, arm.shape.config(self.teacher_config))}

    def is_wanted(self, arm: Arm) -> bool:
        """Whether an arm is to be reported: each one, or with `--finished` those that were trained to their end."""
        return not self.finished or (self.runs / arm.folder / RESULT).is_file()

    def run(self, arm: Arm, make: Callable[[Arm], nn.Module] | None = None, keep: bool = False) -> dict[str, Any]:
        """Train an arm, or read what it gave before.

        Args:
            arm: which.
            make: its initial model; `start` if None.
            keep: leave the trained model in the run folder.

        Returns:
            The arm, and its curve: tokens and held-out loss, the first before training.
        """
        folder = self.runs / arm.folder
        done = folder / RESULT
        if done.is_file():
            return json.loads(done.read_text(encoding="utf-8"))
        config = self.config(arm)
        model = (make or self.start)(arm).to(self.device)
        before = self.measure(model)
        ended = train(
            model, self.texts(arm.seed).stream, config, folder, heldout={"text": self.heldout}, quiet=True,
            identity={"loss": arm.loss, "start": arm.start}, **self.loss(arm),
        )  # fmt: skip
        if ended.stopped_by is not None:
            raise SystemExit(f"stopped by {ended.stopped_by}; the same command goes on")
        curve = [{"tokens": 0, "loss": before}, *read_curve(folder, config.tokens_per_step)]
        result = {"arm": asdict(arm), "curve": curve}
        for left in (*folder.glob("step-*"), folder / "tensorboard", *([] if keep else [folder / "model"])):
            shutil.rmtree(left, ignore_errors=True)
        done.write_text(json.dumps(result), encoding="utf-8")
        print(f"{arm.folder}: {before:.3f} -> {curve[-1]['loss']:.4f}", file=sys.stderr, flush=True)
        return result

    def flops(self, arm: Arm, tokens: float) -> float:
        """Of making a model: importance, compensation and training on so many tokens, the teacher's passes included."""
        config = arm.shape.config(self.teacher_config)
        found = training_flops(config, self.teacher_config if arm.loss != "ce" else None, tokens, self.sequence)
        blocks = 4 if self.quick else CALIBRATION_BLOCKS
        large, small = (c.flops_per_token(self.sequence // 2) for c in (self.teacher_config, config))
        calibrated = 0 if arm.start in ("scratch", "random", "magnitude") else large
        compensated = large + 2 * small if arm.start.endswith("+compensation") else 0
        return found + blocks * self.sequence * (calibrated + compensated)


def read_curve(run: Path, tokens_per_step: int) -> list[dict[str, float]]:
    """Held-out losses of a run, by tokens trained on."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    name = "heldout/text/nats_per_token"
    return [{"tokens": row["step"] * tokens_per_step, "loss": row[name]} for row in rows if name in row]


def final(result: dict[str, Any]) -> float:
    """Held-out loss at the end of a run."""
    return result["curve"][-1]["loss"]


def mean_and_spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds, and the values."""
    found = list(values)
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return {"mean": statistics.fmean(found), "spread": spread, "values": found}


def paired(values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Differences from another arm, seed by seed."""
    return mean_and_spread(a - b for a, b in zip(values, base, strict=True))


# --- command line ----------------------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every study has."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("texts", type=Path, help="folder that scripts/bundled_text.py wrote")
    found.add_argument("--runs", type=Path, default=Path("runs/studies"), help="folder for run folders")
    found.add_argument("--out", type=Path, default=ROOT / "studies" / "results", help="folder for the JSON")
    found.add_argument("--plots", type=Path, default=ROOT / "docs" / "studies", help="folder for the plots")
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--finished", action="store_true", help="report what was trained so far, and train nothing")
    found.add_argument("--quick", action="store_true", help="tiny lengths; the numbers mean nothing")
    return found


def machine_facts() -> dict[str, Any]:
    """Processor, threads and versions; what it measures is left out, since no wall times are reported."""
    machine = describe(smoke=True)
    return {key: machine[key] for key in ("device", "threads", "torch", "python")}


def write_result(options: argparse.Namespace, bench: Bench, name: str, facts: dict[str, Any]) -> None:
    """`OUT/NAME.json`, with machine, data and teacher."""
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "study": name,
        "quick": options.quick,
        "machine": machine_facts(),
        "data": {"training": MIXTURE, "heldout": HELDOUT, "heldout_tokens": bench.heldout.num_scored},
        "seeds": options.seeds,
        "tokens_per_step": bench.tokens_per_step,
        "teacher": {"model": "the bundled model", "loss": bench.measure(bench.teacher)},
    }
    (options.out / f"{name}.json").write_text(json.dumps({**about, **facts}, indent=1) + "\n", encoding="utf-8")
    bench.close()
