"""`minitron train`: train a model from text files, or continue a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..locate import locate
from . import training as options
from .common import MODEL_HELP, DeviceOption, JsonOption, quiet_libraries, say, sentence_errors

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045


@sentence_errors
def train(
    data: Annotated[list[str], options.DataOption],
    out: Annotated[Path, options.RunOption],
    heldout: Annotated[Optional[list[str]], options.HeldoutOption] = None,
    heldout_share: float = options.HeldoutShareOption,
    tokenizer: Annotated[
        Optional[str], typer.Option(help="Folder of a tokenizer, or a model with one; --model's by default.")
    ] = None,
    field: str = options.FieldOption,
    encoding: str = options.EncodingOption,
    skip_bad: bool = options.SkipBadOption,
    cache: Annotated[Optional[Path], options.CacheOption] = None,
    model: Annotated[
        Optional[str], typer.Option("--model", "--init", help=f"Start from the weights of a model: {MODEL_HELP}")
    ] = None,
    tune: str = typer.Option("full", help="With --model: what is trained: full, norms, or lora (peft)."),
    lora_rank: int = typer.Option(16, help="Rank of the adapters of lora."),
    config: Annotated[Optional[Path], typer.Option(help="Start a new model from this config.json.")] = None,
    preset: Annotated[Optional[str], typer.Option(help="Start a new model of a published shape.")] = None,
    layers: Optional[int] = typer.Option(None, help="Start a new model: decoder layers."),
    hidden_size: Optional[int] = typer.Option(None, help="New model: width."),
    intermediate_size: Optional[int] = typer.Option(None, help="New model: hidden neurons of the MLP."),
    heads: Optional[int] = typer.Option(None, help="New model: query heads."),
    kv_heads: Optional[int] = typer.Option(None, help="New model: key/value heads; --heads by default."),
    head_dim: Optional[int] = typer.Option(None, help="New model: width of a head; hidden size / heads by default."),
    steps: Optional[int] = options.StepsOption,
    tokens: Optional[int] = options.TokensOption,
    hours: Optional[float] = options.HoursOption,
    batch: int = options.BatchOption,
    micro_batch: Optional[int] = options.MicroBatchOption,
    sequence: int = options.SequenceOption,
    lr: float = typer.Option(2e-3, help="Highest learning rate."),
    schedule: str = options.ScheduleOption,
    warmup: int = options.WarmupOption,
    decay: float = options.DecayOption,
    final_lr: float = options.FinalLrOption,
    weight_decay: float = options.WeightDecayOption,
    clip: float = options.ClipOption,
    seed: int = options.SeedOption,
    eval_every: int = options.EvalEveryOption,
    save_every: int = options.SaveEveryOption,
    keep: int = options.KeepOption,
    extend: bool = options.ExtendOption,
    dtype: str = options.DtypeOption,
    optimizer: str = options.OptimizerOption,
    recompute: str = options.RecomputeOption,
    compile: bool = options.CompileOption,
    on_spike: str = options.OnSpikeOption,
    spike: float = options.SpikeOption,
    tensor_parallel: int = options.TensorParallelOption,
    peak_tflops: Optional[float] = options.PeakOption,
    device: str = DeviceOption,
    as_json: bool = JsonOption,
) -> None:
    """Train a model from text.

    The same command again continues an interrupted run, bit for bit. Ctrl-C saves first. The trained model is the
    folder `model` in the run folder. Under torchrun the model is sharded over the processes.

    Examples:

      minitron train --data stories/ --heldout-share 0.01 --tokenizer my-tokenizer --layers 4 --hidden-size 256
      --intermediate-size 1024 --heads 4 --kv-heads 2 --hours 0.5 --out runs/first

      minitron train --model checkpoint --data a.jsonl --data b.jsonl:2 --steps 1000 --lr 2e-4 --out runs/more

      minitron train --model checkpoint --data a.jsonl --data b.jsonl:2 --steps 1500 --lr 2e-4 --out runs/more --extend

      minitron train --init teacher --tune lora --data corpus/ --steps 500 --lr 4e-5 --out runs/corrected-teacher
    """
    settings = options.settings_from(locals())
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
    if model is None and tune != "full":
        raise ValueError(f"--tune {tune} needs --model: a new model has nothing to keep")
    vocabulary = tokenizer or model
    if vocabulary is None:
        raise ValueError("a new model needs --tokenizer, the folder of a tokenizer")
    options.check_run(out, [model], [*data, *(heldout or [])], cache)
    if model is not None:
        locate(model)
    quiet_libraries()
    with options.processes(device, tensor_parallel) as (world, place):
        from ..checkpoint.hf import read_config
        from ..data.token_cache import TokenFolder
        from ..loading import checkpoint_folder
        from ..tokenizer import load_tokenizer
        from ..train.adapters import choose_trained
        from ..train.inputs import fresh_config, new_model, open_texts, saved_model
        from ..train.memory import require_memory
        from ..train.run_folder import require_positions

        start = None if model is None else world.first_then_all(lambda: checkpoint_folder(model, say))
        encoder: Any = load_tokenizer(_tokenizer_folder(vocabulary) if start is None or tokenizer else start)
        if start is not None:
            made = read_config(start)
        else:
            made = fresh_config(encoder, sequence, file=config, preset=preset, shape=given)
        require_positions(made, settings)
        require_memory(made, settings, place, world, trained=None if tune == "full" else 0)
        with TokenFolder(cache or out.parent / "token-cache") as store:
            texts = world.first_then_all(
                lambda: open_texts(
                    data, heldout or [], heldout_share, encoder, settings, store, field, encoding, skip_bad
                )
            )
            net: Any
            if start is None:
                net = new_model(made, seed).to(place)  # type: ignore[arg-type]
            else:
                # Adapters are drawn beside weights that are there.
                net = saved_model(start, place, None if tune == "lora" else world)
                net = choose_trained(net, tune, lora_rank)
            _run(net, texts, settings, out, encoder, world, place, peak_tflops, as_json, extend, store.keep)


def _tokenizer_folder(name: str) -> Any:
    """The folder of a tokenizer: as it is where it lies without a model, else that of the model."""
    from ..loading import checkpoint_folder

    folder = Path(name).expanduser()
    return folder if folder.is_dir() else checkpoint_folder(name, say)


def _run(
    net: Any,
    texts: Any,
    settings: Any,
    out: Path,
    tokenizer: Any,
    world: Any,
    place: Any,
    peak_tflops: float | None,
    as_json: bool,
    extend: bool,
    accepted: Callable[[], None],
) -> None:
    from ..distill.recipe import flops_per_token
    from ..train.loop import estimate, next_token_loss
    from ..train.loop import train as run_training

    if world.first:
        options.tell(texts.notes)
    peak = options.peak_flops(peak_tflops, place, settings.dtype, world)
    flops = flops_per_token(net.config, settings.sequence)
    need: dict[str, Any] | None = None
    if world.mesh is None:
        count = sum(p.numel() for p in net.parameters())
        measured = estimate(net, texts.stream, settings, next_token_loss)
        how = "given" if peak_tflops else "measured"
        need = options.announce(measured, texts.stream, settings, count, peak, flops, how)
    result = run_training(
        net,
        texts.stream,
        settings,
        out,
        heldout=texts.heldout,
        tokenizer=tokenizer,
        quiet=as_json,
        world=world,
        peak_flops=peak,
        flops_per_token=flops,
        extend=extend,
        accepted=accepted,
    )
    if world.first:
        options.report(result, need, as_json)
