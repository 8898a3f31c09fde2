"""The training loop: one loop for every kind of training, since the loss is a parameter.

It knows a model as a module whose parameters have names, a loss as a function of model and batch, and data as a stream
with places. A run is a folder: `train.json` (what it is), `metrics.jsonl`, `tensorboard/`, checkpoints `step-N` from
which it continues bit for bit after any interruption, and at its end `model`, which is a checkpoint like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from ..data.documents import DataError
from ..data.packing import Batch, BlockStream, PackedBlocks
from ..finite import check_weights
from ..ops.packed_attention import packed_attention_in
from ..world import World
from .exclusive import alone_in_its_folder
from .export import MODEL_FOLDER, export_model
from .log import RunLog, clock
from .machine import Estimate, Stopwatch, autocast, peak_memory, state_bytes
from .objective import LossFunction, Objective, heldout_loss, models_of, next_token_loss
from .parallel import prepare
from .resume import newest_whole
from .run_folder import RUN_FILE, TrainError, describe, open_run, require_positions
from .schedule import TrainConfig, is_decaying, progress
from .signals import StopSignals
from .trainer import Trainer

__all__ = ["RUN_FILE", "LossFunction", "Result", "TrainError", "estimate", "heldout_loss", "next_token_loss", "train"]


class Surroundings(TypedDict, total=False):
    """Arguments of `train` that are the same for every loss, for functions that hand them on."""

    heldout: Mapping[str, PackedBlocks] | None
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
    """Per held-out text: `nats_per_token`, `bits_per_byte`, and what the loss measures besides."""
    checkpoint: Path
    """The last checkpoint; of a run in one process it loads like any other model."""
    model: Path | None
    """The trained model in the Hugging Face layout; None if the run is not over."""
    stopped_by: str | None
    """Signal that ended it early, or "until=N"; the same call continues it."""
    skipped: int
    """Steps whose update was left out, in the whole run."""


def estimate(model: nn.Module, stream: BlockStream, config: TrainConfig, loss: LossFunction) -> Estimate:
    """Time and memory of a step, by running the first one twice without changing the model, in one process."""
    check(model, stream, {}, config)
    objective = Objective(model, loss)
    prepare(objective, config, World())
    trainer = Trainer(objective, stream, config, Path())
    random_state = torch.get_rng_state()
    model.train()
    with packed_attention_in(*objective.trained_models()):
        trainer.forward_backward()  # the first takes longer
        watch = Stopwatch()
        trainer.forward_backward()
        seconds = watch.seconds
    # Adam's averages, which a first step does not have yet, are half of the state.
    peak = peak_memory(trainer.device) + state_bytes(model) // 2
    objective.zero_grad()
    torch.set_rng_state(random_state)
    return Estimate(seconds, peak)


@alone_in_its_folder
def train(
    model: nn.Module,
    stream: BlockStream,
    config: TrainConfig,
    run: Path,
    *,
    heldout: Mapping[str, PackedBlocks] | None = None,
    loss: LossFunction = next_token_loss,
    measure: LossFunction = next_token_loss,
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
        model: causal language model on its device, with the initial weights; changed in place.
        stream: the data; its blocks have `config.sequence` tokens.
        config: the settings.
        run: folder of the run; made if it is not there, continued from if it is.
        heldout: texts by name, whose loss is measured now and then.
        loss: what is minimized.
        measure: what is told of held-out text: the numbers of this loss if `ce` is among them, or else its value.
        identity: what tells this loss from another one (its settings, its teacher), for JSON.
        tokenizer: saved into each checkpoint if given.
        quiet: no progress bar.
        world: the processes, from `parallel.make_world`; this one alone if None.
        export_dtype: of the weights in `run/model`; as trained if None.
        peak_flops: operations per second that the devices can do, and `flops_per_token`, those that a token needs:
            with both, their ratio (MFU) is told.
        flops_per_token: see `peak_flops`.
        until: stop after this step with a checkpoint, as after a signal, and with the measurements of an end; a later
            call continues from there.
        extend: make the run in the folder longer, if it differs from this one in its length alone; see `extending`.
        accepted: is called when nothing stands against the run, before anything is written to its folder.
        going_on: this process trained the run before, so that it is no news from where it continues.

    Raises:
        LockedError, TargetError: see `alone.alone_in_its_folder`.
        TrainError: the folder holds another run, no checkpoint of it is whole, or the loss is no longer a number.
        CheckpointError: a checkpoint cannot be written.
        NotFiniteError: the model has weights that are NaN or infinite, or its teacher.
    """
    world = world or World()
    check(model, stream, heldout or {}, config)
    check_weights(models_of(model, loss))
    config.at_once(world.data_size)
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
    damaged = [f"passed over a damaged checkpoint: {problem}" for problem in problems]
    for text in (*opened.notes, *damaged, *([log.note] if log.note else [])):
        log.say(text)
    if folder is not None and not going_on:
        log.say(f"continuing from {folder}")
    efficiency = flops_per_token / peak_flops if peak_flops and flops_per_token else None
    try:
        with StopSignals() as signals, packed_attention_in(*objective.trained_models()):
            result = _Loop(trainer, heldout or {}, measure, log, signals, efficiency, until).go(folder)
        return _finish(result, trainer, export_dtype)
    finally:
        log.close()


