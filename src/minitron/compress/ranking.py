"""Which candidate becomes best: all are retrained for a while by one teacher that runs once, the worse are dropped.

The paper retrains every candidate alike (arXiv:2407.14679, section 2.3) because ranks before retraining mislead, and
finds that they settle after some three quarters of it (Figure 9). Here the teacher's last hidden states are computed
once for all candidates, and at each rung the worse half is dropped. Candidates are trained one after another in rounds,
each from its own run folder: only one is in memory at a time, and an interruption costs at most a part of a round.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.packing import Batch, BlockStream, PackedBlocks
from ..distill.losses import DistillLoss, DistillOptions
from ..distill.targets import DenseTargets, TeacherTargets
from ..files import allocate, write_text
from ..ops.packed_attention import packed_attention_in
from ..train.heldout import HeldoutText, measure_all
from ..train.loop import train
from ..train.objective import Objective, next_token_loss
from ..train.parallel import prepare
from ..train.resume import list_steps
from ..train.schedule import TrainConfig
from ..world import World
from .stages import StoppedError

RUNGS_FILE = "rungs.json"
ROUND_BYTES = 2_000_000_000
"""Of the teacher's hidden states on disk at one time."""
_VALUE_BYTES = 4  # fp32


@dataclass(frozen=True)
class Contender:
    """A candidate in a ranking."""

    name: str
    """That of its run folder."""
    load: Callable[[], nn.Module]
    """Makes the pruned model in fp32, on its device."""


@dataclass(frozen=True)
class Standing:
    """What a ranking found."""

    order: tuple[str, ...]
    """Names, best first: the longer one stayed, the better; among equals the held-out loss decides."""
    losses: dict[str, dict[int, float]]
    """Name -> step -> held-out loss in nats per token; step 0 is before retraining."""
    teacher_blocks: int
    """Blocks that the teacher read, without those that a killed process had begun. Separate runs would have read
    `student_blocks`."""
    student_blocks: int
    """Blocks that the candidates were trained on, together."""


class SharedTargets:
    """A teacher whose answers are computed once for each block and kept in a file until the round is over.

    Args:
        teacher: computes the answers that the file does not have yet.
        path: file of the round; anything in it is overwritten.
        blocks: most different blocks of the round.
        world: processes that each have a share of every batch and a file of their own. The teacher is sharded over
            them, so that it runs in all of them or in none.
    """

    def __init__(self, teacher: TeacherTargets, path: Path, blocks: int, world: World | None = None) -> None:
        self.teacher, self.path, self.blocks, self.world = teacher, path, blocks, world or World()
        if self.world.mesh is not None:
            self.model = getattr(teacher, "model", None)  # `train` shards it
        self.vocab_size, self.hidden_size = teacher.vocab_size, teacher.hidden_size
        self.num_layers = 0  # only the last hidden states are kept
        self.computed = 0
        self._rows: dict[int, int] = {}
        self._kept: np.memmap[Any, Any] | None = None
        self._head: Tensor | None = None

    def targets_for(self, batch: Batch, layers: Sequence[int] = ()) -> DenseTargets:
        """As of `TeacherTargets`."""
        if batch.indices is None or layers:
            raise ValueError("shared targets are for the last hidden states of blocks of a stream")
        indices = batch.indices.tolist()
        missing = [row for row, place in enumerate(indices) if place not in self._rows]
        if self.world.any(bool(missing) or self._head is None):
            found = self.teacher.targets_for(batch)
            assert isinstance(found, DenseTargets)
            self._head = found.head
            self._keep([indices[row] for row in missing], found.hidden[missing].float().cpu().numpy())
        assert self._kept is not None
        assert self._head is not None
        hidden = torch.from_numpy(self._kept[[self._rows[place] for place in indices]])
        return DenseTargets(hidden.to(batch.input_ids.device), self._head)

    def _keep(self, indices: list[int], hidden: np.ndarray[Any, Any]) -> None:
        if self._kept is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shape = (self.blocks, *hidden.shape[1:])
            allocate(self.path, int(np.prod(shape)) * _VALUE_BYTES)
            self._kept = np.memmap(self.path, np.float32, "r+", shape=shape)
        for place, row in zip(indices, hidden, strict=True):
            if place not in self._rows:  # twice in one batch, where an epoch ends
                self._kept[len(self._rows)] = row
                self._rows[place] = len(self._rows)
                self.computed += 1

    def close(self) -> None:
        """Delete the file."""
        self._kept = None
        self._rows.clear()
        self.path.unlink(missing_ok=True)


