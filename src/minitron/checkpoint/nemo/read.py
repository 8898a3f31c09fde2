"""NeMo 1 (`.nemo` or its folder), NeMo 2 (`weights/` + `context/`) and bare Megatron folders, read lazily.

All of NeMo's ways to store weights end in one map from Megatron's names (global layer numbers) to lazy tensors; from
there to Hugging Face names: QKV split by query group, padded vocabulary trimmed, biases kept, norms as gamma - 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron.config import NemotronConfig
from minitron.files.links import require_inside

from ..archive import Files, open_archive
from ..hf import check_shapes, generation_config, read_config, side_file_name
from ..limits import (
    MAX_CONFIG_BYTES,
    MAX_LAYERS,
    MAX_SENTENCEPIECE_BYTES,
    MAX_TOKENIZER_BYTES,
    MAX_TOKENIZER_JSON_MEMORY,
    MAX_YAML_BYTES,
    CheckpointError,
    member_path,
    parse_json,
    require,
    shown,
)
from ..names import hf_shapes, is_fused_qkv, megatron_to_hf, qkv_rows
from ..spm import SentencePieceModel, composes, differences, read_spm, tokenizer_config, tokenizer_json
from ..tensors import ByteRange, Checkpoint, LazyTensor, join_columns, join_rows, zeros
from ..torch_file import TorchFile, state_dicts_of
from ..yaml_values import parse_yaml
from .config import config_from_nemo, with_class_defaults, zero_centred_norms
from .files import config_of_context
from .megatron_files import Grid, read_distributed

_SETTINGS = ("model_config.yaml", "context/model.yaml", "context/io.json")
_PREFIXES = ("model.", "module.", "state_dict.")
_PARTS = ("decoder.", "embedding.", "output_layer.")
_IGNORED = ("_extra_state", "rotary_pos_emb.", "position_ids", "amax_history", "scale_inv")
_OLD = "language_model."
_MAX_NAME = 512
_RANK = re.compile(
    r"(?:mp_rank_(?P<mp>\d{1,4})|tp_rank_(?P<tp>\d{1,4})_pp_rank_(?P<pp>\d{1,4}))(?:_(?P<pp2>\d{1,4}))?/(?:model_weights\.ckpt|model_optim_rng\.pt)"
)
# Which dimension of a parameter tensor parallelism cuts; the rest is repeated on every rank.
_CUT_ROWS = (
    "word_embeddings.weight",
    "output_layer.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_fc1.weight",
    "linear_fc1.bias",
)
_CUT_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")

Named = dict[str, LazyTensor]


@contextmanager
def open_nemo(path: Path, scratch: Path, config: NemotronConfig | None = None) -> Iterator[Checkpoint]:
    """A NeMo or Megatron checkpoint under Hugging Face names, readable while the block runs.

    Args:
        path: a `.nemo` file, its unpacked folder, a NeMo 2 folder, or a bare distributed checkpoint folder.
        scratch: where a gzip archive may be inflated.
        config: the architecture, for a folder that does not state it; next to a bare folder `model_config.yaml` and
            `config.json` are looked for.

    Raises:
        CheckpointError: not such a checkpoint; hostile, cut or incomplete; not a Nemotron model.
    """
    with open_archive(path, scratch) as files:
        if path.is_dir():
            for name, data in files.items():
                if side_file_name(name) or name.endswith((".model", ".yaml", ".json")):
                    require_inside(data.path, path)
        files = _below_common_folder(files)
        named = read_weights(files, path)
        values, where = _settings(files, path)
        require(
            values or config,
            f"{path}: no model_config.yaml, context/model.yaml or context/io.json in it; pass --config",
        )
        spm = find_sentencepiece(files, values)
        notes: list[str] = []
        if config is None:
            rows = _of(named, "embedding.word_embeddings.weight").shape[0]
            tokens = len(spm[1].pieces) if spm else _tokens_of_json(files)
            config = config_from_nemo(values, _vocabulary(rows, tokens, values, notes), where)
        yield to_checkpoint(named, config, spm, files, notes, zero_centred=not values or zero_centred_norms(values))


def _below_common_folder(files: Files) -> Files:
    """Archives made by hand often have everything in one folder."""
    tops = {name.partition("/")[0] for name in files}
    nested = any(name.endswith(tuple(f"/{settings}" for settings in _SETTINGS)) for name in files)
    if len(tops) == 1 and nested and not any(name in files for name in _SETTINGS):
        return {name.partition("/")[2]: data for name, data in files.items()}
    return files


def _settings(files: Files, path: Path) -> tuple[dict[str, Any], str]:
    """The architecture as NeMo spells it, from the checkpoint or from beside it; {} if there is none."""
    for name in ("model_config.yaml", "context/model.yaml"):
        if name in files:
            values = parse_yaml(files[name].read_small(MAX_YAML_BYTES), files[name])
            inner = values.get("config", values.get("model", values))
            require(isinstance(inner, dict), f"{files[name]}: config is not a mapping")
            return with_class_defaults(inner), str(files[name])
    if "context/io.json" in files:
        data = files["context/io.json"]
        return with_class_defaults(config_of_context(data.read_small(MAX_CONFIG_BYTES), data)), str(data)
    beside = path.parent / "model_config.yaml"
    if path.is_dir() and beside.is_file():
        return parse_yaml(ByteRange.whole(beside).read_small(MAX_YAML_BYTES), beside), str(beside)
    return {}, ""


# --- weights, as Megatron names them ---------------------------------------------------------------------------


def read_weights(files: Files, path: Path) -> Named:
    """Megatron's names, without prefix and with global layer numbers, to tensors over all ranks.

    Raises:
        CheckpointError: no weights in any of the known places; ranks missing.
    """
    for folder in ("model_weights/", "weights/", ""):
        below = {name.removeprefix(folder): data for name, data in files.items() if name.startswith(folder)}
        if ".metadata" in below or "metadata.json" in below or any(name.endswith("/.zarray") for name in below):
            return _unstacked(read_distributed(below, f"{path}/{folder}", _is_looked_at))
    if "model_weights.ckpt" in files:
        stages = enumerate(_plain(files["model_weights.ckpt"]))
        return _in_order({(number, 0): {0: stage} for number, stage in stages}, path)
    ranks = {name: match for name in files if (match := _RANK.fullmatch(name))}
    require(ranks, f"{path}: no model_weights, model_weights.ckpt, weights or rank folders; not a NeMo checkpoint")
    return _merge_ranks(ranks, files, path)


def _plain(data: ByteRange) -> list[Named]:
    """The tensors of a rank's file: one map, or one for each of its virtual pipeline stages."""
    return [_stripped(stage, str(data)) for stage in state_dicts_of(TorchFile(data))]


