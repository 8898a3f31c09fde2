"""A run in memory: model, optimizer, stream and position; its steps and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoint.hf import save_model
from ..quiet import progress_bars
from ..world import World
from . import sharded
from .log import METRICS_FILE
from .machine import autocast
from .objective import Numbers, Objective, models_of
from .optimizers import load_state, make_optimizer, placed_like, scale_gradients, set_rate, state_tensors
from .resume import OPTIMIZER_FILE, check_step, remove_old, save_step
from .run_folder import TrainError
from .schedule import TrainConfig, learning_rate, progress
from .stream import Stream

# Adapters are saved twice: in the format of peft for other programs, and under the names of parameters to resume from.
TRAINED_FILE = "trained.safetensors"
_LOSS = "loss."
_LOSS_FILE_PREFIX = "parameter."
# Steps over which the gradient's norm is averaged, and after which the average is used to recognize a spike.
_MEMORY = 50
_MOST_SKIPPED = 10


@dataclass
class State:
    """The progress of a run: everything in a checkpoint but weights and optimizer."""

    step: int = 0
    """Optimizer steps done."""
    blocks: int = 0
    """Position in the stream: examples used, of packed text blocks."""
    tokens: int = 0
    """Tokens used, padding included."""
    seconds: float = 0.0
    """Time spent in training."""
    decay_step: int | None = None
    """Step before which the learning rate began to go down."""
    usual_norm: float = 0.0
    """Running average of the gradient's norm."""
    skipped: int = 0
    """Steps whose update was skipped."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last update."""


