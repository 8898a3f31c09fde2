"""An untested release of transformers: served if its cached steps are right, refused with both versions if not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from family_samples import RELATIVES, small_config
from model_samples import scramble, tiny, token_ids
from transformers import GenerationMixin

import minitron
from minitron import engine_hook as decoding
from minitron import framework, release_check
from minitron.families import family_of
from minitron.family_models import causal_lm_class
from minitron.framework import CACHE_NAME, TESTED
from minitron.release_check import UntestedReleaseError, cached_step_difference


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model on a release that is not in the list."""
    monkeypatch.setattr(framework.transformers, "__version__", "5.99.1")
    release_check._require.cache_clear()
    yield scramble(minitron.NemotronForCausalLM(tiny())).eval()
    release_check._require.cache_clear()


def greedy(model: Any, engine: str = "auto") -> Any:
    return model.generate(token_ids(batch=1), max_new_tokens=4, do_sample=False, engine=engine)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_installed_release_is_right(implementation: str) -> None:
    difference, reached = cached_step_difference(implementation)
    assert difference < 1e-5
    assert reached


@pytest.mark.parametrize("family", RELATIVES)
def test_the_installed_release_is_right_for_other_families(family: str) -> None:
    difference, reached = cached_step_difference("sdpa", family)
    assert difference < 1e-5
    assert reached


def test_each_family_is_checked_with_a_model_of_its_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that breaks the cache of Qwen3 alone is refused for Qwen3 and serves Nemotron."""
    config = small_config("qwen3")
    other = causal_lm_class(family_of(config))(config).eval()
    attention = type(other.model.layers[0].self_attn)
    forward = attention.forward

    def without_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, CACHE_NAME: None})

    monkeypatch.setattr(attention, "forward", without_cache)
    greedy(model)
    with pytest.raises(UntestedReleaseError, match=r"transformers 5\.99\.1 is installed"):
        greedy(other)


def test_a_release_that_is_right_serves_and_is_checked_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    inner = cached_step_difference
    monkeypatch.setattr(release_check, "cached_step_difference", lambda *x: calls.append(x) or inner(*x))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        greedy(model)
        greedy(model, "off")
    assert calls == [("sdpa", "nemotron")]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tested_release_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framework.transformers, "__version__", TESTED[-1])
    monkeypatch.setattr(release_check, "require", lambda model: pytest.fail("checked"))
    greedy(scramble(minitron.NemotronForCausalLM(tiny())).eval())


def _renamed(change: Any) -> Any:
    inner = GenerationMixin.prepare_inputs_for_generation

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = inner(self, *args, **kwargs)
        change(inputs)
        return inputs

    return prepare


BREAKS = {
    "the cache is lost": lambda inputs: inputs.pop(CACHE_NAME, None),
    "the cache has another name": lambda inputs: inputs.update(kv_state=inputs.pop(CACHE_NAME, None)),
    "the mask has another name": lambda inputs: inputs.update(padding=inputs.pop("attention_mask", None)),
    "positions are wrong": lambda inputs: inputs.update(position_ids=inputs["position_ids"] ** 2),
    "the tokens are not there": lambda inputs: inputs.pop("input_ids"),
}


@pytest.mark.parametrize("engine", ["auto", "off"])
@pytest.mark.parametrize("broken", BREAKS)
def test_a_release_that_is_wrong_is_refused_with_both_versions(
    broken: str, engine: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", _renamed(BREAKS[broken]))
    for _ in range(2):  # not only the first time
        with pytest.raises(UntestedReleaseError, match=r"transformers 5\.99\.1 is installed") as caught:
            greedy(model, engine)
        assert f"tested with transformers {', '.join(TESTED)}" in str(caught.value)


def test_a_forward_that_loses_the_cache_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = minitron.NemotronModel.forward
    monkeypatch.setattr(
        minitron.NemotronModel, "forward", lambda self, *a, past_key_values=None, cache=None, **k: inner(self, *a, **k)
    )
    with pytest.raises(UntestedReleaseError, match=r"does not generate correctly with it"):
        greedy(model)


def test_an_engine_that_is_not_called_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = GenerationMixin._sample
    monkeypatch.delattr(decoding.EngineDecoding, "_sample")
    monkeypatch.setattr(minitron.NemotronForCausalLM, "_sample", sample, raising=False)
    with pytest.warns(UserWarning, match=r"transformers 5.99.1 does not call minitron's engine"):
        greedy(model)
