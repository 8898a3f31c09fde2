"""What the studies share: arms that are trained (or only pruned) once and measured alike, and their results as JSON.

An arm is a start (random weights, or the teacher pruned in some way), a loss, a learning rate, a length and a seed.
Arms of one study see the same text in the same order for the same seed. Each has a run folder, so that a study that
was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron import NemotronConfig, NemotronForCausalLM, bundled_model
from minitron.distill.inputs import Texts, new_model, open_texts, saved_model
from minitron.distill.machine import keep_freed_memory
from minitron.distill.schedule import TrainConfig
from minitron.distill.train import train
from minitron.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from machine import describe  # noqa: E402

# The mixture that the bundled model was trained on, as its card states it.
MIXTURE = ("easy.jsonl:2", "adventure.jsonl:0.5", "plain_books.jsonl:0.5", "storybooks.jsonl:4")
HELDOUT = ("heldout_simple.jsonl",)
EVALS = 2
"""Held-out losses measured along a run, its end included."""


@dataclass(frozen=True)
class Arm:
    """One training run of a study."""

    name: str
    start: str
    """Name of a function of the study that makes the initial model; "random" for new weights."""
    loss: str
    """"ce", or a kind of distillation that the study knows."""
    lr: float
    tokens: int
    seed: int

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return f"{self.name}-lr{self.lr:g}-{self.tokens}-seed{self.seed}".replace("/", "_")


class Bench:
    """Teacher, texts and settings of the studies, and what measures an arm.

    Args:
        texts: folder that `scripts/bundled_text.py` wrote.
        runs: folder for run folders and token caches.
        quick: shapes and lengths at which numbers mean nothing, for a test.
    """

    def __init__(self, texts: Path, runs: Path, quick: bool = False) -> None:
        self.texts, self.runs, self.quick = texts, runs, quick
        self.teacher_folder = bundled_model()
        self.tokenizer: Any = load_tokenizer(self.teacher_folder)
        self.tokenizer.model_max_length = sys.maxsize
        self.teacher_config = NemotronConfig.from_pretrained(self.teacher_folder)
        self.sequence, self.batch = (64, 2) if quick else (512, 8)
        self._teacher: NemotronForCausalLM | None = None
        keep_freed_memory()

    @property
    def teacher(self) -> NemotronForCausalLM:
        """The bundled model in fp32, in evaluation mode."""
        if self._teacher is None:
            self._teacher = saved_model(self.teacher_folder).eval().requires_grad_(False)
        return self._teacher

    def config(self, arm: Arm) -> TrainConfig:
        """The settings of an arm's run."""
        tokens = 4 * self.batch * self.sequence if self.quick else arm.tokens
        steps = max(1, round(tokens / (self.batch * self.sequence)))
        return TrainConfig(
            steps=steps, batch=self.batch, sequence=self.sequence, lr=arm.lr, warmup=min(50, steps // 5), decay=0.25,
            seed=arm.seed, eval_every=max(1, steps // EVALS), save_every=200, keep=1,
        )  # fmt: skip

    def open(self, config: TrainConfig) -> Texts:
        """Training and held-out text for a run."""
        names = [name for name in HELDOUT if (self.texts / name).is_file()]
        if not names:
            raise SystemExit(f"{self.texts}: no {HELDOUT[0]} in it; make the folder with scripts/bundled_text.py")
        data = [str(self.texts / name) for name in MIXTURE if (self.texts / name.split(":")[0]).is_file()]
        held = [str(self.texts / name) for name in names]
        return open_texts(data, held, 0.0, self.tokenizer, config, self.runs / "token-cache")

    def run(
        self,
        arm: Arm,
        make: Callable[[int], nn.Module],
        loss: Callable[..., Any] | None = None,
        flops_per_token: float = 0.0,
    ) -> dict[str, Any]:
        """Train an arm, or read what it gave before.

        Args:
            arm: which.
            make: seed -> the initial model.
            loss: what is minimized; cross-entropy if None.
            flops_per_token: of a training step, the teacher included; for the curve.

        Returns:
            The arm, and its curve: tokens, FLOPs and held-out losses by text.
        """
        folder = self.runs / arm.folder
        done = folder / "result.json"
        if done.is_file():
            return json.loads(done.read_text(encoding="utf-8"))
        config = self.config(arm)
        texts = self.open(config)
        model = make(arm.seed)
        model.to(pick())
        keywords: dict[str, Any] = {} if loss is None else {"loss": loss}
        print(f"{arm.folder}: {config.total_steps} steps", file=sys.stderr, flush=True)
        train(
            model, texts.stream, config, folder, heldout=texts.heldout, tokenizer=self.tokenizer, quiet=True, **keywords
        )  # fmt: skip
        curve = read_curve(folder, config.tokens_per_step, flops_per_token)
        result = {"arm": asdict(arm), "curve": curve}
        done.write_text(json.dumps(result), encoding="utf-8")
        return result


def read_curve(run: Path, tokens_per_step: int, flops_per_token: float) -> list[dict[str, Any]]:
    """Held-out losses of a run, by tokens trained on."""
    rows: dict[int, dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        tokens = values["step"] * tokens_per_step
        for key, value in values.items():
            part = key.split("/")
            if part[0] == "heldout" and part[-1] == "nats_per_token":
                row = rows.setdefault(tokens, {"tokens": tokens, "flops": tokens * flops_per_token})
                row[part[1]] = value
    return [rows[tokens] for tokens in sorted(rows)]


def random_start(config: NemotronConfig) -> Callable[[int], nn.Module]:
    """Makes a model of a shape with new weights."""
    return lambda seed: new_model(config, seed)


def pick() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and the standard deviation over seeds (0 for one)."""
    found = list(values)
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def tokens_to_reach(curve: list[tuple[float, float]], loss: float) -> float | None:
    """Where a falling curve of (tokens, loss) reaches `loss`, on a straight line in log tokens; None if it does not."""
    for (t0, l0), (t1, l1) in pairwise(curve):
        if l0 >= loss >= l1 and l0 > l1:
            share = (l0 - loss) / (l0 - l1)
            return math.exp(math.log(t0) + share * (math.log(t1) - math.log(t0)))
    return None


def arguments(description: str | None, seeds: int = 3) -> argparse.Namespace:
    """Options that every study has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder that scripts/bundled_text.py wrote")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="folder for run folders")
    parser.add_argument("--out", type=Path, default=ROOT / "studies" / "results", help="folder for the JSON")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "studies", help="folder for the plots")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--only", nargs="*", help="train these arms only, and write no result")
    parser.add_argument("--quick", action="store_true", help="tiny lengths; the numbers mean nothing")
    return parser.parse_args()


def write_result(out: Path, name: str, facts: dict[str, Any]) -> None:
    """`out/NAME.json`, with the machine."""
    out.mkdir(parents=True, exist_ok=True)
    facts = {"study": name, "machine": describe(smoke=facts.get("quick", False)), **facts}
    (out / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
