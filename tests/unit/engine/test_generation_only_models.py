"""Models that have only engine weights, and memory that does not suffice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from engine_models import some_tokens, tiny_model
from family_samples import KINDS, kind_config, small_model
from text_checkpoint import make_text_checkpoint

import minitron
from minitron import NemotronConfig
from minitron.engine import memory
from minitron.engine.engines import open_engine
from minitron.engine.memory import require_memory
from minitron.engine.model_weights import GenerationOnly, generation_only_model, weights_of
from minitron.engine.weights import EngineWeights, from_model, weight_bytes
from minitron.families import family_of
from minitron.family_models import causal_lm_class


@pytest.mark.parametrize("format", [None, "bf12", "int8"])
def test_a_packed_model_writes_what_the_model_writes(tmp_path: Path, format: str | None) -> None:
    model = tiny_model(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = generation_only_model(tmp_path, format)  # type: ignore[arg-type]
    assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}
    ids = torch.tensor([some_tokens(7)])
    ours = loaded.generate(ids, max_new_tokens=20, do_sample=False)
    assert loaded.last_generation.engine == "cpu"
    if format != "int8":
        assert torch.equal(ours, model.generate(ids, max_new_tokens=20, do_sample=False))
    assert torch.equal(ours, loaded.generate(ids, max_new_tokens=20, do_sample=False, draft="lookup"))
    with pytest.raises(ValueError, match="engine only, which cannot serve this: output_attentions"):
        loaded.generate(ids, max_new_tokens=3, return_dict_in_generate=True, output_attentions=True)
    with pytest.raises(ValueError, match="not in int4"):
        weights_of(loaded, "int4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_relative_in_a_format_writes_what_its_weights_write(tmp_path: Path, kind: str) -> None:
    """The weights of a folder in a format give the tokens of the same weights taken from a model in memory."""
    config = kind_config(kind, max_position_embeddings=128, eos_token_id=None)
    small_model(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    ids = torch.tensor([some_tokens(7)])
    whole = causal_lm_class(family_of(config)).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for format in (None, "bf12", "int8", "int4"):
        loaded = generation_only_model(tmp_path, format)  # type: ignore[arg-type]
        assert isinstance(loaded, GenerationOnly)
        assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}
        weights = weights_of(loaded)
        expected = decode(from_model(whole, format), ids[0].tolist(), 12)  # type: ignore[arg-type]
        found = loaded.generate(ids, max_new_tokens=12, do_sample=False)
        assert loaded.last_generation.engine == "cpu", loaded.last_generation.reason
        assert found[0, 7:].tolist() == expected
        assert weights.nbytes == from_model(whole, format).nbytes  # type: ignore[arg-type]
        if format != "bf12":  # whose escapes depend on the weights
            assert weights.nbytes == weight_bytes(config, format or "bf16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="engine only, which cannot serve this: output_attentions"):
        loaded.generate(ids, max_new_tokens=3, return_dict_in_generate=True, output_attentions=True)
    with pytest.raises(ValueError, match="runs in the engine only"):
        loaded(ids)
    with pytest.raises(ValueError, match="has its weights in int4 only, not in bf16"):
        weights_of(loaded, "bf16")
    with pytest.raises(ValueError, match="its weights can be neither read nor changed"):
        loaded.model.layers[0].self_attn.q_proj.weight.sum()


def decode(weights: EngineWeights, prompt: list[int], count: int) -> list[int]:
    engine = open_engine(weights, len(prompt) + count)
    engine.prefill(prompt[:-1])
    found = [row[0] for row in engine.greedy(prompt[-1:], count)]
    engine.close()
    return found


def test_a_gated_mlp_has_no_zeros_to_report(tmp_path: Path) -> None:
    small_model(kind_config("smollm")).save_pretrained(tmp_path)
    model = generation_only_model(tmp_path, "int8")
    model.generate(torch.tensor([some_tokens(7)]), max_new_tokens=3, do_sample=False)
    assert model.last_generation.zero_fraction is None


def test_loading_in_a_format(tmp_path: Path) -> None:
    folder = make_text_checkpoint(tmp_path / "tiny")
    model, tokenizer = minitron.load(folder, format="int8")
    out = model.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=5)
    assert out.shape[1] > 2
    with pytest.raises(ValueError, match="format is 'int3'"):
        minitron.load(folder, format="int3")
    with pytest.raises(ValueError, match="both given; leave one of them out"):
        minitron.load(folder, format="int8", dtype="bf16")


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    config = NemotronConfig.preset("minitron-4b")
    monkeypatch.setattr(memory, "available_memory", lambda: 5 * 10**9)
    with pytest.raises(ValueError, match=r"small takes 8.38 GB of memory in bf16, and 5.00 GB are free") as found:
        require_memory("small", config, "bf16", generation_only=True)
    assert re.search(r"int8 \(4.\d\d GB\), int4 \(2.\d\d GB\) it would fit", str(found.value))
    require_memory("small", config, "int4", generation_only=True)
    monkeypatch.setattr(memory, "available_memory", lambda: 10**9)
    with pytest.raises(ValueError, match=r"no format fits, the smallest \(int4\) takes 2"):
        require_memory("small", config, "bf16", generation_only=False)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    require_memory("small", config, "bf16", generation_only=False)


def test_loading_says_so_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_text_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    for format in (None, "int4"):
        with pytest.raises(ValueError, match=r"0\.00 GB are free"):
            minitron.load(folder, format=format, device="cpu")


def test_it_decodes_on_a_processor_without_vector_extensions(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    code = (
        "import torch, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from engine_models import tiny_model, some_tokens\n"
        "model, ids = tiny_model(torch.bfloat16), torch.tensor([some_tokens(7)])\n"
        "out = model.generate(ids, max_new_tokens=12, do_sample=False)\n"
        "print(model.last_generation.engine, out[0].tolist())\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2] / "samples")]
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    found = [
        subprocess.run(command, env={**os.environ, **extra}, capture_output=True, text=True, check=True).stdout
        for extra in (plain, {})
    ]
    assert found[0].startswith("cpu [")
    assert found[0] == found[1]


EDITS = {
    "data": lambda p: p.data.zero_(),
    "data replaced": lambda p: setattr(p, "data", torch.zeros(p.shape)),
    "in place": lambda p: p.detach().mul_(2),
    "item": lambda p: p.detach().__setitem__((slice(None), 0), 0),
    "numpy": lambda p: p.detach().numpy(),
    "read": lambda p: p.sum(),
}


@pytest.mark.parametrize("how", EDITS)
def test_weights_that_are_packed_refuse_to_be_read_or_changed(tmp_path: Path, how: str) -> None:
    tiny_model(torch.bfloat16).save_pretrained(tmp_path)
    loaded = generation_only_model(tmp_path, "int8")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="its weights can be neither read nor changed"),
    ):
        EDITS[how](loaded.model.layers[0].mlp.down_proj.weight)


def test_what_else_is_edited_in_a_packed_model_is_followed_or_refused(tmp_path: Path) -> None:
    model = tiny_model(torch.bfloat16, partial_rotary_factor=1.0)
    model.save_pretrained(tmp_path)
    loaded, ids = generation_only_model(tmp_path), torch.tensor([some_tokens(7)])
    before = loaded.generate(ids, max_new_tokens=20, do_sample=False)
    for edited in (model, loaded):
        edited.model.rotary_emb.inv_freq.mul_(7.0)
        for module in edited.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1.0
    ours = loaded.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours, model.generate(ids, max_new_tokens=20, do_sample=False))
    assert not torch.equal(ours, before)
    loaded.model.layers[0].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="cannot serve this: Identity in place of NemotronMLP"):
        loaded.generate(ids, max_new_tokens=2)
    with pytest.raises((ValueError, RuntimeError), match="was loaded in a format"):
        loaded.load_state_dict(model.state_dict())
