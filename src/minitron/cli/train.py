"""`minitron train`: train a model from text files, or continue a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .common import DeviceOption, JsonOption, human_bytes, human_count, print_json, quiet_libraries, sentence_errors

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045


@sentence_errors
def train(
    data: Annotated[list[str], typer.Option(help="PATH[:WEIGHT] of text: a file, folder or pattern; repeatable.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an interrupted run in it is continued.")],
    heldout: Annotated[
        Optional[list[str]], typer.Option(help="Text whose loss is measured and never trained on; repeatable.")
    ] = None,
    heldout_share: float = typer.Option(0.0, help="Share of the training documents to hold out, 0 to 1."),
    tokenizer: Annotated[
        Optional[Path], typer.Option(help="Folder of a tokenizer; that of --model by default.")
    ] = None,
    cache: Annotated[
        Optional[Path], typer.Option(help="Folder for tokenized text; beside the run folder by default.")
    ] = None,
    model: Annotated[Optional[Path], typer.Option(help="Start from the weights of this checkpoint folder.")] = None,
    config: Annotated[Optional[Path], typer.Option(help="Start a new model from this config.json.")] = None,
    preset: Annotated[Optional[str], typer.Option(help="Start a new model of a published shape.")] = None,
    layers: Optional[int] = typer.Option(None, help="Start a new model: decoder layers."),
    hidden_size: Optional[int] = typer.Option(None, help="New model: width."),
    intermediate_size: Optional[int] = typer.Option(None, help="New model: hidden neurons of the MLP."),
    heads: Optional[int] = typer.Option(None, help="New model: query heads."),
    kv_heads: Optional[int] = typer.Option(None, help="New model: key/value heads; --heads by default."),
    head_dim: Optional[int] = typer.Option(None, help="New model: width of a head; hidden size / heads by default."),
    steps: Optional[int] = typer.Option(None, help="Length of the run in optimizer steps."),
    tokens: Optional[int] = typer.Option(None, help="Or in tokens."),
    hours: Optional[float] = typer.Option(None, help="Or in hours of training; the schedule follows the clock."),
    batch: int = typer.Option(32, help="Sequences per optimizer step."),
    micro_batch: Optional[int] = typer.Option(None, help="Sequences per forward pass; --batch by default."),
    sequence: int = typer.Option(512, help="Tokens per sequence."),
    lr: float = typer.Option(2e-3, help="Highest learning rate."),
    schedule: str = typer.Option("wsd", help="wsd (warmup, stable, decay), cosine or constant."),
    warmup: int = typer.Option(100, help="Steps over which the learning rate rises."),
    decay: float = typer.Option(0.2, help="Share of the run in which wsd goes down to 0."),
    weight_decay: float = typer.Option(0.1, help="AdamW's decay of matrices."),
    clip: float = typer.Option(1.0, help="Largest norm of the gradient; 0 for any."),
    seed: int = typer.Option(0, help="Decides the initial weights and the order of the data."),
    eval_every: int = typer.Option(500, help="Steps between held-out losses; 0 for only one at the end."),
    save_every: int = typer.Option(500, help="Steps between checkpoints; 0 for only one at the end."),
    keep: int = typer.Option(2, help="Checkpoints to keep."),
    dtype: str = typer.Option("auto", help="auto, bfloat16 or float32."),
    device: str = DeviceOption,
    as_json: bool = JsonOption,
) -> None:
    """Train a model from text files (.txt, .md, .jsonl, .jsonl.gz, .jsonl.xz).

    The same command again continues an interrupted run, bit for bit. Ctrl-C saves first.

    Examples:

      minitron train --data stories/ --heldout-share 0.01 --tokenizer my-tokenizer --layers 4 --hidden-size 256
      --intermediate-size 1024 --heads 4 --kv-heads 2 --hours 0.5 --out runs/first

      minitron train --model checkpoint --data a.jsonl --data b.jsonl:2 --steps 1000 --lr 2e-4 --out runs/more
    """
    from ..distill.schedule import TrainConfig

    settings = TrainConfig(
        steps=steps, tokens=tokens, hours=hours, batch=batch, micro_batch=micro_batch, sequence=sequence, lr=lr,
        schedule=schedule, warmup=warmup, decay=decay, weight_decay=weight_decay, clip=clip, seed=seed,  # type: ignore[arg-type]
        eval_every=eval_every, save_every=save_every, keep=keep, dtype=dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    given = {name: value for name, value in shape.items() if value is not None}
    if sum(x is not None for x in (model, config, preset)) + bool(given) != 1:
        raise ValueError("give exactly one of --model, --config, --preset and the shape of a new model (--layers ...)")
    vocabulary = tokenizer or model
    if vocabulary is None:
        raise ValueError("a new model needs --tokenizer, the folder of a tokenizer")
    quiet_libraries()
    from ..distill.inputs import fresh_config, new_model, open_texts, saved_model
    from ..distill.machine import keep_freed_memory
    from ..distill.train import train as run_training
    from ..loading import pick_device
    from ..tokenizer import load_tokenizer

    keep_freed_memory()
    encoder: Any = load_tokenizer(vocabulary)
    encoder.model_max_length = sys.maxsize  # longer documents are cut into blocks, which needs no warning
    texts = open_texts(data, heldout or [], heldout_share, encoder, settings, cache or out.parent / "token-cache")
    if model is not None:
        net = saved_model(model)
    else:
        made = fresh_config(encoder, sequence, file=config, preset=preset, shape=given)
        net = new_model(made, seed)
    net.to(pick_device(device))  # type: ignore[arg-type]
    need = _announce(net, texts.stream, settings)
    result = run_training(net, texts.stream, settings, out, heldout=texts.heldout, tokenizer=encoder, quiet=as_json)
    if as_json:
        row = {name: str(value) if isinstance(value, Path) else value for name, value in vars(result).items()}
        print_json({**row, "estimate": need})
    else:
        _print(result)


def _announce(net: Any, stream: Any, settings: Any) -> dict[str, float]:
    """Measure a step and say on stderr how long the run will take and what memory it needs."""
    from ..distill.train import estimate, next_token_loss

    need = estimate(net, stream, settings, next_token_loss)
    steps = settings.total_steps or int(3600 * settings.hours / need.seconds_per_step)
    count = sum(p.numel() for p in net.parameters())
    tokens = steps * settings.tokens_per_step
    typer.echo(
        f"{human_count(count)} parameters. About {steps:,} steps, {human_count(tokens)} tokens: "
        f"{steps * settings.batch / len(stream):.1f} passes over the data, {tokens / count:.1f} tokens per parameter. "
        f"About {steps * need.seconds_per_step / 3600:.2f} hours at "
        f"{settings.tokens_per_step / need.seconds_per_step:,.0f} tokens/s, {human_bytes(need.peak_bytes)} of memory.",
        err=True,
    )
    return {"steps": steps, "seconds_per_step": need.seconds_per_step, "peak_bytes": need.peak_bytes}


def _print(result: Any) -> None:
    typer.echo(f"step {result.step:,}, {human_count(result.tokens)} tokens; checkpoint: {result.checkpoint}")
    for name, scores in result.heldout.items():
        typer.echo(
            f"{name}: {scores['nats_per_token']:.4f} nats per token, {scores['bits_per_byte']:.4f} bits per byte"
        )
    if result.stopped_by:
        typer.echo(f"stopped by {result.stopped_by}; the same command continues the run")
