"""Loading, training, distilling and evaluating models of every family, against the classes of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_samples import KINDS, RELATIVES, kind_config, small_config, small_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from minitron.bench.measure import random_model
from minitron.checkpoint.fingerprint import fingerprint
from minitron.checkpoint.hf import check_checkpoint, open_hf, read_config
from minitron.checkpoint.limits import CheckpointError
from minitron.data.packing import Batch
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.targets import OnlineTeacher, hidden_states
from minitron.evaluate.loglikelihood import Request, loglikelihoods
from minitron.ops.packed_attention import packed_attention_in
from minitron.prune.baselines import magnitude_scores, random_scores, taylor_scores
from minitron.train.adapters import choose_trained
from minitron.train.export import export_model
from minitron.train.inputs import new_model, saved_model
from minitron.train.objective import Objective, next_token_loss
from minitron.train.parallel import prepare
from minitron.train.schedule import TrainConfig
from minitron.world import World


def a_batch(config: Any, length: int = 24) -> Batch:
    """Two rows, of which the second holds two documents."""
    ids = torch.randint(5, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length).repeat(2, 1)
    positions[1, 10:] -= 10
    labels = ids.clone()
    labels[:, 0] = labels[1, 10] = -100
    return Batch(ids, positions, labels, int((labels != -100).sum()))


def saved(folder: Path, config: Any, seed: int = 0) -> Any:
    model = small_model(config, seed)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_upstreams_with_our_generate(tmp_path: Path, kind: str) -> None:
    config = kind_config(kind)
    saved(tmp_path, config)
    ours = saved_model(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = a_batch(config).input_ids
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, stock(ids).logits)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(ours.generate(ids, **settings), stock.generate(ids, **settings))
    assert ours.last_generation is not None


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_loss_and_its_gradients_are_upstreams(tmp_path: Path, kind: str) -> None:
    config = kind_config(kind)
    saved(tmp_path, config)
    batch = a_batch(config)
    found, expected = saved_model(tmp_path).train(), saved_model(tmp_path).train()
    loss, _ = next_token_loss(found, batch)
    loss.backward()
    logits = expected(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for (name, one), two in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", ["mlp", "layers"])
def test_recomputation_changes_no_gradient(tmp_path: Path, kind: str, recompute: str) -> None:
    config = kind_config(kind)
    saved(tmp_path, config)
    batch = a_batch(config)
    gradients = []
    for what in ("none", recompute):
        model = saved_model(tmp_path).train()
        objective = Objective(model, next_token_loss)
        prepare(objective, TrainConfig(steps=1, recompute=what), World())
        objective(batch)[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "qwen2"])
def test_packed_attention_is_upstreams_attention(tmp_path: Path, kind: str) -> None:
    config = kind_config(kind, max_position_embeddings=256)
    saved(tmp_path, config)
    batch = a_batch(config, length=160)
    results = []
    for packed in (False, True):
        model = saved_model(tmp_path).train()
        with packed_attention_in(*([model] if packed else [])):
            loss, _ = next_token_loss(model, batch)
            loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("teacher", ["nemotron", "llama-3", "qwen3-biased", "qwen2-tied"])
@pytest.mark.parametrize("student", ["smollm", "mistral", "qwen3"])
def test_any_family_teaches_any_other(tmp_path: Path, teacher: str, student: str) -> None:
    large, small = (small_model(kind_config(kind), seed) for seed, kind in enumerate((teacher, student)))
    batch = a_batch(small.config)
    options = DistillOptions(hidden="cosine", layer_map=((0, 0),), embeddings=True)
    loss = DistillLoss(OnlineTeacher(large), options, small.config)
    value, numbers = loss(small, batch)
    value.backward()
    with torch.no_grad():
        p, q = (
            model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            for model in (large, small)
        )
    kept = batch.labels[:, 1:] != -100
    expected = (p.exp() * (p - q)).sum(-1)[kept].mean()
    torch.testing.assert_close(numbers["kl"].float(), expected, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_of_a_layer_are_those_after_the_next_norm(tmp_path: Path, kind: str) -> None:
    model = small_model(kind_config(kind))
    batch = a_batch(model.config)
    with torch.no_grad():
        _, (state,) = hidden_states(model, batch, [0])
        whole = model.model(
            batch.input_ids, position_ids=batch.position_ids, use_cache=False, output_hidden_states=True
        ).hidden_states
        expected = model.model.layers[1].input_layernorm(whole[1])
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_prefixes_change_no_answer(tmp_path: Path, kind: str) -> None:
    """Trees of requests with a cache, and the last layer at scored positions only, against plain forward passes."""
    config = kind_config(kind)
    saved(tmp_path, config)
    model = saved_model(tmp_path).eval()
    draw = torch.Generator().manual_seed(5)
    stem = torch.randint(5, 96, (24,), generator=draw).tolist()
    requests = [
        Request(stem + torch.randint(5, 96, (n,), generator=draw).tolist(), [7 + n, 9]) for n in (1, 2, 2, 5, 9)
    ]
    requests += [Request([5, 6, 7], [8]), Request([11, 12], [13, 14, 15])]
    answers = dict(pair for found in loglikelihoods(model, requests, row_tokens=40) for pair in found)
    for index, (context, continuation) in enumerate(requests):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(continuation) - 1)
        expected = sum(float(logits[at, token]) for at, token in zip(places, continuation, strict=True))
        assert answers[index].log_prob == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_loads_in_transformers_and_is_the_same_model(tmp_path: Path, kind: str) -> None:
    config = kind_config(kind)
    saved(tmp_path / "a", config)
    export_model(saved_model(tmp_path / "a"), tmp_path / "b")
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"]
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert stock.config.architectures == [type(stock).__name__]


@pytest.mark.parametrize("family", RELATIVES)
def test_new_models_baselines_and_random_weights(tmp_path: Path, family: str) -> None:
    config = small_config(family)
    model = new_model(config, seed=3)
    assert torch.equal(model.lm_head.weight, new_model(config, seed=3).lm_head.weight)
    model.save_pretrained(tmp_path)
    batch = a_batch(config)
    for scores in (random_scores(config, 1), magnitude_scores(tmp_path), taylor_scores(tmp_path, batch)):
        scores.check_fits(config)
    state = dict(model.named_parameters())
    first = [state[f"model.layers.0.mlp.{name}.weight"].double().square() for name in ("gate_proj", "up_proj")]
    down = state["model.layers.0.mlp.down_proj.weight"].double().square()
    expected = (sum(x.sum(1) for x in first) + down.sum(0)).sqrt()
    torch.testing.assert_close(magnitude_scores(tmp_path).neurons[0], expected)
    assert torch.isfinite(random_model(config, dtype=torch.float32)(batch.input_ids).logits).all()
    trained = choose_trained(model, "norms")
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == {n for n in state if "norm" in n}


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_quantized_checkpoints_are_refused_with_what_to_do(tmp_path: Path, method: str) -> None:
    config = small_config("llama")
    saved(tmp_path, config)
    config.quantization_config = {"quant_method": method, "bits": 4}
    config.save_pretrained(tmp_path)
    for work in (check_checkpoint, open_hf):
        with pytest.raises(CheckpointError, match=f"quantized by {method}.*Use the checkpoint that it was made from"):
            work(tmp_path)


def test_a_configuration_says_its_rotary_base_in_both_spellings(tmp_path: Path) -> None:
    """Readers that do not know `rope_parameters` would compute with another base."""
    saved(tmp_path / "a", kind_config("llama-3"))
    export_model(saved_model(tmp_path / "a"), tmp_path / "b")
    config = read_config(tmp_path / "b")
    text = (tmp_path / "b" / "config.json").read_text()
    assert '"rope_theta": 1000.0' in text
    assert '"rope_scaling"' in text
    assert config.rope_parameters == read_config(tmp_path / "a").rope_parameters
