"""Checks for weights and outputs that are not finite, with errors that name them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

PIECE = 1 << 24
"""Numbers that are checked at a time: bounds the memory."""

SCORES = "q_proj", "k_proj", "q_norm", "k_norm"
"""Modules whose outputs go into nothing but attention scores."""


class NotFiniteError(ValueError):
    """A model computes NaN or infinity."""


def weights_not_finite(model: nn.Module, modules: tuple[str, ...] = ()) -> str:
    """The first weights that are NaN or infinite, as words for a sentence; empty if there are none.

    Tensors without plain values (on the meta device, sharded, quantized) are skipped.

    Args:
        modules: the names of the modules that are looked at, without what they are in; none for all.
    """
    from torch import Tensor, nn

    for name, tensor in model.state_dict(keep_vars=True).items():
        if modules and name.rpartition(".")[0].rpartition(".")[2] not in modules:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.is_floating_point():
            continue
        flat = tensor.detach().reshape(-1)
        wrong = sum(int((~part.isfinite()).sum()) for part in flat.split(PIECE))
        if wrong:
            return f"{wrong:,} of the {flat.numel():,} numbers of {name} are NaN or infinite"
    return ""


def check_weights(models: dict[str, nn.Module]) -> None:
    """Refuse models with weights that are NaN or infinite.

    Args:
        models: by their names in messages, such as "the teacher".

    Raises:
        NotFiniteError: names the model and its first such tensor.
    """
    for who, model in models.items():
        wrong = weights_not_finite(model)
        if wrong:
            raise NotFiniteError(
                f"{who} cannot be used: {wrong}; the checkpoint is damaged or its training had diverged"
            )


def check_attention(model: nn.Module) -> None:
    """Refuse a model on a CPU whose weights before the attention scores are NaN or infinite.

    torch 2.13's attention on a CPU with AVX-512 loses a score that is NaN, so that no logit would show it.

    Raises:
        NotFiniteError: names the first such tensor.
    """
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        wrong = weights_not_finite(model, SCORES)
        if wrong:
            raise NotFiniteError(f"an attention score is nan: {wrong}")


def check_logits(logits: Tensor | np.ndarray) -> None:
    """Refuse logits (..., V) with a row whose largest value is NaN or infinite.

    Raises:
        NotFiniteError: without the cause, which `explain` adds.
    """
    if 0 in logits.shape:
        return
    largest = logits.max(-1) if isinstance(logits, np.ndarray) else logits.detach().amax(-1).double().cpu().numpy()
    wrong = largest[~np.isfinite(largest)]
    if wrong.size:
        raise NotFiniteError(f"the largest logit is {float(wrong[0])}")


def explain(error: NotFiniteError, model: nn.Module) -> NotFiniteError:
    """The error with its cause: the model's first weights that are not finite, or too narrow a dtype."""
    wrong = weights_not_finite(model)
    if not wrong:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        wrong = f"all weights are finite, so the activations are too large for {dtype}"
        wrong += "; try fp32" if dtype.endswith("16") else ""
    return NotFiniteError(f"{error}: {wrong}")
