"""What transformers' own machinery asks of a model: attention interfaces, plans, devices, compilation, resizing."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import CLASSES, SHAPES, build, pair, tiny, token_ids
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import minitron

# --- attention --------------------------------------------------------------------------------------------------


def test_custom_attention_receives_what_the_caller_passes__upstream_drops_it() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[Any] = []

    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.pop("note_of_mine", None))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("noting", noting)
    ALL_MASK_ATTENTION_FUNCTIONS.register("noting", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    ours, theirs = pair()
    ids = token_ids()
    plain = ours(ids).logits
    for model, expected in ((ours, ["x", "x"]), (theirs, [None, None])):
        model.set_attn_implementation("noting")
        seen.clear()
        assert torch.equal(model(ids, note_of_mine="x").logits, plain)
        assert seen == expected


@pytest.mark.parametrize("name", CLASSES)
def test_attention_implementation_can_be_switched(name: str) -> None:
    model = build(name, "sdpa", pad_token_id=0)
    ids = token_ids()
    outputs = []
    for attn in ("sdpa", "eager"):
        model.set_attn_implementation(attn)
        assert model.config._attn_implementation == attn
        outputs.append(model(ids)[0])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(*outputs) or name == CLASSES[2]


def test_flex_attention_is_sdpa() -> None:
    ours = build(attn="flex_attention", head_dim=16)
    ids = token_ids()
    # Flex attention is made to be compiled; what it computes can be seen without.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        got = ours(ids, use_cache=False).logits
        torch.testing.assert_close(got, build(attn="sdpa", head_dim=16)(ids).logits, rtol=1e-4, atol=1e-4)


def test_attention_dropout_is_for_training_only() -> None:
    model = build(attn="eager", attention_dropout=0.5)
    ids = token_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


# --- plans ------------------------------------------------------------------------------------------------------


def test_tensor_parallel_plan_names_every_projection_once() -> None:
    ours, theirs = pair()
    assert ours._tp_plan == theirs._tp_plan
    matrices = {name for name, module in ours.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    for key in ours._tp_plan:
        pattern = re.compile(re.escape(key).replace(r"\*", r"\d+") + "$")
        found = {name for name in matrices if pattern.match(name)}
        assert found, key
        matrices -= found
    assert not matrices


def test_pipeline_plan_follows_the_modules_of_the_backbone__upstream_has_none() -> None:
    ours, theirs = pair()
    children = [name for name, _ in ours.model.named_children() if name != "rotary_emb"]
    assert list(ours.config.base_model_pp_plan) == children
    assert not getattr(theirs.config, "base_model_pp_plan", None)
    assert set(ours._pp_plan) == {"lm_head", *(f"model.{name}" for name in children)}


# --- placement --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "model", max_shard_size="30KB")
    return tmp_path / "model"


@pytest.mark.parametrize("where", ["auto", "cpu", {"": "cpu"}])
def test_device_map(checkpoint: Path, where: Any) -> None:
    model = minitron.NemotronForCausalLM.from_pretrained(checkpoint, device_map=where).eval()
    assert torch.equal(model(token_ids()).logits, build()(token_ids()).logits)


def test_layers_on_disk(checkpoint: Path, tmp_path: Path) -> None:
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    where |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    model = minitron.NemotronForCausalLM.from_pretrained(
        checkpoint, device_map=where, offload_folder=tmp_path / "offload"
    ).eval()
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, build()(ids).logits)
        assert torch.equal(model(ids, labels=ids).loss, build()(ids, labels=ids).loss)
        expected = build().generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_what_does_not_fit_in_memory_goes_to_disk_layer_by_layer(checkpoint: Path, tmp_path: Path) -> None:
    model = minitron.NemotronForCausalLM.from_pretrained(
        checkpoint, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path / "offload"
    ).eval()
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert not [name for name in model.hf_device_map if re.match(r"model\.layers\.\d+\.", name)]
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, build()(token_ids()).logits)


# --- compilation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CLASSES)
def test_forward_compiles_without_a_graph_break(name: str, attn: str) -> None:
    torch.compiler.reset()
    model = build(name, attn, pad_token_id=0)
    ids = token_ids()
    mask = torch.ones_like(ids)
    expected = model(ids, attention_mask=mask, use_cache=False)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, attention_mask=mask, use_cache=False)[0], expected, rtol=1e-5, atol=1e-5)


def test_training_step_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    model, ids = build(), token_ids()
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_decoding_with_a_static_cache_compiles() -> None:
    from transformers import StaticCache

    torch.compiler.reset()
    model, ids = build(), token_ids()
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for step in (ids[:, :6], ids[:, 6:7], ids[:, 7:8]):
            a, b = (m(step, past_key_values=c).logits for m, c in zip((model, compiled), caches, strict=True))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_forward_compiles_to_machine_code() -> None:
    torch.compiler.reset()
    model = build(num_hidden_layers=1)
    ids = token_ids()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        got = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --- gradient checkpointing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    ids = token_ids()
    grads = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


def test_gradient_checkpointing_recomputes() -> None:
    model = build().train()
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    model(token_ids(), labels=token_ids()).loss.backward()
    assert len(calls) == 2


# --- loss -------------------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own_is_used() -> None:
    model = build()
    got: dict[str, Any] = {}

    def mine(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        got.update(kwargs, vocab_size=vocab_size, shape=logits.shape)
        return logits.sum() * 0 + 7.0

    model.loss_function = mine
    ids = token_ids()
    out = model(ids, labels=ids, num_items_in_batch=5)
    assert out.loss == 7.0
    assert got["vocab_size"] == 96
    assert got["shape"] == (2, 9, 96)
    assert got["num_items_in_batch"] == 5


# --- derivatives and tensors without values ---------------------------------------------------------------------


def test_gradients_of_single_rows_by_vmap_are_upstreams() -> None:
    from torch.func import functional_call, grad, vmap

    ids = token_ids()
    found = []
    for model in pair(attn="eager"):

        def loss(parameters: Any, row: torch.Tensor, model: Any = model) -> torch.Tensor:
            given = {"labels": row[None], "use_cache": False}
            return functional_call(model, parameters, (row[None],), given).loss

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        found.append(vmap(grad(loss), in_dims=(None, 0))(parameters, ids))
    for name, gradient in found[0].items():
        assert gradient.shape[0] == 2
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_second_derivatives_are_upstreams() -> None:
    ids = token_ids()
    found = []
    for model in pair(attn="eager"):
        weight = model.model.layers[0].mlp.up_proj.weight
        (gradient,) = torch.autograd.grad(model(ids, labels=ids).loss, weight, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), weight)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_shapes_can_be_found_without_values() -> None:
    with torch.device("meta"):
        model = minitron.NemotronForCausalLM(tiny())
        ids = torch.zeros(2, 9, dtype=torch.long)
        assert model(ids).logits.shape == (2, 9, 96)
        assert model(ids, labels=ids).loss.shape == ()


def test_export() -> None:
    model, ids = build(), token_ids()
    program = torch.export.export(model, (ids,), {"use_cache": False})
    torch.testing.assert_close(program.module()(ids, use_cache=False).logits, model(ids).logits)


# --- embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [110, 80])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_can_be_resized(tied: bool, size: int, tmp_path: Path) -> None:
    model = build(tie_word_embeddings=tied)
    before = build(tie_word_embeddings=tied)
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == model.vocab_size == size
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (size, 32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    kept = min(size, 96)
    assert torch.equal(model.lm_head.weight[:kept], before.lm_head.weight[:kept])
    ids = token_ids(vocab=80)
    labels = torch.full_like(ids, size - 1)
    assert model(ids, labels=labels).logits.shape == (2, 9, size)
    model.save_pretrained(tmp_path)
    again = minitron.NemotronForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_embeddings_grow_by_the_mean_on_request() -> None:
    model = build()
    model.resize_token_embeddings(100, pad_to_multiple_of=16)
    assert model.config.vocab_size == 112


@pytest.mark.parametrize("name", CLASSES)
def test_embeddings_can_be_got_and_set(name: str) -> None:
    model = build(name)
    fresh = nn.Embedding(50, 32)
    model.set_input_embeddings(fresh)
    assert model.get_input_embeddings() is fresh
    assert model.base_model.embed_tokens is fresh
    assert model(torch.full((2, 3), 49))[0].shape[:1] == (2,)
    with pytest.raises(ValueError, match="input_ids contains 50; it must be 0 to 49"):
        model(torch.full((2, 3), 50))


# --- pruning of heads -------------------------------------------------------------------------------------------


def silence(model: Any, layer: int, heads: list[int]) -> None:
    """Set to zero what the given heads hand to the output projection."""
    weight = model.base_model.layers[layer].self_attn.o_proj.weight
    width = model.config.head_dim
    with torch.no_grad():
        for head in heads:
            weight[:, head * width : (head + 1) * width] = 0


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ({"num_key_value_heads": 4}, {0: [1], 1: [0, 3]}),  # a head of its own key/value head each
        ({}, {0: [0, 2]}),  # one of each group
        ({}, {1: [2, 3]}),  # a whole group
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "attention_bias": True}, {0: [1, 4]}),
    ],
)
def test_prune_heads_is_silencing_them(shape: dict[str, Any], cut: dict[int, list[int]], tmp_path: Path) -> None:
    model = build(**shape).double()
    silent = copy.deepcopy(model)
    for layer, heads in cut.items():
        silence(silent, layer, heads)
    model.prune_heads(cut)
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, silent(ids).logits, rtol=1e-12, atol=1e-12)
    assert model.num_parameters() < silent.num_parameters()
    assert model.config.pruned_heads == cut
    model.save_pretrained(tmp_path)
    again = minitron.NemotronForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    if model.config.head_dim % 8 == 0:
        assert torch.equal(again(ids).logits, model(ids).logits)
    else:  # on some processors the order of sums over an odd width depends on where in memory it begins
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_prune_heads_in_two_steps_counts_heads_as_first_built() -> None:
    once, twice = (build(num_key_value_heads=4) for _ in range(2))
    once.prune_heads({0: [0, 2]})
    twice.prune_heads({0: [0]})
    twice.prune_heads({0: [2]})
    assert once.config.pruned_heads == twice.config.pruned_heads == {0: [0, 2]}
    assert torch.equal(once(token_ids()).logits, twice(token_ids()).logits)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({0: [4]}, "layer 0 has no head 4; heads are 0 to 3"),
        ({2: [0]}, "layer 2 does not exist; layers are 0 to 1"),
        ({0: [0]}, "each key/value head that stays must keep the same number"),
        ({0: [0, 1, 2, 3]}, "at least one"),
    ],
)
def test_prune_heads_refuses_what_cannot_be(cut: dict[int, list[int]], message: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=message):
        model.prune_heads(cut)
    assert not getattr(model.config, "pruned_heads", None)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 32)


# --- shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_class_of_every_shape_trains(shape: str) -> None:
    ids = token_ids()
    labels = {
        "NemotronForCausalLM": {"labels": ids},
        "NemotronForSequenceClassification": {"labels": torch.tensor([0, 1])},
        "NemotronForQuestionAnswering": {
            "start_positions": torch.tensor([0, 1]),
            "end_positions": torch.tensor([2, 3]),
        },
        "NemotronForTokenClassification": {"labels": ids % 2},
    }
    for name, given in labels.items():
        model = build(name, pad_token_id=0, **SHAPES[shape]).train()
        model(ids, **given).loss.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, (name, key)
            assert parameter.grad.isfinite().all(), (name, key)


def test_ids_outside_the_vocabulary_are_named() -> None:
    for wrong in (96, -1):
        with pytest.raises(ValueError, match=f"input_ids contains {wrong}; it must be 0 to 95"):
            build()(torch.tensor([[1, wrong]]))
