"""Adapters over shared weights, against peft's own unmerged model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("starlette", reason="pip install 'minitron[serve]'")
pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")

from peft import LoraConfig, PeftModel, get_peft_model
from served_sequences import Wanted, alone

from minitron.assets import bundled_model
from minitron.checkpoint.limits import CheckpointError
from minitron.loading import load
from minitron.sampling_parameters import SamplingParameters
from minitron.serve.served import load_models
from minitron.serve.settings import ServeSettings
from minitron.serve.token_choice import TokenRules

BASE = str(bundled_model("half"))
PROMPT = [5, 700, 81, 2043, 19, 640]


def save_adapter(folder: Path, seed: int, **settings: object) -> str:
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj", "o_proj"], **settings}
    wrapped = get_peft_model(load(BASE, dtype="fp32").model, LoraConfig(init_lora_weights=False, **config))
    wrapped.peft_config["default"].base_model_name_or_path = BASE
    wrapped.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    one = save_adapter(folder / "one", 1)
    two = save_adapter(folder / "two", 2, use_rslora=True, rank_pattern={"o_proj": 2})
    given = (f"base={BASE}", f"one={one}", f"two={two}")
    return load_models(
        ServeSettings(given, adapters="shared", dtype="fp32", slots=2, max_context=64), lambda _: None
    ), folder


def test_the_tokens_are_those_of_pefts_unmerged_model(models) -> None:
    (base, *adapted), folder = models
    answers = []
    for served in adapted:
        oracle = PeftModel.from_pretrained(load(BASE, dtype="fp32").model, folder / served.name).eval()
        with torch.inference_mode():
            theirs = oracle(input_ids=torch.tensor([PROMPT])).logits[0]
            ours = served.model(input_ids=torch.tensor([PROMPT])).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        expected = oracle.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        answers.append(greedy(served))
        assert answers[-1] == expected[0, len(PROMPT) :].tolist()
    plain = greedy(base)
    assert len({tuple(answer) for answer in (*answers, plain)}) == 3


def greedy(served) -> list[int]:
    wanted = Wanted(tuple(PROMPT), TokenRules(SamplingParameters(temperature=0.0)), 12, frozenset())
    engine, vocabulary = served.scheduler.engine, served.vocabulary
    if engine.name == "cpu":
        return alone(engine, wanted)[0]
    sequence = wanted.sequence(vocabulary)
    served.scheduler.submit(sequence)
    while not sequence.ended:
        served.scheduler.step()
    return sequence.tokens


def test_no_weight_of_the_base_is_copied_and_the_engine_says_why(models) -> None:
    (base, *adapted), _ = models
    weights = {parameter.data_ptr() for parameter in base.model.parameters()}
    for served in adapted:
        assert {parameter.data_ptr() for parameter in served.model.parameters()} == weights
        assert served.engine_name == "transformers"
        assert "LoRA adapter over the shared weights" in served.reason
    assert base.engine_name != "transformers"
    assert not any("Adapted" in type(module).__name__ for module in base.model.modules())


def test_what_is_more_than_low_rank_must_be_merged(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "whole", 3, modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is trained beside low-rank matrices"):
        load_models(ServeSettings((adapter,), adapters="shared", dtype="fp32", slots=1, max_context=32), lambda _: None)
