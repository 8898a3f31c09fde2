"""Models that were edited after a first `generate`: the engine's text is that of torch on the same model object."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import some_tokens
from engine_models import tiny_model as plain_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import minitron.model
from minitron import NemotronForCausalLM
from minitron.engine import checksums as checksum_file
from minitron.engine.checksums import checksums
from minitron.model import NemotronAttention, NemotronDecoderLayer, NemotronMLP, NemotronModel
from minitron.ops import act

PROMPT = torch.tensor([some_tokens(6, seed=3)])
Edit = Callable[[NemotronForCausalLM], Any]


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> NemotronForCausalLM:
    """One whose text depends on its MLPs as much as on the rest."""
    model = plain_tiny_model(torch.float32, seed, **overrides)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.mul_(2.0)
    return model.to(dtype)


def text(model: NemotronForCausalLM, **how: Any) -> list[int]:
    return model.generate(PROMPT, max_new_tokens=16, do_sample=False, eos_token_id=None, **how)[0].tolist()


def check(model: NemotronForCausalLM, edit: Edit, engine: str, changes: bool = True) -> None:
    """Generate, edit, generate: the second text is torch's, written by `engine`."""
    before = text(model)
    assert model.last_generation.engine == "cpu"
    edit(model)
    ours = text(model)
    report = model.last_generation
    assert ours == text(model, engine="off")
    assert (ours != before) == changes
    assert report.engine == engine, report.reason


# --- tensors: the engine follows -----------------------------------------------------------------------------------


def down(model: NemotronForCausalLM, layer: int = 0) -> Tensor:
    return model.model.layers[layer].mlp.down_proj.weight


def through_numpy(model: NemotronForCausalLM) -> None:
    array = down(model).detach().numpy()
    array[:, 1::2] = 0


def one_number(model: NemotronForCausalLM) -> None:
    down(model, 1).data[7, 5] += 4000.0


def two_signs(model: NemotronForCausalLM) -> None:
    down(model).data[:, 3] *= -1  # an even number of sign bits: sums of words do not see it


def two_columns(model: NemotronForCausalLM) -> None:
    data = down(model).data
    data[:, [5, 60]] = data[:, [60, 5]]


def replaced_parameter(model: NemotronForCausalLM) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight.detach().flip(0).clone())


def replaced_linear(model: NemotronForCausalLM) -> None:
    old = model.model.layers[0].mlp.down_proj
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    new.weight.data.copy_(-old.weight.data)
    model.model.layers[0].mlp.down_proj = new


def plain_attribute(model: NemotronForCausalLM) -> None:
    up = model.model.layers[0].mlp.up_proj
    weight = up.weight.detach().neg()
    del up.weight
    up.weight = weight


def swapped_layers(model: NemotronForCausalLM) -> None:
    first, second = model.model.layers
    first.mlp, second.mlp = second.mlp, first.mlp


def one_bias_of_three(model: NemotronForCausalLM) -> None:
    value = model.model.layers[0].self_attn.v_proj
    value.bias = nn.Parameter(torch.full((value.out_features,), 2.0))


def untied(model: NemotronForCausalLM) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().roll(1, 1).clone())


def tied(model: NemotronForCausalLM) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def merged_lora(model: NemotronForCausalLM) -> None:
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        low = [torch.randn(size, 4, generator=generator) for size in weight.shape]
        weight.data += low[0] @ low[1].T * 0.1


