"""`minitron inspect`: architecture, parameters and memory of a checkpoint, from its config.json alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Optional

import typer

from ..locate import fetch, locate
from ..presets import PRESETS
from .common import JsonOption, ModelArgument, human_bytes, human_count, print_json, quiet_libraries, sentence_errors

# Bytes per parameter. int8: one byte and an fp16 scale per 32 weights; int4: half a byte and the same scale.
_FORMATS = {"bf16": 2.0, "int8": 1.0 + 2 / 32, "int4": 0.5 + 2 / 32}


@sentence_errors
def inspect(
    model: Optional[str] = ModelArgument,  # noqa: UP045 (typer reads this annotation at run time)
    context: int = typer.Option(0, help="Tokens to size the cache for; 0 is the model's context."),
    as_json: bool = JsonOption,
) -> None:
    """Show architecture, parameters per part, memory by format, and cache size.

    MODEL may also be a config.json, or a preset such as minitron-4b. Only the config is needed (from a repository
    nothing else is fetched). If there are weights, their headers are checked against it.

    Examples:

      minitron inspect minitron-4b

      minitron inspect path/to/checkpoint --json
    """
    found = _find(model)
    quiet_libraries()
    config, source, weights = _read(found)
    facts = _facts(config, context or config.max_position_embeddings)
    facts = {"model": source, "weights": weights, **facts}
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _find(model: str | None) -> Path | str:
    """A path, a repository id, or the name of a preset."""
    if model in PRESETS:
        return str(model)
    try:
        return locate(model, config_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or a preset: {', '.join(PRESETS)}") from None


def _read(found: Path | str) -> tuple[Any, str, str]:
    """The config, where it came from, and whether there are weights."""
    from ..checkpoint.detect import detect
    from ..checkpoint.hf import check_checkpoint, read_config, read_config_file
    from ..checkpoint.sources import open_checkpoint
    from ..config import NemotronConfig

    if not isinstance(found, Path):
        if found in PRESETS:
            return NemotronConfig.preset(found), f"preset {found}", "none"
        return read_config(fetch(found, config_only=True)), f"repository {found}", "not fetched"
    if found.is_file() and found.suffix == ".json":
        return read_config_file(found), str(found), "none"
    if detect(found) != "hf":
        with tempfile.TemporaryDirectory() as scratch, open_checkpoint(found, Path(scratch)) as checkpoint:
            return checkpoint.config, str(found), "complete"
    config = read_config(found)
    if not any(found.glob("*.safetensors*")) and not any(found.glob("pytorch_model*.bin*")):
        return config, str(found), "none"
    check_checkpoint(found)
    return config, str(found), "complete"


def _facts(config: Any, context: int) -> dict[str, Any]:
    from ..shapes import describe

    shape = describe(config)
    counts, total = shape.parameter_counts(), shape.num_parameters()
    return {
        "architecture": {
            "family": shape.family.title,
            "model_type": shape.family.model_type,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": shape.head_dim,
            "rotary_dim": shape.rotary_dim,
            "rope_parameters": dict(shape.rope),
            "norm": shape.family.norm.kind,
            "gated_mlp": shape.family.gated,
            "head_norms": shape.family.has("query_norm"),
            "biases": sorted(part.name for part in shape.family.layer if part.columns and part.role in shape.biased),
            "hidden_act": str(config.hidden_act),
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "tie_word_embeddings": config.tie_word_embeddings,
            "dtype": str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        },
        "parameters": {**counts, "total": total, "non_embedding": shape.num_non_embedding_parameters()},
        "weight_bytes": {name: round(total * size) for name, size in _FORMATS.items()},
        "cache": {
            "bytes_per_token_bf16": round(shape.kv_bytes_per_token()),
            "context": context,
            "bytes_at_context_bf16": round(shape.kv_bytes_per_token() * context),
        },
        "per_token": {
            "flops": shape.flops_per_token(),
            "bytes_read_bf16": 2 * shape.parameters_read_per_token(),
        },
    }


def _print(facts: dict[str, Any]) -> None:
    shape, counts = facts["architecture"], facts["parameters"]
    cache, per_token = facts["cache"], facts["per_token"]
    total = counts["total"]
    typer.echo(f"{facts['model']} (weights: {facts['weights']})")
    typer.echo(
        f"  {shape['family']}: {shape['num_hidden_layers']} layers, hidden {shape['hidden_size']}, "
        f"MLP {shape['intermediate_size']}, "
        f"{shape['num_attention_heads']} heads of {shape['head_dim']} in {shape['num_key_value_heads']} groups"
    )
    rope = shape["rope_parameters"]
    typer.echo(
        f"  rotary {shape['rotary_dim']} of {shape['head_dim']} channels, theta {rope['rope_theta']:g}, "
        f"type {rope['rope_type']}; {shape['hidden_act']}; vocabulary {shape['vocab_size']}, "
        f"context {shape['max_position_embeddings']}, {shape['dtype'] or 'dtype not stated'}"
    )
    parts = [
        {"rmsnorm": "RMS norms", "layernorm1p": "LayerNorm1P"}[shape["norm"]],
        "gated MLP" if shape["gated_mlp"] else "plain MLP",
    ]
    parts += ["norms of queries and keys"] if shape["head_norms"] else []
    parts += [f"biases on {', '.join(shape['biases'])}"] if shape["biases"] else []
    typer.echo(f"  {', '.join(parts)}")
    typer.echo("parameters")
    for part in ("embedding", "attention", "mlp", "norms", "lm_head"):
        note = " (tied to the embedding)" if part == "lm_head" and shape["tie_word_embeddings"] else ""
        typer.echo(f"  {part:<14}{human_count(counts[part]):>9}  {counts[part] / total:6.1%}{note}")
    typer.echo(f"  {'total':<14}{human_count(total):>9}")
    typer.echo(f"  {'non-embedding':<14}{human_count(counts['non_embedding']):>9}")
    typer.echo("memory of the weights")
    for name, size in facts["weight_bytes"].items():
        typer.echo(f"  {name:<14}{human_bytes(size):>9}")
    typer.echo("KV cache, bf16")
    typer.echo(f"  {'per token':<14}{human_bytes(cache['bytes_per_token_bf16']):>9}")
    typer.echo(f"  {'full':<14}{human_bytes(cache['bytes_at_context_bf16']):>9}  at {cache['context']} tokens")
    typer.echo("one token")
    typer.echo(f"  {'reads':<14}{human_bytes(per_token['bytes_read_bf16']):>9}  of bf16 weights")
    typer.echo(f"  {'computes':<14}{per_token['flops'] / 1e9:>9.2f}  GFLOP")
