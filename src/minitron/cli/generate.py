"""`minitron generate`: continue a text."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer

from ..locate import locate
from ..sampling_parameters import SamplingParameters
from .common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    no_gpu,
    print_json,
    quiet_libraries,
    say,
    sentence_errors,
    speed_of,
)

if TYPE_CHECKING:
    from ..light.stream import LightStream
    from ..text_stream import TextStream

UNSTATED = {"temperature": 0.8, "top_p": 0.95}
"""Parameters where neither the user nor the checkpoint states them."""


@sentence_errors
def generate(
    model: Optional[str] = ModelArgument,  # noqa: UP045 (typer reads this annotation at run time)
    prompt: str = typer.Option(..., "--prompt", "-p", help="Text to continue; `-` reads it from stdin."),
    max_new_tokens: Optional[int] = typer.Option(  # noqa: UP045
        None, "--max-new-tokens", "--max-tokens", "-n", help="Largest number of new tokens. [default: 128]"
    ),
    temperature: Optional[float] = typer.Option(None, help="0 is greedy; higher is more varied. [default: 0.8]"),  # noqa: UP045
    top_p: Optional[float] = typer.Option(  # noqa: UP045
        None, help="Keep the most probable tokens of this total probability; 1 keeps all. [default: 0.95]"
    ),
    top_k: Optional[int] = typer.Option(None, help="Keep this many most probable tokens; 0 keeps all. [default: 0]"),  # noqa: UP045
    min_p: Optional[float] = typer.Option(  # noqa: UP045
        None, help="Keep tokens of at least this share of the best one's probability. [default: 0]"
    ),
    repetition_penalty: Optional[float] = typer.Option(  # noqa: UP045
        None, help="Above 1, words already present become less likely. [default: 1]"
    ),
    recommended: bool = typer.Option(
        True, help="Use the parameters in the checkpoint's generation_config.json where no option is given."
    ),
    seed: Optional[int] = typer.Option(None, help="Same seed, same machine, same text."),  # noqa: UP045
    stop: Optional[list[str]] = typer.Option(None, help="Stop after this string; may be repeated."),  # noqa: B008, UP045
    speculate: Optional[str] = typer.Option(  # noqa: UP045
        None,
        help="Draft tokens and check several at once: `lookup` (words that repeat), `self` (int4), `default`, folder.",
    ),
    format: Optional[str] = typer.Option(  # noqa: UP045
        None, help="Load the weights in a format: bf16, fp32, bf12 (bf16 without loss, on a CPU), int8 or int4."
    ),
    dtype: str = DtypeOption,
    device: str = DeviceOption,
    as_json: bool = JsonOption,
) -> None:
    """Continue a text and print it as it is written.

    Parameters that are not given come from the checkpoint's generation_config.json; the defaults below apply to those
    that it lacks.

    Examples:

      minitron generate -p "Once upon a time"

      minitron generate path/to/checkpoint -p "The sea was" --temperature 0 -n 64

      minitron generate large -p "def main(" --speculate lookup --temperature 0

      minitron generate large -p "Dear Anna," --speculate small

      minitron generate large -p "Dear Anna," --format int8

      echo "Dear Anna," | minitron generate -p - --seed 7 --json
    """
    source = locate(model)
    for name in [] if speculate in (None, "default", "lookup", "self") else [speculate]:
        locate(name)
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
        "checkpoint": recommended,
    }
    SamplingParameters(**{name: value for name, value in given.items() if value is not None})  # refuses early
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("the prompt is empty; give some text to continue")
    stream = None
    if speculate is None and format is None and dtype == "auto":
        stream = light_stream(source, device, text, given)
    if stream is None:
        quiet_libraries()
        from ..loading import load
        from ..text_stream import TextStream, encode_prompt

        loaded = load(model, dtype=dtype, device=device, format=format, say=say)
        ids = encode_prompt(loaded.tokenizer, text)
        draft = None if speculate is None else _draft(speculate, loaded)
        config: Any = loaded.model.generation_config
        parameters = SamplingParameters.for_model(config, given, UNSTATED)
        stream = TextStream(loaded.model, loaded.tokenizer, ids, parameters, draft=draft)
    _write(stream, {"model": str(model or "bundled"), "prompt": text}, as_json)


def _write(stream: LightStream | TextStream, about: dict[str, Any], as_json: bool) -> None:
    """Print the text as it comes, or one JSON object at the end."""
    for note in stream.notes:
        typer.echo(f"note: {note}", err=True)
    chosen = {"settings": asdict(stream.settings), "from_checkpoint": stream.from_checkpoint, "notes": stream.notes}
    try:
        with stream:
            if not as_json:
                typer.echo(about["prompt"], nl=False)
            for piece in stream:
                if not as_json:
                    typer.echo(piece, nl=False)
                    sys.stdout.flush()
    except KeyboardInterrupt:
        # The text so far is on the terminal already.
        if as_json:
            print_json({**about, "text": stream.text, **chosen, "interrupted": True})
        raise
    summary = stream.summary
    if summary is None:
        raise RuntimeError("the generation ended without a result")
    if as_json:
        print_json(
            {
                **about,
                "text": stream.text,
                **chosen,
                **asdict(summary),
                "tokens_per_second": summary.tokens_per_second,
                "decode_tokens_per_second": summary.decode_tokens_per_second,
            }
        )
        return
    typer.echo()
    line = speed_of(summary)
    if summary.zero_fraction is not None:
        line += f"; {summary.zero_fraction:.0%} of the MLP neurons were zero"
    if summary.tokens_per_step is not None:
        line += f"; {summary.tokens_per_step:.2f} tokens a step, {summary.acceptance_rate:.0%} of drafts accepted"
    typer.echo(f"{line} ({summary.engine})", err=True)


def light_stream(source: Path | str, device: str, prompt: str, given: dict[str, Any]) -> LightStream | None:
    """The stream that needs neither torch nor transformers; None if they must serve the request."""
    if isinstance(source, str) or not source.is_dir() or not (device == "cpu" or (device == "auto" and no_gpu())):
        return None
    from ..light.settings import NotServedError
    from ..light.stream import LightModel, LightStream

    try:
        model = LightModel(source)
        parameters = SamplingParameters.for_model(model.recommended, given, UNSTATED)
        return LightStream(model, prompt, parameters)
    except NotServedError:
        return None


def _draft(wanted: str, loaded: Any) -> Any:
    """The draft for `TextStream`.

    Raises:
        ValueError: the checkpoint has another tokenizer.
    """
    if wanted in ("default", "lookup", "self"):
        return wanted
    from ..loading import load

    helper = load(wanted, device=str(loaded.model.device), say=say)
    if helper.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise ValueError(
            f"--speculate {wanted}: its tokenizer has other tokens than the model's; they must be the same"
        )
    return helper.model
