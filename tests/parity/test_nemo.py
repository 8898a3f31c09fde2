"""NeMo and Megatron checkpoints, judged by files of megatron-core, by torch's checkpoint code, by transformers."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoint_samples import data_folder, random_state, sentencepiece_model, tiny_config
from safetensors.torch import load_file

from minitron.checkpoint.hf import check_checkpoint, write_hf
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.nemo.read import open_nemo
from minitron.checkpoint.nemo.write import write_nemo
from minitron.checkpoint.tensors import Checkpoint, from_tensor
from minitron.config import NemotronConfig


def nemo_samples() -> Path:
    folder = data_folder()
    if folder is None or not (folder / "nemo").is_dir():
        pytest.skip("checkpoints written by megatron-core are not at hand (MINITRON_DATA)")
    return folder / "nemo"


def sample_config(tmp_path: Path) -> NemotronConfig:
    with open_nemo(nemo_samples() / "tiny_nemotron_torch_dist.nemo", tmp_path) as checkpoint:
        return checkpoint.config


SAMPLES = ["tiny_nemotron_legacy_ckpt.nemo", "tiny_nemotron_torch_dist.nemo", "tp1_fp32/zarr", "tp1_fp32/torch_dist"]


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_bit_for_bit_and_their_logits(tmp_path: Path, name: str) -> None:
    from transformers.models.nemotron import NemotronForCausalLM

    expected = torch.load(nemo_samples() / "tp1_fp32/expected_hf_state_dict_and_logits.pt", weights_only=True)
    config = None if name.endswith(".nemo") else sample_config(tmp_path)
    with open_nemo(nemo_samples() / name, tmp_path, config) as checkpoint:
        write_hf(checkpoint, tmp_path / "hf")
    check_checkpoint(tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == expected["sd"].keys()
    assert all(torch.equal(found[key], expected["sd"][key]) for key in found)
    model = NemotronForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=2e-6)


# --- checkpoints in NeMo's layouts, made here with torch alone ---------------------------------------------------


def megatron_state(state: dict[str, torch.Tensor], config: NemotronConfig, pad_to: int = 1) -> dict[str, torch.Tensor]:
    """Megatron's tensors of a Hugging Face state dict, by views and concatenation."""
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    out: dict[str, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers):
        mine, theirs = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{mine}self_attn.q_proj.{kind}" in state:
                q, k, v = (state[f"{mine}self_attn.{part}_proj.{kind}"] for part in "qkv")
                rest = q.shape[1:]
                parts = [
                    q.view(groups, heads // groups, width, *rest),
                    k.view(groups, 1, width, *rest),
                    v.view(groups, 1, width, *rest),
                ]
                out[f"{theirs}self_attention.linear_qkv.{kind}"] = torch.cat(parts, 1).reshape(-1, *rest)
            for ours, name in (
                ("self_attn.o_proj", "self_attention.linear_proj"),
                ("mlp.up_proj", "mlp.linear_fc1"),
                ("mlp.down_proj", "mlp.linear_fc2"),
            ):
                if f"{mine}{ours}.{kind}" in state:
                    out[f"{theirs}{name}.{kind}"] = state[f"{mine}{ours}.{kind}"]
            out[f"{theirs}self_attention.linear_qkv.layer_norm_{kind}"] = state[f"{mine}input_layernorm.{kind}"]
            out[f"{theirs}mlp.linear_fc1.layer_norm_{kind}"] = state[f"{mine}post_attention_layernorm.{kind}"]
    for ours, name in (
        ("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
        ("lm_head.weight", "output_layer.weight"),
        ("model.norm.weight", "decoder.final_layernorm.weight"),
        ("model.norm.bias", "decoder.final_layernorm.bias"),
    ):
        if ours in state:
            tensor = state[ours]
            if "norm" not in ours:
                tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % pad_to))
            out[name] = tensor
    return out


