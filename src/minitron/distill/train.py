"""The training loop: one loop for every kind of training, since the loss is a parameter.

It knows a model as a module whose parameters have names, a loss as a function of model and batch, and data as a stream
with places. A run is a folder: `train.json` (what it is), `metrics.jsonl`, `tensorboard/`, and checkpoints `step-N`
from which it continues bit for bit after any interruption.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint.resume import OPTIMIZER_FILE, load_step, newest_whole, remove_old, save_step
from ..data import Batch, BlockStream, DataError, PackedBlocks, collate
from .log import METRICS_FILE, RunLog, clock
from .machine import Estimate, Stopwatch, autocast, peak_memory, state_bytes
from .schedule import TrainConfig, is_decaying, learning_rate, progress

RUN_FILE = "train.json"

LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, float]]]
"""(model, batch) -> the batch's part of the mean over `batch.num_items` labels, and numbers to log, summed likewise."""


class TrainError(ValueError):
    """A run that cannot start or go on."""


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the next token in nats: summed over the batch, divided by `batch.num_items`."""
    out = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        labels=batch.labels,
        num_items_in_batch=batch.num_items,
        use_cache=False,
    )
    return out.loss, {}


@dataclass
class State:
    """Where a run stands; everything but weights and optimizer."""

    step: int = 0
    """Optimizer steps done."""
    blocks: int = 0
    """Place in the data: blocks used."""
    seconds: float = 0.0
    """Time spent in training."""
    decay_step: int | None = None
    """Step before which the learning rate began to go down."""


@dataclass(frozen=True)
class Result:
    """What a call of `train` ended with."""

    step: int
    tokens: int
    loss: float | None
    """Training loss of the last step, nats per token; None if there was nothing left to do."""
    heldout: dict[str, dict[str, float]]
    """Per held-out text: `nats_per_token` and `bits_per_byte`."""
    checkpoint: Path
    """The last checkpoint, a folder that loads like any other model."""
    stopped_by: str | None
    """Signal that ended it early; the same call continues it."""


# --- held-out loss -----------------------------------------------------------------------------------------------


@torch.no_grad()
def heldout_loss(
    model: nn.Module, blocks: PackedBlocks, at_once: int, context: AbstractContextManager[Any] | None = None
) -> dict[str, float]:
    """Mean loss over every token but the first of each document, and the same per byte of text.

    Args:
        model: a causal language model in any mode; evaluated in eval mode.
        blocks: the held-out text.
        at_once: blocks per forward pass.
        context: for instance an autocast context.

    Returns:
        `nats_per_token` and `bits_per_byte`. The end of a document counts as a token, and its nats count in both.
    """
    was_training = model.training
    model.eval()
    nats = 0.0
    device = next(model.parameters()).device
    for start in range(0, len(blocks), at_once):
        batch = collate([blocks.pieces(i) for i in range(start, min(start + at_once, len(blocks)))], blocks.block)
        with context or torch.autocast(device.type, enabled=False):
            loss, _ = next_token_loss(model, batch.to(device))
        nats += loss.item() * batch.num_items
    model.train(was_training)
    return {"nats_per_token": nats / blocks.num_scored, "bits_per_byte": nats / math.log(2) / blocks.text_bytes}


# --- a run -------------------------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One pass over memory instead of a dozen; there is such a kernel for CPU and CUDA.
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=fused)


def describe(model: nn.Module, stream: BlockStream, config: TrainConfig) -> dict[str, Any]:
    """What a run is: two runs with the same description and the same machine give the same weights."""
    shape = {k: v for k, v in model.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}  # type: ignore[operator, union-attr]
    data = {s.cache.key[:16]: w for s, w in zip(stream.sources, stream.weights, strict=True)}
    # Through JSON, so that tuples compare equal to what is read back from the run folder.
    return json.loads(json.dumps({"train": asdict(config), "data": data, "model": shape}, default=str))


def open_run(run: Path, description: Mapping[str, Any]) -> None:
    """Make a run folder, or make sure that an existing one is of the same run.

    Raises:
        TrainError: it is of another run, or is no run folder.
    """
    path = run / RUN_FILE
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TrainError(f"{path}: cannot be read ({error})") from None
        differing = _differences(before, description)
        if differing:
            raise TrainError(f"{run} holds another run; choose another folder or the same settings: {differing}")
        return
    if run.exists() and any(run.iterdir()):
        raise TrainError(f"{run} is not empty and is not the folder of a run (no {RUN_FILE}); choose another folder")
    run.mkdir(parents=True, exist_ok=True)
    work = path.with_suffix(".tmp")
    work.write_text(json.dumps(description, indent=1), encoding="utf-8")
    work.replace(path)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    out = []
    for part in sorted({*before, *now}):
        old, new = before.get(part, {}), now.get(part, {})
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                out += [f"{part} {key} was {old.get(key)!r}, is {new.get(key)!r}"]
    return "; ".join(out)


class _Run:
    """Model, optimizer, data and place of a run, and what is done with them."""

    def __init__(
        self, model: nn.Module, stream: BlockStream, config: TrainConfig, loss: LossFunction, tokenizer: Any, run: Path
    ) -> None:
        self.model, self.stream, self.config, self.loss = model, stream, config, loss
        self.tokenizer, self.run = tokenizer, run
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, config)
        self.state = State()

    def forward_backward(self) -> tuple[float, int, dict[str, float]]:
        """Add up the gradients of the next batch: (loss in nats per token, scored tokens, other numbers)."""
        config = self.config
        total, numbers = 0.0, {}
        batches = self.stream.batches(self.state.blocks, config.batch, config.sequences_at_once)
        for batch in batches:
            with autocast(self.device, config.dtype):
                loss, more = self.loss(self.model, batch.to(self.device))
            loss.backward()
            total += loss.item()
            for name, value in more.items():
                numbers[name] = numbers.get(name, 0.0) + value
        return total, batches[0].num_items, numbers

    def step(self) -> dict[str, float]:
        """One optimizer step; numbers to log."""
        config, state = self.config, self.state
        rate = learning_rate(config, state.step, progress(config, state.step, state.seconds))
        loss, _, numbers = self.forward_backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainError(
                f"step {state.step + 1}: the loss is {loss} and the gradient's norm {norm}, so training stopped. "
                f"A lower learning rate (now {rate:.2g}) or a longer warmup helps; see {self.run / METRICS_FILE}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        state.blocks += config.batch
        return {"loss": loss, "lr": rate, "grad_norm": norm, **numbers}

    def save(self) -> Path:
        """Write a checkpoint and remove old ones."""
        tensors = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        folder = save_step(self.run, self.state.step, asdict(self.state), tensors, self._write_model)
        remove_old(self.run, self.config.keep, self.state.decay_step)
        return folder

    def _write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)  # type: ignore[operator]
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        state, tensors = load_step(folder)
        weights: dict[str, Tensor] = {}
        for path in folder.glob("*.safetensors"):
            if path.name != OPTIMIZER_FILE:
                weights |= load_file(path)
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        tied = getattr(self.model, "_tied_weights_keys", None) or ()
        absent = [name for name in missing if name not in tied]
        if absent or unexpected:
            raise TrainError(f"{folder}: weights do not fit the model; missing {absent}, not known {unexpected}")
        for name, parameter in self.model.named_parameters():
            own = {k: tensors[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in tensors}
            if own:
                self.optimizer.state[parameter] = {
                    k: v if k == "step" and self.device.type == "cpu" else v.to(self.device) for k, v in own.items()
                }
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.state = State(**state)


class _StopSignals:
    """Turns the first SIGTERM or Ctrl-C into a wish to stop after the step; the second one ends at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def estimate(model: nn.Module, stream: BlockStream, config: TrainConfig, loss: LossFunction) -> Estimate:
    """Time and memory of a step, by running the first one twice without changing the model."""
    _check(model, stream, {}, config)
    run = _Run(model, stream, config, loss, None, Path())
    random_state = torch.get_rng_state()
    model.train()
    run.forward_backward()  # the first takes longer
    watch = Stopwatch()
    run.forward_backward()
    seconds = watch.seconds
    # Adam's averages, which a first step does not have yet, are half of the state.
    peak = peak_memory(run.device) + state_bytes(model) // 2
    model.zero_grad()
    torch.set_rng_state(random_state)
    return Estimate(seconds, peak)


