"""`generate` in all its modes, and continuous batching."""

from __future__ import annotations

import copy
import importlib.util
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_samples import build, pair, rms, token_ids
from transformers import DynamicCache, QuantizedCache, StaticCache, TextIteratorStreamer

from minitron import NemotronCache


@pytest.fixture
def model() -> Any:
    model = build(pad_token_id=0)
    model.generation_config.eos_token_id = None
    return model


def greedy(model: Any, ids: torch.Tensor, **how: Any) -> Any:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **how)


def test_greedy_is_upstreams() -> None:
    ours, theirs = pair(pad_token_id=0)
    assert greedy(ours, token_ids()).tolist() == greedy(theirs, token_ids()).tolist()


def test_sampling_is_upstreams_for_the_same_seed() -> None:
    drawn = []
    for model in pair(pad_token_id=0):
        torch.manual_seed(0)
        how = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "num_return_sequences": 3}
        drawn.append(model.generate(token_ids(), max_new_tokens=8, **how).tolist())
    assert drawn[0] == drawn[1]
    assert len({tuple(row) for row in drawn[0]}) > 2


@pytest.mark.parametrize("sample", [False, True])
def test_beam_search_is_upstreams(sample: bool) -> None:
    found = []
    for model in pair(pad_token_id=0):
        torch.manual_seed(0)
        how = {"num_beams": 3, "num_return_sequences": 2, "do_sample": sample, "length_penalty": 2.0}
        found.append(model.generate(token_ids(), max_new_tokens=6, **how).tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("assistant", ["itself", "another", "smaller"])
def test_assisted_is_greedy(model: Any, assistant: str) -> None:
    helper = {
        "itself": lambda: copy.deepcopy(model),
        "another": lambda: build(pad_token_id=0, seed=1),
        "smaller": lambda: build(pad_token_id=0, num_hidden_layers=1),
    }[assistant]()
    ids = token_ids(batch=1)
    assert greedy(model, ids, assistant_model=helper).tolist() == greedy(model, ids).tolist()


def test_prompt_lookup_is_greedy(model: Any) -> None:
    ids = token_ids(batch=1, length=4).repeat(1, 3)
    assert greedy(model, ids, prompt_lookup_num_tokens=3).tolist() == greedy(model, ids).tolist()


def test_static_cache_is_dynamic(model: Any) -> None:
    ids = token_ids()
    expected = greedy(model, ids).tolist()
    out = greedy(model, ids, cache_implementation="static", return_dict_in_generate=True)
    assert isinstance(out.past_key_values, StaticCache)
    assert out.sequences.tolist() == expected
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert greedy(model, ids, past_key_values=cache).tolist() == expected
    assert not [name for name in model.state_dict() if "cache" in name]


@pytest.mark.parametrize(("backend", "needs"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_quantized_cache(backend: str, needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        found = importlib.util.find_spec(needs) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        pytest.skip(f"{needs} is not installed")
    if backend == "quanto":  # its own kernel is C++ that would be compiled here first
        from optimum.quanto.library.extensions.extension import get_extension

        def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
            return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

        monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=unpack))
    model = build(head_dim=64, pad_token_id=0)
    model.generation_config.eos_token_id = None
    settings = {"backend": backend, "nbits": 4, "q_group_size": 64, "residual_length": 4}
    if backend == "hqq":
        settings |= {"axis_key": 1, "axis_value": 1}
    ids = token_ids()
    asked = {"return_dict_in_generate": True, "output_logits": True}
    out = greedy(model, ids, cache_implementation="quantized", cache_config=settings, **asked)
    assert isinstance(out.past_key_values, QuantizedCache)
    assert out.sequences.shape == (2, 17)
    # The first step sees the keys as they are, the next one sees them in four bits.
    exact = greedy(model, ids, **asked)
    torch.testing.assert_close(out.logits[0], exact.logits[0])
    error = rms(out.logits[1] - exact.logits[1]) / rms(exact.logits[1])
    assert 0 < error < 0.1, error


def test_legacy_tuple_goes_through_generate__upstream_raises(model: Any) -> None:
    ids = token_ids()
    past = model(ids[:, :6]).past_key_values
    as_tuple = tuple(past[layer] for layer in range(2))
    expected = greedy(model, ids).tolist()
    out = greedy(model, ids, past_key_values=as_tuple, return_dict_in_generate=True)
    assert out.sequences.tolist() == expected
    assert type(out.past_key_values) is tuple
    assert out.past_key_values[0][0].shape == (2, 2, 16, 8)
    assert as_tuple[0][0].shape == (2, 2, 6, 8)
    # and on from there, with only the new part to be computed
    more = greedy(model, out.sequences, past_key_values=out.past_key_values)
    assert more.tolist() == greedy(model, out.sequences).tolist()
    with pytest.raises(ValueError, match="tuple"):
        greedy(pair()[1], ids, past_key_values=as_tuple)


def test_going_on_from_a_cache(model: Any) -> None:
    ids = token_ids()
    first = greedy(model, ids, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, DynamicCache)
    more = greedy(model, first.sequences, past_key_values=first.past_key_values)
    assert more.tolist() == greedy(model, first.sequences).tolist()
    own = NemotronCache(config=model.config)
    assert greedy(model, ids, past_key_values=own, return_dict_in_generate=True).past_key_values is own


def test_left_padded_batch_is_each_prompt_alone(model: Any) -> None:
    short, long = token_ids(1, 5, seed=1), token_ids(1, 9, seed=2)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), short), dim=1)
    ids = torch.cat((padded, long))
    mask = (ids != 0).long()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert together[0, 4:].tolist() == greedy(model, short)[0].tolist()
    assert together[1].tolist() == greedy(model, long)[0].tolist()