NUMBERS = ["rotary_base", "rotary_percentage", "layernorm_epsilon", "num_query_groups", "kv_channels"]
NUMBERS += ["ffn_hidden_size", "init_method_std", "max_position_embeddings", "num_layers"]


def model_config_yaml(config: NemotronConfig, **overrides: object) -> str:
    values = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "rotary_percentage": config.partial_rotary_factor,
        "layernorm_epsilon": config.norm_eps,
        "init_method_std": config.initializer_range,
        "max_position_embeddings": config.max_position_embeddings,
        "normalization": "layernorm1p",
        "activation": "squared-relu",
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": bool(config.tie_word_embeddings),
        "bias": bool(config.mlp_bias),
        **overrides,
    }
    return yaml.safe_dump(values)


def save_ckpt(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = {"model.decoder.layers.0.mlp.linear_fc1._extra_state": io.BytesIO(b"transformer engine's")}
    torch.save({**{f"model.{name}": tensor.clone() for name, tensor in tensors.items()}, **extra}, path)


def save_ranks(folder: Path, tensors: dict[str, torch.Tensor], layers: int, tp: int, pp: int) -> None:
    """What NeMo writes with tensor and pipeline parallelism; layers are numbered from 0 in each stage."""
    linear = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias")
    rows = ("word_embeddings.weight", "output_layer.weight", *linear)
    for stage in range(pp):
        mine = {}
        for name, tensor in tensors.items():
            if name.startswith("decoder.layers."):
                number, rest = name.removeprefix("decoder.layers.").split(".", 1)
                if int(number) // (layers // pp) == stage:
                    mine[f"decoder.layers.{int(number) % (layers // pp)}.{rest}"] = tensor
            elif stage == (0 if name.startswith("embedding") else pp - 1):
                mine[name] = tensor
        for rank in range(tp):
            cut = {}
            for name, tensor in mine.items():
                axis = (
                    0
                    if name.endswith(rows)
                    else 1
                    if name.endswith(("linear_proj.weight", "linear_fc2.weight"))
                    else None
                )
                cut[name] = tensor if axis is None else tensor.chunk(tp, axis)[rank]
            sub = f"mp_rank_{rank:02d}" if pp == 1 else f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
            save_ckpt(folder / sub / "model_weights.ckpt", cut)


def save_zarr(folder: Path, tensors: dict[str, torch.Tensor], layers: int, tp: int) -> None:
    """Zarr version 2 as Megatron wrote it, bfloat16 included: one chunk per layer and tensor-parallel rank."""
    stacked: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("decoder.layers."):
            rest = name.removeprefix("decoder.layers.").split(".", 1)[1]
            stacked[f"decoder.layers.{rest}"] = torch.stack(
                [tensors[f"decoder.layers.{i}.{rest}"] for i in range(layers)]
            )
        else:
            stacked[name] = tensor
    for name, tensor in stacked.items():
        first = int(name.startswith("decoder.layers."))
        chunks = list(tensor.shape)
        chunks[0] = 1 if first else chunks[0]
        cut = None
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            cut = first + 1
        elif name.endswith(("embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_fc1.weight")):
            cut = first
        if cut is not None:
            chunks[cut] //= tp
        place = folder / f"model.{name}"
        place.mkdir(parents=True)
        dtype = "bfloat16" if tensor.dtype == torch.bfloat16 else "<f4"
        header = {"chunks": chunks, "dtype": dtype, "shape": list(tensor.shape), "order": "C", "zarr_format": 2}
        header |= {"compressor": None, "fill_value": None, "filters": None}
        (place / ".zarray").write_text(json.dumps(header))
        counts = [-(-size // step) for size, step in zip(tensor.shape, chunks, strict=True)]
        for index in np.ndindex(*counts):
            box = tensor[tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, chunks, strict=True))]
            (place / ".".join(map(str, index))).write_bytes(
                box.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


LAYOUTS = ["ckpt", "tp2", "tp2 pp2", "zarr", "zarr tp2", "torch_dist", "tar", "tar.gz"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["plain", "biases", "tied"])
def test_every_layout(tmp_path: Path, layout: str, kind: str) -> None:
    biases = kind == "biases"
    config = tiny_config(attention_bias=biases, mlp_bias=biases, tie_word_embeddings=kind == "tied")
    state = random_state(config, torch.bfloat16)
    tensors = megatron_state(state, config, pad_to=64)
    folder = tmp_path / "nemo"
    folder.mkdir()
    (folder / "model_config.yaml").write_text(model_config_yaml(config, vocab_size=config.vocab_size))
    if layout.startswith("tp2"):
        save_ranks(folder, tensors, config.num_hidden_layers, 2, 2 if "pp2" in layout else 1)
    elif layout.startswith("zarr"):
        save_zarr(folder / "model_weights", tensors, config.num_hidden_layers, 2 if "tp2" in layout else 1)
    elif layout == "torch_dist":
        from torch.distributed.checkpoint import FileSystemWriter, save

        named = {f"module.{name}": tensor for name, tensor in tensors.items()}
        save(named, storage_writer=FileSystemWriter(folder / "model_weights"), no_dist=True)
    else:
        save_ckpt(folder / "model_weights.ckpt", tensors)
    path = folder
    if layout.startswith("tar"):
        path = tmp_path / "model.nemo"
        with tarfile.open(path, "w:gz" if layout == "tar.gz" else "w") as tar:
            tar.add(folder, arcname="./")
    with open_nemo(path, tmp_path) as checkpoint:
        assert checkpoint.config.vocab_size == config.vocab_size
        assert checkpoint.config.attention_bias == checkpoint.config.mlp_bias == biases
        assert bool(checkpoint.config.tie_word_embeddings) == (kind == "tied")
        assert checkpoint.tensors.keys() == state.keys()
        for name, tensor in checkpoint.tensors.items():
            assert torch.equal(tensor.load(), state[name]), name
            assert torch.equal(torch.cat(list(tensor.blocks(100))), state[name]), name
    assert not list(tmp_path.glob(".inflated*"))


def test_separate_norm_names(tmp_path: Path) -> None:
    """Megatron's local layer spec, with gamma instead of gamma - 1."""
    config = tiny_config()
    state = random_state(config)
    tensors = {}
    for name, tensor in megatron_state(state, config).items():
        name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        tensors[name] = tensor + 1 if name.endswith("norm.weight") else tensor
    save_ckpt(tmp_path / "nemo" / "model_weights.ckpt", tensors)
    text = model_config_yaml(config, normalization="layernorm")
    (tmp_path / "nemo" / "model_config.yaml").write_text(text)
    with open_nemo(tmp_path / "nemo", tmp_path) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            torch.testing.assert_close(tensor.load(), state[name], rtol=0, atol=1e-7)


# --- the nine defects of the conversion script of transformers 4.46 ----------------------------------------------


def convert(tmp_path: Path, config: NemotronConfig, state: dict[str, torch.Tensor], **yaml_values: object) -> Path:
    folder = tmp_path / "nemo"
    save_ckpt(folder / "model_weights.ckpt", megatron_state(state, config, pad_to=128))
    (folder / "model_config.yaml").write_text(model_config_yaml(config, **yaml_values))
    with open_nemo(folder, tmp_path) as checkpoint:
        write_hf(checkpoint, tmp_path / "hf")
    return tmp_path / "hf"


def test_a_head_dim_of_minitron_8b_survives(tmp_path: Path) -> None:
    from transformers.models.nemotron import NemotronForCausalLM

    config = tiny_config(hidden_size=32, num_attention_heads=6, head_dim=12)
    folder = convert(tmp_path, config, random_state(config))
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 12
    assert NemotronForCausalLM.from_pretrained(folder).model.layers[0].self_attn.q_proj.weight.shape == (72, 32)


def test_b_biases_survive(tmp_path: Path) -> None:
    config = tiny_config(attention_bias=True, mlp_bias=True)
    state = random_state(config)
    found = load_file(convert(tmp_path, config, state) / "model.safetensors")
    for name in state:
        if name.endswith("_proj.bias"):
            assert torch.equal(found[name], state[name])


def test_c_tied_embeddings(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    folder = convert(tmp_path, config, random_state(config))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    check_checkpoint(folder)


def test_d_padding_of_the_vocabulary_is_cut(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=97)
    state = random_state(config)
    found = load_file(convert(tmp_path, config, state, vocab_size=97) / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], state["lm_head.weight"])
    assert found["model.embed_tokens.weight"].shape == (97, 32)


@pytest.mark.parametrize("activation", ["fast-swiglu", "swiglu", "geglu"])
def test_e_gated_mlp_is_refused(tmp_path: Path, activation: str) -> None:
    config = tiny_config()
    with pytest.raises(CheckpointError, match="no gate"):
        convert(tmp_path, config, random_state(config), activation=activation)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("theirs", "ours"), [("squared-relu", "relu2"), ("gelu", "gelu"), ("relu", "relu")])
def test_f_activations(tmp_path: Path, theirs: str, ours: str) -> None:
    config = tiny_config()
    folder = convert(tmp_path, config, random_state(config), activation=theirs)
    assert json.loads((folder / "config.json").read_text())["hidden_act"] == ours


def test_g_tokenizer_gives_an_attention_mask(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = tiny_config(vocab_size=512)
    (tmp_path / "nemo").mkdir()
    model = sentencepiece_model(tmp_path)
    shutil.copy(model, tmp_path / "nemo" / "0123_tokenizer.model")
    folder = convert(tmp_path, config, random_state(config), tokenizer={"model": "nemo:0123_tokenizer.model"})
    batch = AutoTokenizer.from_pretrained(folder)("the quick fox", return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert (folder / "tokenizer.model").read_bytes() == model.read_bytes()
    settings = json.loads((folder / "config.json").read_text())
    assert settings["vocab_size"] < 512  # rows past the tokenizer's pieces are padding
    assert (settings["pad_token_id"], settings["bos_token_id"], settings["eos_token_id"]) == (0, 2, 3)


def test_h_generation_config_and_rotary_keys(tmp_path: Path) -> None:
    config = tiny_config()
    values = {"rotary_percentage": 0.25, "rotary_base": 500000.0, "layernorm_epsilon": 1e-6}
    folder = convert(tmp_path, config, random_state(config), **values)
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["partial_rotary_factor"], settings["rope_theta"], settings["norm_eps"]) == (0.25, 500000.0, 1e-6)
    assert settings["rope_parameters"]["rope_theta"] == 500000.0
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (2, 3)


def test_h_rotary_defaults_are_megatrons(tmp_path: Path) -> None:
    config = tiny_config()
    text = yaml.safe_load(model_config_yaml(config))
    del text["rotary_percentage"]
    save_ckpt(tmp_path / "nemo" / "model_weights.ckpt", megatron_state(random_state(config), config))
    (tmp_path / "nemo" / "model_config.yaml").write_text(yaml.safe_dump(text))
    with open_nemo(tmp_path / "nemo", tmp_path) as checkpoint:
        assert checkpoint.config.partial_rotary_factor == 1.0


def test_nemo_2_class_without_fields(tmp_path: Path) -> None:
    """NeMo 2 may write the class only; shapes then follow from it and a mismatch with the tensors is refused."""
    config = tiny_config()
    save_ckpt(tmp_path / "nemo" / "model_weights.ckpt", megatron_state(random_state(config), config))
    (tmp_path / "nemo" / "context").mkdir()
    target = "nemo.collections.llm.gpt.model.nemotron.Nemotron3Config4B"
    function = {"_target_": "nemo.collections.llm.fn.activation.squared_relu", "_call_": False}
    values = {"config": {"_target_": target, "activation_func": function, "vocab_size": 96}}
    (tmp_path / "nemo" / "context" / "model.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError, match=r"24 heads and 8 groups of 128"), open_nemo(tmp_path / "nemo", tmp_path):
        pass
    shape = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 96, "num_attention_heads": 6, "num_query_groups": 2}
    values["config"] |= {**shape, "kv_channels": 12, "seq_length": 64}  # type: ignore[operator]
    (tmp_path / "nemo" / "context" / "model.yaml").write_text(yaml.safe_dump(values))
    with open_nemo(tmp_path / "nemo", tmp_path) as checkpoint:
        assert checkpoint.config.partial_rotary_factor == 0.5
        assert checkpoint.config.hidden_act == "relu2"


def test_padding_is_known_from_a_tokenizer_json(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=97)
    folder = tmp_path / "nemo"
    save_ckpt(folder / "model_weights.ckpt", megatron_state(random_state(config), config, pad_to=128))
    (folder / "model_config.yaml").write_text(model_config_yaml(config))
    vocab = {
        "model": {"type": "BPE", "vocab": {str(i): i for i in range(96)}},
        "added_tokens": [{"id": 96, "content": "x"}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(vocab))
    with open_nemo(folder, tmp_path) as checkpoint:
        assert checkpoint.config.vocab_size == 97
        assert any("31 padding rows" in note for note in checkpoint.notes)


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["text", [1], {"a": 1}, -1, float("nan")])
def test_settings_that_cannot_be(tmp_path: Path, key: str, value: object) -> None:
    """Refused with a sentence, or read as it stands where NeMo itself would not mind; no other error."""
    config = tiny_config()
    with contextlib.suppress(CheckpointError):
        convert(tmp_path, config, random_state(config), **{key: value})
        check_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("form", ["nemo", "nemo2"])
@pytest.mark.parametrize("kind", ["plain", "biases", "tied"])
def test_i_back_to_nemo(tmp_path: Path, form: str, kind: str) -> None:
    biases = kind == "biases"
    config = tiny_config(vocab_size=97, attention_bias=biases, mlp_bias=biases, tie_word_embeddings=kind == "tied")
    state = random_state(config, torch.bfloat16)
    target = tmp_path / ("model.nemo" if form == "nemo" else "folder")
    write_nemo(Checkpoint(config, {name: from_tensor(tensor) for name, tensor in state.items()}), target, form=form)
    with open_nemo(target, tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        assert all(torch.equal(tensor.load(), state[name]) for name, tensor in checkpoint.tensors.items())
        for key in ("vocab_size", "head_dim", "partial_rotary_factor", "rope_theta", "norm_eps", "hidden_act",
                    "intermediate_size", "attention_bias", "mlp_bias", "max_position_embeddings"):  # fmt: skip
            assert getattr(checkpoint.config, key) == getattr(config, key), key


def test_i_torch_reads_what_we_write(tmp_path: Path) -> None:
    """The distributed checkpoint in a `.nemo`, loaded by torch.distributed.checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader, load

    config = tiny_config(vocab_size=97)
    state = random_state(config, torch.bfloat16)
    checkpoint = Checkpoint(config, {name: from_tensor(tensor) for name, tensor in state.items()})
    write_nemo(checkpoint, tmp_path / "model.nemo", form="nemo")
    with tarfile.open(tmp_path / "model.nemo") as tar:
        assert all(name.startswith("./") for name in tar.getnames())
        (tmp_path / "out" / "model_weights").mkdir(parents=True)
        for member in tar:
            if member.isfile():
                (tmp_path / "out" / member.name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in megatron_state(state, config, pad_to=128).items():
        if name.startswith("decoder.layers."):
            rest = name.removeprefix("decoder.layers.").split(".", 1)[1]
            layers = [f"decoder.layers.{layer}.{rest}" for layer in range(config.num_hidden_layers)]
            name, tensor = (
                f"decoder.layers.{rest}",
                torch.stack([megatron_state(state, config)[each] for each in layers]),
            )
        expected[f"model.{name}"] = tensor
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    load(found, storage_reader=FileSystemReader(tmp_path / "out" / "model_weights"), no_dist=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