def train(
    model: nn.Module,
    stream: BlockStream,
    config: TrainConfig,
    run: Path,
    *,
    heldout: Mapping[str, PackedBlocks] | None = None,
    loss: LossFunction = next_token_loss,
    tokenizer: Any = None,
    quiet: bool = False,
) -> Result:
    """Train a model, or continue the run in `run`.

    Args:
        model: causal language model on its device, with the initial weights; changed in place.
        stream: the data; its blocks have `config.sequence` tokens.
        config: the settings.
        run: folder of the run; made if it is not there, continued from if it is.
        heldout: texts by name, whose loss is measured now and then.
        loss: what is minimized.
        tokenizer: saved into each checkpoint if given.
        quiet: no progress bar.

    Raises:
        TrainError: the folder holds another run, no checkpoint of it is whole, or the loss is no longer a number.
    """
    _check(model, stream, heldout or {}, config)
    open_run(run, describe(model, stream, config))
    task = _Run(model, stream, config, loss, tokenizer, run)
    folder, problems = newest_whole(run)
    if folder is not None:
        task.load(folder)
    elif problems:
        raise TrainError(f"no checkpoint in {run} is whole, so the run cannot continue: {'; '.join(problems)}")
    log = RunLog(run, task.state.step, progress(config, task.state.step, task.state.seconds), quiet)
    for text in (*(f"passed over a damaged checkpoint: {p}" for p in problems), *([log.note] if log.note else [])):
        log.say(text)
    if folder is not None:
        log.say(f"continuing from {folder}")
    try:
        with _StopSignals() as signals:
            return _loop(task, heldout or {}, log, signals, folder)
    finally:
        log.close()


