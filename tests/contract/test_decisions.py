"""Decisions D1 to D18 of docs/contract.md, where the page, transformers 4.46.2 and 5.23.0 disagree.

What a row of the page already tests is tested there, and here only what goes beyond it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import CLASSES, UpstreamConfig, build, pair, rms, tiny, token_ids, upstream, upstream_tiny
from transformers import DynamicCache, PreTrainedTokenizerFast

import minitron
from minitron import NemotronConfig
from minitron.assets import chat_template
from minitron.ops import head_loss


def test_D1_the_default_model_can_be_built() -> None:
    with torch.device("meta"):
        model = minitron.NemotronModel(NemotronConfig())
    assert model.config.num_key_value_heads == model.config.num_attention_heads == 48
    assert sum(p.numel() for p in model.parameters()) == NemotronConfig().num_parameters() - 256000 * 6144


SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope_percent": ({"rope_percent": 0.25}, {"partial_rotary_factor": 0.25}),
    "rope_percentage": ({"rope_percentage": 0.25}, {"partial_rotary_factor": 0.25}),
    "kv_channels": ({"kv_channels": 16}, {"head_dim": 16}),
    "layer_norm_eps": ({"layer_norm_eps": 1e-6}, {"norm_eps": 1e-6}),
    "torch_dtype": ({"torch_dtype": "bfloat16"}, {"dtype": torch.bfloat16}),
    "rope_scaling": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5, "partial_rotary_factor": 0.25},
        {"rope_theta": 5e5, "partial_rotary_factor": 0.25},
    ),
    "rope_parameters": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25}},
        {"rope_theta": 5e5, "partial_rotary_factor": 0.25},
    ),
    "rope_parameters and theta": (
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_D2_every_spelling_in_checkpoints_is_read(spelling: str, tmp_path: Path) -> None:
    given, expected = SPELLINGS[spelling]
    written = {k: v for k, v in tiny().to_dict().items() if k not in ("rope_parameters", "head_dim", "norm_eps")}
    written = {k: v for k, v in written.items() if k not in ("partial_rotary_factor", "rope_theta", "dtype")}
    (tmp_path / "config.json").write_text(json.dumps({**written, **given}))
    config = NemotronConfig.from_pretrained(tmp_path)
    for name, value in expected.items():
        assert getattr(config, name) == value, name
    assert config.rope_parameters["rope_theta"] == config.rope_theta
    assert config.rope_parameters["partial_rotary_factor"] == config.partial_rotary_factor


@pytest.mark.parametrize("spelling", ["rope_percent", "rope_percentage", "kv_channels"])
def test_D2_upstream_ignores_some_spellings(spelling: str) -> None:
    given, expected = SPELLINGS[spelling]
    theirs = upstream_tiny(**given)
    (name, value), *_ = expected.items()
    found = theirs.rope_parameters[name] if name == "partial_rotary_factor" else getattr(theirs, name)
    assert found != value


def test_D2_four_views_of_one_state_always_agree() -> None:
    config = tiny()
    config.rope_theta = 7e4
    assert config.rope_parameters["rope_theta"] == 7e4
    config.partial_rotary_factor = 0.25
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0}  # upstream: KeyError in the model
    assert (config.rope_theta, config.partial_rotary_factor) == (7e4, 0.25)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e3}
    assert (config.rope_theta, config.partial_rotary_factor) == (1e3, 0.25)
    minitron.NemotronModel(config)
    theirs = upstream_tiny()
    theirs.rope_parameters = {"rope_type": "default", "rope_theta": 1e3}
    with pytest.raises(KeyError):
        upstream.NemotronModel(theirs)


def test_D2_saved_json_is_read_alike_by_old_and_new_readers(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}
    tiny(rope_parameters={**rope, "partial_rotary_factor": 0.25}, dtype="bfloat16").save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["rope_theta"] == 5e5  # transformers 4, mlx-lm, llama.cpp
    assert data["partial_rotary_factor"] == 0.25
    assert data["rope_scaling"]["type"] == data["rope_scaling"]["rope_type"] == "yarn"
    assert data["torch_dtype"] == "bfloat16"
    theirs = UpstreamConfig.from_pretrained(tmp_path)  # transformers 5
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.25
    assert theirs.rope_parameters["rope_type"] == "yarn"
    again = NemotronConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == tiny(rope_parameters={**rope, "partial_rotary_factor": 0.25}).rope_parameters


def test_D2_two_spellings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_channels is 16 but head_dim is 8; they are two names of one field"):
        tiny(head_dim=8, kv_channels=16)


def test_D3_one_cache_serves_both_readings_of_the_page() -> None:
    model = build("NemotronModel")
    ids = token_ids(length=8)
    past = model(ids[:, :5]).past_key_values
    by_index = tuple((past[i][0].clone(), past[i][1].clone()) for i in range(len(past)))
    a = model(ids[:, 5:], past_key_values=by_index)
    b = model(ids[:, 5:], past_key_values=past)
    assert type(a.past_key_values) is tuple
    assert b.past_key_values is past
    assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    assert torch.equal(a.past_key_values[1][0], past[1][0])


def test_D4_both_names_of_keep_last_with_and_without_labels() -> None:
    model, ids = build(), token_ids()
    for name in ("num_logits_to_keep", "logits_to_keep"):
        assert model(ids, **{name: 2}).logits.shape == (2, 2, 96)
        out = model(ids, labels=ids, **{name: 2})
        assert out.logits.shape == (2, 2, 96)
        assert torch.equal(out.loss, model(ids, labels=ids).loss)


def test_D5_the_loss_alone_never_forms_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.heads.CHUNK_VALUES", 96)
    monkeypatch.setattr(head_loss, "_CHUNK_BYTES", 96 * 4 * 4)
    largest, inside = 0, []
    # The loss is one operator; what it forms inside is seen where it takes the logits of a chunk.
    look = head_loss._Loss.__call__
    monkeypatch.setattr(
        head_loss._Loss, "__call__", lambda self, s, *rest: (inside.append(s.numel()), look(self, s, *rest))[1]
    )

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == 96:
                largest = max(largest, out.numel())
            return out

    model, ids = build(), token_ids()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with Watch():
        out = model(ids, labels=ids)
    assert largest <= 96 * 4
    assert max(inside) == 96 * 4
    assert sum(inside) == 96 * 2 * 8  # all that are scored, in chunks
    assert out.logits.shape == (2, 9, 96)  # formed now, because they are read


@pytest.mark.parametrize("pad", [None, 0])
def test_D6_sequences_of_any_batch_size_with_and_without_a_pad_id(pad: int | None) -> None:
    model = build("NemotronForSequenceClassification", pad_token_id=pad)
    ids = token_ids(batch=3)
    together = model(ids).logits
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], model(ids[row : row + 1]).logits)


def test_D7_question_answering_reads_sharded_causal_checkpoints_and_writes_its_own_names(tmp_path: Path) -> None:
    causal = build()
    causal.save_pretrained(tmp_path / "causal", max_shard_size="20KB")
    model, info = minitron.NemotronForQuestionAnswering.from_pretrained(tmp_path / "causal", output_loading_info=True)
    assert set(info["missing_keys"]) == {"qa_outputs.weight", "qa_outputs.bias"}
    for name, tensor in causal.model.state_dict().items():
        assert torch.equal(model.transformer.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path / "qa")
    again, info = upstream.NemotronForQuestionAnswering.from_pretrained(tmp_path / "qa", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(again.transformer.norm.weight, causal.model.norm.weight)


def test_D8_token_labels_of_any_strides_and_regression() -> None:
    ids = token_ids()
    model = build("NemotronForTokenClassification", num_labels=1)
    targets = torch.randn(9, 2).t()
    assert not targets.is_contiguous()
    out = model(ids, labels=targets)
    torch.testing.assert_close(out.loss, (out.logits.squeeze(-1) - targets).square().mean())


@pytest.mark.parametrize("name", CLASSES)
def test_D9_every_class_returns_attentions_with_sdpa(name: str) -> None:
    model = build(name, "sdpa", pad_token_id=0)
    assert [a.shape for a in model(token_ids(), output_attentions=True).attentions] == [(2, 4, 9, 9)] * 2


def test_D10_the_gain_is_formed_in_fp32__upstream_rounds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(256, generator=generator) * 0.05).bfloat16()
    x = torch.randn(64, 256, generator=generator).bfloat16()
    ours = minitron.model.NemotronLayerNorm1P(256).bfloat16()
    theirs = upstream.NemotronLayerNorm1P(256).bfloat16()
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(weight)
            norm.bias.zero_()
        wide = x.double()
        exact = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        exact = exact * (1 + weight.double())
        a, b = rms(ours(x) - exact), rms(theirs(x) - exact)
    assert a < 0.95 * b


def test_D10_new_norms_have_gain_one__upstreams_two() -> None:
    x = token_ids(batch=4).float()
    expected = torch.nn.functional.layer_norm(x, (9,))
    torch.testing.assert_close(minitron.model.NemotronLayerNorm1P(9)(x), expected)
    for model, gain in ((minitron.NemotronModel(tiny()), 1.0), (upstream.NemotronModel(upstream_tiny()), 2.0)):
        for name, parameter in model.named_parameters():
            if "norm.weight" in name:
                assert torch.equal(1 + parameter, torch.full((32,), gain)), name


def test_D11_weights_are_drawn_within_three_deviations_biases_and_padding_are_zero() -> None:
    model = minitron.NemotronForCausalLM(tiny(pad_token_id=0, attention_bias=True, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            assert parameter.abs().max() == 0, name
        else:
            assert 0.1 < parameter.abs().max() <= 0.15, name
    assert model.model.embed_tokens.weight[0].abs().max() == 0


def test_D12_a_function_as_activation_survives_copying_and_refuses_to_be_guessed(tmp_path: Path) -> None:
    config = tiny(hidden_act=torch.tanh)
    assert isinstance(minitron.NemotronModel(config).layers[0].mlp(torch.ones(1, 32)), torch.Tensor)
    build(hidden_act=torch.tanh).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hidden_act is '.*tanh'.*needs hidden_act=<that function>"):
        minitron.NemotronForCausalLM.from_pretrained(tmp_path)
    again = minitron.NemotronForCausalLM.from_pretrained(tmp_path, hidden_act=torch.tanh)
    assert torch.equal(again(token_ids()).logits, build(hidden_act=torch.tanh)(token_ids()).logits)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("configured", [True, False])
def test_D13_return_dict(name: str, asked: bool | None, configured: bool) -> None:
    model = build(name, pad_token_id=0)
    model.config.return_dict = configured
    out = model(token_ids(), return_dict=asked)
    assert (type(out) is tuple) == (not (configured if asked is None else asked))


def test_D14_arguments_reach_the_attention_function_through_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def noting(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("cu_seq_lens_q"))
        return query.transpose(1, 2), None

    monkeypatch.setitem(minitron.model.ALL_ATTENTION_FUNCTIONS, "sdpa", noting)
    lengths = torch.tensor([0, 4, 9])
    for name in CLASSES:
        seen.clear()
        build(name, "sdpa", pad_token_id=0)(token_ids(), cu_seq_lens_q=lengths)
        assert [value is lengths for value in seen] == [True, True], name


def test_D15_frequencies_stay_fp32__upstreams_follow_the_model() -> None:
    ours, theirs = (model.to(torch.bfloat16) for model in pair())
    assert ours.model.rotary_emb.inv_freq.dtype == torch.float32
    assert theirs.model.rotary_emb.inv_freq.dtype == torch.bfloat16


def test_D16_what_the_framework_looks_for_is_there() -> None:
    cls = minitron.NemotronForCausalLM
    assert cls.supports_gradient_checkpointing
    assert cls._no_split_modules == ["NemotronDecoderLayer"]
    assert cls._can_compile_fullgraph
    assert NemotronConfig.base_model_tp_plan == UpstreamConfig.base_model_tp_plan
    assert NemotronConfig.base_model_pp_plan
    assert callable(cls.prune_heads)


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "groups": ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)"),
    "hidden": ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number of at least 1"),
    "heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "float": ({"intermediate_size": 48.5}, r"intermediate_size is 48\.5"),
    "layers": ({"num_hidden_layers": -1}, "num_hidden_layers is -1; it must be a whole number, 0 or more"),
    "partial": ({"partial_rotary_factor": 1.5}, r"partial_rotary_factor is 1\.5; it must be a number from 0 to 1"),
    "odd": ({"head_dim": 5, "partial_rotary_factor": 1.0}, "head_dim 5 .* rotates 6 channels"),
    "theta": ({"rope_theta": 0.0}, r"rope_theta is 0\.0"),
    "eps": ({"norm_eps": 0.0}, r"norm_eps is 0\.0"),
    "vocabulary": ({"vocab_size": True}, "vocab_size is True"),
    "padding": ({"pad_token_id": 96}, r"pad_token_id is 96; it must be below vocab_size \(96\)"),
    "text": ({"rope_theta": "10000"}, "rope_theta is '10000'; it must be a number greater than 0"),
    "negative deviation": ({"initializer_range": -1.0}, "initializer_range is -1.0; it must be a number 0 or more"),
    "dropout": ({"attention_dropout": 2.0}, "attention_dropout is 2.0; it must be a number from 0 to 1"),
    "scaling": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: Missing required keys .*factor"),
    "factor": ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rope_parameters: factor is 'x'"),
    "no scaling": ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be a dictionary"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_D17_impossible_shapes_are_refused_with_a_sentence(what: str) -> None:
    overrides, message = IMPOSSIBLE[what]
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


@pytest.mark.parametrize("what", ["groups", "hidden", "layers", "partial"])
def test_D17_a_shape_made_impossible_afterwards_is_refused_by_the_model(what: str) -> None:
    overrides, message = IMPOSSIBLE[what]
    config = tiny()
    for name, value in overrides.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        minitron.NemotronModel(config)


def test_D17_heads_times_head_dim_need_not_be_hidden() -> None:
    model = build(num_attention_heads=6, num_key_value_heads=2, head_dim=12)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (72, 32)
    assert attention.k_proj.weight.shape == (24, 32)
    assert attention.o_proj.weight.shape == (32, 72)
    assert isinstance(model(token_ids()).past_key_values, DynamicCache)


def test_D18_tool_calls_are_rendered(tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    text = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(), tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<extra_id_0>System\n\n"
        "<extra_id_1>User\n1 + 1?\n"
        '<extra_id_1>Assistant\n<toolcall> {"name": "add", "arguments": {"a": 1}} </toolcall>\n'
        "<extra_id_1>Tool\n2\n"
        "<extra_id_1>Assistant\n"
    )
