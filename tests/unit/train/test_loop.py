"""The training loop against plain formulas: schedule, gradient, optimizer, held-out loss, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_run import small_config, small_model, small_stream
from torch import nn
from torch.nn import functional as F

from minitron.data.documents import DataError
from minitron.data.packing import collate
from minitron.train import machine
from minitron.train.log import METRICS_FILE, RunLog
from minitron.train.loop import TrainError, estimate, heldout_loss, next_token_loss, train
from minitron.train.optimizers import make_optimizer
from minitron.train.schedule import TrainConfig, learning_rate, progress

# --- schedule ----------------------------------------------------------------------------------------------------


def rates(config: TrainConfig) -> list[float]:
    assert config.total_steps is not None
    return [learning_rate(config, step, progress(config, step, 0)) for step in range(config.total_steps)]


def test_wsd_rises_stays_and_falls() -> None:
    found = rates(TrainConfig(steps=100, lr=1.0, warmup=10, decay=0.2, schedule="wsd"))
    assert found[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert found[10:81] == [1.0] * 71
    assert found[81:] == pytest.approx([(100 - step) / 20 for step in range(81, 100)])


def test_cosine_is_half_a_cosine_down_to_the_final_share() -> None:
    found = rates(TrainConfig(steps=50, lr=2.0, warmup=0, schedule="cosine", final_lr=0.1))
    assert found == pytest.approx([0.2 + 1.8 * (1 + math.cos(math.pi * step / 50)) / 2 for step in range(50)])


def test_torch_agrees_on_the_cosine() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=0.3)
    expected = []
    for _ in range(30):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(TrainConfig(steps=30, lr=3.0, warmup=0, schedule="cosine", final_lr=0.1)) == pytest.approx(expected)


def test_hours_follow_the_clock() -> None:
    config = TrainConfig(hours=2.0, lr=1.0, warmup=0, decay=0.25)
    assert config.total_steps is None
    assert learning_rate(config, 10**6, progress(config, 10**6, 3600)) == 1.0
    assert learning_rate(config, 5, progress(config, 5, 7200 - 900)) == pytest.approx(0.5)
    assert progress(config, 5, 8000) == 1.0


def test_tokens_are_counted_in_whole_steps() -> None:
    assert TrainConfig(tokens=1001, batch=2, sequence=50).total_steps == 11
    assert TrainConfig(tokens=1000, batch=2, sequence=50).total_steps == 10


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "exactly one of steps, tokens and hours; found: none"),
        ({"steps": 1, "hours": 1.0}, "found: steps, hours"),
        ({"steps": 0}, "steps is 0; it must be greater than 0"),
        ({"steps": 1, "batch": 6, "micro_batch": 4}, "micro_batch is 4; it must be a divisor of batch, which is 6"),
        ({"steps": 1, "micro_batch": 0}, "micro_batch is 0"),
        ({"steps": 1, "lr": -1.0}, "lr is -1.0; it must be greater than 0"),
        ({"steps": 1, "lr": math.nan}, "lr is nan; it must be greater than 0"),
        ({"steps": 1, "decay": 1.5}, "decay is 1.5; it must be from 0 to 1"),
        ({"steps": 1, "schedule": "linear"}, "schedule is 'linear'; it must be wsd, cosine or constant"),
        ({"steps": 1, "betas": (0.9, 1.0)}, "betas is"),
        ({"steps": 1, "sequence": 1}, "sequence is 1; it must be at least 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict, says: str) -> None:
    with pytest.raises(ValueError, match=r"it must be|give exactly") as error:
        TrainConfig(**values)
    assert says in str(error.value)


# --- one step ----------------------------------------------------------------------------------------------------


def plain_loss(model: nn.Module, ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.double()
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def test_the_loop_is_adamw_on_the_mean_loss_of_the_whole_batch(tmp_path: Path) -> None:
    """Three steps of two passes each, against a loop of torch.optim.AdamW over whole batches, unfused."""
    config = small_config(3, batch=6, micro_batch=2, clip=0.5, warmup=2, save_every=0, dtype="float32")
    model, plain = small_model(), small_model()
    train(model, small_stream(), config, tmp_path / "run", quiet=True)

    matrices = [p for p in plain.parameters() if p.ndim == 2]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), foreach=False)
    expected = []
    for step, rate in enumerate([1.5e-3, 3e-3, 3e-3 * (1 - 2 / 3) / 0.2 if 2 / 3 > 0.8 else 3e-3]):
        (batch,) = small_stream().batches(6 * step, 6, 6)
        loss = plain_loss(plain, batch.input_ids, batch.position_ids, batch.labels)
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in plain.parameters()))  # type: ignore[union-attr]
        assert norm > 0.5  # so that clipping is tested
        for parameter in plain.parameters():
            parameter.grad *= 0.5 / norm
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    rows = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6, msg=name)


def test_every_parameter_is_in_the_optimizer_once_and_only_matrices_decay() -> None:
    model = small_model()
    optimizer = make_optimizer([(1.0, list(model.parameters()))], small_config(1, weight_decay=0.3))
    groups = [(len(g["params"]), g["weight_decay"], {p.ndim for p in g["params"]}) for g in optimizer.param_groups]
    assert [g[1:] for g in groups] == [(0.3, {2}), (0.0, {1})]
    assert sum(g[0] for g in groups) == len(list(model.parameters()))


def test_the_loss_falls_and_another_loss_can_be_given(tmp_path: Path) -> None:
    model = small_model()
    first = train(model, small_stream(), small_config(60, lr=1e-2, save_every=0), tmp_path / "run", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    assert first.loss is not None
    assert first.loss < 0.8 * rows[0]["loss"]

    def doubled(model, batch):
        loss, _ = next_token_loss(model, batch)
        return 2 * loss, {"half": loss.item()}

    train(small_model(), small_stream(), small_config(1, save_every=0), tmp_path / "b", loss=doubled, quiet=True)
    (row,) = map(json.loads, (tmp_path / "b" / METRICS_FILE).read_text().splitlines())
    assert row["loss"] == pytest.approx(2 * row["half"])
    assert row["half"] == pytest.approx(rows[0]["loss"])


# --- held-out loss -----------------------------------------------------------------------------------------------


def test_heldout_loss_equals_a_plain_loop_over_documents() -> None:
    model = small_model().train()
    (blocks,) = small_stream().sources
    found = heldout_loss(model, blocks, at_once=3)
    assert model.training
    nats, count = 0.0, 0
    model.eval()
    starts = blocks.cache.starts
    with torch.no_grad():
        for start, stop in pairwise(starts):
            ids = torch.tensor([blocks.cache.tokens[start:stop].tolist()])
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
            nats -= log_p.gather(1, ids[0, 1:, None]).sum().item()
            count += ids.shape[1] - 1
    assert found["nats_per_token"] == pytest.approx(nats / count, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / blocks.cache.text_bytes.sum(), rel=1e-6)


def test_heldout_loss_is_measured_at_its_steps_and_at_the_end(tmp_path: Path) -> None:
    stream = small_stream()
    config = small_config(5, eval_every=2, save_every=0)
    result = train(small_model(), stream, config, tmp_path / "run", heldout={"t": stream.sources[0]}, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows if "heldout/t/nats_per_token" in row] == [2, 4, 5]
    assert result.heldout["t"]["nats_per_token"] == rows[-1]["heldout/t/nats_per_token"]


# --- what is refused, and what is told ---------------------------------------------------------------------------


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.model.norm.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"the model cannot be used: 1 of the 16 numbers of model\.norm\.bias"):
        train(model, small_stream(), small_config(3), tmp_path / "run", quiet=True)


def test_data_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(TrainError, match="max_position_embeddings is 32"):
        train(model, small_stream(sequence=64), small_config(1, sequence=64), tmp_path / "run", quiet=True)
    model.config.vocab_size = 20
    with pytest.raises(DataError, match="token id 47; the model's vocab_size is 20"):
        train(model, small_stream(), small_config(1), tmp_path / "run", quiet=True)
    with pytest.raises(DataError, match="token id 47"):
        estimate(model, small_stream(), small_config(1), next_token_loss)
    assert not (tmp_path / "run").exists()


def test_an_estimate_changes_nothing() -> None:
    model = small_model(dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    need = estimate(model, small_stream(), small_config(10), next_token_loss)
    assert need.seconds_per_step > 0
    assert need.peak_bytes > machine.state_bytes(model) > 4 * sum(p.numel() * 4 for p in model.parameters()) - 1
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bfloat16_is_close_and_leaves_weights_in_fp32(tmp_path: Path) -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = small_model()
        config = replace(small_config(5, save_every=0), dtype=dtype)
        losses.append(train(model, small_stream(), config, tmp_path / dtype, quiet=True).loss)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]


def test_a_missing_tensorboard_is_said_and_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path, 0, 0.0, quiet=True)
    log.write(1, {"loss": 2.0})
    log.close()
    assert log.note is not None
    assert "minitron[train]" in log.note
    assert json.loads((tmp_path / METRICS_FILE).read_text()) == {"step": 1, "loss": 2.0}


def test_padding_is_neither_scored_nor_seen() -> None:
    model = small_model().eval()
    (blocks,) = small_stream().sources
    rows = [blocks.pieces(len(blocks) - 1)]
    used = sum(map(len, rows[0]))
    with torch.no_grad():
        values = [next_token_loss(model, collate(rows, n, pad))[0].item() for n, pad in ((used, 0), (32, 0), (32, 7))]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_one_model_goes_through_the_pieces_of_a_run(tmp_path: Path) -> None:
    model = small_model()
    model.config.dtype = torch.bfloat16  # as the configuration of a saved checkpoint says; the weights are fp32
    before = model.config.to_dict()
    for until in (2, 4):
        result = train(model, small_stream(), small_config(5), tmp_path / "run", quiet=True, until=until)
        assert result.step == until
    assert model.config.to_dict() == before
    train(model, small_stream(), small_config(5), tmp_path / "run", quiet=True)
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["dtype"] == "float32"


def test_a_run_in_pieces_is_the_run_in_one(tmp_path: Path) -> None:
    config = small_config(5, save_every=0)
    train(small_model(), small_stream(), config, tmp_path / "whole", quiet=True)
    stops = []
    for until in (2, 2, 4, 9):
        result = train(small_model(), small_stream(), config, tmp_path / "pieces", quiet=True, until=until)
        stops.append((result.step, result.stopped_by))
    assert stops == [(2, "until=2"), (2, "until=2"), (4, "until=4"), (5, None)]
    one, other = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "pieces"))
    assert one == other
