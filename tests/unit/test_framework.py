"""Each use of transformers that its documentation does not promise, on the installed release."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from model_samples import CLASSES, scramble, tiny, token_ids
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput

import minitron
from minitron import framework
from minitron.framework import CACHE_NAME, CACHE_NAMES

PACKAGE = Path(minitron.__file__).parent
# Modules that the documentation of transformers has a page for, or whose names it tells to import from there.
DOCUMENTED = {
    "transformers",
    "transformers.cache_utils",
    "transformers.configuration_utils",
    "transformers.generation.streamers",
    "transformers.generation.utils",
    "transformers.modeling_outputs",
    "transformers.modeling_utils",
    "transformers.utils",
}
OF_MODELING_UTILS = {"PreTrainedModel"}


def build(name: str = "NemotronForCausalLM", **config: Any) -> Any:
    return scramble(getattr(minitron, name)(tiny(num_labels=3, **config))).eval()


def test_no_other_file_imports_what_is_not_documented() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "framework.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "transformers":
                continue
            assert node.module in DOCUMENTED, f"{path.name}:{node.lineno} imports from {node.module}"
            if node.module == "transformers.modeling_utils":
                assert {alias.name for alias in node.names} <= OF_MODELING_UTILS, f"{path.name}:{node.lineno}"


# --- the cache's name ------------------------------------------------------------------------------------------------


def test_the_name_is_the_one_that_generation_uses() -> None:
    assert CACHE_NAME in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert CACHE_NAME in GenerateDecoderOnlyOutput.__dataclass_fields__
    assert framework.installed() == transformers.__version__


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_takes_the_cache_under_both_names(cls: str, name: str) -> None:
    model, ids = build(cls), token_ids()
    backbone = model.base_model
    with torch.no_grad():
        full = model(ids, output_hidden_states=True).hidden_states[-1][:, 5:]
        for as_tuple in (False, True):
            past: Any = backbone(ids[:, :5])[CACHE_NAME]
            if as_tuple:
                past = tuple(past[layer] for layer in range(2))
            step = model(ids[:, 5:], output_hidden_states=True, **{name: past}).hidden_states[-1]
            torch.testing.assert_close(step, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_layers_and_attention_take_the_cache_under_both_names(name: str) -> None:
    model, ids = build("NemotronModel"), token_ids()
    x = model.embed_tokens(ids)
    rotary = model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for module in (model.layers[0], model.layers[0].self_attn):
        cache = DynamicCache(config=model.config)
        module(hidden_states=x, position_embeddings=rotary, **{name: cache})
        assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("engine", ["auto", "off"])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generate_takes_the_cache_under_both_names(name: str, engine: str) -> None:
    model, ids = build(), token_ids(batch=1)
    request: dict[str, Any] = {"do_sample": False, "engine": engine, "return_dict_in_generate": True}
    expected = model.generate(ids, max_new_tokens=6, **request).sequences
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, max_new_tokens=3, **{name: cache}, **request)
    assert first[CACHE_NAME] is cache
    assert cache.get_seq_length() >= ids.shape[1]
    rest = model.generate(first.sequences, max_new_tokens=3, **{name: cache}, **request)
    assert rest.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_prepare_inputs_takes_the_cache_under_both_names(name: str) -> None:
    model, ids = build(), token_ids(batch=1)
    cache = model(ids[:, :4])[CACHE_NAME]
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **{name: cache})
    assert inputs[CACHE_NAME] is cache
    assert inputs["input_ids"].shape == (1, 1)
    assert not (set(CACHE_NAMES) - {CACHE_NAME}) & set(inputs)


def test_two_caches_are_refused_and_one_under_both_names_is_not() -> None:
    model, ids = build(), token_ids()
    one, two = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, past_key_values=one, cache=two)
    assert model(ids, past_key_values=one, cache=one)[CACHE_NAME] is one
    assert one.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_cache_under_an_unknown_name_is_refused(cls: str) -> None:
    model, ids = build(cls), token_ids()
    with pytest.raises(ValueError, match=f"'kv_state' holds a DynamicCache.*transformers {transformers.__version__}"):
        model(ids, kv_state=DynamicCache(config=model.config))


def test_a_paged_cache_reaches_its_reader() -> None:
    paged = SimpleNamespace(update=lambda key, value, layer, kwargs: (key + layer, kwargs["seen"]))
    assert framework.update_cache(paged, torch.ones(1), torch.ones(1), 2, {"seen": 7}) == (torch.full((1,), 3.0), 7)
    kwargs = {"cache": paged}
    expected = paged if CACHE_NAME == "cache" else None
    assert framework.given_cache(None, kwargs) is expected
    assert kwargs == ({} if expected else {"cache": paged})  # else it is for the attention function


# --- the rest --------------------------------------------------------------------------------------------------------


def test_masks_are_causal_and_keep_documents_apart() -> None:
    model = build("NemotronModel", attn_implementation="eager")
    x = torch.zeros(1, 4, 32)
    plain = framework.framework_mask(model.config, x, None, None, torch.arange(4)[None])
    assert ((plain == 0) == torch.ones(4, 4).tril().bool()).all()
    packed = framework.framework_mask(model.config, x, None, None, torch.tensor([[0, 1, 0, 1]]))
    assert ((packed == 0) == torch.block_diag(*[torch.ones(2, 2).tril()] * 2).bool()).all()
    own = framework.framework_mask(model.config, x, None, None, torch.arange(4)[None], lambda b, h, q, k: k != 1)
    assert (own[..., 1] < 0).all()
    assert framework.sdpa_mask(**_sdpa_arguments(x)) is None
    four = torch.zeros(1, 1, 4, 4)
    assert framework.framework_mask(model.config, x, four, None, None) is four


def _sdpa_arguments(x: torch.Tensor) -> dict[str, Any]:
    return {"batch_size": 1, "q_length": 4, "kv_length": 4, "q_offset": 0, "kv_offset": 0, "device": x.device}


def test_attention_functions_are_found_by_name() -> None:
    sdpa = framework.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    assert sdpa is framework.sdpa_attention_forward
    assert framework.ALL_ATTENTION_FUNCTIONS.get_interface("eager", print) is print
    assert framework.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is framework.sdpa_mask
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
    out, weights = sdpa(module, q, k, k, None, dropout=0.0, scaling=0.5)
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.5).masked_fill(~torch.ones(3, 3).tril().bool(), -1e30)
    torch.testing.assert_close(out, (scores.softmax(-1) @ k.repeat_interleave(2, 1)).transpose(1, 2))
    assert weights is None


def test_activations_and_rotary_functions_are_tables_of_callables() -> None:
    x = torch.tensor([-1.0, 2.0])
    assert framework.ACT2FN["relu2"](x).tolist() == [0.0, 4.0]
    assert {"linear", "dynamic", "yarn", "longrope", "llama3"} <= set(framework.ROPE_INIT_FUNCTIONS)
    frequencies, factor = framework.ROPE_INIT_FUNCTIONS["linear"](
        tiny(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
        torch.device("cpu"),
    )
    assert frequencies[0].item() == pytest.approx(0.25)
    assert factor == 1.0


def test_dynamic_frequencies_grow_with_the_text() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    rotary = build("NemotronModel", rope_parameters=rope).rotary_emb
    before = rotary.inv_freq.clone()
    rotary(torch.zeros(1, 1, 32), torch.arange(200)[None])
    assert (rotary.inv_freq[1:] < before[1:]).all()


def test_initialization_leaves_loaded_weights_alone() -> None:
    fresh, loaded = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    loaded._is_hf_initialized = True  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in (fresh, loaded):
            framework.initialization.zeros_(parameter)
    assert (fresh.tolist(), loaded.tolist()) == ([0.0] * 3, [1.0] * 3)


def test_decorators_follow_the_configuration() -> None:
    class Model(PreTrainedModel):
        config_class = minitron.NemotronConfig
        _can_record_outputs = {"hidden_states": nn.Identity}  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.layer = nn.Identity()
            self.post_init()

        @framework.merge_with_config_defaults
        @framework.capture_outputs
        def forward(self, x: torch.Tensor, use_cache: bool | None = None, **kwargs: Any) -> Any:
            y = self.layer(x)
            return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=y + bool(use_cache))

    model, x = Model(tiny(use_cache=True)), torch.zeros(1, 2, 3)
    assert model(x)[0].eq(1).all()
    assert model(x, use_cache=False)[0].eq(0).all()
    assert len(model(x, output_hidden_states=True).hidden_states) >= 1
    assert isinstance(model(x, return_dict=False), tuple)


def test_a_layer_is_recomputed_in_training_when_it_is_told_to() -> None:
    assert issubclass(minitron.model.NemotronDecoderLayer, framework.GradientCheckpointingLayer)
    model, ids = build("NemotronModel").train(), token_ids()
    calls: list[int] = []
    model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    model(ids, use_cache=False).last_hidden_state.sum().backward()
    assert len(calls) == 2


def test_outputs_may_be_tuples() -> None:
    assert isinstance(build()(token_ids(), return_dict=False), tuple)


def test_generate_calls_the_methods_that_hand_over_to_the_engine() -> None:
    names = {str(mode).rpartition(".")[2].lower(): name for mode, name in GENERATION_MODES_MAPPING.items()}
    assert names["sample"] == names["greedy_search"] == "_sample"
    assert names["assisted_generation"] == "_assisted_decoding"
    for name in ("_sample", "_assisted_decoding"):
        theirs = inspect.signature(framework.method_of_generation(name)).parameters
        ours = inspect.signature(getattr(minitron.NemotronForCausalLM, name)).parameters
        assert list(theirs)[:5] == list(ours)[:5]
    model, ids = build(), token_ids(batch=1)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert model.last_generation.engine != "transformers"
    model.generate(ids, max_new_tokens=2, do_sample=False, prompt_lookup_num_tokens=2)
    assert model.last_generation.speculation is not None


def test_the_renaming_of_a_load_can_be_taken_back(tmp_path: Path) -> None:
    build("NemotronForQuestionAnswering").save_pretrained(tmp_path)
    model = minitron.NemotronForCausalLM.from_pretrained(tmp_path)
    assert not any("transformer" in str(c.source_patterns) for c in model._weight_conversions or [])
