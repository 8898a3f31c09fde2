"""Which parameters of a model are trained: all, its norms, or adapters; and merging adapters into the weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..families import family_of
from .run_folder import TrainError

_COPY = "modules_to_save.default"
TUNE = ("full", "norms", "head", "lora")


def choose_trained(model: nn.Module, tune: str, rank: int = 16, whole: Sequence[str] = ()) -> nn.Module:
    """Choose which parameters of a model are trained.

    Args:
        model: a causal language model; changed in place.
        tune: `full` for all; `norms` for the layer norms alone; `head` for the modules of `whole` alone; `lora` for
            adapters on all matrices of the layers, which needs peft.
        rank: of the adapters.
        whole: names of modules that are trained in full in any case, such as a new head.

    Returns:
        The model, for `lora` wrapped by peft. `export.export_model` merges the adapters.

    Raises:
        TrainError: an unknown choice, a rank below 1, or peft is not installed.
    """
    if tune == "qlora":
        raise TrainError(
            "tune 'qlora', adapters over weights that stay in 8 or 4 bits, is not built (docs/customization.md says "
            "why); use lora, with a smaller --micro-batch or --recompute layers where memory is short"
        )
    if tune not in TUNE:
        raise TrainError(f"tune is {tune!r}; it must be one of {', '.join(TUNE)}")
    if tune == "full":
        return model.requires_grad_(True)
    if tune in ("norms", "head"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_((tune == "norms" and "norm" in name) or name.split(".")[0] in whole)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise TrainError("tune 'head' needs a model with a head of its own; a language model has none")
        return model
    if rank < 1:
        raise TrainError(f"the rank of the adapters is {rank}; it must be at least 1")
    try:
        from peft import LoraConfig, get_peft_model  # heavy, and an extra
    except ImportError:
        raise TrainError("tune 'lora' needs peft: pip install 'minitron[train]'") from None
    matrices = [part.name.rpartition(".")[2] for part in family_of(model.config).layer if part.columns is not None]
    kind = "CAUSAL_LM" if not whole else None
    adapter = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=matrices, task_type=kind, modules_to_save=list(whole) or None
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 by a name that is deprecated there
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, adapter)  # type: ignore[arg-type, return-value]


def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model with LoRA adapters as those of the plain model that computes the same."""
    weights: dict[str, Tensor] = {}
    plain = model.get_base_model()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            # Of a module that is trained in full peft keeps the original beside the trained copy.
            if "lora_" not in name and ".original_module." not in name:
                plain_name = name.replace(".base_layer.", ".").replace(f".{_COPY}.", ".")
                weights[plain_name] = parameter.detach()
        for name, module in plain.named_modules():
            if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
                for adapter in module.active_adapters:
                    key = f"{name}.weight"
                    weights[key] = weights[key] + module.get_delta_weight(adapter).to(weights[key].dtype)
    return weights
