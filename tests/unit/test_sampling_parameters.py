"""Settings against what a checkpoint recommends: what is said is what is drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from text_checkpoint import make_text_checkpoint
from transformers import GenerationConfig

import minitron
from minitron.loading import Loaded
from minitron.sampling_parameters import _OTHER_MODES
from minitron.text_stream import SamplingParameters, TextStream

PROMPT = [7, 12, 20]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return minitron.load(make_text_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"), dtype="fp32")


def drawn(loaded: Loaded, settings: SamplingParameters, **config: Any) -> list[int]:
    """New tokens of a stream, for a checkpoint with this generation config."""
    loaded.model.generation_config = GenerationConfig(eos_token_id=3, **config)
    stream = TextStream(loaded.model, loaded.tokenizer, PROMPT, settings)
    list(stream)
    return stream._output[0, len(PROMPT) :].tolist()


def ranks(loaded: Loaded, seeds: range, settings: dict[str, Any], **config: Any) -> list[int]:
    """Of first tokens: how many tokens are more probable."""
    logits = loaded.model(torch.tensor([PROMPT])).logits[0, -1]
    order = logits.argsort(descending=True).argsort()
    tokens = [drawn(loaded, SamplingParameters(1, seed=seed, **settings), **config)[0] for seed in seeds]
    return [int(order[token]) for token in tokens]


def test_no_top_k_means_none(loaded: Loaded) -> None:
    found = ranks(loaded, range(60), {"temperature": 3.0, "top_k": 0})
    expected = []
    for seed in range(60):  # transformers, told so
        torch.manual_seed(seed)
        logits = loaded.model(torch.tensor([PROMPT])).logits[0, -1]
        order = logits.argsort(descending=True).argsort()
        out = loaded.model.generate(
            torch.tensor([PROMPT]), do_sample=True, temperature=3.0, top_k=0, max_new_tokens=1, engine="off"
        )
        expected.append(int(order[out[0, -1]]))
    assert found == expected
    assert max(found) > 50


@pytest.mark.parametrize(
    "config",
    [
        {"top_k": 2},
        {"min_p": 0.9},
        {"top_p": 0.01},
        {"typical_p": 0.01},
        {"epsilon_cutoff": 0.3},
        {"eta_cutoff": 0.3},
        {"top_k": 3, "min_p": 0.5, "temperature": 0.01, "do_sample": True},
    ],
    ids=str,
)
def test_what_a_checkpoint_recommends_can_be_switched_off(loaded: Loaded, config: dict[str, Any]) -> None:
    plain = ranks(loaded, range(12), {"temperature": 2.0})
    assert ranks(loaded, range(12), {"temperature": 2.0}, **config) == plain
    given = {"temperature": 2.0, "top_k": 0, "min_p": 0.0, "top_p": 1.0, "checkpoint": False}
    settings = SamplingParameters.for_model(GenerationConfig(**config), given, {})
    assert settings == SamplingParameters(temperature=2.0, checkpoint=False)


@pytest.mark.parametrize(("name", "value"), [("repetition_penalty", 50.0), ("no_repeat_ngram_size", 1)])
def test_penalties_of_a_checkpoint_can_be_switched_off(loaded: Loaded, name: str, value: Any) -> None:
    settings = SamplingParameters(20, temperature=0.0)
    assert drawn(loaded, settings, **{name: value}) == drawn(loaded, settings)
    assert drawn(loaded, SamplingParameters(20, temperature=0.0, **{name: value})) != drawn(loaded, settings)


def test_what_is_recommended_holds_where_nothing_is_given() -> None:
    config = GenerationConfig(do_sample=True, top_k=5, min_p=0.3, temperature=0.6, typical_p=0.9, max_new_tokens=9)
    found = SamplingParameters.for_model(config, {"top_k": None, "min_p": 0.0}, {"temperature": 0.8, "top_p": 0.95})
    assert found == SamplingParameters(9, 0.6, 0.95, 5, 0.0, typical_p=0.9)
    greedy = GenerationConfig(do_sample=False)
    assert SamplingParameters.for_model(greedy, {"temperature": None}, {"temperature": 0.8}).temperature == 0
    assert SamplingParameters.for_model(greedy, {"top_k": 4}, {"temperature": 0.8}).temperature == 0.8
    assert SamplingParameters.for_model(GenerationConfig(), {}, {"temperature": 0.8}).temperature == 0.8
    assert SamplingParameters(temperature=0, top_k=4, top_p=0.3).effective == SamplingParameters(temperature=0)


def test_an_impossible_recommendation_is_told_as_the_checkpoints() -> None:
    config = GenerationConfig()
    config.top_p = 1.5
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p is 1\.5"):
        SamplingParameters.for_model(config, {}, {})


@pytest.mark.parametrize(
    "config",
    [
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
        {"num_return_sequences": 2, "do_sample": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beam_groups": 2, "num_beams": 2, "diversity_penalty": 0.5},
        {"prompt_lookup_num_tokens": 3},
        {"force_words_ids": [[5]], "num_beams": 2},
        {"cache_implementation": "static"},
        {"token_healing": True},
        {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True, "use_cache": False},
    ],
    ids=str,
)
def test_another_search_that_a_checkpoint_asks_for_is_ignored_with_a_note(loaded: Loaded, config: Any) -> None:
    for settings in (SamplingParameters(6, temperature=0.0), SamplingParameters(6, temperature=1.5, seed=3)):
        plain = drawn(loaded, settings)
        loaded.model.generation_config = GenerationConfig.from_dict({"eos_token_id": 3, **config})
        stream = TextStream(loaded.model, loaded.tokenizer, PROMPT, settings)
        list(stream)
        assert stream._output[0, len(PROMPT) :].tolist() == plain
        told = "".join(stream.notes)
        assert all(name in told for name in config if name in _OTHER_MODES)
        assert bool(told) == ("return_dict_in_generate" not in config)
        assert loaded.model.last_generation.engine == "cpu"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "config",
    [
        {"suppress_tokens": list(range(0, 60, 2))},
        {"begin_suppress_tokens": list(range(40))},
        {"bad_words_ids": [[t] for t in range(30)]},
        {"min_new_tokens": 18, "eos_token_id": list(range(3, 50))},
        {"forced_eos_token_id": 9},
        {"sequence_bias": [[[11], 30.0]]},
    ],
    ids=str,
)
def test_other_rules_of_a_checkpoint_hold_as_in_transformers(loaded: Loaded, config: dict[str, Any]) -> None:
    full = {"eos_token_id": 3, **config}
    loaded.model.generation_config = GenerationConfig(**full)
    stream = TextStream(loaded.model, loaded.tokenizer, PROMPT, SamplingParameters(20, temperature=0.0))
    list(stream)
    ids = torch.tensor([PROMPT])
    expected = loaded.model.generate(ids, max_new_tokens=20, do_sample=False, engine="off", pad_token_id=0)
    assert torch.equal(stream._output, expected)
    assert stream.from_checkpoint == {name: x for name, x in config.items() if name != "eos_token_id"}
    off = TextStream(loaded.model, loaded.tokenizer, PROMPT, SamplingParameters(20, temperature=0.0, checkpoint=False))
    list(off)
    assert off.from_checkpoint == {}
    ends = GenerationConfig(eos_token_id=full["eos_token_id"])
    loaded.model.generation_config = ends
    assert torch.equal(off._output, loaded.model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("stop", ["q", ["q", "zz"]])
def test_stop_strings_of_a_checkpoint_end_the_text(loaded: Loaded, stop: Any) -> None:
    # Random weights: the letter that comes first in the text without stops.
    loaded.model.generation_config = GenerationConfig(eos_token_id=3)
    texts = {}
    for seed in range(20):
        texts[seed] = "".join(TextStream(loaded.model, loaded.tokenizer, PROMPT, SamplingParameters(20, seed=seed)))
    seed, whole = next((n, t) for n, t in texts.items() if any(c.isalpha() for c in t[: len(t) // 2]))
    letter = next(c for c in whole if c.isalpha())
    theirs = letter if isinstance(stop, str) else [letter, "zz"]
    loaded.model.generation_config = GenerationConfig(eos_token_id=3, stop_strings=theirs)
    stream = TextStream(loaded.model, loaded.tokenizer, PROMPT, SamplingParameters(20, seed=seed))
    short = "".join(stream)
    assert letter in short
    assert len(short) < len(whole)
    assert stream.from_checkpoint == {"stop_strings": theirs}


NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "max_new_tokens",
    "no_repeat_ngram_size",
)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, "1", True, None])
def test_what_is_no_number_in_the_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; it must be"):
        SamplingParameters(**{name: value})


@pytest.mark.parametrize("name", ["top_k", "max_new_tokens", "no_repeat_ngram_size", "seed"])
def test_counts_are_integers(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 2.5; it must be an integer"):
        SamplingParameters(**{name: 2.5})


@pytest.mark.parametrize("seed", [2**64, 10**40, -(2**63) - 1])
def test_seeds_that_torch_does_not_take_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}; it must be from -9223372036854775808 to"):
        SamplingParameters(seed=seed)


def test_settings_at_the_ends_of_their_ranges_are_served(loaded: Loaded) -> None:
    for settings in (
        {"seed": 2**64 - 1, "temperature": 2, "top_k": 10**30, "max_new_tokens": 10**30},
        {"seed": -(2**63), "temperature": 1e-300, "top_p": 1e-300, "min_p": 1},
        {"temperature": 1e300, "repetition_penalty": 1000, "typical_p": 1e-9},
    ):
        assert len(drawn(loaded, SamplingParameters(**settings))) > 0


def test_the_command_line_reports_what_holds(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from minitron.cli import app

    folder = make_text_checkpoint(tmp_path / "tiny")
    recommended = {
        "eos_token_id": 3,
        "do_sample": True,
        "top_k": 5,
        "min_p": 0.3,
        "num_beams": 2,
        "suppress_tokens": [9],
    }
    (folder / "generation_config.json").write_text(json.dumps(recommended))

    def run(*options: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["generate", str(folder), "-p", "the cat", "-n", "4", "--json", *options])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    own = run()
    assert own["settings"]["top_k"] == 5
    assert own["settings"]["min_p"] == 0.3
    assert own["from_checkpoint"] == {"suppress_tokens": [9]}
    assert "num_beams 2" in own["notes"][0]
    off = run("--top-k", "0", "--min-p", "0")
    assert (off["settings"]["top_k"], off["settings"]["min_p"]) == (0, 0)
    plain = run("--no-recommended")
    assert (plain["settings"]["top_k"], plain["from_checkpoint"], plain["notes"]) == (0, {}, [])
    for option, value in (
        ("--temperature", "nan"),
        ("--top-p", "inf"),
        ("--min-p", "-1"),
        ("-n", "0"),
        ("--seed", "9" * 30),
    ):
        done = CliRunner().invoke(app, ["generate", str(folder), "-p", "the cat", option, value])
        assert done.exit_code == 2
        assert "must be" in done.output
