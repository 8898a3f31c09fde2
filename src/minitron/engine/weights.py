"""The weights of a causal language model in the form that decoding reads: contiguous rows, each read once.

All matrices of a model are in one of the formats of `engine.quantize`, the embedding too; the head's is `head_format`.

`down_proj` is stored transposed, so that one MLP neuron is one contiguous row that can be skipped; gains of the norms
are `1 + weight` in fp32. They come from a model in memory (whose other matrices are shared, not copied) or straight
from a checkpoint on disk. Sizes and constants are those of the model's modules and tensors, as its `forward` uses them;
its `config` may have been changed since. Letters of shapes: D hidden, N query heads, K key/value heads, H head_dim,
F MLP neurons, V vocabulary, S positions, R rotated channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import pages
from ..checkpoint.hf import open_hf
from ..checkpoint.tensors import LazyTensor
from ..config import NemotronConfig
from ..finite import NotFiniteError
from ..head_pruning import kept_heads
from ..heads import NemotronForCausalLM
from ..model import NemotronDecoderLayer, NemotronRotaryEmbedding
from .quantize import HEAD_FORMATS, PLAIN, Format, Matrix, quantize, quantize_blocks, row_bytes

WEIGHT_DTYPES = (torch.bfloat16, torch.float32)
"""What the decode kernels read where weights are not quantized. The reference takes any floating dtype."""


@dataclass
class Norm:
    """Layer norm: `gain` (1 + the stored weight) and `offset`, both (D,) fp32."""

    gain: Tensor
    offset: Tensor


@dataclass
class Constants:
    """What the computation needs besides weights."""

    num_layers: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    tied: bool
    """Whether the head is the embedding."""
    inv_freq: Tensor
    """Of the rotation, fp32 (R / 2,)."""
    attention_scaling: float
    """Factor on the cosines and sines of the rotation."""


@dataclass
class LayerWeights:
    """One decoder layer. Matrices are (outputs, inputs), biases fp32 or None."""

    num_heads: int
    num_key_value_heads: int
    attention_norm: Norm
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    mlp_norm: Norm
    up: Matrix
    down_t: Matrix
    """(F, D): row f is what neuron f adds to the residual stream."""
    qkv_bias: Tensor | None
    o_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All six."""
        return self.q, self.k, self.v, self.o, self.up, self.down_t


@dataclass
class EngineWeights:
    """A whole model. `embed` and `head` are (V, D), the same tensor if they are tied.

    `format` is that of all matrices but the head (and a tied embedding): one of `engine.quantize.FORMATS`, or for the
    reference engine "fp16" or "fp64".
    """

    constants: Constants
    format: str
    embed: Matrix
    head: Matrix
    norm: Norm
    layers: list[LayerWeights]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.embed.shape[1]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embed.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values, and of torch's matrix products: that of plain matrices, otherwise bf16."""
        return PLAIN.get(self.format, torch.bfloat16)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices; tied ones are counted once."""
        found = (self.embed, self.head, *(m for x in self.layers for m in x.matrices))
        return sum(matrix.nbytes for matrix in {matrix.data.data_ptr(): matrix for matrix in found}.values())

    def bytes_per_token(self, active: float = 1.0) -> float:
        """Bytes of weights that decoding one token reads when the share `active` of MLP neurons is not zero."""
        dense = sum(m.nbytes for layer in self.layers for m in layer.matrices[:-1]) + self.head.nbytes
        return dense + active * sum(layer.down_t.nbytes for layer in self.layers)

    def rotary_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (S, R / 2) fp32 for positions 0 to S - 1."""
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self.constants.inv_freq
        return angles.cos() * self.constants.attention_scaling, angles.sin() * self.constants.attention_scaling


def head_format(format: str) -> str:
    """The format of the LM head where the other matrices have `format`."""
    return HEAD_FORMATS.get(format, format)


