"""`minitron bench`: how fast this machine decodes, against its memory bandwidth and against other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import typer

from ..locate import locate
from .common import (
    PICTURES,
    JsonOption,
    ModelArgument,
    check_output,
    human_bytes,
    print_json,
    quiet_libraries,
    say,
    sentence_errors,
)

PEERS = ("transformers", "llama.cpp")
MANY_COLUMNS = 1 << 20
"""More columns than any row has."""


@sentence_errors
def bench(
    model: Optional[str] = ModelArgument,  # noqa: UP045 (typer reads this annotation at run time)
    preset: Optional[str] = typer.Option(None, help="Random weights in a published shape, e.g. minitron-4b."),  # noqa: UP045
    random_weights: bool = typer.Option(False, "--random-weights", help="Random weights in the shape of MODEL."),
    zeros: float = typer.Option(0.9, help="With random weights: share of MLP neurons that are zero."),
    layers: Optional[int] = typer.Option(  # noqa: UP045
        None,
        help="With random weights: fewer layers and a smaller vocabulary, for machines with little memory.",
    ),
    format: str | None = typer.Option(None, help="bf16, fp32, bf12, int8 or int4; the checkpoint's if not given."),
    prompt_tokens: int = typer.Option(128, help="Length of the prompt (random tokens)."),
    new_tokens: int = typer.Option(32, "--new-tokens", "-n", help="Tokens to decode per round."),
    rounds: int = typer.Option(5, help="Rounds; engine and peers take turns."),
    peers: str = typer.Option("all", help="transformers, llama.cpp (if installed), all or none."),
    retune: bool = typer.Option(False, "--retune", help="Measure again how weights are read fastest on this machine."),
    plot: Optional[Path] = typer.Option(None, help="Write the roofline as a picture (.png, .svg, .pdf)."),  # noqa: B008, UP045
    as_json: bool = JsonOption,
) -> None:
    """Measure decoding on the CPU: tokens/s, bytes per token, GB/s against the bandwidth measured in the same run.

    Examples:

      minitron bench

      minitron bench --preset minitron-4b --random-weights --zeros 0.9 --format int8 --rounds 3

      minitron bench --preset minitron-4b --layers 8 --peers llama.cpp --plot roofline.png

      minitron bench path/to/checkpoint --json
    """
    if format is not None:
        from ..dtypes import short_name

        format = short_name(format.lower())
    _check(model, preset, layers, random_weights, peers, format)
    for name, value, least in (
        ("prompt-tokens", prompt_tokens, 1),
        ("new-tokens", new_tokens, 2),
        ("rounds", rounds, 1),
    ):
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    if model is not None and not Path(model).expanduser().exists():
        locate(model)  # a wrong name is refused before torch is imported
    _need(peers == "llama.cpp", ("llama_cpp", "gguf"), "--peers llama.cpp needs llama-cpp-python and gguf")
    check_output(plot, PICTURES)
    _need(plot is not None, ("matplotlib",), "--plot needs matplotlib: pip install 'minitron[plot]'")
    quiet_libraries()
    import torch

    from ..bench.measure import compare, tuning_of
    from ..bench.peers import TransformersPeer, llama_peer
    from ..engine.model_weights import weights_of
    from ..engine.models import why_not_model

    subject, name, weights = _subject(model, preset, random_weights, zeros, layers)
    reason = why_not_model(subject)
    if reason:
        raise ValueError(f"the engine does not run this model: {reason}")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(subject.config.vocab_size, (prompt_tokens,), generator=generator).tolist()
    stored = weights_of(subject, format)  # type: ignore[arg-type]
    tuning = tuning_of(stored, retune)
    others: dict[str, Any] = {}
    if peers in ("all", "transformers"):
        others["transformers"] = TransformersPeer(subject)
    with llama_peer(subject, stored.format, prompt_tokens + new_tokens, peers in ("all", "llama.cpp")) as llama:
        if peers == "llama.cpp" and not llama:
            raise ValueError("--peers llama.cpp: llama.cpp does not load this shape")
        result = compare(stored, others | llama, prompt, new_tokens, rounds)
    result = {"model": name, "weights": weights, "format": stored.format, **result, "tuning": tuning}
    if plot is not None:
        from ..bench.roofline import draw_roofline

        draw_roofline([{"name": stored.format, **result}], plot)
    if as_json:
        print_json(result)
    else:
        _print_table(result)


def _check(
    model: str | None, preset: str | None, layers: int | None, random: bool, peers: str, format: str | None
) -> None:
    if model is not None and preset is not None:
        raise ValueError("MODEL and --preset were both given; give one of them")
    if layers is not None and preset is None and not random:
        raise ValueError("--layers was given for a model's own weights; it goes with --preset or --random-weights")
    if peers not in ("all", "none", *PEERS):
        raise ValueError(f"--peers is {peers!r}; it must be {', '.join(PEERS)}, all or none")
    if format is not None:
        from ..engine.matrix import FORMATS

        if format not in FORMATS:
            raise ValueError(f"--format is {format!r}; it must be one of {', '.join(FORMATS)}")


def _need(wanted: bool, modules: tuple[str, ...], sentence: str) -> None:
    import importlib.util

    if wanted and not all(importlib.util.find_spec(name) for name in modules):
        raise ValueError(sentence)


def _subject(
    model: str | None, preset: str | None, random: bool, zeros: float, layers: int | None
) -> tuple[Any, str, str]:
    """The model, its name and a word on its weights."""
    from ..bench.measure import random_model, shortened
    from ..config import NemotronConfig
    from ..loading import load

    if preset is None and not random:
        return load(model, device="cpu", say=say).model, str(model or "bundled"), "the checkpoint's"
    if preset is not None:
        config, name = NemotronConfig.preset(preset), preset
    else:
        config, name = load(model, device="cpu", say=say).model.config, str(model or "bundled")
    if layers is not None:
        name = f"{name}, {layers} of {config.num_hidden_layers} layers and as much of the vocabulary"
        config = shortened(config, layers)
    return random_model(config, zeros), name, f"random, {zeros:.0%} zeros declared"


def _print_table(result: dict[str, Any]) -> None:
    lines = [
        ("model", f"{result['model']} ({result['weights']} weights; {result['format']}, {result['threads']} threads)"),
        ("read bandwidth", f"{result['read_bandwidth_gb_per_s']:.1f} GB/s, measured in this run"),
        ("prompt", f"{result['prefill_tokens_per_s']:.0f} tokens/s at {result['prompt_tokens']} tokens"),
        ("decoding", f"{result['tokens_per_s']:.1f} tokens/s, median of {result['rounds']} rounds"),
        *([("zeros seen", f"{result['zero_fraction']:.1%} of the MLP neurons")] if result["zero_fraction"] else []),
        (
            "weights read",
            f"{human_bytes(result['bytes_per_token'])} per token, {human_bytes(result['dense_bytes_per_token'])} dense",
        ),
        ("rate", f"{result['gb_per_s']:.1f} GB/s, {result['of_bandwidth']:.0%} of the bandwidth"),
        ("dense floor", f"{result['of_dense_floor']:.2f} times the tokens/s that reading all weights would allow"),
    ]
    lines += [
        (
            name,
            f"{peer['tokens_per_s']:.1f} tokens/s, the engine is {peer['times']:.2f} times as fast; prompt "
            f"{peer['prefill_tokens_per_s']:.0f} tokens/s, {peer['prefill_times']:.2f} times; "
            f"the first {peer['equal_tokens']} of {result['new_tokens']} tokens are the same",
        )
        for name, peer in result["peers"].items()
    ]
    for name, value in lines + _tuning_lines(result["tuning"], result["threads"]):
        typer.echo(f"{name:15} {value}")


def _tuning_lines(tuning: dict[str, Any] | None, threads: int) -> list[tuple[str, str]]:
    """How weights are read, and the other ways that were tried."""
    if tuning is None:
        return []
    origin = {
        "small model": "not measured: the model fits into the caches",
        "measured": "measured in this run",
        "kept": "measured earlier on this machine; --retune measures again",
    }[tuning["origin"]]
    if tuning["load"]:
        origin = f"measured in this run and not kept: {tuning['load']}"
    rates = [(_reading(tried, threads), f"{tried['gb_per_s']:.1f} GB/s") for tried in tuning["measured"]]
    return [("tuning", f"{_reading(tuning['chosen'], threads)} ({origin})")] + [
        ("", f"{rate}  {way}") for way, rate in rates
    ]


def _reading(tuning: dict[str, Any], threads: int) -> str:
    """One way to read weights, in words."""
    ahead, short = tuning["ahead"], tuning["short"]
    shares = "fixed shares" if tuning["fixed"] else f"{tuning['parts']} parts a thread"
    rows = "one row at a time"
    if short:
        rows = "four rows at a time" + (f" up to {short:,} columns" if short < MANY_COLUMNS else "")
    prefetch = f"prefetch {ahead:,} bytes ahead" if ahead else "no prefetch"
    return f"{prefetch}, {rows}, {shares}, {tuning['threads'] or threads} threads"
