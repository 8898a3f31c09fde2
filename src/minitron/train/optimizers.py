"""Three kinds of AdamW, and their state as tensors by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from . import eight_bits
from .run_folder import TrainError
from .schedule import TrainConfig

Named = Iterable[tuple[str, nn.Parameter]]

_AVERAGES = ("exp_avg", "exp_avg_sq")


def make_optimizer(
    groups: Sequence[tuple[float, Sequence[nn.Parameter]]], config: TrainConfig
) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only, not on vectors.

    Args:
        groups: (factor of the learning rate, parameters that are trained).
        config: kind, learning rate, decay and averaging factors.

    Raises:
        TrainError: the kind does not work on this device or for sharded parameters.
    """
    trained = [p for _, members in groups for p in members]
    split = [
        {"params": members, "weight_decay": decay, "scale": scale}
        for scale, part in groups
        for members, decay in (
            ([p for p in part if p.ndim >= 2], config.weight_decay),
            ([p for p in part if p.ndim < 2], 0.0),
        )
        if members
    ]
    if config.optimizer == "adamw":
        # One pass over memory instead of a dozen; torch has such a kernel for CPU and CUDA.
        fused = all(p.device.type in ("cpu", "cuda") for p in trained)
        return torch.optim.AdamW(split, lr=config.lr, betas=config.betas, fused=fused)
    if config.optimizer == "offload" and any(isinstance(p, DTensor) for p in trained):
        raise TrainError("optimizer 'offload' works in one process only; adamw and adamw8bit shard their state")
    try:
        from torchao.optim import AdamW8bit, CPUOffloadOptimizer  # heavy, and an extra
    except ImportError:
        raise TrainError(f"optimizer {config.optimizer!r} needs torchao: pip install 'minitron[train]'") from None
    if config.optimizer == "adamw8bit":
        return AdamW8bit(split, lr=config.lr, betas=config.betas)
    if any(p.device.type != "cuda" for p in trained):
        raise TrainError("optimizer 'offload' moves state from a GPU to the CPU; the model is on the CPU already")
    return CPUOffloadOptimizer(split, torch.optim.AdamW, lr=config.lr, betas=config.betas)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each group to `rate` times its factor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao
            group["lr"].fill_(rate * group["scale"])
        else:
            group["lr"] = rate * group["scale"]


def scale_gradients(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply gradients by a factor, also those that an offloading optimizer has already copied to the CPU."""
    on_cpu: Mapping[nn.Parameter, Tensor] = getattr(optimizer, "param_d2h_map", {})
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
        if parameter in on_cpu and parameter in optimizer.queue:  # type: ignore[attr-defined]
            optimizer.queue[parameter].synchronize()  # type: ignore[attr-defined]
            on_cpu[parameter].grad.mul_(factor)  # type: ignore[union-attr]


def _state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The state of a parameter, to read or to fill."""
    inner = getattr(optimizer, "optim_dict", {}).get(parameter)
    if inner is not None:
        return inner.state[optimizer.param_d2h_map[parameter]]  # type: ignore[attr-defined]
    owner = getattr(optimizer, "d_opt", None) or optimizer
    return owner.state[parameter]


def state_tensors(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, Tensor]:
    """The optimizer's state: `step.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`; 8-bit averages as their parts, and sharded
    ones as those of `eight_bits.to_parts`."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in named:
        for key, value in (_state_of(optimizer, parameter) if parameter.requires_grad else {}).items():
            if hasattr(value, eight_bits.CODES):
                parts = {part: getattr(value, part) for part in value.__tensor_flatten__()[0]}
            elif _has_eight_bits(optimizer) and isinstance(value, DTensor):
                parts = eight_bits.to_parts(value)
            else:
                tensors[f"{key}.{name}"] = value
                continue
            tensors |= {f"{key}/{part}.{name}": tensor for part, tensor in parts.items()}
    return tensors


def _has_eight_bits(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer, "block_size")


def load_state(optimizer: torch.optim.Optimizer, named: Named, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `state_tensors` returned; whole tensors are sharded as their parameters are."""
    for name, parameter in named:
        if f"step.{name}" not in tensors:
            continue
        state = _state_of(optimizer, parameter)
        inner = getattr(optimizer, "param_d2h_map", {}).get(parameter, parameter)
        state["step"] = tensors[f"step.{name}"]
        if not (inner.device.type == "cpu" or _has_eight_bits(optimizer)):
            state["step"] = state["step"].to(inner.device)
        for key in _AVERAGES:
            state[key] = _average(optimizer, key, name, tensors, inner)


def _average(
    optimizer: torch.optim.Optimizer, key: str, name: str, tensors: Mapping[str, Tensor], like: Tensor
) -> Tensor:
    """An average of a parameter, in the form in which the optimizer keeps it."""
    if not _has_eight_bits(optimizer):
        return placed_like(tensors[f"{key}.{name}"], like)
    signed = key == "exp_avg"
    if f"{key}/{eight_bits.SCALES}.{name}" in tensors:  # of several processes
        codes, scales = (tensors[f"{key}/{part}.{name}"] for part in (eight_bits.CODES, eight_bits.SCALES))
    elif f"{key}/{eight_bits.CODES}.{name}" in tensors:
        whole: Any = _eight_bits(key, name, tensors, like.device)
        if not isinstance(like, DTensor):
            return whole
        codes, scales = whole.codes, whole.scale.repeat_interleave(whole.block_size).view(whole.shape)
    else:
        scales = tensors[f"{key}.{name}"]
        codes = torch.full_like(scales, 255, dtype=torch.uint8)
    average = optimizer._new_buffer(like, signed)  # type: ignore[attr-defined]
    eight_bits.fill(average, placed_like(codes, like), placed_like(scales, like), signed)
    return average


def _eight_bits(key: str, name: str, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    parts: dict[str, Any] = {part: tensors[f"{key}/{part}.{name}"].to(device) for part in OptimState8bit.tensor_attrs}
    return OptimState8bit(**parts, signed=key == "exp_avg")


def placed_like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor on the device of `model`, or its shard if `model` is one."""
    if isinstance(model, DTensor) and not isinstance(value, DTensor):
        # Every process has the whole tensor, so each takes its own part and nothing is sent.
        return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
    return value.to(model.device)