def test_from_embeddings(model: Any) -> None:
    ids = token_ids()
    embeds = model.get_input_embeddings()(ids)
    got = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    ).tolist()
    assert got == greedy(model, ids)[:, 9:].tolist()


def test_everything_can_be_returned(model: Any) -> None:
    asked = {"output_scores": True, "output_logits": True, "output_attentions": True, "output_hidden_states": True}
    out = greedy(model, token_ids(), return_dict_in_generate=True, **asked)
    assert len(out.scores) == len(out.logits) == len(out.attentions) == len(out.hidden_states) == 8
    assert [a.shape for a in out.attentions[0]] == [(2, 4, 9, 9)] * 2
    assert [a.shape for a in out.attentions[3]] == [(2, 4, 1, 12)] * 2
    assert [h.shape for h in out.hidden_states[3]] == [(2, 1, 32)] * 3


def test_prompt_is_processed_once_and_only_the_last_logits_are_formed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(tuple(x.shape)) or forward(x))
    greedy(model, token_ids())
    assert seen == [(2, 1, 32)] * 8


def test_streaming(model: Any) -> None:
    class Numbers:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True)  # type: ignore[arg-type]
    ids = token_ids(batch=1)
    thread = threading.Thread(target=greedy, args=(model, ids), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert [int(word) for word in text.split()] == greedy(model, ids)[0, 9:].tolist()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_continuous_batching_is_generate__upstream_fails(attn: str) -> None:
    from transformers.generation import ContinuousBatchingConfig

    ours, theirs = pair(attn=attn, pad_token_id=0, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    prompts = [token_ids(1, n, seed=n)[0].tolist() for n in (3, 7, 12)]
    config = copy.deepcopy(ours.generation_config)
    config.max_new_tokens, config.do_sample, config.eos_token_id = 6, False, -1
    settings = ContinuousBatchingConfig(num_blocks=16, page_size=8, max_batch_tokens=32)
    how = {"generation_config": config, "continuous_batching_config": settings, "warmup": False}
    expected = [greedy(ours, torch.tensor([p]), eos_token_id=-1)[0, len(p) : len(p) + 6].tolist() for p in prompts]
    assert [out.generated_tokens for _, out in sorted(ours.generate_batch(prompts, **how).items())] == expected
    # Upstream loses the cache on the way to attention.
    assert all(out.error for out in theirs.generate_batch(prompts, **how).values())
