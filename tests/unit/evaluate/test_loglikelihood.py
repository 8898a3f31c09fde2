"""Shared prefixes, trees in a row and kept caches against one plain forward pass per request."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import pair

from minitron.evaluate import loglikelihood
from minitron.evaluate.loglikelihood import Answer, Request, loglikelihoods, was_truncated

OURS, UPSTREAM = pair(max_position_embeddings=40)
CONTEXT = 40


@torch.no_grad()
def plain(request: Request) -> Answer:
    """Upstream's model, its whole logits, in float64."""
    ids = (request.context + request.continuation)[-(CONTEXT + 1) :]
    count = len(request.continuation)
    logits = UPSTREAM(torch.tensor([ids[:-1]])).logits[0, -count:].double()
    target = torch.tensor(request.continuation)
    return Answer(
        logits.log_softmax(-1).gather(1, target[:, None]).sum().item(),
        bool((logits.argmax(-1) == target).all()),
    )


def check(requests: list[Request], **options: int) -> None:
    found: dict[int, Answer] = {}
    for part in loglikelihoods(OURS, requests, **options):
        for index, answer in part:
            assert index not in found
            found[index] = answer
    assert sorted(found) == list(range(len(requests)))
    for index, request in enumerate(requests):
        expected = plain(request)
        assert found[index].log_prob == pytest.approx(expected.log_prob, abs=1e-4)
        assert found[index].greedy == expected.greedy


# Few symbols and few stems, so that prefixes are shared at every depth.
symbols = st.integers(5, 7)
stems = st.sampled_from([[8] * 5, [8] * 18, [8] * 18 + [9] * 9, [9] * 30, [10]])
tails = st.lists(symbols, max_size=20)
pieces = st.builds(Request, st.builds(lambda a, b: a + b, stems, tails), st.lists(symbols, min_size=1, max_size=6))


@given(requests=st.lists(pieces, min_size=1, max_size=12), row_tokens=st.sampled_from([1, 24, 64, 400]))
@settings(max_examples=150, deadline=None)
def test_any_requests(requests: list[Request], row_tokens: int) -> None:
    check(requests, row_tokens=row_tokens)


def test_choices_of_a_question_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = OURS.model.forward
    monkeypatch.setattr(OURS.model, "forward", lambda ids, **rest: seen.append(ids.shape[1]) or forward(ids, **rest))
    check([Request([8] * 20, [a, b]) for a, b in [(5, 6), (6, 6), (7, 5), (5, 6)]], row_tokens=64)
    assert seen == [23]  # the context once, and one token for each different first token


def test_a_few_shot_prefix_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = OURS.model.forward
    monkeypatch.setattr(OURS.model, "forward", lambda ids, **rest: seen.append(ids.shape[1]) or forward(ids, **rest))
    requests = [Request([8] * 25 + [a, b], [c]) for a in (5, 6, 7) for b in (5, 6, 7) for c in (9, 10)]
    check(requests, row_tokens=6)
    assert sum(seen) == 25 + 3 + 9
    assert len(seen) > 1


def test_long_requests_lose_tokens_from_the_left() -> None:
    long = Request(list(range(5, 95)), [5, 6])
    assert was_truncated(long, CONTEXT)
    assert not was_truncated(Request([5] * 39, [6, 7]), CONTEXT)
    check([long, Request(list(range(5, 95)), [7]), Request([5] * 39, [6, 7])])


def test_requests_that_cannot_be_answered() -> None:
    with pytest.raises(ValueError, match="request 1 has an empty context"):
        list(loglikelihoods(OURS, [Request([5], [6]), Request([], [6])]))
    with pytest.raises(ValueError, match="request 0: the continuation has 41 tokens; the model's context is 40"):
        list(loglikelihoods(OURS, [Request([5], [6] * 41)]))
    assert list(loglikelihoods(OURS, [])) == []


def test_rows_keep_to_their_budget() -> None:
    windows = [loglikelihood._window(i, Request([i % 9 + 5] * 10 + [i % 7], [5]), CONTEXT) for i in range(60)]
    windows.sort(key=lambda w: w.ids.tolist())
    for row in loglikelihood._rows(windows, 30):
        assert sum(len(path.ids) for path in row.windows[:1]) <= 30
        assert len(loglikelihood._lay_out(row).ids) <= 30