def _check(model: nn.Module, stream: BlockStream, heldout: Mapping[str, PackedBlocks], config: TrainConfig) -> None:
    if any(blocks.block != config.sequence for blocks in (*stream.sources, *heldout.values())):
        raise TrainError(f"the data's blocks must have sequence = {config.sequence} tokens")
    limit = model.config.max_position_embeddings  # type: ignore[union-attr]
    if config.sequence > limit:  # type: ignore[operator]
        raise TrainError(f"sequence is {config.sequence}; the model's max_position_embeddings is {limit}")
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    for blocks in (*stream.sources, *heldout.values()):
        highest = int(blocks.cache.tokens.max())
        if highest >= vocabulary:  # type: ignore[operator]
            raise DataError(f"the data has token id {highest}; the model's vocab_size is {vocabulary}")


def _loop(
    task: _Run, heldout: Mapping[str, PackedBlocks], log: RunLog, signals: _StopSignals, saved: Path | None
) -> Result:
    config, state = task.config, task.state
    watch = Stopwatch(state.seconds)
    first, began = state.step, state.seconds
    numbers: dict[str, float] = {}
    scores: dict[str, dict[str, float]] = {}
    task.model.train()

    def measure() -> None:
        for name, blocks in heldout.items():
            context = autocast(task.device, config.dtype)
            scores[name] = heldout_loss(task.model, blocks, config.sequences_at_once, context)
            log.write(state.step, {f"heldout/{name}/{k}": v for k, v in scores[name].items()})
            log.say(f"step {state.step}: {name}: " + ", ".join(f"{v:.4f} {k}" for k, v in scores[name].items()))

    while (done := progress(config, state.step, state.seconds)) < 1 and signals.received is None:
        if is_decaying(config, done) and state.decay_step is None:
            state.decay_step = state.step
            saved = task.save()
        numbers = task.step()
        state.seconds = watch.seconds
        done = progress(config, state.step, state.seconds)
        speed = (state.step - first) * config.tokens_per_step / (state.seconds - began)
        left = (state.seconds - began) / max(1e-9, done - progress(config, first, began)) * (1 - done)
        log.write(state.step, {**numbers, "tokens_per_second": speed, "seconds": state.seconds})
        log.show(done, f"step {state.step}, loss {numbers['loss']:.3f}, {speed:,.0f} tokens/s, {clock(left)} left")
        saved = saved if saved is not None and saved.name == f"step-{state.step}" else None
        if config.eval_every and state.step % config.eval_every == 0 and done < 1:
            measure()
        if config.save_every and state.step % config.save_every == 0:
            log.flush()
            saved = task.save()
    stopped = signals.received if progress(config, state.step, state.seconds) < 1 else None
    if saved is None:
        log.flush()
        saved = task.save()
    if stopped is None:
        measure()
    return Result(state.step, state.step * config.tokens_per_step, numbers.get("loss"), scores, saved, stopped)
