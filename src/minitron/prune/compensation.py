"""Compensation: what stays is fitted to do some of the work of what was cut. Needs no gradients.

The original and the pruned model walk through calibration text side by side, a layer at a time. Each norm of the pruned
model gets the gain and offset that bring its output closest to the original's (channels that were cut change mean and
variance), then `o_proj` and `down_proj` get the ridge least-squares change that brings the residual stream behind them
closest to the original's, on the inputs that the pruned model really has by then. A fit that does not lower the error
on held-out blocks is rejected, part by part. Least squares after structured pruning: ZipLM (arXiv 2302.04089), SlimGPT
(arXiv 2412.18110).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checkpoint.hf import open_hf, write_hf
from ..checkpoint.safetensors_io import read_safetensors, write_safetensors
from ..checkpoint.tensors import LazyTensor, from_tensor
from ..data.packing import Batch
from ..families import Role
from ..files import check_target
from .architecture import Architecture
from .plan import PlanError, PrunePlan
from .regression import Fit, LinearFit, NormFit
from .streaming import TOKENS_AT_ONCE, Residuals, StreamedModel, StreamError, token_counts, workplace
from .surgery import check_fingerprint

PARTS = ("norms", "linear")
REPORT = "compensation.json"
_FINAL_NORM = "norm.weight"


@dataclass(frozen=True)
class CompensatedPart:
    """One part of the pruned model."""

    name: str
    """Of its weight."""
    fit: Fit


def compensate(
    source: Path,
    pruned: Path,
    plan: PrunePlan,
    blocks: Batch,
    out: Path,
    *,
    parts: tuple[str, ...] = PARTS,
    heldout: float = 0.25,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CompensatedPart]:
    """Write `out`, the checkpoint `pruned` with norms and output projections fitted to `source`.

    Memory: a layer of each model, and for the MLP four float64 matrices of neurons by neurons. Besides the checkpoint,
    `compensation.json` in `out` lists each part's error before and after.

    Args:
        source: the original checkpoint.
        pruned: what `plan` made of it.
        plan: the plan.
        blocks: calibration blocks (B, T).
        out: folder to write.
        parts: "norms", "linear" or both.
        heldout: share of the blocks on which fits are judged; at least one block.
        dtype, device: of the computation.
        overwrite: replace `out` if it is there.
        progress: called with (layers done, layers).

    Raises:
        PlanError: the plan is for another source, or `pruned` has another shape than it says.
        StreamError: too few blocks, an unknown part, or activations that are not finite.
        CheckpointError: a checkpoint cannot be read.
        TargetError: `out` is there already, overlaps with what is read, or holds files that were not written here.
    """
    check_target(out, folder=True, overwrite=overwrite, sources=[source, pruned])
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise StreamError(
            f"parts to compensate: {unknown[0] if unknown else 'none'}; they must be {' or '.join(PARTS)}"
        )
    check_fingerprint(source, plan)
    large, small = StreamedModel(source, dtype, device), StreamedModel(pruned, dtype, device)
    found = Architecture.of(small.config)
    if found != plan.target:
        raise PlanError(f"{pruned}: {found}; the plan makes {plan.target}")
    count = len(blocks.input_ids)
    held = max(1, round(count * heldout))
    if not 0 < heldout < 1 or held >= count:
        raise StreamError(f"{count} blocks with a held-out share of {heldout}: one is needed on each side at least")
    with (
        tempfile.TemporaryDirectory(prefix="minitron-compensation-") as temporary,
        workplace(large, blocks, None, streams=4) as place,
    ):
        run = _Run(large, small, plan, blocks, count - held, parts, Path(temporary), place)
        run.all_layers(progress)
        checkpoint = open_hf(pruned)
        tensors = {**checkpoint.tensors, **run.changed}
        rows = [{"part": part.name, "accepted": part.fit.accepted, **asdict(part.fit)} for part in run.found]
        texts = {**checkpoint.texts, REPORT: json.dumps({"plan": plan.hash, "parts": rows}, indent=1) + "\n"}
        write_hf(replace(checkpoint, tensors=tensors, texts=texts), out, overwrite=overwrite)
    return run.found


class _Run:
    """Both models' residual streams, and what was fitted so far."""

    def __init__(
        self,
        large: StreamedModel,
        small: StreamedModel,
        plan: PrunePlan,
        blocks: Batch,
        fitted: int,
        parts: tuple[str, ...],
        folder: Path,
        place: Path | None,
    ) -> None:
        self.large, self.small, self.plan, self.blocks, self.parts = large, small, plan, blocks, parts
        self.folder, self.place, self.fitted = folder, place, fitted
        self.channels = torch.tensor(plan.channels, device=large.device)
        self.counts = token_counts(blocks)
        self.found: list[CompensatedPart] = []
        self.changed: dict[str, LazyTensor] = {}
        at_once = max(1, TOKENS_AT_ONCE // blocks.input_ids.shape[1])
        # Groups of blocks do not mix fitted and held-out ones.
        spans = ((0, fitted), (fitted, len(blocks.input_ids)))
        self.groups = [range(i, min(i + at_once, stop)) for start, stop in spans for i in range(start, stop, at_once)]
        self.original, self.own = self._enter(large, "original"), self._enter(small, "own")

    def _enter(self, model: StreamedModel, name: str) -> Residuals:
        count, tokens = self.blocks.input_ids.shape
        path = None if self.place is None else self.place / f"stream-{name}.bin"
        store = Residuals(count, tokens, model.config.hidden_size, model.dtype, path)
        for rows in self.groups:
            store.put(rows, model.embed(self.blocks.input_ids[rows.start : rows.stop]))
        return store

    @torch.no_grad()
    def all_layers(self, progress: Callable[[int, int], None]) -> None:
        """Layer after layer, then the final norm."""
        kept = [entry.layer for entry in self.plan.layers]
        following = [*kept[1:], self.large.config.num_hidden_layers]
        for index in range(kept[0] if kept == sorted(kept) else 0):  # layers cut before the first one that stays
            self._pass_through(self.large.layer(index))
        for number, (index, after) in enumerate(zip(kept, following, strict=True)):
            before, layer = self.large.layer(index), self.small.layer(number)
            self._attention(before, layer, number)
            # What layers cut behind this one did is for this one's MLP to make up for.
            self._mlp(before, layer, number, [self.large.layer(i) for i in range(index + 1, after)])
            progress(number + 1, len(kept))
        norm = self.small.norm()
        self._fit_norm(self.large.norm(), norm, _FINAL_NORM)

    # --- a layer -----------------------------------------------------------------------------------------------------

    def _attention(self, before: Any, layer: Any, number: int) -> None:
        self._fit_norm(*self._pair(before, layer, "attention_norm"), self._name(number, "attention_norm"))
        for rows in self.groups:
            h = self._get(self.original, rows)
            self.original.put(rows, h + self._attend(self.large, before, h, rows)[0])
        self._fit_linear(
            self.small.module(layer, "output"),
            lambda p, rows: self._attend(self.small, layer, p, rows)[1],
            self._name(number, "output"),
        )

    def _mlp(self, before: Any, layer: Any, number: int, cut: list[Any]) -> None:
        whole_norm, norm = self._pair(before, layer, "mlp_norm")
        self._fit_norm(whole_norm, norm, self._name(number, "mlp_norm"))
        for rows in self.groups:
            h = self._get(self.original, rows)
            self.original.put(rows, h + before.mlp(whole_norm(h)))
        for gone in cut:
            self._pass_through(gone)
        self._fit_linear(
            self.small.module(layer, "down"),
            lambda p, rows: self._neurons(layer, norm(p)),
            self._name(number, "down"),
        )

    def _neurons(self, layer: Any, normed: Tensor) -> Tensor:
        """What enters the down projection of the pruned model."""
        act = layer.mlp.act_fn
        up = self.small.module(layer, "up")(normed)
        return act(self.small.module(layer, "gate")(normed)) * up if self.small.shape.family.gated else act(up)

    def _pair(self, before: Any, layer: Any, role: Role) -> tuple[Any, Any]:
        return self.large.module(before, role), self.small.module(layer, role)

    def _name(self, number: int, role: Role) -> str:
        return f"layers.{number}.{self.small.shape.family.part(role).name}.weight"

    def _pass_through(self, layer: Any) -> None:
        for rows in self.groups:
            h = self._get(self.original, rows)
            positions = self.blocks.position_ids[rows.start : rows.stop].to(h.device)
            self.original.put(rows, layer(h, **self.large.surroundings(h, positions)))

    def _attend(self, model: StreamedModel, layer: Any, hidden: Tensor, rows: range) -> tuple[Tensor, Tensor]:
        """Output of the attention, and the input of its `o_proj`."""
        seen: list[Tensor] = []
        hook = model.module(layer, "output").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        positions = self.blocks.position_ids[rows.start : rows.stop].to(hidden.device)
        try:
            normed = model.module(layer, "attention_norm")(hidden)
            out, _ = layer.self_attn(hidden_states=normed, **model.surroundings(hidden, positions))
        finally:
            hook.remove()
        return out, seen[0]

    # --- fits --------------------------------------------------------------------------------------------------------

    def _get(self, store: Residuals, rows: range) -> Tensor:
        return store.get(rows).to(self.large.device)

    def _tokens(self, values: Tensor, rows: range) -> Tensor:
        """(B, T, n) to (tokens, n), without padding."""
        return torch.cat([values[i, : self.counts[block]] for i, block in enumerate(rows)])

    def _fit_norm(self, before: Any, norm: Any, name: str) -> None:
        if "norms" not in self.parts:
            return
        kind = self.small.shape.family.norm
        sums = NormFit(len(self.channels), kind.bias)
        for rows in self.groups:
            wanted = before(self._get(self.original, rows))[..., self.channels]
            own = self._normalized(self._get(self.own, rows))
            sums.add(self._tokens(own, rows), self._tokens(wanted, rows), heldout=rows.start >= self.fitted)
        bias = norm.bias.cpu() if kind.bias else torch.zeros(len(self.channels))
        gain, offset, fit = sums.solve((norm.weight + kind.offset).cpu(), bias)
        new = {name: (norm.weight, gain - kind.offset)}
        if kind.bias:
            new[name.replace(".weight", ".bias")] = (norm.bias, offset)
        self._keep(name, fit, new)

    def _normalized(self, hidden: Tensor) -> Tensor:
        """A norm's output before its gain and offset."""
        shape = self.small.shape
        if shape.family.norm.kind == "layernorm1p":
            return F.layer_norm(hidden, hidden.shape[-1:], eps=shape.norm_eps)
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + shape.norm_eps)

    def _fit_linear(self, linear: Any, inputs: Callable[[Tensor, range], Tensor], name: str) -> None:
        """Fit `linear`, and take the pruned model's stream past it."""
        if "linear" in self.parts:
            biased = linear.bias is not None
            sums = LinearFit(linear.in_features + biased, linear.out_features)
            for rows in self.groups:
                p = self._get(self.own, rows)
                x = self._tokens(inputs(p, rows), rows)
                wanted = self._tokens(self._get(self.original, rows)[..., self.channels] - p, rows)
                missing = wanted - linear(x)
                if biased:
                    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
                if not torch.isfinite(missing).all():
                    raise StreamError(f"{name}: its output, or the original's, has NaN or infinity")
                sums.add(x, missing, wanted, heldout=rows.start >= self.fitted)
            change, fit = sums.solve()
            new = {name: (linear.weight, linear.weight.cpu() + change[:, : linear.in_features])}
            if biased:
                new[name.replace(".weight", ".bias")] = (linear.bias, linear.bias.cpu() + change[:, -1])
            self._keep(name, fit, new)
        for rows in self.groups:
            p = self._get(self.own, rows)
            self.own.put(rows, p + linear(inputs(p, rows)))

    def _keep(self, name: str, fit: Fit, new: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Note a fit; if it is accepted, put it into the model, rounded as it will be stored."""
        self.found.append(CompensatedPart(name, fit))
        if not fit.accepted:
            return
        stored = {}
        for tensor, (parameter, value) in new.items():
            full = self.small.full_name(tensor)
            rounded = value.to(self.small.tensor(tensor).dtype)
            parameter.data.copy_(rounded)
            stored[full] = from_tensor(rounded.contiguous())
        path = self.folder / f"{len(self.found)}.safetensors"
        write_safetensors(path, stored)
        self.changed |= read_safetensors(path)
