"""A ranking with one teacher is the separate runs it stands for, bit for bit, only cheaper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_run import small_config, small_model, small_stream
from torch import nn

from minitron import NemotronForCausalLM
from minitron.compress.ranking import Contender, SharedTargets, Standing, rank
from minitron.data.packing import Batch
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.targets import DenseTargets, OnlineTeacher
from minitron.train.heldout import heldout_loss
from minitron.train.loop import train
from minitron.train.schedule import TrainConfig

STEPS = 8
CONFIG = small_config(STEPS, save_every=0, dtype="float32")


def student(seed: int) -> NemotronForCausalLM:
    model = small_model()
    torch.manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


class Teacher(OnlineTeacher):
    """Counts its blocks, and breaks down after so many."""

    def __init__(self, breaks_after: int = 10**9) -> None:
        torch.manual_seed(1)
        super().__init__(small_model().requires_grad_(False))
        self.blocks, self.breaks_after = 0, breaks_after

    def targets_for(self, batch: Batch, layers: Sequence[int] = ()) -> DenseTargets:
        self.blocks += len(batch.input_ids)
        if self.blocks > self.breaks_after:
            raise RuntimeError("power cut")
        return super().targets_for(batch, layers)


NAMES = ["a", "b", "c"]


def race(folder: Path, teacher: nn.Module | Teacher, **options: int) -> Standing:
    contenders = [Contender(name, lambda seed=seed: student(seed)) for seed, name in enumerate(NAMES)]
    stream = small_stream()
    held = {"text": stream.sources[0]}
    return rank(contenders, lambda: teacher, stream, held, CONFIG, [0.5], folder, hidden_size=16, **options)  # type: ignore[arg-type, return-value]


def alone(seed: int, run: Path, until: int | None = None) -> NemotronForCausalLM:
    model = student(seed)
    loss = DistillLoss(OnlineTeacher(Teacher().model), DistillOptions(), model.config)
    train(model, small_stream(), CONFIG, run, loss=loss, quiet=True, until=until)
    return model


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_the_winner_is_bit_for_bit_what_it_becomes_alone(tmp_path: Path) -> None:
    found = race(tmp_path / "race", Teacher())
    winner = found.order[0]
    alone(NAMES.index(winner), tmp_path / "alone")
    assert weights(tmp_path / "race" / winner) == weights(tmp_path / "alone")


def test_losses_are_those_of_separate_runs_and_decide_the_order(tmp_path: Path) -> None:
    found = race(tmp_path / "race", Teacher())
    held = small_stream().sources[0]
    for seed, name in enumerate(NAMES):
        assert found.losses[name][0] == heldout_loss(student(seed), held, 2)["nats_per_token"]
        half = alone(seed, tmp_path / name, until=4)
        assert found.losses[name][4] == heldout_loss(half, held, 2)["nats_per_token"]
    at_half = sorted(NAMES, key=lambda name: found.losses[name][4])
    assert set(found.order[:2]) == set(at_half[:2])
    assert found.order[2] == at_half[2]
    assert STEPS not in found.losses[at_half[2]]
    final = [found.losses[name][STEPS] for name in found.order[:2]]
    assert final == sorted(final)


def test_the_teacher_reads_each_block_once(tmp_path: Path) -> None:
    teacher = Teacher()
    found = race(tmp_path, teacher)
    assert found.student_blocks == 4 * (3 * 4 + 2 * 4)
    assert found.teacher_blocks <= 4 * STEPS
    assert teacher.blocks == found.teacher_blocks
    assert not (tmp_path / "targets.bin").exists()


def test_small_rounds_change_nothing(tmp_path: Path) -> None:
    whole, small = race(tmp_path / "whole", Teacher()), race(tmp_path / "small", Teacher(), round_bytes=1)
    assert whole.losses == small.losses
    assert weights(tmp_path / "whole" / whole.order[0]) == weights(tmp_path / "small" / small.order[0])


@pytest.mark.parametrize("blocks", [3, 10, 17, 25])
def test_an_interrupted_ranking_goes_on_to_the_same_end(tmp_path: Path, blocks: int) -> None:
    whole = race(tmp_path / "whole", Teacher())
    before, after = Teacher(blocks), Teacher()
    with pytest.raises(RuntimeError, match="power cut"):
        race(tmp_path / "cut", before, round_bytes=1)
    again = race(tmp_path / "cut", after, round_bytes=1)
    assert again.order == whole.order
    assert again.losses == whole.losses
    assert again.teacher_blocks == before.blocks - CONFIG.at_once() + after.blocks  # the last batch was not answered
    assert weights(tmp_path / "cut" / again.order[0]) == weights(tmp_path / "whole" / whole.order[0])


def test_shared_targets_are_the_teachers(tmp_path: Path) -> None:
    teacher = Teacher()
    shared = SharedTargets(teacher, tmp_path / "t.bin", 8)
    batch = small_stream().batches(0, 8, 8)[0]
    expected = teacher.targets_for(batch).hidden
    for _ in range(2):
        assert torch.equal(shared.targets_for(batch).hidden, expected)
    assert shared.computed == len(set(batch.indices.tolist()))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="last hidden states of blocks"):
        shared.targets_for(batch, [0])


def test_a_ranking_by_the_clock_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(hours=1.0)
    with pytest.raises(ValueError, match="not hours"):
        rank([], Teacher, small_stream(), {}, config, [0.5], tmp_path, hidden_size=16)  # type: ignore[arg-type]