WEIGHTS: dict[str, Edit] = {
    "columns through data": lambda m: [layer.mlp.down_proj.weight.data[:, 32:].zero_() for layer in m.model.layers],
    "rows through detach": lambda m: down(m).detach()[::2].zero_(),
    "numpy view": through_numpy,
    "one number": one_number,
    "signs": two_signs,
    "columns swapped": two_columns,
    "replaced parameter": replaced_parameter,
    "replaced data": lambda m: setattr(down(m), "data", down(m).data.flip(0).contiguous()),
    "replaced linear": replaced_linear,
    "plain attribute": plain_attribute,
    "swapped MLPs": swapped_layers,
    "low rank merged": merged_lora,
    "load_state_dict": lambda m: m.load_state_dict({n: v.roll(1, 0) for n, v in m.state_dict().items()}),
    "load_state_dict assigned": lambda m: m.load_state_dict(
        {n: v.roll(1, 0).clone() for n, v in m.state_dict().items()}, assign=True
    ),
    "norm through data": lambda m: m.model.norm.weight.data[1::2].add_(3.0),
    "norm offset": lambda m: m.model.layers[1].input_layernorm.bias.data[::3].sub_(2.0),
    "query through data": lambda m: m.model.layers[0].self_attn.q_proj.weight.data.neg_(),
    "embedding row": lambda m: (
        m.model.embed_tokens.weight.data[PROMPT[0]].mul_(1) is None or m.model.embed_tokens.weight.data.mul_(-1)
    ),
    "head through data": lambda m: m.lm_head.weight.data.copy_(m.lm_head.weight.data.roll(3, 0)),
    "a bias of its own": one_bias_of_three,
    "another head": untied,
    "head tied": tied,
    "frequencies": lambda m: m.model.rotary_emb.inv_freq.mul_(3.0),
    "frequencies replaced": lambda m: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq * 5),
    "attention_scaling": lambda m: setattr(m.model.rotary_emb, "attention_scaling", 2.0),
    "eps of all norms": lambda m: [
        setattr(module, "eps", 5.0) for module in m.modules() if isinstance(module, nn.LayerNorm)
    ],
    "merged by prune": lambda m: (
        prune.random_unstructured(m.model.layers[0].mlp.down_proj, "weight", 0.6),
        prune.remove(m.model.layers[0].mlp.down_proj, "weight"),
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_engine_follows_weights_and_constants(name: str) -> None:
    check(tiny_model(partial_rotary_factor=1.0, head_dim=8), WEIGHTS[name], "cpu")


@pytest.mark.parametrize("name", ["columns through data", "one number", "signs", "norm through data", "head tied"])
def test_in_bf16_too(name: str) -> None:
    model = tiny_model(torch.bfloat16)
    text(model)
    WEIGHTS[name](model)
    fresh = tiny_model(torch.bfloat16)  # a model that was never copied before: the same numbers, the same bits
    WEIGHTS[name](fresh)
    assert text(model) == text(fresh)


def test_tied_weights_stay_tied() -> None:
    check(tiny_model(tie_word_embeddings=True), lambda m: m.model.embed_tokens.weight.data.mul_(-1.5), "cpu")


def test_many_edits_after_each_other() -> None:
    model = tiny_model()
    for column in range(0, 96, 8):
        down(model).data[:, column : column + 8] = 0
        assert text(model) == text(model, engine="off")


# --- configuration after the build: torch's forward ignores it, or the engine leaves it to torch -------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_theta", 3.0),
        ("norm_eps", 2.0),
        ("hidden_size", 7),
        ("intermediate_size", 3),
        ("num_hidden_layers", 1),
        ("num_attention_heads", 99),
        ("head_dim", 4),
        ("partial_rotary_factor", 0.25),
        ("tie_word_embeddings", True),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
    ],
)
def test_a_changed_config_changes_nothing(name: str, value: Any) -> None:
    model = tiny_model()
    cache = torch.tensor(text(model))
    vars(model.config)[name] = value
    assert text(model) == cache.tolist()
    assert model.last_generation.engine == "cpu", model.last_generation.reason


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: setattr(m.config, "is_causal", False),
        lambda m: setattr(m.config, "_attn_implementation", "none of these"),
        lambda m: setattr(m.config, "layer_types", ["sliding_attention"] * 2) or setattr(m.config, "sliding_window", 3),
        lambda m: setattr(m.config, "sliding_window", 3),
    ],
    ids=["is_causal", "attention", "sliding layers", "sliding window"],
)
def test_a_config_that_transformers_looks_at_is_left_to_it(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    text(model)
    edit(model)
    try:
        expected = text(model, engine="off")
    except Exception as error:  # transformers refuses: so do we
        with pytest.raises(type(error)):
            text(model)
        return
    assert text(model) == expected


# --- code and structure: left to torch -----------------------------------------------------------------------------


class NegativeMLP(NemotronMLP):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class HalfAttention(NemotronAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return 0.2 * out, weights


class LoneLayer(NemotronDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states + 3 * self.mlp(self.post_attention_layernorm(hidden_states))


class ReversedModel(NemotronModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state.flip(-1)
        return out


class BackwardsLM(NemotronForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = -out.logits
        return out


class PreparedLM(NemotronForCausalLM):
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["input_ids"] = (inputs["input_ids"] + 1) % 96
        return inputs


def become(get: Callable[[NemotronForCausalLM], nn.Module], kind: type) -> Edit:
    return lambda model: setattr(get(model), "__class__", kind)


def first(model: NemotronForCausalLM) -> Any:
    return model.model.layers[0]


def bound(module: nn.Module, function: Callable) -> None:
    module.forward = types.MethodType(function, module)


class LowRank(nn.Module):
    """An adapter as libraries put it in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    bias = None

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.flip(-1))


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Scale(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


def fewer_neurons(model: NemotronForCausalLM) -> None:
    for index, layer in enumerate(model.model.layers):
        up, down, kept = layer.mlp.up_proj, layer.mlp.down_proj, 20 + 9 * index
        up.weight = nn.Parameter(up.weight[:kept].detach().clone())
        down.weight = nn.Parameter(down.weight[:, :kept].detach().clone())


def deeper(model: NemotronForCausalLM) -> None:
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList([layers[0], layers[1], layers[0]])
    model.config.num_hidden_layers = 3


CODE: dict[str, Edit] = {
    "subclassed MLP": become(lambda m: first(m).mlp, NegativeMLP),
    "subclassed attention": become(lambda m: first(m).self_attn, HalfAttention),
    "subclassed layer": become(first, LoneLayer),
    "subclassed backbone": become(lambda m: m.model, ReversedModel),
    "subclassed model": become(lambda m: m, BackwardsLM),
    "subclassed preparation": become(lambda m: m, PreparedLM),
    "subclassed norm": become(
        lambda m: m.model.norm,
        type("Louder", (minitron.model.NemotronLayerNorm1P,), {"forward": lambda self, x: x.flip(-1)}),
    ),
    "subclassed rotation": become(
        lambda m: m.model.rotary_emb,
        type(
            "Still",
            (minitron.model.NemotronRotaryEmbedding,),
            {"forward": lambda self, x, position_ids: [torch.ones(1, position_ids.shape[-1], 8)] * 2},
        ),
    ),
    "subclassed embedding": become(
        lambda m: m.model.embed_tokens,
        type("Negative", (nn.Embedding,), {"forward": lambda self, ids: -nn.Embedding.forward(self, ids)}),
    ),
    "subclassed head": become(
        lambda m: m.lm_head,
        type("Negative", (nn.Linear,), {"forward": lambda self, x: -nn.Linear.forward(self, x)}),
    ),
    "forward of one MLP": lambda m: bound(first(m).mlp, lambda self, x: -x),
    "forward of one linear": lambda m: bound(
        first(m).mlp.up_proj, lambda self, x: nn.functional.linear(x, -self.weight)
    ),
    "forward of an activation": lambda m: bound(first(m).mlp.act_fn, lambda self, x: x.abs()),
    "another activation": lambda m: setattr(first(m).mlp, "act_fn", Squared()),
    "adapter": lambda m: setattr(first(m).mlp, "up_proj", LowRank(first(m).mlp.up_proj)),
    "a block of another kind": lambda m: setattr(first(m), "mlp", nn.Identity()),
    "a layer in a Sequential": lambda m: setattr(
        first(m).mlp, "down_proj", nn.Sequential(first(m).mlp.down_proj, nn.Tanh())
    ),
    "head with a bias": lambda m: setattr(m.lm_head, "bias", nn.Parameter(40.0 * torch.arange(96.0).remainder(7))),
    "scaling": lambda m: setattr(first(m).self_attn, "scaling", 5.0),
    "scaling by a tensor": lambda m: setattr(first(m).self_attn, "scaling", 5.0 * torch.ones(())),
    "eps of one norm": lambda m: setattr(first(m).input_layernorm, "eps", 9.0),
    "fewer neurons": lambda m: [
        setattr(layer.mlp.up_proj, "weight", nn.Parameter(layer.mlp.up_proj.weight[: 20 + 9 * i].detach().clone()))
        or setattr(
            layer.mlp.down_proj, "weight", nn.Parameter(layer.mlp.down_proj.weight[:, : 20 + 9 * i].detach().clone())
        )
        for i, layer in enumerate(m.model.layers)
    ],
    "repeated layer": deeper,
    "reversed layers": lambda m: setattr(m.model, "layers", nn.ModuleList(list(m.model.layers)[::-1])),
    "hook": lambda m: first(m).mlp.register_forward_hook(lambda module, args, out: -out),
    "hook before": lambda m: first(m).mlp.register_forward_pre_hook(lambda module, args: (-args[0],)),
    "pruned by a mask": lambda m: prune.random_unstructured(first(m).mlp.down_proj, "weight", 0.6),
    "parametrization": lambda m: parametrize.register_parametrization(first(m).mlp.down_proj, "weight", Scale()),
    "weight norm": lambda m: (
        parametrizations.weight_norm(first(m).mlp.up_proj),
        first(m).mlp.up_proj.parametrizations.weight.original0.data.mul_(-1),
    ),
    "dropout in one attention": lambda m: (
        setattr(first(m).self_attn, "attention_dropout", 1.0),
        first(m).self_attn.train(),
    ),
    "embedding with a norm": lambda m: setattr(m.model.embed_tokens, "max_norm", 1.0),
    "rows of another stride": lambda m: setattr(
        first(m).mlp.down_proj, "weight", nn.Parameter(first(m).mlp.down_proj.weight.detach().flip(1).T.contiguous().T)
    ),
}


@pytest.mark.parametrize("name", CODE)
def test_what_computes_something_else_is_left_to_torch(name: str) -> None:
    check(tiny_model(partial_rotary_factor=1.0, head_dim=8), CODE[name], "transformers")


def test_a_rotation_that_depends_on_the_length_is_left_to_torch() -> None:
    model = tiny_model()
    model.config.rope_parameters.update(rope_type="dynamic", factor=2.0)
    text(model)
    assert model.last_generation.engine == "cpu"  # torch looks at the module
    model.model.rotary_emb.rope_type = "dynamic"
    text(model)
    assert model.last_generation.engine == "transformers"


def test_dropout_in_evaluation_mode_changes_nothing() -> None:
    check(tiny_model(), lambda m: setattr(first(m).self_attn, "attention_dropout", 0.9), "cpu", changes=False)


def test_a_copy_by_adapter_library_is_followed() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    before = text(model)
    config = peft.LoraConfig(r=4, target_modules=["down_proj", "q_proj"], init_lora_weights=False, lora_alpha=400)
    wrapped = peft.get_peft_model(model, config)
    assert text(wrapped) == text(wrapped, engine="off") != before
    merged = wrapped.merge_and_unload()
    expected = text(merged, engine="off")
    assert text(merged) == expected != before
    assert merged.last_generation.engine == "cpu", merged.last_generation.reason


PATCHES: dict[str, tuple[Any, str, Callable]] = {
    "MLP": (NemotronMLP, "forward", lambda self, x: -x),
    "attention": (NemotronAttention, "forward", lambda self, hidden_states, **_: (-hidden_states, None)),
    "linear": (nn.Linear, "forward", lambda self, x: -nn.functional.linear(x, self.weight, self.bias)),
    "activation": (act.SquaredReLU, "forward", lambda self, x: x.abs()),
    "squared_relu": (act, "squared_relu", lambda x: x.abs()),
    "apply_rotary": (minitron.model, "apply_rotary", lambda q, k, cos, sin: (q, k)),
    "layer_norm_1p": (minitron.model, "layer_norm_1p", lambda x, weight, bias, eps: x),
    "call of a layer": (NemotronDecoderLayer, "__call__", lambda self, hidden_states, **_: -hidden_states),
    "embedding function": (
        nn.functional,
        "embedding",
        lambda ids, weight, *_, embedding=nn.functional.embedding: -embedding(ids, weight),
    ),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_class_or_function_that_was_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tiny_model(partial_rotary_factor=1.0), lambda _: monkeypatch.setattr(*PATCHES[name]), "transformers")


def test_an_attention_function_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def values(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return value[:, :1, -1:].expand(-1, query.shape[1], query.shape[2], -1).transpose(1, 2), None

    check(
        tiny_model(),
        lambda _: monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", values),  # type: ignore[attr-defined]
        "transformers",
    )


def test_a_class_that_was_replaced_before_the_model_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minitron.model, "NemotronMLP", NegativeMLP)
    model = tiny_model()
    assert text(model) == text(model, engine="off")
    monkeypatch.undo()
    assert text(model) != text(tiny_model())


def test_a_hook_on_all_modules() -> None:
    model = tiny_model()
    before = text(model)

    def negate(module: nn.Module, args: Any, out: Any) -> Any:
        return -out if isinstance(module, NemotronMLP) else out

    with nn.modules.module.register_module_forward_hook(negate):
        assert text(model) == text(model, engine="off") != before
    assert text(model) == before


class Contexts:
    """What changes every operation for a while."""

    class Negating(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return -out if func is torch.relu else out

    @staticmethod
    def autocast() -> AbstractContextManager:
        return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("context", [Contexts.Negating, Contexts.autocast])
def test_contexts_that_change_operations(context: Callable[[], AbstractContextManager]) -> None:
    model = tiny_model()
    text(model)
    with context():
        ours = text(model)
        assert model.last_generation.engine == "transformers"
        assert ours == text(model, engine="off")
    assert text(model) == text(model, engine="off")
    assert model.last_generation.engine == "transformers"
    text(model)
    assert model.last_generation.engine == "cpu"


def test_a_default_device_is_no_such_context() -> None:
    model = tiny_model()
    with torch.device("cpu"):
        text(model)
    assert model.last_generation.engine == "cpu"


def test_hidden_states_that_were_asked_for_once_leave_the_engine_on() -> None:
    model = tiny_model()
    model(PROMPT, output_hidden_states=True)
    text(model)
    assert model.last_generation.engine == "cpu", model.last_generation.reason


# --- drafts and models without parameters ----------------------------------------------------------------------------


def test_the_models_own_draft_follows_it() -> None:
    from minitron.engine.model_weights import weights_of

    model = tiny_model(torch.bfloat16)
    text(model, draft="self")
    model.model.layers[0].self_attn.q_proj.weight.data[:, ::2] = 0
    fresh = tiny_model(torch.bfloat16)
    fresh.model.layers[0].self_attn.q_proj.weight.data[:, ::2] = 0
    ours, theirs = weights_of(model, "int4"), weights_of(fresh, "int4")
    assert torch.equal(ours.layers[0].q.data, theirs.layers[0].q.data)
    assert ours.layers[1].up is weights_of(model, "int4").layers[1].up  # what did not change is not quantized again
    assert text(model, draft="self") == text(model)


def test_a_draft_that_was_edited() -> None:
    model, draft = tiny_model(), tiny_model(seed=1)
    expected = text(model)
    assert text(model, assistant_model=draft) == expected
    draft.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert text(model, assistant_model=draft) == expected


# --- the checksum itself ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_change_changes_the_checksum(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5000))
    numbers = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    tensor = torch.from_numpy(numbers)
    before = checksums({"x": tensor})
    kind = data.draw(st.sampled_from(["bits", "swap", "signs", "roll"]))
    changed = tensor.clone()
    if kind == "bits":
        for place in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4, unique=True)):
            changed[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "swap":
        a, b = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
        changed[[a, b]] = changed[[b, a]]
    elif kind == "signs":
        step = data.draw(st.sampled_from([2, 4, 8, 16, 4096]))
        changed[step - 1 :: step] ^= 128
    else:
        changed = changed.roll(data.draw(st.sampled_from([1, 8, 4096])))
    same = torch.equal(changed, tensor)
    assert (checksums({"x": changed}) == before) == same
    assert checksums({"x": tensor.clone()}) == before


def test_the_checksum_does_not_depend_on_threads_or_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randint(256, (70_001,), dtype=torch.uint8)
    monkeypatch.setattr(checksum_file, "PIECE", 8192)
    monkeypatch.setattr(checksum_file, "SHORT", 0)
    one = checksums({"x": whole[1:]})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert checksums({"x": whole[1:]}) == one == checksums({"x": whole[1:].clone()})
    assert checksums({"x": whole[1:].view(7, 10_000)}) != one
