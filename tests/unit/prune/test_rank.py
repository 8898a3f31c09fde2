"""Scores of candidates against the models that surgery writes, and the file that keeps them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import build, upstream
from prune_samples import random_scores

from minitron.checkpoint.fingerprint import fingerprint
from minitron.data.packing import Batch
from minitron.ops.loss import IGNORE_INDEX
from minitron.prune import rank
from minitron.prune.architecture import Architecture
from minitron.prune.choose import make_plan
from minitron.prune.plan import PrunePlan, keep_all
from minitron.prune.rank import Scorer, rank_candidates, read_candidates, zero_shot
from minitron.prune.search import Budget, Candidate, Grid, Machine, SearchError, enumerate_architectures
from minitron.prune.surgery import prune_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    build(num_hidden_layers=3).double().save_pretrained(folder)
    return folder


def blocks() -> Batch:
    ids = torch.randint(5, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    labels[1, 7:] = IGNORE_INDEX
    return Batch(ids, torch.arange(12).expand(3, 12).clone(), labels, int((labels != IGNORE_INDEX).sum()))


def plan_of(source: Path, shape: Architecture) -> PrunePlan:
    config = build(num_hidden_layers=3).config
    return make_plan(config, random_scores(config), shape, source=fingerprint(source))


@torch.no_grad()
def log_probs(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Upstream's next-token log-probabilities at the places that have a label, and these labels."""
    model = upstream.NemotronForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    batch = blocks()
    found = model(batch.input_ids).logits[:, :-1].log_softmax(-1)
    targets = batch.labels[:, 1:]
    keep = targets != IGNORE_INDEX
    return found[keep], targets[keep]


@pytest.mark.parametrize("head_block", [1 << 25, 1000])
def test_scores_are_those_of_the_model_that_surgery_writes(
    source: Path, tmp_path: Path, head_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "HEAD_BLOCK_BYTES", head_block)
    plan = plan_of(source, Architecture(2, 20, 2, 2, 30))
    prune_checkpoint(source, tmp_path / "small", plan)
    teacher, targets = log_probs(source)
    student, _ = log_probs(tmp_path / "small")
    loss = zero_shot(source, blocks(), dtype=torch.float64).score(plan)
    assert loss == pytest.approx(torch.nn.functional.nll_loss(student, targets).item(), abs=1e-12)
    divergence = zero_shot(source, blocks(), "kl", dtype=torch.float64).score(plan)
    expected = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean").item()
    assert divergence == pytest.approx(expected, abs=1e-12)
    same = zero_shot(source, blocks(), "kl").score(keep_all(plan.shape, plan.source))
    assert same == pytest.approx(0, abs=1e-6)


def candidates(source: Path) -> list[Candidate]:
    config = build(num_hidden_layers=3).config
    grid = Grid(layers=(2, 3), heads=(2, 4), groups=(2,), hidden=(16, 32), ffn=(24, 48))
    return enumerate_architectures(config, Budget("params", 1, 1e9), grid, Machine())


def test_ranking_looks_at_all_and_goes_on_where_it_stopped(source: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    path = tmp_path / "work" / "candidates.jsonl"

    def score(plan: PrunePlan) -> float:
        calls.append(len(plan.channels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return float(len(plan.layers) * 100 + len(plan.channels))

    def run(**changes: Any) -> list[rank.Ranked]:
        scorer = Scorer(**{"name": "size", "score": score, **changes})
        return rank_candidates(candidates(source), lambda shape: plan_of(source, shape), scorer, path)

    with pytest.raises(KeyboardInterrupt):
        run()
    path.write_bytes(path.read_bytes() + b'{"plan": "torn')
    found = run()
    assert len(calls) == 16 + 1
    assert len(found) == 16
    assert [r.score for r in found] == sorted(r.score for r in found)
    assert found[0].candidate.architecture.hidden == 16
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 16
    assert {"architecture", "parameters", "plan", "method", "score", "seconds"} <= rows[0].keys()
    assert run() == found
    assert run(higher_is_better=True)[0].score == found[-1].score
    assert len(calls) == 17
    run(name="another method")
    assert len(calls) == 33
    assert len(read_candidates(path)) == 32


def test_a_model_that_has_no_number_comes_last(source: Path, tmp_path: Path) -> None:
    scorer = Scorer("odd", lambda plan: math.nan if len(plan.channels) == 16 else -1.0)
    found = rank_candidates(candidates(source), lambda s: plan_of(source, s), scorer, tmp_path / "c.jsonl")
    assert [math.isnan(r.score) for r in found] == [False] * 8 + [True] * 8


def test_a_file_that_was_damaged(source: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"plan": 3}\n')
    with pytest.raises(SearchError, match=r"c\.jsonl: line 1 is not the score of a candidate"):
        read_candidates(tmp_path / "c.jsonl")
    with pytest.raises(SearchError, match="no candidate to rank"):
        rank_candidates([], lambda s: plan_of(source, s), Scorer("x", lambda _: 0.0), tmp_path / "d.jsonl")
