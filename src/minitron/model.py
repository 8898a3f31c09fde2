"""The Nemotron architecture: attention, MLP, layer and the backbone, `NemotronModel`; its heads are in `heads.py`.

Single-device eager PyTorch; names of parameters and classes are those of transformers, whose framework carries it.
Letters of shapes: B batch, T tokens, S cached + new tokens, D hidden, N query heads, K key/value heads, H head_dim,
F MLP neurons, V vocabulary. What differs from Llama: layer norm with gain `1 + weight` and a bias, squared ReLU
without a gate, and rotary embedding on a part of each head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from . import framework
from .cache import LegacyCache, NemotronCache, from_legacy, to_legacy
from .config import NemotronConfig
from .framework import (
    ACT2FN,
    ALL_ATTENTION_FUNCTIONS,
    CACHE_NAME,
    CACHE_NAMES,
    ROPE_INIT_FUNCTIONS,
    GradientCheckpointingLayer,
    capture_outputs,
    dynamic_rope_update,
    merge_with_config_defaults,
)
from .framework import initialization as init
from .head_pruning import kept_heads, prune_attention
from .masks import causal_mask, readable
from .ops.act import SquaredReLU
from .ops.attention import eager_attention
from .ops.autocast import autocast_dtype, without_autocast
from .ops.norm import layer_norm_1p
from .ops.rope import apply_rotary, rotary_frequencies
from .submodules import moved
from .written_code import record


class NemotronLayerNorm1P(nn.LayerNorm):
    """Layer norm with gain `1 + weight`, formed in fp32; see `ops.norm`. New weights are 0, a gain of 1."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, device: Any = None, dtype: Any = None) -> None:
        super().__init__(hidden_size, eps=eps, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Gain 1, offset 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., D), in the dtype of `input`, under autocast too."""
        if autocast_dtype(input) is None:  # entering a context takes longer than normalizing a token
            return layer_norm_1p(input, self.weight, self.bias, self.eps)
        with without_autocast(input):
            return layer_norm_1p(input, self.weight, self.bias, self.eps)


class NemotronRotaryEmbedding(nn.Module):
    """Cosines and sines for positions. The frequencies stay fp32 whatever dtype the model is moved to.

    The class name, `original_inv_freq`, `rope_type` and `compute_default_rope_parameters` are what transformers
    looks for to refill buffers of a model that was built on the meta device.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: NemotronConfig, device: Any = None) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type: str = config.rope_parameters["rope_type"]  # type: ignore[index]
        if self.rope_type != "default" and self.rope_type not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ValueError(f"rope_parameters: rope_type is {self.rope_type!r}; it must be one of {known}")
        compute = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = compute(config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: NemotronConfig, device: Any = None, **_: Any) -> tuple[Tensor, float]:
        """Frequencies without scaling, and the factor 1 on cosines and sines."""
        width = int(config.head_dim * config.partial_rotary_factor)  # type: ignore[operator]
        return rotary_frequencies(width, config.rope_theta, device), 1.0

    def _apply(self, fn: Callable, recurse: bool = True) -> NemotronRotaryEmbedding:
        # `model.to(torch.bfloat16)` ends here for every buffer. Rounded frequencies would turn positions.
        before = {name: getattr(self, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            moved = getattr(self, name)
            if moved.dtype != kept.dtype:
                setattr(self, name, kept.to(moved.device))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, T) to cosines and sines (B, T, R) in the dtype of `x`, computed in fp32."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class NemotronMLP(nn.Module):
    """`down_proj(act(up_proj(x)))`; no gate."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = _activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.down_proj(self.act_fn(self.up_proj(x)))


def _activation(act: str | Callable) -> Callable:
    if callable(act):
        return act
    if act == "relu2":
        return SquaredReLU()
    if act not in ACT2FN:
        raise ValueError(
            f"hidden_act is {act!r}, which is no activation known to transformers; known: {', '.join(sorted(ACT2FN))}. "
            f"A config saved with a function as hidden_act needs hidden_act=<that function> when it is loaded"
        )
    return ACT2FN[act]


class NemotronAttention(nn.Module):
    """Causal grouped-query attention with rotary embedding on a part of each head.

    `num_heads * head_dim` need not be `hidden_size`.
    """

    def __init__(self, config: NemotronConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim: int = config.head_dim  # type: ignore[assignment]
        self.hidden_size = config.hidden_size
        self.num_heads, self.num_key_value_heads = kept_heads(config, layer_idx)
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        D, q_width, kv_width = (
            config.hidden_size,
            self.num_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
        )
        self.q_proj = nn.Linear(D, q_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_width, D, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) to (B, T, D), and the weights (B, N, T, S) where the attention function returns them.

        The cache may also be named `cache`. Other `kwargs` reach the attention function: paged caches, sequence
        lengths of packed batches, and what a registered attention of the user's own expects.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape)
        k = self.k_proj(hidden_states).view(shape)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = apply_rotary(q, k, *position_embeddings)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        cache = framework.given_cache(past_key_values, kwargs)
        if cache is not None:
            k, v = framework.update_cache(cache, k, v, self.layer_idx, kwargs)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)  # type: ignore[arg-type]
        if kwargs.get("output_attentions"):
            attend = eager_attention  # the only one that has weights to return
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*out.shape[:2], -1)), weights


class NemotronDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each on a normalized copy of the residual stream."""

    def __init__(self, config: NemotronConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = NemotronAttention(config, layer_idx)
        self.mlp = NemotronMLP(config)
        self.input_layernorm = NemotronLayerNorm1P(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = NemotronLayerNorm1P(config.hidden_size, eps=config.norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, T, D) to (B, T, D); `kwargs` as for `NemotronAttention.forward`."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class NemotronPreTrainedModel(PreTrainedModel):
    """What all Nemotron classes share: loading, initialization, and what the framework may do with them."""

    config: NemotronConfig
    config_class = NemotronConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NemotronDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = [*CACHE_NAMES]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NemotronDecoderLayer, "attentions": NemotronAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NemotronLayerNorm1P):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Embedding):
            # Truncated at three standard deviations, which leaves the deviation at 0.987 of the one asked for.
            std = self.config.initializer_range
            init.trunc_normal_(module.weight, mean=0.0, std=std, a=-3 * std, b=3 * std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
            padding = getattr(module, "padding_idx", None)
            if padding is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[padding])
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in transformers; a checkpoint of any of the five classes gives its backbone to any other.

        Raises:
            ValueError: the checkpoint holds a part of the backbone only. transformers would fill the rest with
                random numbers and go on.
        """
        other = "transformer" if cls.base_model_prefix == "model" else "model"
        renamed = rf"^{other}\."
        kwargs["key_mapping"] = {renamed: f"{cls.base_model_prefix}.", **(kwargs.get("key_mapping") or {})}
        want_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        # `save_pretrained` undoes what was done on loading; this renaming it must not undo.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if renamed not in c.source_patterns] or None
        backbone = {name for name, _ in model.base_model.named_parameters()}
        prefix = "" if model.base_model is model else f"{cls.base_model_prefix}."
        missing = sorted(name for name in info["missing_keys"] if name.removeprefix(prefix) in backbone)
        if missing and len(missing) < len(backbone):
            raise ValueError(
                f"{pretrained_model_name_or_path}: {len(missing)} of {len(backbone)} backbone tensors are missing, "
                f"{missing[0]!r} first; the checkpoint is incomplete or its config.json describes another shape"
            )
        return (model, info) if want_info else model

    def prune_heads(self, heads_to_prune: dict[int, list[int]]) -> None:
        """Remove query heads, `{layer: [head, ...]}`, counted as in the model as it was first built.

        With grouped queries each key/value head that stays must keep the same number of query heads; one that loses
        all of its query heads goes with them. `config.pruned_heads` records what was removed, and `from_pretrained`
        builds the smaller shape from it. transformers 5 dropped this method; its documentation page promises it.

        Raises:
            ValueError: a head or layer that does not exist, or groups left unequal.
        """
        pruned = dict(getattr(self.config, "pruned_heads", None) or {})
        for layer, heads in heads_to_prune.items():
            before = set(pruned.get(layer, ()))
            after = before | set(heads)
            prune_attention(self.base_model.layers, self.config, layer, before, after)  # type: ignore[arg-type]
            pruned[layer] = sorted(after)
            self.config.pruned_heads = pruned


class NemotronModel(NemotronPreTrainedModel):
    """The decoder without a head: token ids to hidden states."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__(config)
        config.validate_shapes()
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(NemotronDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = NemotronLayerNorm1P(config.hidden_size, eps=config.norm_eps)
        self.rotary_emb = NemotronRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states of tokens; arguments and outputs as the page documents them.

        Args:
            input_ids: (B, T), or `inputs_embeds`: (B, T, D); exactly one of them.
            attention_mask: (B, S), 1 (or true) to attend and 0 for padding, in any dtype; or four dimensions, of bools
                or integers, true to attend, or of floats that are added to the scores.
            position_ids: (B, T); by default they go on from the cached tokens. Without a mask, a position that is
                not one more than the position before it begins another document (positions that restart at 0, for
                instance); the documents of a row do not attend to each other.
            past_key_values: a `Cache`, or the legacy tuple; what is given decides what is returned. May also be named
                `cache`, as transformers does from 5.24 on.
            use_cache, output_attentions, output_hidden_states, return_dict: None means what the config says.
            cache_position: (T,), positions of the new tokens in the sequence.
            **kwargs: for the attention function.

        Returns:
            `last_hidden_state` (B, T, D), `past_key_values` (`cache` from transformers 5.24 on, which still reads
            the other name), `hidden_states` (layers + 1 tensors, the last one after the final norm), `attentions`
            (layers tensors (B, N, T, S), whatever the attention implementation).

        Raises:
            ValueError: both or none of ids and embeddings; ids outside the vocabulary and mask values other than 0
                and 1 (checked on the CPU); a mask of another width than S; packed documents behind a filled cache;
                two caches, or a cache under a name that is not known.
        """
        # The framework's decorators take the presence of a flag, even None, as an answer.
        flags = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        cache = framework.given_cache(past_key_values, kwargs)
        framework.refuse_stray_caches(kwargs)
        return self._decode(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_position=cache_position,
            **{name: value for name, value in flags.items() if value is not None},
            **kwargs,
        )

    @merge_with_config_defaults
    @capture_outputs
    def _decode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: Cache | LegacyCache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        cache_position: Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds is needed; {given} was given")
        if inputs_embeds is None:
            check_ids(input_ids, self.embed_tokens.num_embeddings, "input_ids")  # type: ignore[arg-type]
            inputs_embeds = self.embed_tokens(input_ids)

        legacy = isinstance(past, tuple | list)
        cache: Cache | None = from_legacy(past, len(self.layers)) if legacy else past  # type: ignore[assignment, arg-type]
        if use_cache and cache is None:
            cache = NemotronCache(config=self.config)
        if position_ids is None:
            position_ids = cache_position
        positions_given = position_ids is not None
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen  # type: ignore[union-attr]
        if position_ids.dim() == 1:
            position_ids = position_ids.unsqueeze(0)

        output_attentions = kwargs.pop("output_attentions", self.config.output_attentions)
        config = self.config.eager_copy() if output_attentions else self.config
        mask = causal_mask(config, inputs_embeds, attention_mask, cache, position_ids, positions_given)  # type: ignore[arg-type]
        # The last layers of a head's backbone may read both sides, see `config.bidirectional_layers`.
        both_ways = getattr(self.config, "bidirectional_layers", None) or 0
        reads = {"attention_mask": mask}
        late_reads: dict[str, Any] = {}
        if both_ways:
            wide = config.bidirectional_copy()
            wide_mask = causal_mask(wide, inputs_embeds, attention_mask, cache, position_ids, positions_given)  # type: ignore[arg-type]
            late_reads = {"attention_mask": wide_mask, "is_causal": False}
        if output_attentions:
            kwargs["output_attentions"] = True
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                **(reads if index < len(self.layers) - both_ways else late_reads),
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        past_out = to_legacy(cache) if legacy else cache  # type: ignore[arg-type]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: past_out})  # type: ignore[arg-type]


def check_ids(ids: Tensor, size: int, name: str, ignore: int | None = None) -> None:
    """Refuse ids outside `range(size)`, but `ignore`. Only on the CPU: elsewhere looking would stall the device.

    Ids without plain values to look at (fake, sharded, or under `torch.func`) pass.

    Raises:
        ValueError: names the argument, the value and the range.
    """
    if ids.numel() == 0 or not readable(ids):
        return
    lowest, highest = torch.aminmax(ids)
    if lowest >= 0 and highest < size:
        return
    wrong = (ids < 0) | (ids >= size)
    if ignore is not None:
        wrong &= ids != ignore
    if wrong.any():
        allowed = f"0 to {size - 1}" + (f" or {ignore}" if ignore is not None else "")
        raise ValueError(f"{name} contains {ids[wrong][0].item()}; it must be {allowed}")


record(__name__)  # what the engine computes; see there

__getattr__ = moved(__name__, "minitron.heads")
