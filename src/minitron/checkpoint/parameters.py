"""The tensors of a folder as the parameters of its model: shapes and dtypes compared, old buffers set aside."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from minitron.config import ModelConfig
from minitron.families import family_of
from minitron.ops.rope import rotary_frequencies
from minitron.shapes import describe

from .limits import CheckpointError, require
from .names import hf_shapes
from .tensors import LazyTensor

_BUFFER = re.compile(r"(?:.*\.)?rotary_emb\.(?:original_)?inv_freq")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_MAX_VALUES_PER_BYTE = 8  # one bit for each weight, the most that a quantized tensor can pack


def parameters_of(
    config: ModelConfig, tensors: Mapping[str, LazyTensor], where: object
) -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors that are parameters, in a dtype that everything here computes in, and notes about the others.

    Rotary frequencies, which old checkpoints store, follow from the configuration: they are compared with it and set
    aside, with a note that says whether they differ. float8 weights without scales are widened to bfloat16, which
    holds each of their values exactly.

    Raises:
        CheckpointError: a dtype that weights cannot have.
    """
    notes = []
    shape = describe(config)
    buffers = [name for name in tensors if _BUFFER.fullmatch(name)]
    other = next((name for name in buffers if not _are_those_of(config, tensors[name])), None)
    if other is not None:
        notes.append(
            f"{where}: {other} {list(tensors[other].shape)} differs from the frequencies that config.json gives "
            f"(rope_theta {shape.rope_theta:g}, {shape.rotary_dim // 2} of them); config.json decides, as in "
            f"transformers. If the model was trained with the stored ones, correct config.json"
        )
    elif buffers:
        notes.append(f"{len(buffers)} rotary_emb.inv_freq tensors skipped: they are what config.json states")
    kept = {name: tensor for name, tensor in tensors.items() if name not in set(buffers)}
    float8 = [name for name, tensor in kept.items() if tensor.dtype in _FLOAT8]
    if float8 and not getattr(config, "quantization_config", None):
        kind = _name(kept[float8[0]].dtype)
        scale = next((name for name in kept if re.search(r"(?:^|[._])scales?(?:_inv)?$", name)), None)
        require(
            scale is None,
            f"{where}: {float8[0]} is {kind} and {scale} scales it; expected weights without scales",
        )
        notes.append(f"{len(float8)} tensors of {kind} read as bfloat16, which holds their values exactly")
        kept |= {name: kept[name].to(torch.bfloat16) for name in float8}
        if config.dtype in (None, *_FLOAT8):
            config.dtype = torch.bfloat16
    return kept, notes


def _are_those_of(config: ModelConfig, tensor: LazyTensor) -> bool:
    """Whether stored frequencies are those of config.json, scaled or not, up to the rounding of their dtype."""
    shape = describe(config)
    width = int(shape.head_dim * shape.rope["partial_rotary_factor"])
    plain = rotary_frequencies(width, shape.rope_theta)
    expected = [plain, *_scaled(config)]
    if tensor.shape != plain.shape or tensor.dtype not in _DTYPES:
        return False
    stored = tensor.load()
    # fp16 has no smaller positive number than 6e-8.
    smallest = torch.finfo(stored.dtype).smallest_normal if stored.dtype == torch.float16 else 0.0
    rtol = max(1e-5, 2 * torch.finfo(stored.dtype).eps)
    return any(torch.allclose(stored.double(), each.double(), rtol=rtol, atol=smallest) for each in expected)


def _scaled(config: ModelConfig) -> list[torch.Tensor]:
    from ..framework import ROPE_INIT_FUNCTIONS

    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in ROPE_INIT_FUNCTIONS:
        return []
    return [ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]]


def check_shapes(config: ModelConfig, tensors: Mapping[str, LazyTensor], where: object) -> None:
    """Compare names, shapes and dtypes with the configuration. Heads other than the LM head are not looked at.

    Where config.json has a quantization_config, a matrix may be packed: tensors under its layer's name that have room
    for its values stand for it.

    Raises:
        CheckpointError: a parameter is missing, or has another shape or a dtype that weights cannot have.
    """
    # Question answering keeps the backbone under `transformer.`, transformers' own base models under no prefix.
    prefix = next((p for p in ("model.", "transformer.") if p + "embed_tokens.weight" in tensors), None)
    if prefix is None:
        prefix = "" if "embed_tokens.weight" in tensors else "model."
    own = family_of(config).architecture
    classes = config.architectures or [own]
    room = _room(tensors) if getattr(config, "quantization_config", None) else {}
    for name, shape in hf_shapes(config).items():
        if name.startswith("model."):
            name = prefix + name.removeprefix("model.")
        elif name not in tensors and classes[0] != own:
            continue
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype not in _DTYPES:
            _require_packed(name, shape, tensor, room, where)


def _require_packed(
    name: str, shape: tuple[int, ...], tensor: LazyTensor | None, room: Mapping[str, int], where: object
) -> None:
    layer, _, last = name.rpartition(".")
    packed = tensor is None or tensor.dtype not in _DTYPES
    fits = len(shape) == 2 and room.get(layer, 0) * _MAX_VALUES_PER_BYTE >= shape[0] * shape[1]
    if last == "weight" and packed and fits:
        return
    if tensor is None:
        raise CheckpointError(f"{where}: no tensor {name}; config.json asks for it with shape {list(shape)}")
    if tensor.shape != shape:
        raise CheckpointError(f"{where}: {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
    known = ", ".join(map(_name, _DTYPES))
    raise CheckpointError(f"{where}: {name} is {_name(tensor.dtype)}, expected one of {known}")


def _room(tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    """Bytes of all tensors under each layer's name (`...q_proj`: its weight, scales, zero points)."""
    room: dict[str, int] = {}
    for name, tensor in tensors.items():
        layer = re.sub(r"\.(?:weight|qweight|scales|qzeros|g_idx)[^/]*$", "", name)
        room[layer] = room.get(layer, 0) + tensor.nbytes
    return room


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
