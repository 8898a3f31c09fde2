"""Caches of a teacher: exact or unbiased, the same bytes after any interruption, refused where they do not belong."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cache import small_plan
from small_run import small_model, small_stream
from torch import Tensor

from minitron import NemotronForCausalLM
from minitron.data.packing import Batch
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.target_codecs import draw, pack_entries, unpack_entries
from minitron.distill.targets import OnlineTeacher, SparseTargets
from minitron.distill.teacher_cache import CachePlan, TargetCache, make_codec, measure_bytes, open_targets, write_cache
from minitron.ops.kl import linear_divergence, linear_sparse_divergence

SAMPLES = Path(__file__).parents[2] / "samples"


def cached(
    folder: Path, kind: str, model: NemotronForCausalLM | None = None, blocks: int = 11, **options: Any
) -> TargetCache:
    model = model or small_model()
    plan = replace(small_plan(kind, blocks=blocks), codec=make_codec(kind, model, **options))
    write_cache(folder, plan, small_stream(), model)
    return open_targets(folder, small_stream())


def student() -> NemotronForCausalLM:
    model = small_model()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hidden_state_cache_is_the_teacher_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher, learner = small_model().to(dtype), student()
    cache = cached(tmp_path / "c", "hidden", teacher)
    results = []
    for targets in (OnlineTeacher(teacher), cache):
        learner.zero_grad()
        # The cache's batches are of two blocks; so are these, since sums of another shape may round otherwise.
        for batch in small_stream().batches(0, 8, 2):
            loss, numbers = DistillLoss(targets, DistillOptions(ce_weight=0.1), learner.config)(learner, batch)
            loss.backward()
        results.append([loss.detach(), torch.tensor(list(numbers.values())), *(p.grad for p in learner.parameters())])
    for online, offline in zip(*results, strict=True):
        assert torch.equal(online, offline)


def test_every_epoch_finds_its_blocks(tmp_path: Path) -> None:
    stream = small_stream()
    cache = cached(tmp_path / "c", "hidden", blocks=len(stream))
    teacher = OnlineTeacher(small_model())
    for batch in stream.batches(len(stream), len(stream), 5):
        expected = teacher.targets_for(batch).hidden
        torch.testing.assert_close(cache.targets_for(batch).hidden, expected, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


# --- sampling ----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**18 - 1), st.integers(0, 63)), max_size=40))
def test_entries_hold_18_bits_and_6_bits(pairs: list[tuple[int, int]]) -> None:
    ids, counts = (
        (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True)) if pairs else (np.zeros(0),) * 2
    )
    packed = pack_entries(ids, counts)
    assert packed.shape == (len(pairs), 3)
    assert list(zip(*(x.tolist() for x in unpack_entries(packed)), strict=True)) == pairs


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
def test_drawn_tokens_have_exactly_the_probability_of_the_teacher(weights: list[int]) -> None:
    """Over uniforms spread evenly over [0, 1) each token comes up in proportion to its weight, and none of weight 0."""
    total = sum(weights)
    probabilities = torch.tensor([weights], dtype=torch.float64) / total
    uniforms = ((torch.arange(total * 10, dtype=torch.float64) + 0.5) / (total * 10))[None]
    counts = torch.bincount(draw(probabilities, uniforms)[0], minlength=len(weights))
    assert counts.tolist() == [10 * w for w in weights]


def all_outcomes(p: Tensor, samples: int) -> list[tuple[float, Tensor]]:
    """(probability, shares) of every sequence of samples from a distribution (V,)."""
    out = []
    for ids in itertools.product(range(len(p)), repeat=samples):
        shares = torch.bincount(torch.tensor(ids), minlength=len(p)).double() / samples
        out.append((float(torch.stack([p[i] for i in ids]).prod()), shares))
    return out


def test_sampled_targets_are_unbiased_and_top_k_is_not() -> None:
    """The mean over all outcomes of value and gradients is that of the whole distribution, and so is the variance."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, t_hidden, t_weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((1, 3), (4, 3), (1, 2), (4, 2))
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    label, ids = torch.tensor([1]), torch.arange(4)[None]
    p = (t_hidden @ t_weight.t()).softmax(-1)[0]
    entropy = -(p * p.log()).sum()[None]

    def of(shares: Tensor) -> tuple[Tensor, ...]:
        loss = linear_sparse_divergence(hidden, weight, ids, shares[None], entropy, label).loss
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    exact = linear_divergence(hidden, weight, t_hidden, t_weight, label).loss
    expected = (exact.detach(), *torch.autograd.grad(exact, (hidden, weight)))
    outcomes = all_outcomes(p, 3)
    assert sum(q for q, _ in outcomes) == pytest.approx(1, rel=1e-12)
    found = [(q, of(shares)) for q, shares in outcomes]
    for i, whole in enumerate(expected):
        torch.testing.assert_close(sum(q * values[i] for q, values in found), whole, rtol=1e-12, atol=1e-13)
    # The gradient of the logits is p_s - shares, whose variance is p (1 - p) / N.
    spread = sum(q * (shares - p) ** 2 for q, shares in outcomes)
    torch.testing.assert_close(spread, p * (1 - p) / 3, rtol=1e-12, atol=1e-13)
    top = torch.where(p >= p.sort().values[-2], p, 0)
    assert (of(top)[2] - expected[2]).norm() > 0.05 * expected[2].norm()


