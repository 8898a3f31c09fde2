"""Rows S1 to S6, Q1 to Q5 and T1 to T5 of docs/contract.md: what the page says about the three heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import build, pair, token_ids, upstream
from torch.nn import functional as F

import minitron

SEQ, QA, TOK = (
    "NemotronForSequenceClassification",
    "NemotronForQuestionAnswering",
    "NemotronForTokenClassification",
)


def scored_at(model: Any, ids: torch.Tensor, columns: list[int]) -> torch.Tensor:
    """What the head says at the given position of each row, from the backbone's own output."""
    hidden = model.model(ids).last_hidden_state
    return model.score(hidden[torch.arange(len(columns)), columns])


# --- sequence classification ------------------------------------------------------------------------------------

PADDED = {
    "right": ([9, 8, 7, 0, 0], 2),
    "left": ([0, 0, 9, 8, 7], 4),
    "inside": ([9, 0, 8, 0, 7], 4),
    "all": ([0, 0, 0, 0, 0], 0),
    "none": ([9, 8, 7, 6, 5], 4),
}


def test_S1_the_last_token_that_is_not_padding() -> None:
    ours, theirs = pair(SEQ, pad_token_id=0)
    ids = torch.tensor([row for row, _ in PADDED.values()])
    expected = scored_at(ours, ids, [last for _, last in PADDED.values()])
    torch.testing.assert_close(ours(ids).logits, expected)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_S2_without_a_pad_id_the_last_position__upstream_raises_for_batches() -> None:
    ours, theirs = pair(SEQ)
    assert ours.config.pad_token_id is None
    ids = token_ids(batch=3)
    torch.testing.assert_close(ours(ids).logits, scored_at(ours, ids, [8, 8, 8]))
    with pytest.raises(ValueError, match="batch sizes > 1"):
        theirs(ids)


@pytest.mark.parametrize("pad", [None, 0])
def test_S3_with_embeddings_the_last_position(pad: int | None) -> None:
    ours = build(SEQ, pad_token_id=pad)
    ids = token_ids(batch=3)
    embeds = ours.get_input_embeddings()(ids)
    torch.testing.assert_close(ours(inputs_embeds=embeds).logits, scored_at(ours, ids, [8, 8, 8]))


def test_S4_the_attention_mask_does_not_choose_the_token() -> None:
    ours = build(SEQ, pad_token_id=0)
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    hidden = ours.model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits, ours.score(hidden[:, -1]))


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem", "loss"),
    [
        (1, torch.tensor([0.5, -1.0]), "regression", lambda x, y: F.mse_loss(x.squeeze(), y)),
        (3, torch.tensor([2, 0]), "single_label_classification", F.cross_entropy),
        (
            3,
            torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
            "multi_label_classification",
            F.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_S5_the_loss_follows_labels_and_their_number(num_labels: int, labels: Any, problem: str, loss: Any) -> None:
    ours = build(SEQ, pad_token_id=0, num_labels=num_labels)
    out = ours(token_ids(), labels=labels)
    torch.testing.assert_close(out.loss, loss(out.logits, labels))
    assert ours.config.problem_type == problem


def test_S5_labels_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="labels contains 3; it must be 0 to 2"):
        build(SEQ, num_labels=3)(token_ids(), labels=torch.tensor([3, 0]))


def test_S6_one_row_of_scores_per_sequence() -> None:
    for count in (1, 5):
        out = build(SEQ, num_labels=count)(token_ids())
        assert out.logits.shape == (2, count)
        assert out.past_key_values is not None


# --- question answering -----------------------------------------------------------------------------------------


def test_Q1_scores_per_position_and_the_mean_of_two_losses() -> None:
    ours = build(QA)
    ids = token_ids()
    start, end = torch.tensor([1, 3]), torch.tensor([4, 8])
    out = ours(ids, start_positions=start, end_positions=end)
    assert out.start_logits.shape == out.end_logits.shape == (2, 9)
    expected = (F.cross_entropy(out.start_logits, start) + F.cross_entropy(out.end_logits, end)) / 2
    torch.testing.assert_close(out.loss, expected)
    assert ours(ids, start_positions=start).loss is None
    column = ours(ids, start_positions=start[:, None], end_positions=end[:, None])
    torch.testing.assert_close(column.loss, expected)


@pytest.mark.parametrize("outside", [9, 100, -1, -7])
def test_Q2_positions_outside_do_not_count__upstream_counts_negative_ones(outside: int) -> None:
    ours, theirs = pair(QA)
    ids = token_ids()
    start, end = torch.tensor([1, outside]), torch.tensor([4, outside])
    first = {"start_positions": start[:1], "end_positions": end[:1]}
    got = ours(ids, start_positions=start, end_positions=end).loss
    torch.testing.assert_close(got, ours(ids[:1], **first).loss)
    assert start.tolist() == [1, outside]  # the caller's labels are not written to
    reference = theirs(ids, start_positions=start.clone(), end_positions=end.clone()).loss
    assert torch.allclose(reference, theirs(ids[:1], **first).loss) == (outside > 0)


def test_Q2_no_position_inside_gives_zero() -> None:
    nowhere = torch.tensor([-1, 99])
    model = build(QA)
    loss = model(token_ids(), start_positions=nowhere, end_positions=nowhere).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())  # zero, and not NaN


