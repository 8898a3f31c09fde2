"""`minitron train`: train a model from text files, or continue a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..locate import locate
from . import training as options
from .common import MODEL_HELP, quiet_libraries, say, sentence_errors
from .quiet_option import with_quiet

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045


@sentence_errors
@with_quiet
@options.with_run_options()
def train(
    run: options.RunOptions,
    tokenizer: Annotated[
        Optional[str], typer.Option(help="Folder of a tokenizer, or a model with one; --model's by default.")
    ] = None,
    model: Annotated[
        Optional[str], typer.Option("--model", "--init", help=f"Start from the weights of a model. {MODEL_HELP}")
    ] = None,
    tune: Annotated[str, typer.Option(help="With --model: what is trained: full, norms, or lora (peft).")] = "full",
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters of lora.")] = 16,
    config: Annotated[Optional[Path], typer.Option(help="Start a new model from this config.json.")] = None,
    preset: Annotated[Optional[str], typer.Option(help="Start a new model of a published shape.")] = None,
    layers: Annotated[Optional[int], typer.Option(help="Start a new model: decoder layers.")] = None,
    hidden_size: Annotated[Optional[int], typer.Option(help="New model: width.")] = None,
    intermediate_size: Annotated[Optional[int], typer.Option(help="New model: hidden neurons of the MLP.")] = None,
    heads: Annotated[Optional[int], typer.Option(help="New model: query heads.")] = None,
    kv_heads: Annotated[Optional[int], typer.Option(help="New model: key/value heads; --heads by default.")] = None,
    head_dim: Annotated[
        Optional[int], typer.Option(help="New model: width of a head; hidden size / heads by default.")
    ] = None,
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
    settings = run.settings()
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
        raise ValueError(f"--tune {tune} needs --model: a new model has no weights to keep")
    vocabulary = tokenizer or model
    if vocabulary is None:
        raise ValueError("a new model needs --tokenizer, the folder of a tokenizer")
    run.check_run([model])
    if model is not None:
        locate(model)
    quiet_libraries()
    with options.processes(run.device, run.tensor_parallel) as (world, place):
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
            made = fresh_config(encoder, settings.sequence, file=config, preset=preset, shape=given)
        require_positions(made, settings)
        require_memory(made, settings, place, world, trained=None if tune == "full" else 0)
        with TokenFolder(run.cache_folder) as store:
            texts = world.first_then_all(
                lambda: open_texts(
                    run.data, run.heldout or [], run.heldout_share, encoder, settings, store, **run.reading
                )
            )
            net: Any
            if start is None:
                net = new_model(made, settings.seed).to(place)  # type: ignore[arg-type]
            else:
                # Adapters are initialized from weights that are loaded.
                net = saved_model(start, place, None if tune == "lora" else world)
                net = choose_trained(net, tune, lora_rank)
            _run(run, net, texts, settings, encoder, world, place, store.keep)


def _tokenizer_folder(name: str) -> Any:
    """The folder of a tokenizer: as it is where it lies without a model, else that of the model."""
    from ..loading import checkpoint_folder

    folder = Path(name).expanduser()
    return folder if folder.is_dir() else checkpoint_folder(name, say)


def _run(
    run: options.RunOptions,
    net: Any,
    texts: Any,
    settings: Any,
    tokenizer: Any,
    world: Any,
    place: Any,
    accepted: Callable[[], None],
) -> None:
    from ..shapes import training_flops_per_token
    from ..train.loop import next_token_loss
    from ..train.loop import train as run_training

    flops = training_flops_per_token(net.config, settings.sequence)
    with_loss = options.Measured(net, texts.stream, next_token_loss, flops)
    peak, need = options.prepare(run, texts.notes, with_loss, settings, world, place)
    result = run_training(
        net,
        texts.stream,
        settings,
        run.out,
        heldout=texts.heldout,
        tokenizer=tokenizer,
        quiet=run.as_json,
        world=world,
        peak_flops=peak,
        flops_per_token=flops,
        extend=run.extend,
        accepted=accepted,
    )
    if world.first:
        options.report(result, need, run.as_json)