def _bare(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _is_parameter(name: str) -> bool:
    """Whether a tensor of a Megatron checkpoint is a parameter of the model, not the optimizer's or a buffer."""
    short = len(name) <= _MAX_NAME
    return short and _bare(name).startswith(_PARTS) and not any(part in name for part in _IGNORED)


def _is_looked_at(name: str) -> bool:
    return _is_parameter(name) or _OLD in name


def _stripped(tensors: dict[str, Any], where: str) -> dict[str, Any]:
    """Parameters of the model under their bare names; optimizer state and the like are skipped."""
    found = {}
    for full, tensor in tensors.items():
        if _is_parameter(full):
            name = _bare(full)
            require(name not in found, f"{where}: {name} appears twice, under two prefixes")
            shape = list(tensor.shape)  # of a vector or a matrix, perhaps stacked over layers
            require(1 <= len(shape) <= 3, f"{where}: {name} has shape {shape}, expected a vector or a matrix")
            found[name] = tensor
    old = any(_OLD in name for name in tensors)
    require(not old, f"{where}: saved by NeMo without Megatron core (language_model.*); convert it with NeMo first")
    require(found, f"{where}: no parameter of a Megatron GPT model in it")
    return found


def _unstacked(grids: dict[str, Grid]) -> Named:
    named: Named = {}
    for name, grid in _stripped(dict(grids), "distributed checkpoint").items():
        if name.startswith("decoder.layers.") and not re.match(r"decoder\.layers\.\d", name):
            require(grid.shape and grid.shape[0] <= MAX_LAYERS, f"{name}: shape {grid.shape}, expected layers first")
            rest = name.removeprefix("decoder.layers.")
            for layer, tensor in enumerate(grid.layers()):
                named[f"decoder.layers.{layer}.{rest}"] = tensor
        else:
            named[name] = grid.tensor()
    return named


def _merge_ranks(ranks: dict[str, re.Match[str]], files: Files, path: Path) -> Named:
    """Join tensor-parallel parts, and concatenate pipeline stages.

    With virtual stages a rank holds several pieces of the model: the first pieces of all ranks come first.
    """
    stages: dict[tuple[int, int], dict[int, Named]] = {}
    for name, match in ranks.items():
        tp = int(match["mp"] or match["tp"] or 0)
        pp = int(match["pp"] or match["pp2"] or 0)
        for virtual, stage in enumerate(_plain(files[name])):
            require(tp not in stages.get((virtual, pp), {}), f"{path}: two files of rank {tp}, stage {pp}")
            stages.setdefault((virtual, pp), {})[tp] = stage
    widths = {len(stage) for stage in stages.values()}
    depth, chunks = (1 + max(key[axis] for key in stages) for axis in (1, 0))
    complete = len(stages) == depth * chunks and all(
        sorted(stage) == list(range(max(widths))) for stage in stages.values()
    )
    require(complete, f"{path}: ranks {sorted(ranks)}: some are missing (tensor x pipeline ranks must form a grid)")
    return _in_order(stages, path)


def _in_order(stages: dict[tuple[int, int], dict[int, Named]], path: Path) -> Named:
    """(virtual stage, pipeline stage) -> tensor-parallel rank -> tensors, as one map with global layer numbers."""
    merged: Named = {}
    first_layer = 0
    for _, stage in sorted(stages.items()):
        parts = [stage[rank] for rank in sorted(stage)]
        layers = 0
        for name in parts[0]:
            require(all(name in part for part in parts), f"{path}: {name} is not on every tensor-parallel rank")
            tensor = _join_ranks(name, [part[name] for part in parts])
            match = re.fullmatch(r"decoder\.layers\.(\d{1,5})\.(.+)", name)
            if match:
                layers = max(layers, int(match[1]) + 1)
                name = f"decoder.layers.{first_layer + int(match[1])}.{match[2]}"
            # With pipeline stages and tied embeddings, the last stage repeats the embedding.
            merged.setdefault(name, tensor)
        first_layer += layers
    return merged


def _join_ranks(name: str, parts: list[LazyTensor]) -> LazyTensor:
    if name.endswith(_CUT_ROWS):
        return join_rows(parts)
    if name.endswith(_CUT_COLUMNS):
        return join_columns(parts)
    return parts[0]


# --- to Hugging Face -------------------------------------------------------------------------------------------


def to_checkpoint(
    named: Named,
    config: NemotronConfig,
    spm: tuple[ByteRange, SentencePieceModel] | None,
    files: Files,
    notes: list[str],
    *,
    zero_centred: bool = True,
) -> Checkpoint:
    """Rename, split and trim; the config learns from the tensors which biases there are and what dtype they have.

    Raises:
        CheckpointError: tensors that a Nemotron model does not have, or shapes that contradict the config.
    """
    config.attention_bias = any(name.endswith(("linear_qkv.bias", "linear_proj.bias")) for name in named)
    config.mlp_bias = any(name.endswith(("linear_fc1.bias", "linear_fc2.bias")) for name in named)
    if "output_layer.weight" not in named:
        if not config.tie_word_embeddings:
            notes.append("no output layer in the checkpoint: the LM head is tied to the embeddings")
        config.tie_word_embeddings = True
    tensors = _renamed(named, config)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if not zero_centred:
        notes.append("norm weights were stored as gamma; stored as gamma - 1 now")
        tensors = {n: _minus_one(t) if n.endswith("norm.weight") else t for n, t in tensors.items()}
    dtype = _of(named, "embedding.word_embeddings.weight").dtype
    config.dtype = dtype
    ordered = {}
    for name, shape in hf_shapes(config).items():
        if name not in tensors and name.endswith("_proj.bias"):
            notes.append(f"{name} is missing beside other biases: zeros")
            tensors[name] = zeros(shape, dtype)
        if name in tensors:
            ordered[name] = tensors[name]
    check_shapes(config, ordered, "NeMo checkpoint")
    extra = sorted(set(tensors) - set(ordered))
    require(not extra, f"NeMo checkpoint: {extra[:3]} lie beyond the layers of the config; is num_layers right?")
    checkpoint = Checkpoint(config, ordered, notes=notes)
    _add_tokenizer(checkpoint, spm, files)
    return checkpoint


def _renamed(named: Named, config: NemotronConfig) -> Named:
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert groups is not None
    assert width is not None
    runs = qkv_rows(heads, groups, width)
    tensors: Named = {}
    for name, tensor in named.items():
        if is_fused_qkv(name):
            height = (heads + 2 * groups) * width
            require(
                tensor.shape[0] == height,
                f"{name} has {tensor.shape[0]} rows, expected {height}: {heads} heads and {groups} groups of {width}",
            )
            for part, rows in runs.items():
                tensors[megatron_to_hf(name, part)] = tensor.take_rows(rows)
        else:
            tensors[megatron_to_hf(name)] = tensor
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            rows = tensors[name].shape[0]
            require(rows >= config.vocab_size, f"{name} has {rows} rows, the vocabulary {config.vocab_size}")
            tensors[name] = tensors[name].take_rows([(0, config.vocab_size)])
    return tensors


def _minus_one(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(
        tensor.shape, tensor.dtype, lambda start, stop: (tensor.rows(start, stop).float() - 1).to(tensor.dtype)
    )


def _of(named: Named, name: str) -> LazyTensor:
    if name not in named:
        raise CheckpointError(f"NeMo checkpoint: no tensor {name}; is a pipeline rank missing?")
    return named[name]


# --- tokenizer -------------------------------------------------------------------------------------------------


def find_sentencepiece(files: Files, values: dict[str, Any]) -> tuple[ByteRange, SentencePieceModel] | None:
    """The SentencePiece model inside, by the name in the config, or the only `.model` there is."""
    section = values.get("tokenizer")
    named = section.get("model") if isinstance(section, dict) else None
    candidates = []
    if isinstance(named, str):
        candidates.append(
            member_path(named.removeprefix("nemo:").rpartition("/")[2] or "x", "tokenizer.model").as_posix()
        )
    models = [name for name in files if name.endswith(".model")]
    candidates += models if len(models) == 1 else []
    for name in candidates:
        if name in files:
            data = files[name]
            return data, read_spm(data.read_small(MAX_SENTENCEPIECE_BYTES), data)
    return None


def _tokens_of_json(files: Files) -> int | None:
    """The size of the vocabulary in a `tokenizer.json` inside."""
    data = next((data for name, data in files.items() if name.rpartition("/")[2] == "tokenizer.json"), None)
    if data is None or data.size > MAX_TOKENIZER_BYTES:
        return None
    values = parse_json(data.read(), data, MAX_TOKENIZER_JSON_MEMORY)
    model, added = values.get("model"), values.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    numbers = [*vocab.values()] if isinstance(vocab, dict) else [*range(len(vocab))] if isinstance(vocab, list) else []
    numbers += [entry.get("id") for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    return max((number for number in numbers if type(number) is int), default=-1) + 1 or None


def _vocabulary(rows: int, tokens: int | None, values: dict[str, Any], notes: list[str]) -> int:
    """Rows of the embedding that are tokens; Megatron pads them to a multiple for tensor parallelism."""
    told = next((values[key] for key in ("vocab_size", "override_vocab_size") if values.get(key) is not None), None)
    require(told is None or type(told) is int, f"NeMo checkpoint: vocab_size is {shown(told)}, expected a whole number")
    size = told or tokens or rows
    require(size <= rows, f"the vocabulary has {size:,} tokens, the embedding only {rows:,} rows")
    if size < rows:
        notes.append(f"{rows - size:,} padding rows were cut off the embedding and the output layer")
    elif tokens is None and not told:
        notes.append("no tokenizer inside: padding rows of the vocabulary, if there are any, are kept")
    return size


def _add_tokenizer(checkpoint: Checkpoint, spm: tuple[ByteRange, SentencePieceModel] | None, files: Files) -> None:
    for name, data in files.items():
        place = side_file_name(name)
        if place is not None:
            checkpoint.files[place] = data
    if spm is not None:
        _add_sentencepiece(checkpoint, *spm)
    if "generation_config.json" not in checkpoint.files:
        checkpoint.texts["generation_config.json"] = generation_config(checkpoint.config)


def _add_sentencepiece(checkpoint: Checkpoint, data: ByteRange, model: SentencePieceModel) -> None:
    checkpoint.files["tokenizer.model"] = data
    if "tokenizer.json" not in checkpoint.files:
        checkpoint.texts["tokenizer.json"] = tokenizer_json(model)
        checkpoint.texts["tokenizer_config.json"] = tokenizer_config(model, checkpoint.config.max_position_embeddings)
        checkpoint.differences += differences(model)
        if model.charsmap and composes(model.charsmap):
            checkpoint.notes.append(
                "SentencePiece's normalization is followed but for rare sequences: a letter with several combining "
                "marks, or a ligature with one, may be normalized otherwise"
            )
    for name in ("bos", "eos", "pad"):
        piece = model.special(name)
        if piece is not None:
            setattr(checkpoint.config, f"{name}_token_id", model.pieces.index(piece))


def config_beside(path: Path) -> NemotronConfig | None:
    """The `config.json` in a bare Megatron folder or in the folder above, if there is one."""
    for folder in (path, path.parent):
        if folder.is_dir() and (folder / "config.json").is_file():
            return read_config(folder)
    return None
