"""NeMo 2's `context/`: `io.json` judged by fiddle, with which NeMo restores it; RoPE scaling in both NeMo formats."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_samples import random_state, sentencepiece_model, tiny_config

from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.nemo.files import config_of_context
from minitron.checkpoint.nemo.read import open_nemo
from minitron.checkpoint.nemo.write import write_nemo
from minitron.checkpoint.tensors import ByteRange, Checkpoint, from_tensor
from minitron.config import NemotronConfig

MODEL = "nemo.collections.llm.gpt.model"
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


class Recorded:
    """Stands for a class of NeMo: keeps what it is called with."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) ** 2


def take(module: types.ModuleType, name: str, value: Any) -> None:
    value.__module__, value.__qualname__ = module.__name__, name
    setattr(module, name, value)


@pytest.fixture
def nemo(monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo's module tree with stand-ins for the names that a context refers to."""
    places = {
        "nemo.lightning.io.pl": ["TrainerContext"],
        f"{MODEL}.nemotron": ["NemotronConfig", "NemotronModel"],
        f"{MODEL}.llama": ["Llama31Config"],
        "nemo.collections.common.tokenizers.huggingface.auto_tokenizer": ["AutoTokenizer"],
        "nemo.collections.common.tokenizers.sentencepiece_tokenizer": ["SentencePieceTokenizer"],
        "nemo.collections.llm.fn.activation": [],
    }
    for place, names in places.items():
        parts = place.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for name in names:
            take(sys.modules[place], name, type(name, (Recorded,), {}))
    take(sys.modules["nemo.collections.llm.fn.activation"], "squared_relu", squared_relu)


def written(folder: Path, config: NemotronConfig, form: str = "nemo2", **extra: Any) -> Path:
    tensors = {name: from_tensor(tensor) for name, tensor in random_state(config, torch.bfloat16).items()}
    target = folder / ("model.nemo" if form == "nemo" else "nemo2")
    write_nemo(Checkpoint(config, tensors, **extra), target, form=form)
    return target


def built(folder: Path) -> Any:
    """What NeMo's `load_context` builds: fiddle deserializes the file and makes the calls."""
    fiddle = pytest.importorskip("fiddle")
    from fiddle.experimental import serialization

    return fiddle.build(serialization.load_json((folder / "context" / "io.json").read_text()))


@pytest.mark.usefixtures("nemo")
def test_fiddle_builds_the_model_that_we_wrote(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=97, rope_theta=500.0, norm_eps=1e-6)
    context = built(written(tmp_path, config))
    assert type(context).__name__ == "TrainerContext"
    assert context.arguments["trainer"] is None
    model = context.arguments["model"]
    assert type(model).__qualname__ == "NemotronModel"
    assert model.arguments["tokenizer"] is None
    found = model.arguments["config"].arguments
    assert type(model.arguments["config"]).__qualname__ == "NemotronConfig"
    shape = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    assert [found[key] for key in shape] == [2, 32, 96, 6, 2, 12]
    assert found["activation_func"] is squared_relu
    assert found["params_dtype"] is torch.bfloat16
    assert (found["rotary_percent"], found["rotary_base"], found["layernorm_epsilon"]) == (0.5, 500.0, 1e-6)
    assert found["layernorm_zero_centered_gamma"] is True
    # NeMo pads no further where it is told a size, so this must be the number of rows in the file.
    assert found["vocab_size"] == 128
    assert "scale_factor" not in found


@pytest.mark.usefixtures("nemo")
@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_the_context_names_the_tokenizer_beside_it(tmp_path: Path, kind: str) -> None:
    path = sentencepiece_model(tmp_path)
    extra: dict[str, Any] = {"files": {"tokenizer.model": ByteRange.whole(path)}}
    if kind == "json":
        extra["texts"] = {"tokenizer.json": "{}", "tokenizer_config.json": "{}"}
    folder = written(tmp_path, tiny_config(vocab_size=512), **extra)
    tokenizer = built(folder).arguments["model"].arguments["tokenizer"]
    name, key, place = (
        ("AutoTokenizer", "pretrained_model_name", "nemo_tokenizer")
        if kind == "json"
        else ("SentencePieceTokenizer", "model_path", "nemo_tokenizer/tokenizer.model")
    )
    assert type(tokenizer).__qualname__ == name
    assert tokenizer.arguments == {key: place}
    assert (folder / "context" / place).exists()  # NeMo joins the path of the context with it


@pytest.mark.usefixtures("nemo")
def test_a_context_made_by_fiddle_is_read(tmp_path: Path) -> None:
    """As NeMo saves it: only arguments that were passed, an optimizer, nested calls; the rest is the class's."""
    fiddle = pytest.importorskip("fiddle")
    from fiddle.experimental import serialization

    def cls(place: str, name: str) -> Any:
        return getattr(sys.modules[place], name)

    config = fiddle.Config(cls(f"{MODEL}.nemotron", "NemotronConfig"), num_layers=2, hidden_size=32,
                           ffn_hidden_size=96, num_attention_heads=6, num_query_groups=2, kv_channels=12,
                           seq_length=64, activation_func=squared_relu, params_dtype=torch.bfloat16,
                           tp_comm_overlap_cfg={"a": [1, 2]})  # fmt: skip
    model = fiddle.Config(cls(f"{MODEL}.nemotron", "NemotronModel"), config=config)
    context = fiddle.Config(cls("nemo.lightning.io.pl", "TrainerContext"), model=model, extra={"x": (1, 2)})
    from fiddle import daglish
    from fiddle._src import daglish_extensions

    daglish_extensions.register_immutable(torch.bfloat16)
    serialization.register_constant("torch", "bfloat16", compare_by_identity=True)
    assert daglish.is_traversable_type(dict)
    target = written(tmp_path, tiny_config(vocab_size=128))
    (target / "context" / "io.json").write_text(serialization.dump_json(context))
    (target / "context" / "model.yaml").unlink()
    with open_nemo(target, tmp_path) as checkpoint:
        read = checkpoint.config
        assert (read.num_hidden_layers, read.head_dim, read.num_key_value_heads) == (2, 12, 2)
        assert (read.partial_rotary_factor, read.max_position_embeddings, read.hidden_act) == (0.5, 64, "relu2")
        # The class says zero-centred gamma: nothing is subtracted from the norms.
        assert not any("gamma" in note for note in checkpoint.notes)
        expected = random_state(tiny_config(vocab_size=128), torch.bfloat16)
        assert all(torch.equal(tensor.load(), expected[name]) for name, tensor in checkpoint.tensors.items())


def test_the_two_descriptions_agree(tmp_path: Path) -> None:
    """Without model.yaml the same configuration comes out of io.json, but for the padding that it cannot know."""
    config = tiny_config(vocab_size=97, attention_bias=True, mlp_bias=True)
    target = written(tmp_path, config)
    text = yaml.safe_load((target / "context" / "model.yaml").read_text())
    values = config_of_context((target / "context" / "io.json").read_bytes(), "io.json")
    assert text["_target_"] == f"{MODEL}.nemotron.NemotronModel"
    assert {**text["config"], "vocab_size": 128} == values
    (target / "context" / "model.yaml").unlink()
    with open_nemo(target, tmp_path) as checkpoint:
        assert checkpoint.config.vocab_size == 128
        assert checkpoint.config.attention_bias
        assert checkpoint.config.norm_eps == config.norm_eps


@pytest.mark.parametrize("form", ["nemo", "nemo2"])
@pytest.mark.parametrize("rope", [LINEAR, LLAMA3], ids=["linear", "llama3"])
def test_rope_scaling_there_and_back(tmp_path: Path, form: str, rope: dict[str, Any]) -> None:
    config = tiny_config(rope_parameters={**rope, "rope_theta": 500.0})
    target = written(tmp_path, config, form)
    with open_nemo(target, tmp_path) as checkpoint:
        assert checkpoint.config.rope_parameters == config.rope_parameters
    if form == "nemo2":
        (target / "context" / "model.yaml").unlink()
        with open_nemo(target, tmp_path) as checkpoint:
            assert checkpoint.config.rope_parameters == config.rope_parameters


@pytest.mark.usefixtures("nemo")
def test_llama3_scaling_needs_the_class_of_nemo_that_has_it(tmp_path: Path) -> None:
    found = built(written(tmp_path, tiny_config(rope_parameters=dict(LLAMA3)))).arguments["model"].arguments["config"]
    assert type(found).__qualname__ == "Llama31Config"
    keys = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
    assert [found.arguments[key] for key in keys] == [8.0, 1.0, 4.0, 32]
    # Its own values for these would make another model.
    own = ("normalization", "gated_linear_unit", "rotary_percent", "bias_activation_fusion", "activation_func")
    assert [found.arguments[key] for key in own] == ["LayerNorm", False, 0.5, False, squared_relu]


def test_nemo1_spells_llama3_scaling_as_its_code_reads_it(tmp_path: Path) -> None:
    import tarfile

    path = written(tmp_path, tiny_config(rope_parameters=dict(LLAMA3)), "nemo")
    with tarfile.open(path) as tar:
        values = yaml.safe_load(tar.extractfile("./model_config.yaml").read())  # type: ignore[union-attr]
    assert values["scale_positional_embedding"] is True
    assert [values[key] for key in ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")] == [
        8.0, 1.0, 4.0, 32]  # fmt: skip
    assert values["seq_len_interpolation_factor"] is None


@pytest.mark.parametrize("form", ["nemo", "nemo2"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "longrope", "long_factor": [1.0] * 3, "short_factor": [1.0] * 3, "factor": 2.0,
         "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rope_scaling_that_nemo_has_not_is_refused(tmp_path: Path, form: str, rope: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=rf"rope_type is '{rope['rope_type']}'; NeMo scales RoPE in two ways"):
        written(tmp_path, tiny_config(rope_parameters=rope), form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"root": {"type": "ref", "key": "a"}, "objects": {}}',
        '{"root": {"type": "ref", "key": "a"}, "objects": {"a": {"type": "ref", "key": "a"}}}',
        '{"root": {"items": [[1, 2]], "metadata": {"items": 3}}, "objects": {}}',
        '{"root": {"items": [[1, 2]], "metadata": {"items": [["", {}], ["", {"items": []}]]}}, "objects": {}}',
        "[" * 100_000,
    ],
)
def test_contexts_that_cannot_be(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"io\.json"):
        config_of_context(text.encode(), Path("io.json"))


def test_a_hostile_context_imports_nothing(tmp_path: Path) -> None:
    """A name in io.json is text here, whatever it names."""
    target = written(tmp_path, tiny_config())
    (target / "context" / "model.yaml").unlink()
    path = target / "context" / "io.json"
    path.write_text(path.read_text().replace("nemo.collections.llm.fn.activation", "antigravity"))
    with open_nemo(target, tmp_path) as checkpoint:
        assert checkpoint.config.hidden_act == "relu2"
    assert "antigravity" not in sys.modules
    values = json.loads(path.read_text())
    assert values["version"] == "0.0.1"