def weight_bytes(config: NemotronConfig, format: Format) -> int:
    """Bytes of a model's matrices in a format, without bf12's escapes (below a percent for real weights)."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    H: int = config.head_dim  # type: ignore[assignment]

    def size(rows: int, columns: int, format: str = format) -> int:
        return rows * row_bytes(format, columns) + (8 * rows + 4 if format == "bf12" else 0)

    total = size(V, D, head_format(format)) + (0 if config.tie_word_embeddings else size(V, D))
    for index in range(config.num_hidden_layers):
        heads, groups = kept_heads(config, index)
        total += size(heads * H, D) + 2 * size(groups * H, D) + size(D, heads * H) + 2 * size(F, D)
    return total


def from_model(
    model: NemotronForCausalLM, format: Format | None = None, copies: dict[str, Matrix] | None = None
) -> EngineWeights:
    """The weights of a model on the CPU.

    Args:
        model: its matrices are shared, except `down_proj`, if the format is that of their dtype.
        format: that of the model's dtype if None.
        copies: matrices that are not shared, by the names of their parameters. Those that it contains are reused; the
            others are made and added to it.

    Raises:
        NotFiniteError: weights of `down_proj` are NaN or infinite.
        ValueError: see `engine.quantize.quantize`.
    """
    tensors = tensors_of(model)
    own = format_of(model.model.embed_tokens.weight.dtype)
    chosen = format or own
    ready = {} if copies is None else copies

    def rows(name: str, format: str) -> Matrix:
        if format == own:
            return quantize(tensors[name], own)  # type: ignore[arg-type]
        if name not in ready:
            ready[name] = quantize(tensors[name], format)  # type: ignore[arg-type]
        return ready[name]

    def transposed(name: str) -> Matrix:
        if name not in ready:
            matrix = tensors[name]
            turned = pages.empty((matrix.shape[1], matrix.shape[0]), matrix.dtype).copy_(matrix.T)
            _check_rows(name, turned)
            ready[name] = quantize(turned, chosen)  # type: ignore[arg-type]
        return ready[name]

    return _assemble(constants_of(model), tensors.get, transposed, rows, chosen)


def copied(tensors: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """The matrices of a model that `from_model` copies for a format; it shares the others."""
    own = format_of(tensors[f"{EMBEDDING}.weight"].dtype)
    return {
        name: tensor for name, tensor in tensors.items() if tensor.dim() == 2 and (format != own or name.endswith(DOWN))
    }


def constants_of(model: NemotronForCausalLM) -> Constants:
    """The constants that the model's modules have now."""
    body = model.model
    first = body.layers[0] if len(body.layers) else None
    return Constants(
        len(body.layers),
        model.config.head_dim if first is None else first.self_attn.head_dim,  # type: ignore[arg-type, union-attr]
        model.config.intermediate_size if first is None else first.mlp.up_proj.weight.shape[0],  # type: ignore[arg-type, union-attr]
        body.norm.eps,
        model.lm_head.weight is body.embed_tokens.weight,
        body.rotary_emb.inv_freq.detach().float().contiguous(),
        body.rotary_emb.attention_scaling,
    )


def constants_from_config(config: NemotronConfig) -> Constants:
    """The constants of a new model of this configuration."""
    rotary = NemotronRotaryEmbedding(config)
    return Constants(
        config.num_hidden_layers,
        config.head_dim,  # type: ignore[arg-type]
        config.intermediate_size,
        config.norm_eps,
        config.tie_word_embeddings,
        rotary.inv_freq,
        rotary.attention_scaling,
    )


EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
DOWN = "mlp.down_proj.weight"


def parts_of(layer: NemotronDecoderLayer) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules of a layer that have weights, with their names within it."""
    attention, mlp = layer.self_attn, layer.mlp
    yield "input_layernorm", layer.input_layernorm
    yield "self_attn.q_proj", attention.q_proj
    yield "self_attn.k_proj", attention.k_proj
    yield "self_attn.v_proj", attention.v_proj
    yield "self_attn.o_proj", attention.o_proj
    yield "post_attention_layernorm", layer.post_attention_layernorm
    yield "mlp.up_proj", mlp.up_proj
    yield "mlp.down_proj", mlp.down_proj


def tensors_of(model: NemotronForCausalLM) -> dict[str, Tensor]:
    """The tensors that the model's modules use now, by their names in a checkpoint; a tied head too."""
    body = model.model
    modules = {EMBEDDING: body.embed_tokens, NORM: body.norm, HEAD: model.lm_head}
    for index, layer in enumerate(body.layers):
        modules |= {f"model.layers.{index}.{name}": module for name, module in parts_of(layer)}  # type: ignore[arg-type]
    found = {}
    for name, module in modules.items():
        for kind in ("weight", "bias"):
            tensor = getattr(module, kind, None)  # an embedding has no bias
            if tensor is not None:
                found[f"{name}.{kind}"] = tensor.detach()
    return found