class Trainer:
    """Model, optimizer, stream and position of a run."""

    def __init__(
        self,
        objective: Objective,
        stream: Stream,
        config: TrainConfig,
        run: Path,
        tokenizer: Any = None,
        world: World | None = None,
    ) -> None:
        self.objective, self.model = objective, objective.model
        self.stream, self.config, self.run, self.tokenizer = stream, config, run, tokenizer
        self.world = world or World()
        self.device = next(self.model.parameters()).device
        self.groups = [members for _, members in objective.groups()]
        self.optimizer = make_optimizer(objective.groups(), config)
        self.state = State()
        self.events: list[str] = []
        """Messages of the steps so far; the caller logs them and clears the list."""

    # --- a step --------------------------------------------------------------------------------------------------

    def forward_backward(self) -> tuple[float, dict[str, float]]:
        """Add up the gradients of the next step: (loss, other numbers), of all processes together."""
        config, totals, tokens = self.config, Numbers(self.device), 0
        at_once = config.at_once(self.world.data_size)
        share = (self.world.data_rank, self.world.data_size)
        for batch in self.stream.batches(self.state.blocks, config.batch, at_once, share=share):
            tokens += batch.num_tokens
            with autocast(self.device, config.dtype):
                loss, more = self.objective(batch.to(self.device))
            loss.backward()
            totals.add({"loss": loss, **more})
        found = self.world.sum({**totals.read(), "tokens": float(tokens)})
        return found.pop("loss"), found

    def step(self) -> dict[str, float]:
        """One optimizer step; numbers to log."""
        config, state = self.config, self.state
        rate = learning_rate(config, state.step, progress(config, state.step, state.seconds))
        loss, numbers = self.forward_backward()
        norms = [self._clip(members) for members in self.groups]
        wrong = self._what_is_wrong(loss, norms, rate, numbers)
        if wrong is None:
            set_rate(self.optimizer, rate)
            self.optimizer.step()
            state.usual_norm += (norms[0] - state.usual_norm) / min(state.step - state.skipped + 1, _MEMORY)
            state.skipped_in_a_row = 0
        else:
            self.events.append(wrong)
            state.skipped += 1
            state.skipped_in_a_row += 1
        self.optimizer.zero_grad()
        state.step += 1
        state.blocks += config.batch
        state.tokens += int(numbers.pop("tokens"))
        teacher = {"teacher_grad_norm": norms[1]} if len(norms) > 1 else {}
        skipped = {"skipped": float(state.skipped)} if state.skipped else {}
        return {"loss": loss, "lr": rate, "grad_norm": norms[0], **teacher, **skipped, **numbers}

    def _clip(self, members: list[nn.Parameter]) -> float:
        """The norm of the gradient of some parameters, before it is scaled down to `clip`."""
        norm = sharded.gradient_norm(members, self.world)
        if self.config.clip and math.isfinite(norm):
            factor = self.config.clip / (norm + 1e-6)
            if factor < 1:
                scale_gradients(self.optimizer, members, factor)
        return norm

    def _what_is_wrong(self, loss: float, norms: list[float], rate: float, numbers: Mapping[str, float]) -> str | None:
        """Why this update must be skipped, if it must; None for an ordinary step.

        Raises:
            TrainError: the run ends here, because the settings say so or because too many updates were skipped.
        """
        config, state = self.config, self.state
        finite = all(map(math.isfinite, (loss, *norms)))
        judged = config.spike and state.step - state.skipped >= _MEMORY
        spike = bool(judged) and norms[0] > config.spike * state.usual_norm
        if finite and not spike:
            return None
        what = f"step {state.step + 1}: the loss is {loss:.4g} and the gradient's norm {norms[0]:.4g}" + (
            f", {norms[0] / state.usual_norm:.1f} times the usual" if finite else ""
        )
        if config.on_spike == "skip" and state.skipped_in_a_row < _MOST_SKIPPED:
            return f"{what}; this update was skipped"
        if not finite and state.step == state.skipped:
            raise TrainError(f"{what}, so training stopped. {self._who(numbers)}")
        row = f" after {state.skipped_in_a_row} updates in a row were skipped" if state.skipped_in_a_row else ""
        raise TrainError(
            f"{what}, so training stopped{row}. A lower learning rate (now {rate:.2g}) or a longer warmup helps, "
            f"or on_spike = 'skip'; see {self.run / METRICS_FILE}"
        )

    def _who(self, numbers: Mapping[str, float]) -> str:
        """Which model computes NaN or infinity, if no update was made yet that could be the cause."""
        names = list(models_of(self.model, self.objective.loss))
        # The student's own loss on the text is finite, so the teacher is the cause.
        who = names[-1] if math.isfinite(numbers.get("ce", math.nan)) else names[0]
        return (
            f"No update was made yet, so the learning rate is not the cause: {who} computes NaN or infinity from "
            f"finite weights in {self.config.dtype}, or the loss does; see {self.run / METRICS_FILE}"
        )

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint and remove old ones."""
        tensors = state_tensors(self.optimizer, self.objective.own_parameters())
        tensors |= {
            f"{_LOSS_FILE_PREFIX}{name}": p.detach()
            for name, p in self.objective.own_parameters()
            if name.startswith(_LOSS)
        }
        random = {f"rng.cpu{self._suffix}": torch.get_rng_state()}
        if self.device.type == "cuda":
            random[f"rng.cuda{self._suffix}"] = torch.cuda.get_rng_state(self.device)
        state = asdict(self.state)
        if self.world.mesh is None:
            folder = save_step(self.run, self.state.step, state, {**tensors, **random}, self._write_model)
            remove_old(self.run, self.config.keep, self.state.decay_step)
            return folder
        weights = {f"{_LOSS_FILE_PREFIX}{name}": p.detach() for name, p in self.objective.own_parameters()}
        folder = sharded.save(
            self.world, self.run, self.state.step, state, {**tensors, **weights, **random}, self._write_config
        )
        self.world.first_does(lambda: remove_old(self.run, self.config.keep, self.state.decay_step))
        return folder

    @property
    def _suffix(self) -> str:
        return "" if self.world.mesh is None else f".{self.world.rank}"

    def _write_model(self, folder: Path) -> None:
        with progress_bars(0):  # a checkpoint is one of many; the log names it
            save_model(self.model, folder)
        if hasattr(self.model, "peft_config"):
            trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, folder / TRAINED_FILE)
        self._write_tokenizer(folder)

    def _write_config(self, folder: Path) -> None:
        self.model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
        self._write_tokenizer(folder)

    def _write_tokenizer(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint that any number of processes wrote."""
        state = check_step(folder) if self.world.mesh is None else self.world.first_does(lambda: check_step(folder))
        if sharded.is_sharded(folder):
            names = [name for name, _ in self.objective.own_parameters()]
            tensors = sharded.load(folder, dict(self.objective.own_parameters()), names, self._suffix)
            weights = {name: tensors[f"{_LOSS_FILE_PREFIX}{name}"] for name in names}
        else:
            tensors = load_file(folder / OPTIMIZER_FILE)
            weights = self._whole_weights(folder, tensors)
        with torch.no_grad():
            for name, parameter in self.objective.own_parameters():
                if name in weights:
                    parameter.copy_(placed_like(weights[name], parameter))
        load_state(self.optimizer, self.objective.own_parameters(), tensors)
        self._load_random(tensors, state["step"])
        # A checkpoint of an older version does not count them; its batches were all full.
        self.state = State(**{"tokens": state["step"] * self.config.tokens_per_step, **state})

    def _whole_weights(self, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        adapter = (folder / TRAINED_FILE).exists()
        for path in [folder / TRAINED_FILE] if adapter else folder.glob("*.safetensors"):
            if path.name != OPTIMIZER_FILE:
                weights |= load_file(path)
        wanted = {n: p for n, p in self.model.named_parameters() if p.requires_grad or not adapter}
        known = {*wanted, *(getattr(self.model, "_tied_weights_keys", None) or ())}
        wrong = [n for n, p in wanted.items() if n not in weights or weights[n].shape != p.shape]
        if wrong or not weights.keys() <= known:
            unknown = sorted(weights.keys() - known)
            raise TrainError(
                f"{folder}: weights do not fit the model; missing or of another shape: {wrong}; unknown: {unknown}"
            )
        for name, _ in self.objective.own_parameters():
            if name.startswith(_LOSS):
                weights[name] = tensors[f"{_LOSS_FILE_PREFIX}{name}"]
        return weights

    def _load_random(self, tensors: dict[str, Tensor], step: int) -> None:
        if f"rng.cpu{self._suffix}" not in tensors:
            # Written by another number of processes, so there is no state to restore; only dropout needs one.
            torch.manual_seed(hash((self.config.seed, step, self.world.data_rank)) % 2**63)
            return
        torch.set_rng_state(tensors[f"rng.cpu{self._suffix}"])
        if f"rng.cuda{self._suffix}" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[f"rng.cuda{self._suffix}"], self.device)
