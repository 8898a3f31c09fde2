"""`minitron train`: train a model from text files, or continue a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..config import NemotronConfig
    from ..data import BlockStream, PackedBlocks
    from ..distill.schedule import TrainConfig

# Options of a fresh model's shape -> keys of NemotronConfig.
_SHAPE = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
_PANEL_DATA, _PANEL_MODEL, _PANEL_RUN = "Text", "Model", "Schedule and optimizer"

Data = Annotated[
    list[str],
    typer.Option(
        "--data", help="PATH[:WEIGHT] of text: a file, folder or pattern; repeatable.", rich_help_panel=_PANEL_DATA
    ),
]
Heldout = Annotated[
    list[str] | None,
    typer.Option(
        "--heldout", help="Text whose loss is measured, never trained on; repeatable.", rich_help_panel=_PANEL_DATA
    ),
]


def train(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an interrupted run in it is continued.")],
    heldout: Heldout = None,
    heldout_share: Annotated[
        float, typer.Option(help="Share of the training documents held out.", rich_help_panel=_PANEL_DATA)
    ] = 0.0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder; by default that of --model.", rich_help_panel=_PANEL_DATA)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder to start from.", rich_help_panel=_PANEL_MODEL)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="config.json of a fresh model.", rich_help_panel=_PANEL_MODEL)
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Fresh model of a published shape.", rich_help_panel=_PANEL_MODEL)
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, rich_help_panel=_PANEL_MODEL)] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1, rich_help_panel=_PANEL_MODEL)] = None,
    intermediate_size: Annotated[int | None, typer.Option(min=1, rich_help_panel=_PANEL_MODEL)] = None,
    heads: Annotated[int | None, typer.Option(min=1, rich_help_panel=_PANEL_MODEL)] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, rich_help_panel=_PANEL_MODEL)] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, rich_help_panel=_PANEL_MODEL)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=_PANEL_RUN)] = None,
    tokens: Annotated[int | None, typer.Option(help="Or: tokens.", rich_help_panel=_PANEL_RUN)] = None,
    hours: Annotated[float | None, typer.Option(help="Or: hours of training.", rich_help_panel=_PANEL_RUN)] = None,
    batch: Annotated[int, typer.Option(help="Sequences per step.", rich_help_panel=_PANEL_RUN)] = 32,
    micro_batch: Annotated[
        int | None, typer.Option(help="Sequences per forward pass.", rich_help_panel=_PANEL_RUN)
    ] = None,
    sequence: Annotated[int, typer.Option(help="Tokens per sequence.", rich_help_panel=_PANEL_RUN)] = 512,
    lr: Annotated[float, typer.Option(help="Highest learning rate.", rich_help_panel=_PANEL_RUN)] = 2e-3,
    schedule: Annotated[str, typer.Option(help="wsd, cosine or constant.", rich_help_panel=_PANEL_RUN)] = "wsd",
    warmup: Annotated[int, typer.Option(help="Steps.", rich_help_panel=_PANEL_RUN)] = 100,
    decay: Annotated[float, typer.Option(help="Share of the run, for wsd.", rich_help_panel=_PANEL_RUN)] = 0.2,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.", rich_help_panel=_PANEL_RUN)] = 0.1,
    clip: Annotated[float, typer.Option(help="Norm of the gradient.", rich_help_panel=_PANEL_RUN)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of weights and order.", rich_help_panel=_PANEL_RUN)] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps.", rich_help_panel=_PANEL_RUN)] = 500,
    save_every: Annotated[int, typer.Option(help="Steps.", rich_help_panel=_PANEL_RUN)] = 500,
    keep: Annotated[int, typer.Option(help="Checkpoints kept.", rich_help_panel=_PANEL_RUN)] = 2,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.", rich_help_panel=_PANEL_RUN)] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default CUDA if there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; no progress bar.")] = False,
) -> None:
    """Train a model from text files, or continue an interrupted run: the same command again goes on where it was.

    \b
    A fresh small model on a folder of text, for half an hour:
      minitron train --data stories/ --heldout-share 0.01 --tokenizer my-tokenizer \\
        --layers 6 --hidden-size 256 --intermediate-size 1024 --heads 4 --kv-heads 2 --hours 0.5 --out runs/first
    Train a checkpoint on, twice over the second file:
      minitron train --model checkpoint --data a.jsonl --data b.jsonl:2 --steps 1000 --lr 2e-4 --out runs/more
    """
    from ..distill.schedule import TrainConfig

    settings = TrainConfig(
        steps=steps, tokens=tokens, hours=hours, batch=batch, micro_batch=micro_batch, sequence=sequence, lr=lr,
        schedule=schedule, warmup=warmup, decay=decay, weight_decay=weight_decay, clip=clip, seed=seed,  # type: ignore[arg-type]
        eval_every=eval_every, save_every=save_every, keep=keep, dtype=dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    shape = {_SHAPE[name]: value for name, value in locals().items() if name in _SHAPE and value is not None}
    _run(settings, data, heldout or [], heldout_share, tokenizer, model, config, preset, shape, out, device, as_json)


def _run(
    settings: TrainConfig,
    data: list[str],
    heldout: list[str],
    share: float,
    tokenizer_folder: Path | None,
    model_folder: Path | None,
    config_file: Path | None,
    preset: str | None,
    shape: dict[str, int],
    out: Path,
    device: str | None,
    as_json: bool,
) -> None:
    import torch

    from ..distill.machine import keep_freed_memory
    from ..distill.train import estimate, next_token_loss
    from ..distill.train import train as run_training
    from ..model import NemotronForCausalLM
    from ..tokenizer import load_tokenizer

    if sum(x is not None for x in (model_folder, config_file, preset)) + bool(shape) != 1:
        raise ValueError("give exactly one of --model, --config, --preset and the shape options (--layers, ...)")
    if tokenizer_folder is None and model_folder is None:
        raise ValueError("a fresh model needs --tokenizer, the folder of a tokenizer")
    if not (0 <= share < 1):
        raise ValueError(f"--heldout-share is {share}; it must be 0 or more and less than 1")
    keep_freed_memory()
    tokenizer: Any = load_tokenizer(tokenizer_folder or model_folder)  # type: ignore[arg-type]
    stream, held = _texts(data, heldout, share, tokenizer, settings, out)
    torch.manual_seed(settings.seed)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model_folder is not None:
        net = NemotronForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    else:
        net = NemotronForCausalLM(_fresh_config(config_file, preset, shape, tokenizer, settings.sequence)).float()
    net.to(where)  # type: ignore[arg-type]
    need = estimate(net, stream, settings, next_token_loss)
    total = settings.total_steps
    seconds = need.seconds_per_step * total if total is not None else 3600 * (settings.hours or 0)
    steps = total if total is not None else int(seconds / need.seconds_per_step)
    count = sum(p.numel() for p in net.parameters())
    print(
        f"{count / 1e6:.2f}M parameters, {len(stream)} blocks an epoch; about {steps} steps of "
        f"{settings.tokens_per_step:,} tokens ({steps / (len(stream) / settings.batch):.2f} epochs, "
        f"{steps * settings.tokens_per_step / count:.1f} tokens per parameter), {seconds / 3600:.2f} hours at "
        f"{settings.tokens_per_step / need.seconds_per_step:,.0f} tokens/s, {need.peak_bytes / 2**30:.1f} GiB",
        file=sys.stderr,
    )
    result = run_training(net, stream, settings, out, heldout=held, tokenizer=tokenizer, quiet=as_json)
    if as_json:
        row = {k: str(v) if isinstance(v, Path) else v for k, v in vars(result).items()}
        print(json.dumps({**row, "estimate": vars(need)}))
        return
    print(f"step {result.step}, {result.tokens:,} tokens; checkpoint: {result.checkpoint}")
    for name, scores in result.heldout.items():
        print(f"{name}: " + ", ".join(f"{value:.4f} {unit}" for unit, value in scores.items()))
    if result.stopped_by:
        print(f"stopped by {result.stopped_by}; the same command continues the run")


def _texts(
    data: list[str], heldout: list[str], share: float, tokenizer: Any, settings: TrainConfig, out: Path
) -> tuple[BlockStream, dict[str, PackedBlocks]]:
    """The training stream, and the held-out texts by name."""
    from ..data import BlockStream, PackedBlocks, Source, split_documents, tokenize

    # Beside the run folders, so that runs share it.
    folder = out.parent / "token-cache"
    trained, held = [], {}
    for source in map(Source.parse, data):
        cache = tokenize(source, tokenizer, folder)
        kept, out_documents = split_documents(cache, share, settings.seed)
        trained.append((PackedBlocks(cache, settings.sequence, kept, settings.seed), source.weight))
        if share:
            held[Path(source.path).stem + "-heldout"] = PackedBlocks(cache, settings.sequence, out_documents)
    for source in map(Source.parse, heldout):
        held[Path(source.path).stem] = PackedBlocks(tokenize(source, tokenizer, folder), settings.sequence)
    return BlockStream(trained, settings.seed), held


def _fresh_config(
    file: Path | None, preset: str | None, shape: dict[str, int], tokenizer: Any, sequence: int
) -> NemotronConfig:
    """The configuration of a fresh model, with the vocabulary and special ids of the tokenizer."""
    from ..config import NemotronConfig

    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if file is not None:
        try:
            keys = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
        return NemotronConfig(**{"vocab_size": len(tokenizer), **ids, **keys})
    if preset is not None:
        return NemotronConfig.preset(preset, **ids)
    missing = [f"--{name.replace('_', '-')}" for name, key in _SHAPE.items() if key not in shape and name != "head_dim"]
    if missing:
        raise ValueError(f"the shape of a fresh model also needs {', '.join(missing)}")
    return NemotronConfig(
        **{"vocab_size": len(tokenizer), "max_position_embeddings": sequence, "initializer_range": 0.02, **ids, **shape}  # type: ignore[arg-type]
    )