def format_of(dtype: torch.dtype) -> str:
    """The plain format of a dtype."""
    return next(name for name, found in PLAIN.items() if found == dtype)


def from_checkpoint(folder: Path, format: Format | None = None) -> EngineWeights:
    """The weights of a Hugging Face folder, read tensor by tensor; memory holds them and one block.

    Args:
        folder: see `checkpoint.hf.open_hf`.
        format: that of the checkpoint's dtype if None.

    Raises:
        CheckpointError: something is missing or wrong with the folder.
        NotFiniteError: weights of `down_proj` are NaN or infinite.
        ValueError: see `engine.quantize.quantize`.
    """
    checkpoint = open_hf(folder)
    tensors = checkpoint.tensors
    chosen = format or format_of(tensors[f"{EMBEDDING}.weight"].dtype)

    def rows(name: str, format: str) -> Matrix:
        lazy = tensors[name]
        return quantize_blocks(lazy.blocks(), (lazy.shape[0], lazy.shape[1]), format)

    def transposed(name: str) -> Matrix:
        lazy = tensors[name]
        out = pages.empty((lazy.shape[1], lazy.shape[0]), PLAIN.get(chosen, lazy.dtype))
        start = 0
        for block in lazy.blocks():
            out[:, start : start + len(block)] = block.T
            start += len(block)
        _check_rows(name, out)
        return quantize(out, chosen)  # type: ignore[arg-type]

    return _assemble(constants_from_config(checkpoint.config), tensors.get, transposed, rows, chosen)


def _assemble(
    constants: Constants,
    get: Callable[[str], Tensor | LazyTensor | None],
    transposed: Callable[[str], Matrix],
    rows: Callable[[str, str], Matrix],
    format: str,
) -> EngineWeights:
    """All weights: vectors from `get`, matrices in a format from `rows`, transposed ones from `transposed`."""

    def bias(*modules: str) -> Tensor | None:
        parts = [get(f"{module}.bias") for module in modules]
        if all(part is None for part in parts):
            return None
        sizes = [get(f"{module}.weight").shape[0] for module in modules]  # type: ignore[union-attr]
        pairs = zip(parts, sizes, strict=True)
        return torch.cat([torch.zeros(size) if part is None else _fp32(part) for part, size in pairs])

    def norm(module: str) -> Norm:
        return Norm(_fp32(get(f"{module}.weight")) + 1.0, _fp32(get(f"{module}.bias")))

    def heads(module: str) -> int:
        return get(f"{module}.weight").shape[0] // constants.head_dim  # type: ignore[union-attr]

    layers = []
    for index in range(constants.num_layers):
        at = f"model.layers.{index}."
        attn, mlp = f"{at}self_attn.", f"{at}mlp."
        layers.append(
            LayerWeights(
                heads(f"{attn}q_proj"),
                heads(f"{attn}k_proj"),
                attention_norm=norm(f"{at}input_layernorm"),
                **{name: rows(f"{attn}{name}_proj.weight", format) for name in "qkvo"},
                mlp_norm=norm(f"{at}post_attention_layernorm"),
                up=rows(f"{mlp}up_proj.weight", format),
                down_t=transposed(f"{at}{DOWN}"),
                qkv_bias=bias(*(f"{attn}{name}_proj" for name in "qkv")),
                o_bias=bias(f"{attn}o_proj"),
                up_bias=bias(f"{mlp}up_proj"),
                down_bias=bias(f"{mlp}down_proj"),
            )
        )
    embed = rows(f"{EMBEDDING}.weight", head_format(format) if constants.tied else format)
    head = embed if constants.tied else rows(f"{HEAD}.weight", head_format(format))
    return EngineWeights(constants, format, embed, head, norm(NORM), layers)


def _check_rows(name: str, matrix: Tensor) -> None:
    """Refuse NaN and infinity where rows of neurons that are zero are skipped: 0 times NaN is NaN."""
    if matrix.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(matrix)):
        raise NotFiniteError(f"some numbers of {name} are NaN or infinite")


def _fp32(tensor: Tensor | LazyTensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.load() if isinstance(tensor, LazyTensor) else tensor).float().contiguous()


def __getattr__(name: str) -> object:
    if name != "packed_bytes":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.packed_bytes is named weight_bytes now", DeprecationWarning, stacklevel=2)
    return weight_bytes
