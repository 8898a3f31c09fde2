"""`minitron demo`: the first thing a newcomer sees."""

from __future__ import annotations

import sys

import typer

from .common import human_bytes, human_count, quiet_libraries, sentence_errors


@sentence_errors
def demo(
    prompt: str = typer.Option("Once upon a time there was a little", "--prompt", "-p", help="How the story begins."),
    max_new_tokens: int = typer.Option(160, "--max-new-tokens", "-n", help="Tokens to write at most."),
    seed: int = typer.Option(1, help="Same seed, same machine, same text."),
) -> None:
    """Write a story with the bundled model, and say what to try next."""
    from ..assets import bundled_model

    folder = bundled_model()
    size = (folder / "model.safetensors").stat().st_size
    quiet_libraries()
    from ..generate import SamplingSettings, TextStream, encode_prompt
    from ..loading import load

    loaded = load(folder)
    config = loaded.model.config
    typer.echo(
        f"The bundled Nemotron: {human_count(config.num_parameters())} parameters in {human_bytes(size)}, "
        f"{config.num_hidden_layers} layers, vocabulary {config.vocab_size}.\n"
    )
    settings = SamplingSettings(max_new_tokens, temperature=0.7, top_p=0.9, seed=seed)
    stream = TextStream(loaded.model, loaded.tokenizer, encode_prompt(loaded.tokenizer, prompt), settings)
    typer.echo(prompt, nl=False)
    with stream:
        for piece in stream:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    summary = stream.summary
    if summary is not None:
        typer.echo(f"\n\n{summary.new_tokens} tokens, {summary.decode_tokens_per_second:.0f} per second.")
    typer.echo(
        "\nThree things to try next:\n"
        '  .venv/bin/minitron generate -p "The old man looked at the sea" --seed 3\n'
        "  .venv/bin/minitron inspect minitron-4b\n"
        "  .venv/bin/minitron train --help"
    )
