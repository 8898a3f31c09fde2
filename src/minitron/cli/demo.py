"""`minitron demo`: the first thing a newcomer sees."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .common import human_bytes, human_count, quiet_libraries, sentence_errors, speed_of
from .invocation import program

if TYPE_CHECKING:
    from ..text_stream import SamplingParameters


@sentence_errors
def demo(
    prompt: str = typer.Option("Once upon a time there was a little", "--prompt", "-p", help="How the story begins."),
    max_new_tokens: int = typer.Option(160, "--max-new-tokens", "-n", help="Largest number of new tokens."),
    seed: int = typer.Option(1, help="Same seed, same machine, same text."),
) -> None:
    """Write a story with the bundled model and one with its half, and suggest what to try next."""
    from ..assets import bundled_model

    quiet_libraries()
    from ..text_stream import SamplingParameters

    parameters = SamplingParameters(max_new_tokens, temperature=0.7, top_p=0.9, seed=seed)
    _write("The bundled Nemotron", bundled_model(), prompt, parameters)
    _write("Its child by `minitron compress`", bundled_model("half"), prompt, parameters)
    minitron = program()
    typer.echo(
        "Three things to try next:\n"
        f'  {minitron} generate -p "The old man looked at the sea" --seed 3\n'
        f"  {minitron} inspect minitron-4b\n"
        f"  {minitron} train --help"
    )


def _write(title: str, folder: Path, prompt: str, parameters: SamplingParameters) -> None:
    """One model: its size and held-out loss, its story as it is written, its speed."""
    from ..assets import stated_losses
    from ..loading import load
    from ..text_stream import TextStream, encode_prompt

    loaded = load(folder)
    config = loaded.model.config
    losses = [f"{loss:.3f} on {text.lower()}" for text, loss in stated_losses(folder).items()]
    size = (folder / "model.safetensors").stat().st_size
    typer.echo(
        f"{title}: {human_count(config.num_parameters())} parameters in {human_bytes(size)}, "
        f"{human_count(config.num_non_embedding_parameters())} without embeddings, {config.num_hidden_layers} layers;\n"
        f"held-out loss in nats per token: {', '.join(losses)}.\n"
    )
    stream = TextStream(loaded.model, loaded.tokenizer, encode_prompt(loaded.tokenizer, prompt), parameters)
    typer.echo(prompt, nl=False)
    with stream:
        for piece in stream:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    summary = stream.summary
    if summary is not None:
        typer.echo(f"\n\n{speed_of(summary)}.\n")