def test_sampled_caches_hold_what_was_drawn(tmp_path: Path) -> None:
    """Counts add up at every scored token; entropy and top token are the teacher's; shares differ from it by chance."""
    cache = cached(tmp_path / "c", "sampled", blocks=30, samples=60)
    teacher = small_model().eval()
    excess, places = 0.0, 0
    for batch in small_stream().batches(0, 30, 5):
        targets = cache.targets_for(batch)
        assert isinstance(targets, SparseTargets)
        with torch.no_grad():
            out = teacher(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        p = out.double().softmax(-1)
        scored = torch.zeros_like(batch.labels, dtype=torch.bool)
        scored[:, :-1] = batch.labels[:, 1:] != -100
        torch.testing.assert_close(targets.shares.sum(-1), scored.float())
        entropy = -(p * p.log()).sum(-1)
        torch.testing.assert_close(targets.entropy.double(), entropy, rtol=1e-3, atol=1e-3)
        assert torch.equal(targets.top, p.argmax(-1))
        shares = torch.zeros_like(p).scatter_add_(-1, targets.ids, targets.shares.double())
        # (sum of squared errors) / (its expectation over draws) is 1 on average.
        expected = (1 - p.square().sum(-1)) / 60
        excess += float(((shares - p).square().sum(-1) / expected)[scored].sum())
        places += int(scored.sum())
    assert excess / places == pytest.approx(1, abs=0.1)


def test_top_k_caches_hold_the_most_likely_tokens(tmp_path: Path) -> None:
    cache = cached(tmp_path / "c", "topk", k=5)
    (batch,) = small_stream().batches(0, 4, 4)
    targets = cache.targets_for(batch)
    assert isinstance(targets, SparseTargets)
    with torch.no_grad():
        out = small_model().eval()(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    values, ids = out.softmax(-1).topk(5)
    assert torch.equal(targets.ids, ids)
    torch.testing.assert_close(targets.shares, values, rtol=1e-3, atol=1e-6)


def test_a_student_can_learn_from_samples_and_equal_models_are_near_zero(tmp_path: Path) -> None:
    cache = cached(tmp_path / "c", "sampled", blocks=30)
    (batch,) = small_stream().batches(0, 20, 20)
    _, numbers = DistillLoss(cache, DistillOptions(), small_model().config)(small_model(), batch)
    assert abs(numbers["kl"]) < 0.05
    assert numbers["top1"] == 1
    with pytest.raises(ValueError, match="a sparse cache of the teacher supports only forward_kl at temperature 1"):
        DistillLoss(cache, DistillOptions(temperature=2.0), small_model().config)
    with pytest.raises(ValueError, match="which a cache does not hold"):
        DistillLoss(cache, DistillOptions(hidden="mse"), small_model().config)


# --- files -------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"}


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, str(SAMPLES / "small_cache.py"), str(tmp_path / "killed"), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.startswith("finished after"), done.stderr
    assert int(done.stdout.split()[2]) > 8
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        write_cache(tmp_path / "whole", small_plan(kind), small_stream(), small_model())
    finally:
        torch.set_num_threads(threads)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_the_size_is_told_beforehand(tmp_path: Path) -> None:
    for kind in ("hidden", "sampled", "topk"):
        plan = small_plan(kind)
        expected = measure_bytes(plan, small_stream(), small_model())
        write_cache(tmp_path / kind, plan, small_stream(), small_model())
        files = sum(p.stat().st_size for p in (tmp_path / kind).glob("part-*"))
        head = (tmp_path / kind / "head.safetensors").stat().st_size if kind == "hidden" else 0
        assert files + head == pytest.approx(expected, rel=0.15)


def refusal(work: Any) -> str:
    with pytest.raises(ValueError, match=" ") as error:
        work()
    return str(error.value)


def test_a_cache_that_does_not_belong_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    plan: CachePlan = small_plan("topk")
    assert "not a cache of teacher targets" in refusal(lambda: open_targets(folder, small_stream()))
    write_cache(folder, plan, small_stream(), small_model())
    assert "made by another teacher (fingerprint tttttttttttt, the given one has uuuuuuuuuuuu)" in refusal(
        lambda: open_targets(folder, small_stream(), "u" * 64)
    )
    open_targets(folder, small_stream(seed=1), "t" * 64)  # another order of the same blocks is fine
    assert "made for blocks of 16 tokens; the run has 8" in refusal(
        lambda: open_targets(folder, small_stream(sequence=8))
    )
    assert "made from other data" in refusal(lambda: open_targets(folder, small_stream(documents=59)))
    other = small_stream()
    other.sources[0].cache = replace(other.sources[0].cache, key="another tokenizer")
    assert "made from other data (another text, tokenizer, seed or held-out share)" in refusal(
        lambda: open_targets(folder, other)
    )
    assert "holds another cache" in refusal(
        lambda: write_cache(folder, replace(plan, seed=3), small_stream(), small_model())
    )
    cache = open_targets(folder, small_stream())
    (last,) = small_stream().batches(len(small_stream()) - 1, 1, 1)
    assert "is not among the 11 in the cache" in refusal(lambda: cache.targets_for(last))
    (outside,) = small_stream().batches(0, 1, 1)
    assert "only blocks of the stream" in refusal(lambda: cache.targets_for(without_indices(outside)))


def without_indices(batch: Batch) -> Batch:
    return replace(batch, indices=None)


def test_damaged_and_unfinished_caches_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_cache(folder, small_plan("sampled"), small_stream(), small_model())
    part = folder / "part-000001.bin"
    raw = bytearray(part.read_bytes())
    part.unlink()
    assert "2 of 3 files are written" in refusal(lambda: open_targets(folder, small_stream()))
    raw[5] ^= 1
    part.write_bytes(raw)
    cache = open_targets(folder, small_stream())
    batches = small_stream().batches(0, 8, 4)
    cache.targets_for(batches[0])
    assert "part-000001.bin: its content is not what was written" in refusal(lambda: cache.targets_for(batches[1]))
    (folder / "meta.json").write_text("[")
    assert "not a cache of teacher targets (meta.json" in refusal(lambda: open_targets(folder, small_stream()))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    assert "is not empty and is not a cache" in refusal(
        lambda: write_cache(tmp_path / "notes", small_plan("topk"), small_stream(), small_model())
    )


def test_settings_that_cannot_be_are_refused() -> None:
    model = small_model()
    assert "kind is 'all'; it must be one of hidden, sampled, topk" in refusal(lambda: make_codec("all", model))
    assert "samples is 64; it must be 1 to 63" in refusal(lambda: make_codec("sampled", model, samples=64))
    assert "k is 51; it must be 1 to the vocabulary's 50" in refusal(lambda: make_codec("topk", model, k=51))
    model.config.vocab_size = 300_000
    assert "a sparse cache holds at most 262144" in refusal(lambda: make_codec("topk", model))
