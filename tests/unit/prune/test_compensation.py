"""Least squares from sums against torch's own solver, and what compensation does to a pruned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration import batch, saved
from safetensors.torch import load_file

from minitron import NemotronForCausalLM
from minitron.checkpoint.fingerprint import fingerprint
from minitron.data.packing import Batch
from minitron.prune.architecture import Architecture
from minitron.prune.baselines import random_scores
from minitron.prune.choose import make_plan
from minitron.prune.compensation import REPORT, compensate
from minitron.prune.plan import PlanError, PrunePlan
from minitron.prune.regression import LinearFit, NormFit
from minitron.prune.streaming import StreamError
from minitron.prune.surgery import prune_checkpoint


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear_fit_is_ridge_regression() -> None:
    x, y, w = normal(200, 5), normal(200, 3, seed=1), normal(3, 5, seed=2)
    held_x, held_y = normal(80, 5, seed=3), normal(80, 3, seed=4)
    sums = LinearFit(5, 3)
    for part in range(0, 200, 50):  # in pieces, as calibration comes
        rows = slice(part, part + 50)
        sums.add(x[rows], y[rows] - x[rows] @ w.T, y[rows], heldout=False)
    sums.add(held_x, held_y - held_x @ w.T, held_y, heldout=True)
    change, fit = sums.solve()
    # The same by the augmented system: a row sqrt(penalty) e_i for each input, whose target is W itself.
    penalty = fit.ridge * float((x * x).sum(0).mean())
    a = torch.cat([x, penalty**0.5 * torch.eye(5, dtype=torch.float64)])
    b = torch.cat([y, penalty**0.5 * w.T])
    expected = torch.linalg.lstsq(a, b).solution.T
    torch.testing.assert_close(w + change, expected, rtol=1e-9, atol=1e-11)
    left = (held_y - held_x @ expected.T).square().sum() / held_y.square().sum()
    before = (held_y - held_x @ w.T).square().sum() / held_y.square().sum()
    assert fit.after == pytest.approx(float(left), rel=1e-9)
    assert fit.before == pytest.approx(float(before), rel=1e-9)


def test_norm_fit_is_a_regression_for_each_channel() -> None:
    z = normal(300, 4)
    y = z * torch.tensor([1.5, 0.2, -1.0, 0.0]) + torch.tensor([0.1, 0.0, 3.0, -2.0]) + 0.1 * normal(300, 4, seed=1)
    sums = NormFit(4)
    sums.add(z[:200], y[:200], heldout=False)
    sums.add(z[200:], y[200:], heldout=True)
    gain, offset, fit = sums.solve(torch.ones(4), torch.zeros(4))
    for channel in range(4):
        slope, intercept = np.polyfit(z[:200, channel].numpy(), y[:200, channel].numpy(), 1)
        assert gain[channel].item() == pytest.approx(slope, abs=3e-3)  # shrunk a little towards 1
        assert offset[channel].item() == pytest.approx(intercept, abs=3e-3)
    left = (y[200:] - gain * z[200:] - offset).square().sum() / y[200:].square().sum()
    assert fit.after == pytest.approx(float(left), rel=1e-9)
    assert fit.before == pytest.approx(float((y[200:] - z[200:]).square().sum() / y[200:].square().sum()), rel=1e-9)
    assert fit.accepted


def test_a_fit_that_learns_noise_is_refused() -> None:
    x, sums = normal(12, 10), LinearFit(10, 4)
    sums.add(x, normal(12, 4, seed=1), normal(12, 4, seed=5), heldout=False)
    sums.add(normal(500, 10, seed=2), 0.01 * normal(500, 4, seed=3), normal(500, 4, seed=4), heldout=True)
    assert not sums.solve()[1].accepted


# --- on models ---------------------------------------------------------------------------------------------------


def pruned(tmp_path: Path, shape: str, **overrides: Any) -> tuple[Any, PrunePlan, Path, Path]:
    source, small = tmp_path / "source", tmp_path / "small"
    model = saved(source, **overrides)
    target = Architecture.parse(shape, model.config)
    plan = make_plan(model.config, random_scores(model.config, 1), target, source=fingerprint(source))
    prune_checkpoint(source, small, plan)
    return model, plan, source, small


def kl(large: Any, folder: Path, blocks: Batch) -> float:
    small = NemotronForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        p, q = (
            m(blocks.input_ids, position_ids=blocks.position_ids, use_cache=False).logits.log_softmax(-1)
            for m in (large, small)
        )
    return float((p.exp() * (p - q)).sum(-1)[blocks.labels != -100].mean())


def many(seed: int = 0) -> Batch:
    return batch(count=150, seed=seed)


@pytest.mark.parametrize(
    ("shape", "overrides"),
    [
        ("ffn=36", {}),
        ("hidden=28,ffn=36,heads=2", {}),
        ("hidden=28,layers=2", {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_the_pruned_model_comes_closer_to_the_original(tmp_path: Path, shape: str, overrides: Any) -> None:
    model, plan, source, small = pruned(tmp_path, shape, **overrides)
    found = compensate(source, small, plan, many(), tmp_path / "better")
    assert kl(model, tmp_path / "better", many(seed=7)) < 0.95 * kl(model, small, many(seed=7))
    assert all(part.fit.after < part.fit.before for part in found if part.fit.accepted)
    report = json.loads((tmp_path / "better" / REPORT).read_text())
    assert report["plan"] == plan.hash
    layers = plan.target.layers
    assert len(report["parts"]) == len(found) == 4 * layers + 1
    untouched = {row["part"] for row in report["parts"] if not row["accepted"]}
    before, after = load_file(small / "model.safetensors"), load_file(tmp_path / "better" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        fitted = name.rsplit(".", 1)[0].endswith(("norm", "o_proj", "down_proj"))
        base = name.removeprefix("model.").replace(".bias", ".weight")
        assert torch.equal(weight, after[name]) == (not fitted or base in untouched), name


def test_a_model_that_lost_nothing_is_left_alone(tmp_path: Path) -> None:
    _, plan, source, small = pruned(tmp_path, "ffn=48", dtype=torch.bfloat16)
    compensate(source, small, plan, many(), tmp_path / "same", dtype=torch.float64)
    before, after = load_file(small / "model.safetensors"), load_file(tmp_path / "same" / "model.safetensors")
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=2**-7, atol=2**-8)


def test_bad_input(tmp_path: Path) -> None:
    _, plan, source, small = pruned(tmp_path, "ffn=36")
    with pytest.raises(StreamError, match="parts to compensate: embeddings; they must be norms or linear"):
        compensate(source, small, plan, batch(), tmp_path / "out", parts=("embeddings",))
    with pytest.raises(PlanError, match="other weights"):
        compensate(small, small, plan, batch(), tmp_path / "out")
    with pytest.raises(PlanError, match="MLP 48; the plan makes"):
        compensate(source, source, plan, batch(), tmp_path / "out")
    one = Batch(*(x[:1] for x in (batch().input_ids, batch().position_ids, batch().labels)), num_items=0)
    with pytest.raises(StreamError, match=r"1 blocks with a held-out share of 0\.25: one is needed on each side"):
        compensate(source, small, plan, one, tmp_path / "out")
    assert not (tmp_path / "out").exists()
