"""The training loop: one loop for every kind of training, since the loss is a parameter.

It knows a model as a module whose parameters have names, a loss as a function of model and batch, data as a `Stream`,
and a held-out set as a `Measure`. A run is a folder: `train.json` (what it is), `metrics.jsonl`, `tensorboard/`,
checkpoints `step-N` from which it continues bit for bit after any interruption, and at its end `model`, which is a
checkpoint like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from ..data.packing import PackedBlocks
from ..finite import check_weights
from ..ops.packed_attention import packed_attention_in
from ..world import World
from .exclusive import alone_in_its_folder
from .export import MODEL_FOLDER, export_model
from .heldout import HeldoutText, heldout_loss, measure_all
from .log import RunLog, clock
from .machine import StepCost, Stopwatch, peak_memory, state_bytes
from .objective import LossFunction, Objective, models_of, next_token_loss
from .parallel import prepare
from .resume import newest_whole
from .run_folder import RUN_FILE, TrainError, describe, open_run, require_positions
from .schedule import TrainConfig, is_decaying, progress
from .signals import StopSignals
from .stream import Measure, Stream
from .trainer import Trainer

__all__ = ["RUN_FILE", "LossFunction", "Result", "TrainError", "estimate", "heldout_loss", "next_token_loss", "train"]


class Surroundings(TypedDict, total=False):
    """Arguments of `train` that are the same for every loss, for functions that hand them on."""

    tokenizer: Any
    quiet: bool
    world: World | None
    export_dtype: torch.dtype | None
    peak_flops: float | None
    until: int | None
    extend: bool
    accepted: Callable[[], object] | None


@dataclass(frozen=True)
class Result:
    """What a call of `train` ended with."""

    step: int
    tokens: int
    loss: float | None
    """Training loss of the last step, nats per token; None if there was nothing left to do."""
    heldout: dict[str, dict[str, float]]
    """Per held-out set what its measure found; of text `nats_per_token`, `bits_per_byte` and more, see
    `HeldoutText`."""
    checkpoint: Path
    """The last checkpoint; of a run in one process it loads like any other model."""
    model: Path | None
    """The trained model in the Hugging Face layout; None if the run is not over."""
    stopped_by: str | None
    """Signal that ended it early, or "until=N"; the same call continues it."""
    skipped: int
    """Steps whose update was skipped, in the whole run."""


def estimate(model: nn.Module, stream: Stream, config: TrainConfig, loss: LossFunction) -> StepCost:
    """Time and memory of a step, by running the first one twice without changing the model, in one process."""
    _check(model, [stream], config)
    objective = Objective(model, loss)
    prepare(objective, config, World())
    trainer = Trainer(objective, stream, config, Path())
    random_state = torch.get_rng_state()
    model.train()
    with packed_attention_in(*objective.trained_models(), compiled=config.compile):
        trainer.forward_backward()  # the first takes longer
        watch = Stopwatch()
        trainer.forward_backward()
        seconds = watch.seconds
    # Adam's averages, which do not exist before the first update, are half of the state.
    peak = peak_memory(trainer.device) + state_bytes(model) // 2
    objective.zero_grad()
    torch.set_rng_state(random_state)
    return StepCost(seconds, peak)


@alone_in_its_folder
def train(
    model: nn.Module,
    stream: Stream,
    config: TrainConfig,
    run: Path,
    *,
    heldout: Mapping[str, PackedBlocks | Measure] | None = None,
    loss: LossFunction = next_token_loss,
    identity: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    quiet: bool = False,
    world: World | None = None,
    export_dtype: torch.dtype | None = None,
    peak_flops: float | None = None,
    flops_per_token: float | None = None,
    until: int | None = None,
    extend: bool = False,
    accepted: Callable[[], object] | None = None,
    going_on: bool = False,
) -> Result:
    """Train a model, or continue the run in `run`. In a run of many processes, each calls this.

    Args:
        model: the model on its device, with the initial weights; changed in place.
        stream: the data, packed text or other; its examples have at most `config.sequence` tokens.
        config: the settings.
        run: folder of the run; created, or continued from if it exists.
        heldout: held-out sets by name, measured every `config.eval_every` steps and at the end: packed text, whose
            cross-entropy is measured, or any function of the model, see `stream.Measure`.
        loss: what is minimized.
        identity: what tells this loss from another one (its settings, its teacher), as JSON values.
        tokenizer: saved into each checkpoint if given.
        quiet: no progress bar.
        world: the processes, from `parallel.make_world`; this one alone if None.
        export_dtype: of the weights in `run/model`; as trained if None.
        peak_flops: operations per second that the devices can do. With `flops_per_token`, the operations that a token
            takes, their ratio (MFU) is logged; otherwise the progress says that it is not known.
        flops_per_token: see `peak_flops`.
        until: stop after this step with a checkpoint, as after a signal, and with the measurements of an end; a later
            call continues from there.
        extend: make the run in the folder longer, if it differs from this one in its length alone; see `extending`.
        accepted: called once all checks have passed, before anything is written to the folder.
        going_on: this process trained the run before, so where it continues from is not logged.

    Raises:
        LockedError, TargetError: see `exclusive.alone_in_its_folder`.
        TrainError: the folder holds another run, no checkpoint of it is whole, or the loss is no longer a number.
        ValueError: the data does not fit the model or the settings.
        CheckpointError: a checkpoint cannot be written.
        NotFiniteError: the model or its teacher has weights that are NaN or infinite.
    """
    world = world or World()
    measures: dict[str, Measure] = {
        name: HeldoutText(held, config.at_once(world.data_size), world=world)
        if isinstance(held, PackedBlocks)
        else held
        for name, held in (heldout or {}).items()
    }
    _check(model, [stream, *measures.values()], config)
    check_weights(models_of(model, loss))
    description = describe(model, stream, config, identity)
    opened = world.first_does(lambda: open_run(run, description, extend))
    objective = Objective(model, loss)
    prepare(objective, config, world)
    trainer = Trainer(objective, stream, config, run, tokenizer, world)
    if accepted is not None:
        accepted()
    world.first_does(opened.begin)
    folder, problems = world.first_does(lambda: newest_whole(run))
    if folder is not None:
        trainer.load(folder)
        _forget_old_decay(trainer)
    elif problems:
        raise TrainError(f"no checkpoint in {run} is whole, so the run cannot continue: {'; '.join(problems)}")
    log = RunLog(
        run, trainer.state.step, progress(config, trainer.state.step, trainer.state.seconds), quiet, world.first
    )
    damaged = [f"skipped a damaged checkpoint: {problem}" for problem in problems]
    for text in (*opened.notes, *damaged, *([log.note] if log.note else [])):
        log.say(text)
    if folder is not None and not going_on:
        log.say(f"continuing from {folder}")
    efficiency = flops_per_token / peak_flops if peak_flops and flops_per_token else None
    try:
        with StopSignals() as signals, packed_attention_in(*objective.trained_models(), compiled=config.compile):
            result = _Loop(trainer, measures, log, signals, efficiency, until).go(folder)
        return _finish(result, trainer, export_dtype)
    finally:
        log.close()


def _forget_old_decay(trainer: Trainer) -> None:
    """Forget where the decay began if the run was lengthened, so that it is still to come."""
    state = trainer.state
    if not is_decaying(trainer.config, progress(trainer.config, state.step, state.seconds)):
        state.decay_step = None


def _finish(result: Result, trainer: Trainer, dtype: torch.dtype | None) -> Result:
    if result.stopped_by is not None:
        return result
    target = trainer.run / MODEL_FOLDER
    export_model(trainer.model, target, dtype=dtype, tokenizer=trainer.tokenizer, world=trainer.world)
    return Result(**{**vars(result), "model": target})


def _check(model: nn.Module, data: Sequence[Any], config: TrainConfig) -> None:
    """Refuse data that does not fit the model or the settings; sets without a method `check` are trusted."""
    require_positions(model.config, config)  # type: ignore[arg-type]
    for each in data:
        if hasattr(each, "check"):
            each.check(model.config.vocab_size, config.sequence)  # type: ignore[union-attr]


class _Loop:
    """Steps until the run is over or is asked to stop; measures, logs and saves in between."""

    def __init__(
        self,
        trainer: Trainer,
        measures: Mapping[str, Measure],
        log: RunLog,
        signals: StopSignals,
        efficiency: float | None,
        until: int | None,
    ) -> None:
        self.trainer, self.measures, self.log, self.signals = trainer, measures, log, signals
        self.until = until
        self.efficiency = efficiency
        self.scores: dict[str, dict[str, float]] = {}
        self.first, self.began, self.tokens = trainer.state.step, trainer.state.seconds, trainer.state.tokens

    def go(self, saved: Path | None) -> Result:
        """Run; `saved` is the checkpoint of where it starts, if there is one."""
        trainer, config, state = self.trainer, self.trainer.config, self.trainer.state
        watch = Stopwatch(state.seconds)
        numbers: dict[str, float] = {}
        stop = self._is_far_enough()
        trainer.model.train()
        while (done := self._done()) < 1 and not stop:
            if is_decaying(config, done) and state.decay_step is None:
                state.decay_step = state.step
                saved = trainer.save()
            numbers = trainer.step()
            # The clock of the first process and a signal to any of them decide, so that all do the same.
            state.seconds = trainer.world.agree(watch.seconds)
            stop = trainer.world.any(self.signals.received is not None) or self._is_far_enough()
            self._log(numbers)
            saved = saved if saved is not None and saved.name == f"step-{state.step}" else None
            if config.eval_every and state.step % config.eval_every == 0 and self._done() < 1:
                self._measure()
            if config.save_every and state.step % config.save_every == 0:
                self.log.flush()
                saved = trainer.save()
        stopped = self._reason() if self._done() < 1 else None
        if saved is None:
            self.log.flush()
            saved = trainer.save()
        if stopped is None or self._is_far_enough():
            self._measure()
        return Result(state.step, state.tokens, numbers.get("loss"), self.scores, saved, None, stopped, state.skipped)

    def _is_far_enough(self) -> bool:
        return self.until is not None and self.trainer.state.step >= self.until

    def _reason(self) -> str:
        if self.signals.received is None and self._is_far_enough():
            return f"until={self.until}"
        return self.signals.received or "a signal to another process"

    def _done(self) -> float:
        return progress(self.trainer.config, self.trainer.state.step, self.trainer.state.seconds)

    def _log(self, numbers: Mapping[str, float]) -> None:
        config, state = self.trainer.config, self.trainer.state
        spent, done = state.seconds - self.began, self._done()
        speed = (state.tokens - self.tokens) / spent
        left = spent / max(1e-9, done - progress(config, self.first, self.began)) * (1 - done)
        mfu = {"mfu": speed * self.efficiency} if self.efficiency else {}
        self.log.write(state.step, {**numbers, "tokens_per_second": speed, **mfu, "seconds": state.seconds})
        parts = [f"step {state.step}", f"loss {numbers['loss']:.3f}"]
        parts += [f"KL {numbers['kl']:.4f}"] if "kl" in numbers else []
        parts += [f"top-1 {numbers['top1']:.1%}"] if "top1" in numbers else []
        parts += [f"{speed:,.0f} tokens/s", f"MFU {mfu['mfu']:.1%}" if mfu else "MFU not known", f"{clock(left)} left"]
        self.log.show(done, ", ".join(parts))
        for text in self.trainer.events:
            self.log.say(text)
        self.trainer.events.clear()

    def _measure(self) -> None:
        step, config = self.trainer.state.step, self.trainer.config
        self.scores = measure_all(self.trainer.objective, self.measures, config.dtype)
        for name, found in self.scores.items():
            self.log.write(step, {f"heldout/{name}/{k}": v for k, v in found.items()})
            self.log.say(f"step {step}: {name}: " + ", ".join(f"{v:.4f} {k}" for k, v in found.items()))
