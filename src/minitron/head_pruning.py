"""Removing attention heads from a built model, as `PreTrainedModel.prune_heads` is documented to do.

It serves that one method. `minitron.prune` makes a smaller checkpoint out of a large one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import NemotronConfig


def kept_heads(config: Any, layer: int) -> tuple[int, int]:
    """Numbers of query heads and key/value heads of a layer, without those in `config.pruned_heads`."""
    pruned = getattr(config, "pruned_heads", None) or {}
    heads = set(pruned.get(layer, pruned.get(str(layer), ())))
    if not heads:
        return config.num_attention_heads, config.num_key_value_heads  # type: ignore[return-value]
    kept, groups = _survivors(config, layer, heads)
    return len(kept), len(groups)


def prune_attention(
    layers: nn.ModuleList, config: NemotronConfig, layer: int, before: set[int], after: set[int]
) -> None:
    """Cut the heads `after - before` out of the projections of a layer that already lacks the heads `before`.

    Raises:
        ValueError: the layer or a head does not exist, or the groups that stay would be unequal.
    """
    if not 0 <= layer < len(layers):
        raise ValueError(f"prune_heads: layer {layer} does not exist; layers are 0 to {len(layers) - 1}")
    attention: Any = layers[layer].self_attn
    old_heads, old_groups = _survivors(config, layer, before)
    heads, groups = _survivors(config, layer, after)
    q_rows = _rows([old_heads.index(head) for head in heads], config.head_dim)  # type: ignore[arg-type]
    kv_rows = _rows([old_groups.index(group) for group in groups], config.head_dim)  # type: ignore[arg-type]
    attention.q_proj = _select(attention.q_proj, q_rows, dim=0)
    attention.k_proj = _select(attention.k_proj, kv_rows, dim=0)
    attention.v_proj = _select(attention.v_proj, kv_rows, dim=0)
    attention.o_proj = _select(attention.o_proj, q_rows, dim=1)
    attention.num_heads, attention.num_key_value_heads = len(heads), len(groups)
    attention.num_key_value_groups = len(heads) // len(groups)


def _survivors(config: NemotronConfig, layer: int, pruned: set[int]) -> tuple[list[int], list[int]]:
    """Query heads and key/value heads that stay, in order."""
    total, per_group = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads  # type: ignore[operator]
    wrong = sorted(head for head in pruned if not 0 <= head < total)
    if wrong:
        raise ValueError(f"prune_heads: layer {layer} has no head {wrong[0]}; heads are 0 to {total - 1}")
    heads = [head for head in range(total) if head not in pruned]
    groups = sorted({head // per_group for head in heads})
    sizes = {sum(head // per_group == group for head in heads) for group in groups}
    if len(sizes) != 1:
        raise ValueError(
            f"prune_heads: layer {layer} would keep {sorted(sizes) or 'no'} query heads per key/value head; "
            f"each key/value head that stays must keep the same number, at least one"
        )
    return heads, groups


def _rows(heads: list[int], head_dim: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _select(linear: nn.Linear, index: Tensor, dim: int) -> nn.Linear:
    index = index.to(linear.weight.device)
    weight = linear.weight.detach().index_select(dim, index)
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    out.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        bias = linear.bias.detach().index_select(0, index) if dim == 0 else linear.bias.detach().clone()
        out.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    return out
