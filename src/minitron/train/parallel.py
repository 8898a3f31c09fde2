"""Preparing a model for its first step, in the one order that works.

Tensor parallelism splits matrices; recomputation wraps parts of a layer; compilation sees a layer with both; sharding
comes last and gathers what a layer needs just before it runs. Then weights are read, if they were not read yet.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from ..families import FAMILIES, SUPPORTED, family_of
from ..world import World, current_world
from .meta_loading import load_weights
from .objective import Objective
from .run_folder import TrainError
from .schedule import TrainConfig

_STYLES: dict[str, Callable[[], Any]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    # Norms of heads: each process has the whole weight and its own heads, axis 2 of (B, T, N, H). DTensor adds up the
    # gradients of the weight.
    "replicated_with_grad_allreduce": partial(SequenceParallel, sequence_dim=2, use_local_output=True),
}


def make_world(tensor_parallel: int = 1, device: torch.device | str = "cpu") -> World:
    """The world of the processes that `world.join` connected.

    Args:
        tensor_parallel: how many neighbouring processes share each matrix; the data is split over the groups of them.
        device: where the tensors are.

    Raises:
        TrainError: the number of processes is not a multiple of it.
    """
    world = current_world()
    if not dist.is_initialized():
        if tensor_parallel != 1:
            raise TrainError(f"tensor_parallel is {tensor_parallel}; with one process it must be 1")
        return world
    processes = world.size
    if tensor_parallel < 1 or processes % tensor_parallel:
        raise TrainError(f"tensor_parallel is {tensor_parallel}; it must divide the number of processes, {processes}")
    kind = torch.device(device).type
    shape = (processes // tensor_parallel, tensor_parallel)
    return replace(world, mesh=init_device_mesh(kind, shape, mesh_dim_names=("data", "tensor")))


def prepare(objective: Objective, config: TrainConfig, world: World) -> None:
    """Apply `config.recompute`, `config.compile` and the world to a model in place; a second call changes nothing.

    Args:
        objective: model and loss on their device.
        config: the settings.
        world: what `make_world` gave.
    """
    if world.size > 1 and world.mesh is None:
        raise TrainError(f"{world.size} processes train together only in a world of `parallel.make_world`")
    model = objective.model
    if world.mesh is not None and world.mesh.size(1) > 1:
        _split_matrices(model, world)
    _recompute(model, config.recompute)
    if config.compile:
        for layer in _layers(model):
            if not getattr(layer, "_minitron_compiled", False):
                layer.compile()
                layer._minitron_compiled = True  # type: ignore[assignment]
    if world.mesh is not None:
        _shard(objective, world)
        for each in (*objective.trained_models(), _guide(objective)):
            load_weights(each, torch.device(world.mesh.device_type))


def _guide(objective: Objective) -> nn.Module | None:
    """A teacher that is not trained."""
    return getattr(getattr(objective.loss, "targets", None), "model", None)


def _layers(model: nn.Module) -> list[nn.Module]:
    return list(_backbone(model).layers)  # type: ignore[union-attr, arg-type]


def _backbone(model: Any) -> nn.Module:
    """The decoder, also of a model with adapters."""
    return (model.get_base_model() if hasattr(model, "peft_config") else model).base_model


# --- tensor parallelism ------------------------------------------------------------------------------------------


def _split_matrices(model: nn.Module, world: World) -> None:
    """Split what the config's plan names. Embedding and LM head stay whole, because the losses read the head."""
    config, mesh = model.config, world.mesh["tensor"]  # type: ignore[index]
    ways = mesh.size()
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value: Any = getattr(config, name)
        if value % ways:
            raise TrainError(f"tensor_parallel is {ways}; it must divide the model's {name}, which is {value}")
    family = family_of(config)
    backbone = _backbone(model)
    styles: dict[str, Any] = {}
    for name, module in backbone.named_modules():
        for pattern, style in family.tensor_parallel_plan.items():
            if fnmatch.fnmatchcase(name, pattern) and not isinstance(next(module.parameters()), DTensor):
                styles[name] = _STYLES[style]()
    if styles:
        parallelize_module(backbone, mesh, styles)


# --- recomputation -----------------------------------------------------------------------------------------------


def _recompute(model: nn.Module, what: str) -> None:
    if what == "mlp" and getattr(model.config, "model_type", None) not in FAMILIES:
        raise TrainError(f"recompute 'mlp' works for {SUPPORTED} only; use 'layers'")
    for layer in _layers(model):
        # What `gradient_checkpointing_enable` of transformers does, whose name changes between versions.
        layer.gradient_checkpointing = what == "layers"  # type: ignore[assignment]
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
        mlp = layer.mlp
        mlp.__dict__.pop("forward", None)  # type: ignore[union-attr]
        if what == "mlp":
            frugal = _frugal_gated_mlp if family_of(model.config).gated else _frugal_mlp
            mlp.forward = partial(frugal, mlp)  # type: ignore[union-attr, assignment]


def _frugal_mlp(mlp: Any, x: Tensor) -> Tensor:
    """`NemotronMLP.forward` that keeps the output of `up_proj` only, and squares it again in the backward pass.

    The recomputation ends as soon as it has what `down_proj` saved, which is before `down_proj` runs.
    """
    return checkpoint(lambda up: mlp.down_proj(mlp.act_fn(up)), mlp.up_proj(x), use_reentrant=False)  # type: ignore[return-value]


def _frugal_gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    """The forward pass of a gated MLP that keeps the outputs of `gate_proj` and `up_proj` only."""

    def inner(gate: Tensor, up: Tensor) -> Tensor:
        return mlp.down_proj(mlp.act_fn(gate) * up)

    return checkpoint(inner, mlp.gate_proj(x), mlp.up_proj(x), use_reentrant=False)  # type: ignore[return-value]


# --- sharding ----------------------------------------------------------------------------------------------------


def _shard(objective: Objective, world: World) -> None:
    """FSDP2: layers one by one, the rest with the objective, whose forward pass holds the head that a loss reads."""
    mesh = world.mesh["data"]  # type: ignore[index]
    if isinstance(next(_layers(objective.model)[0].parameters()), DTensor) and hasattr(objective, "unshard"):
        return
    loss = objective.loss
    corrected: nn.Module | None = getattr(loss, "corrected", None)
    for module in (*_layers(objective.model), *(_layers(corrected) if corrected else ()), objective):
        fully_shard(module, mesh=mesh)
        # A loss is a part of a sum over all sequences, so gradients are added up and not averaged.
        module.set_gradient_divide_factor(1.0)  # type: ignore[attr-defined]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[attr-defined]  # gloo has nothing else
    guide = _guide(objective)
    if guide is not None:
        # The teacher is not part of the objective. Its layers are gathered as they run; embedding and head, which the
        # loss reads, stay whole in every process.
        for layer in _layers(guide):
            if not isinstance(next(layer.parameters()), DTensor):  # one teacher may guide several students in turn
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