def rank(
    contenders: Sequence[Contender],
    teacher: Callable[[], TeacherTargets],
    stream: BlockStream,
    heldout: Mapping[str, PackedBlocks],
    config: TrainConfig,
    rungs: Sequence[float],
    folder: Path,
    *,
    hidden_size: int,
    options: DistillOptions | None = None,
    identity: Mapping[str, Any] | None = None,
    round_bytes: int = ROUND_BYTES,
    world: World | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Standing:
    """Retrain candidates by one teacher, dropping the worse half at each rung.

    Args:
        contenders: at least one; order does not matter.
        teacher: loads the teacher when there is something left to do.
        stream, config: as for `train`; `config.total_steps` is the length for those that are never dropped.
        heldout: texts that decide; the mean of their losses in nats per token.
        rungs: shares of the length, rising.
        folder: for the run folders; an interrupted ranking in it is continued.
        hidden_size: the teacher's, from which the length of a round follows.
        options: the loss; only that of the logits.
        identity: what identifies the teacher, for the run folders.
        round_bytes: most that the teacher's answers may take on disk, of all processes together.
        world: the processes, from `parallel.make_world`; all call this. Candidates and teacher are sharded over them.
        say: called with the standing at each rung.

    Raises:
        ValueError: a run that goes by the clock, where candidates would differ by the load of the machine.
    """
    total = config.total_steps
    if total is None:
        raise ValueError("a ranking needs steps or tokens, not hours: candidates must see the same text")
    stops = [max(1, round(share * total)) for share in rungs] + [total]
    race = _Race(contenders, teacher, stream, heldout, config, folder, options or DistillOptions(), identity, world)
    race.measure_start()
    alive = list(race.contenders)
    at = 0
    for stop in stops:
        length = max(1, round_bytes // (config.batch * stream.block * hidden_size * _VALUE_BYTES))
        for start, end in _rounds(at, stop, length):
            race.advance(alive, start, end, measured=end == stop)
        at = stop
        alive = race.best(alive, stop)
        if stop != total:
            alive = alive[: -(-len(alive) // 2)]
        say(f"step {stop} of {total}: {', '.join(alive)}")
    return race.standing(alive, stops)


class _Race:
    """The candidates' run folders, and the file of their losses."""

    def __init__(
        self,
        contenders: Sequence[Contender],
        teacher: Callable[[], TeacherTargets],
        stream: BlockStream,
        heldout: Mapping[str, PackedBlocks],
        config: TrainConfig,
        folder: Path,
        options: DistillOptions,
        identity: Mapping[str, Any] | None,
        world: World | None,
    ) -> None:
        self.world = world or World()
        self.contenders = {contender.name: contender for contender in contenders}
        self.make_teacher, self.stream, self.heldout, self.folder = teacher, stream, heldout, folder
        self.config = replace(config, eval_every=0, keep=1)
        self.options, self.identity = options, identity
        self._teacher: TeacherTargets | None = None
        self._begun: set[str] = set()
        self._file = folder / RUNGS_FILE
        self._facts: dict[str, Any] = self.world.first_does(self._open)

    def _open(self) -> dict[str, Any]:
        """What an interrupted ranking left, or the beginning of one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._file.is_file():
            return json.loads(self._file.read_text(encoding="utf-8"))
        return {"losses": {name: {} for name in self.contenders}, "teacher": {}, "students": {}}

    @property
    def losses(self) -> dict[str, dict[str, float]]:
        """Name -> step -> held-out loss."""
        return self._facts["losses"]

    def measure_start(self) -> None:
        """Losses before retraining."""
        for name, contender in self.contenders.items():
            if "0" not in self.losses[name]:
                self.losses[name]["0"] = self._loss_of(contender.load())
                self._save()

    def advance(self, names: Sequence[str], start: int, stop: int, *, measured: bool) -> None:
        """Train candidates from step `start` to `stop`, all by the same answers of the teacher."""
        todo = self.world.first_does(lambda: [name for name in names if not self._is_past(name, stop, measured)])
        if not todo:
            return
        self._teacher = self._teacher or self.make_teacher()
        blocks = (stop - start) * self.config.batch // self.world.data_size
        file = "targets.bin" if self.world.size == 1 else f"targets-{self.world.rank}.bin"
        shared = SharedTargets(self._teacher, self.folder / file, blocks, self.world)
        before = self._facts["teacher"].get(str(stop), 0)
        try:
            for name in todo:
                loss = self._train(name, stop, shared, measured)
                self._facts["students"][f"{name} {stop}"] = (stop - start) * self.config.batch
                if measured:
                    self.losses[name][str(stop)] = loss
                self._note_teacher(stop, before + self.world.add_up(shared.computed))
        except BaseException:
            if self.world.size == 1:  # several processes may have failed at different points: nothing is exchanged
                self._note_teacher(stop, before + shared.computed)
            raise
        shared.close()

    def _is_past(self, name: str, stop: int, measured: bool) -> bool:
        steps = list_steps(self.folder / name)
        return str(stop) in self.losses[name] or (bool(steps) and steps[-1][0] >= stop and not measured)

    def _train(self, name: str, stop: int, shared: SharedTargets, measured: bool) -> float:
        """Train a candidate up to a step; its held-out loss there, NaN if it is not measured."""
        model = self.contenders[name].load()
        loss = DistillLoss(shared, self.options, model.config)  # type: ignore[arg-type]
        run = self.folder / name
        result = train(
            model, self.stream, self.config, run, heldout=self.heldout if measured else None, loss=loss,
            identity=self.identity, quiet=True, world=self.world, until=stop, going_on=name in self._begun,
        )  # fmt: skip
        self._begun.add(name)
        if result.step < stop:
            raise StoppedError(result.stopped_by or "a signal")
        return _mean(result.heldout) if measured else math.nan

    def _note_teacher(self, stop: int, blocks: int) -> None:
        self._facts["teacher"][str(stop)] = blocks
        self._save()

    def best(self, names: Sequence[str], stop: int) -> list[str]:
        """Names by their loss at a step, the lowest first."""
        return sorted(names, key=lambda name: (self.losses[name][str(stop)], name))

    def standing(self, alive: Sequence[str], stops: Sequence[int]) -> Standing:
        """The result, when all is done."""
        order = list(alive)
        for stop in reversed(stops):
            left = [name for name in self.contenders if name not in order and str(stop) in self.losses[name]]
            order += self.best(left, stop)
        losses = {name: {int(step): loss for step, loss in self.losses[name].items()} for name in order}
        blocks = (sum(self._facts[kind].values()) for kind in ("teacher", "students"))
        return Standing(tuple(order), losses, *blocks)

    def _loss_of(self, model: nn.Module) -> float:
        """Held-out loss of a model that is not trained yet."""
        objective, world = Objective(model, next_token_loss), self.world
        if world.mesh is not None:
            prepare(objective, self.config, world)
        at_once = self.config.at_once(world.data_size)
        texts = {name: HeldoutText(blocks, at_once, world=world) for name, blocks in self.heldout.items()}
        with packed_attention_in(*objective.trained_models()):  # as in `train`
            return _mean(measure_all(objective, texts, self.config.dtype))

    def _save(self) -> None:
        if self.world.first:
            write_text(self._file, json.dumps(self._facts, indent=1))


def _mean(heldout: Mapping[str, Mapping[str, float]]) -> float:
    """Of the losses of all texts, in nats per token."""
    return sum(found["nats_per_token"] for found in heldout.values()) / len(heldout)


def _rounds(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    """(first step, last step + 1) of rounds of `length` steps between two stops."""
    return [(at, min(at + length, stop)) for at in range(start, stop, length)]