def _forget_old_decay(trainer: Trainer) -> None:
    """A run that was lengthened has its decay still before it."""
    state = trainer.state
    if not is_decaying(trainer.config, progress(trainer.config, state.step, state.seconds)):
        state.decay_step = None


def _finish(result: Result, trainer: Trainer, dtype: torch.dtype | None) -> Result:
    if result.stopped_by is not None:
        return result
    target = trainer.run / MODEL_FOLDER
    export_model(trainer.model, target, dtype=dtype, tokenizer=trainer.tokenizer, world=trainer.world)
    return Result(**{**vars(result), "model": target})


def check(model: nn.Module, stream: BlockStream, heldout: Mapping[str, PackedBlocks], config: TrainConfig) -> None:
    """Refuse data that does not fit the model or the settings.

    Raises:
        TrainError: sequences of another length, or longer than the model's positions.
        DataError: a token that the model's vocabulary does not have.
    """
    if any(blocks.block != config.sequence for blocks in (*stream.sources, *heldout.values())):
        raise TrainError(f"the data's blocks must have sequence = {config.sequence} tokens")
    require_positions(model.config, config)  # type: ignore[arg-type]
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    for blocks in (*stream.sources, *heldout.values()):
        highest = int(blocks.cache.tokens.max())
        if highest >= vocabulary:  # type: ignore[operator]
            raise DataError(f"the data has token id {highest}; the model's vocab_size is {vocabulary}")


class _Loop:
    """Steps until the run is over or somebody wants it to stop; measures, tells and saves in between."""

    def __init__(
        self,
        trainer: Trainer,
        heldout: Mapping[str, PackedBlocks],
        measure: LossFunction,
        log: RunLog,
        signals: StopSignals,
        efficiency: float | None,
        until: int | None,
    ) -> None:
        self.measure, self.until = measure, until
        self.trainer, self.heldout, self.log, self.signals = trainer, heldout, log, signals
        self.efficiency = efficiency
        self.scores: dict[str, dict[str, float]] = {}
        self.first, self.began = trainer.state.step, trainer.state.seconds

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
            # The first process's clock and anybody's signal decide, so that all do the same.
            state.seconds = trainer.world.agree(watch.seconds)
            stop = trainer.world.any(self.signals.received is not None) or self._is_far_enough()
            self._tell(numbers)
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
        tokens = state.step * config.tokens_per_step
        return Result(state.step, tokens, numbers.get("loss"), self.scores, saved, None, stopped, state.skipped)

    def _is_far_enough(self) -> bool:
        return self.until is not None and self.trainer.state.step >= self.until

    def _reason(self) -> str:
        if self.signals.received is None and self._is_far_enough():
            return f"until={self.until}"
        return self.signals.received or "a signal to another process"

    def _done(self) -> float:
        return progress(self.trainer.config, self.trainer.state.step, self.trainer.state.seconds)

    def _tell(self, numbers: Mapping[str, float]) -> None:
        config, state = self.trainer.config, self.trainer.state
        spent, done = state.seconds - self.began, self._done()
        speed = (state.step - self.first) * config.tokens_per_step / spent
        left = spent / max(1e-9, done - progress(config, self.first, self.began)) * (1 - done)
        mfu = {"mfu": speed * self.efficiency} if self.efficiency else {}
        self.log.write(state.step, {**numbers, "tokens_per_second": speed, **mfu, "seconds": state.seconds})
        parts = [f"step {state.step}", f"loss {numbers['loss']:.3f}"]
        parts += [f"KL {numbers['kl']:.4f}"] if "kl" in numbers else []
        parts += [f"top-1 {numbers['top1']:.1%}"] if "top1" in numbers else []
        parts += [f"{speed:,.0f} tokens/s", *([f"MFU {mfu['mfu']:.1%}"] if mfu else []), f"{clock(left)} left"]
        self.log.show(done, ", ".join(parts))
        for text in self.trainer.events:
            self.log.say(text)
        self.trainer.events.clear()

    def _measure(self) -> None:
        trainer, config = self.trainer, self.trainer.config

        def numbers_of(batch: Batch) -> dict[str, float]:
            loss, numbers = trainer.objective(batch, self.measure)
            return numbers if "ce" in numbers else {"ce": loss.item()}

        for name, blocks in self.heldout.items():
            found = heldout_loss(
                trainer.model,
                blocks,
                config.at_once(trainer.world.data_size),
                autocast(trainer.device, config.dtype),
                measure=numbers_of,
                world=trainer.world,
            )
            self.scores[name] = found
            self.log.write(trainer.state.step, {f"heldout/{name}/{k}": v for k, v in found.items()})
            self.log.say(f"step {trainer.state.step}: {name}: " + ", ".join(f"{v:.4f} {k}" for k, v in found.items()))
