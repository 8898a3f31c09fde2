"""The same weights give the same numbers as upstream: fp32 bit for bit, bf16 with float64 as the judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import CLASSES, SHAPES, build, pair, rms, token_ids
from torch import Tensor

from minitron.ops.loss import CHUNK_VALUES

SCORES = {"NemotronModel": ["last_hidden_state"], "NemotronForQuestionAnswering": ["start_logits", "end_logits"]}


def labels_for(name: str, ids: Tensor) -> dict[str, Tensor]:
    labels: dict[str, dict[str, Tensor]] = {
        "NemotronModel": {},
        "NemotronForCausalLM": {"labels": ids.masked_fill(ids % 5 == 0, -100)},
        "NemotronForSequenceClassification": {"labels": torch.tensor([0, 1])},
        "NemotronForQuestionAnswering": {
            "start_positions": torch.tensor([1, 3]),
            "end_positions": torch.tensor([4, 3]),
        },
        "NemotronForTokenClassification": {"labels": ids % 2},
    }
    return labels[name]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_fp32_scores_are_upstreams_bit_for_bit(name: str, shape: str, attn: str) -> None:
    ours, theirs = pair(name, attn, pad_token_id=0, **SHAPES[shape])
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    ids[0, 6:] = 0
    with torch.no_grad():
        a, b = ours(ids, attention_mask=mask), theirs(ids, attention_mask=mask)
    for field in SCORES.get(name, ["logits"]):
        assert torch.equal(a[field], b[field]), field


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSES[1:])
def test_fp32_losses_and_gradients_are_upstreams_bit_for_bit(name: str, shape: str, attn: str) -> None:
    ours, theirs = pair(name, attn, pad_token_id=0, **SHAPES[shape])
    ids = token_ids()
    a, b = (model(ids, **labels_for(name, ids)) for model in (ours, theirs))
    assert torch.equal(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, expected[key].grad), key


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_decoding_with_a_cache_is_upstreams_bit_for_bit(shape: str) -> None:
    ours, theirs = pair(**SHAPES[shape])
    ids = token_ids(length=8)
    steps: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for model, out in zip((ours, theirs), steps, strict=True):
            past = None
            for at in (slice(0, 5), slice(5, 6), slice(6, 8)):
                result = model(ids[:, at], past_key_values=past, use_cache=True)
                past = result.past_key_values
                out.append(result.logits)
    for a, b in zip(*steps, strict=True):
        assert torch.equal(a, b)


def bf16_errors(attn: str, seed: int, **shape: Any) -> tuple[float, float]:
    """RMS errors of our and upstream's bf16 logits against ours in float64."""
    ours, theirs = pair("NemotronForCausalLM", attn, seed=seed, **shape)
    ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    exact = build("NemotronForCausalLM", "eager", seed=seed, **shape).double()
    exact.load_state_dict(ours.state_dict())
    # Upstream's `.to(bf16)` rounds its frequencies as well (D15); that is not what is judged here.
    theirs.model.rotary_emb.inv_freq = ours.model.rotary_emb.inv_freq.clone()
    ids = token_ids(batch=4, length=16, seed=seed)
    with torch.no_grad():
        truth = exact(ids).logits
        return rms(ours(ids).logits.double() - truth), rms(theirs(ids).logits.double() - truth)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_error_against_float64_is_not_above_upstreams(shape: str, attn: str) -> None:
    # Rounding is luck in a single draw: the mean over draws is compared.
    errors = torch.tensor([bf16_errors(attn, seed, **SHAPES[shape]) for seed in range(8)])
    ours, theirs = errors.square().mean(0).sqrt().tolist()
    assert ours <= theirs, (ours, theirs)


def test_the_loss_that_never_holds_all_logits_is_as_close_to_float64_as_the_plain_one() -> None:
    vocab = 4096
    length = CHUNK_VALUES // vocab // 2 + 8
    ours, theirs = pair(vocab_size=vocab, num_hidden_layers=1, hidden_size=16, max_position_embeddings=8192, seed=3)
    ids = token_ids(2, length, vocab)
    exact = build(vocab_size=vocab, num_hidden_layers=1, hidden_size=16, max_position_embeddings=8192, seed=3).double()
    grads = []
    for model in (ours, theirs, exact):
        loss = model(ids, labels=ids).loss
        loss.backward()
        grads.append((loss.detach().double(), model.lm_head.weight.grad, model.model.embed_tokens.weight.grad))
    (loss, *ours_grads), (_, *their_grads), (true_loss, *true_grads) = grads
    assert abs(loss - true_loss) <= 1e-6 * true_loss
    for mine, their, true in zip(ours_grads, their_grads, true_grads, strict=True):
        assert rms(mine - true) <= max(1.2 * rms(their - true), 1e-6 * rms(true))