@pytest.mark.parametrize("name", [QA, TOK])
def test_Q3_T4_tuples_hold_hidden_states(name: str) -> None:
    out = build(name)(token_ids(), return_dict=False, output_hidden_states=True, output_attentions=True)
    assert type(out) is tuple
    hidden, attentions = out[-2:]
    assert [h.shape for h in hidden] == [(2, 9, 32)] * 3
    assert [a.shape for a in attentions] == [(2, 4, 9, 9)] * 2


def test_Q4_the_backbone_is_named_transformer_and_there_is_no_cache() -> None:
    ours = build(QA)
    assert ours.base_model_prefix == "transformer"
    assert ours.base_model is ours.transformer
    assert all(name.startswith(("transformer.", "qa_outputs.")) for name in ours.state_dict())
    out = ours(token_ids(), use_cache=True)
    assert "past_key_values" not in out
    assert list(out.keys()) == ["start_logits", "end_logits"]


def test_Q5_a_causal_checkpoint_gives_its_backbone__upstream_starts_at_random(tmp_path: Path) -> None:
    causal = build()
    causal.save_pretrained(tmp_path)
    ours, info = minitron.NemotronForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    theirs = upstream.NemotronForQuestionAnswering.from_pretrained(tmp_path)
    for name, tensor in causal.model.state_dict().items():
        assert torch.equal(ours.transformer.state_dict()[name], tensor), name
    assert set(info["missing_keys"]) == {"qa_outputs.weight", "qa_outputs.bias"}
    different = [
        n for n, t in causal.model.state_dict().items() if not torch.equal(theirs.transformer.state_dict()[n], t)
    ]
    assert len(different) == len(causal.model.state_dict())


# --- token classification ---------------------------------------------------------------------------------------


def test_T1_scores_per_token() -> None:
    assert build(TOK, num_labels=5)(token_ids()).logits.shape == (2, 9, 5)


def test_T2_one_label_is_regression__upstream_says_zero() -> None:
    ours, theirs = pair(TOK, num_labels=1)
    ids = token_ids()
    labels = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    labels[0, 2] = -100
    out = ours(ids, labels=labels)
    kept = labels != -100
    torch.testing.assert_close(out.loss, F.mse_loss(out.logits.squeeze(-1)[kept], labels[kept]))
    assert theirs(ids, labels=torch.zeros(2, 9, dtype=torch.long)).loss == 0


def test_T2_labels_are_per_token() -> None:
    ours = build(TOK, num_labels=3)
    ids = token_ids()
    labels = (ids % 3).masked_fill(ids % 4 == 0, -100)
    out = ours(ids, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
    with pytest.raises(ValueError, match="labels contains 3; it must be 0 to 2 or -100"):
        ours(ids, labels=torch.full_like(ids, 3))


def test_T3_labels_of_any_strides__upstream_raises() -> None:
    ours, theirs = pair(TOK, num_labels=3)
    ids = token_ids()
    labels = (ids % 3).t().contiguous().t()
    assert not labels.is_contiguous()
    torch.testing.assert_close(ours(ids, labels=labels).loss, ours(ids, labels=labels.contiguous()).loss)
    with pytest.raises(RuntimeError, match="view"):
        theirs(ids, labels=labels)


def test_T5_no_cache_returns() -> None:
    assert list(build(TOK)(token_ids(), use_cache=True).keys()) == ["logits"]


@pytest.mark.parametrize("name", [SEQ, QA, TOK])
def test_heads_take_the_other_arguments_of_the_page(name: str) -> None:
    ours = build(name, pad_token_id=0)
    ids = token_ids()
    past = ours.base_model(ids[:, :4], use_cache=True).past_key_values
    whole = ours(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(9)[None])
    rest = ours(ids[:, 4:], past_key_values=tuple(past[i] for i in range(2)))
    field = "start_logits" if name == QA else "logits"
    got, expected = rest[field], whole[field]
    torch.testing.assert_close(got, expected if name == SEQ else expected[:, 4:], rtol=1e-5, atol=1e-5)
    ours.config.return_dict = False
    assert type(ours(ids)) is tuple
