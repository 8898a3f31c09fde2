"""`minitron chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Any, Optional

import typer

from ..locate import locate
from .common import DeviceOption, DtypeOption, ModelArgument, quiet_libraries, say, sentence_errors


@sentence_errors
def chat(
    model: Optional[str] = ModelArgument,  # noqa: UP045 (typer reads this annotation at run time)
    system: str = typer.Option("", "--system", help="What the assistant is told first."),
    max_new_tokens: int = typer.Option(256, "--max-new-tokens", "--max-tokens", "-n", help="Longest reply, in tokens."),
    temperature: Optional[float] = typer.Option(  # noqa: UP045
        None, help="0 is greedy; higher is more varied; if left out the checkpoint's own, or 0.7."
    ),
    top_p: Optional[float] = typer.Option(  # noqa: UP045
        None, help="Keep the most probable tokens of this total probability; if left out the checkpoint's own, or 0.95."
    ),
    seed: Optional[int] = typer.Option(None, help="Same seed, same machine, same replies."),  # noqa: UP045
    dtype: str = DtypeOption,
    device: str = DeviceOption,
) -> None:
    """Talk with a model; /reset starts anew, /quit or Ctrl-D ends.

    Examples:

      minitron chat path/to/Nemotron-Mini-4B-Instruct

      minitron chat path/to/checkpoint --system "Answer in one sentence."
    """
    locate(model)
    from ..sampling_settings import SamplingSettings

    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    SamplingSettings(**{name: value for name, value in given.items() if value is not None})  # refuses early
    quiet_libraries()
    from ..chat import TURN_MARK
    from ..loading import load

    loaded = load(model, dtype=dtype, device=device, say=say)
    if loaded.tokenizer.chat_template is None:
        raise ValueError(
            f"{model}: the tokenizer has no chat template and no {TURN_MARK}; "
            f"this checkpoint cannot chat, use `minitron generate`"
        )
    config: Any = loaded.model.generation_config
    settings = SamplingSettings.for_model(config, given, {"temperature": 0.7, "top_p": 0.95})
    for note in settings.notes(config):
        typer.echo(f"note: {note}", err=True)
    if model is None:
        typer.echo("The bundled model is small and was only taught to go on with a story; expect no answers.", err=True)
    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            said = input("> ").strip() if sys.stdin.isatty() else _next_line()
        except EOFError:
            return
        if said == "/quit":
            return
        if said == "/reset":
            messages = list(start)
        elif said:
            messages.append({"role": "user", "content": said})
            messages.append(_reply(loaded, messages, settings))


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()


def _reply(loaded: Any, messages: list[dict[str, Any]], settings: Any) -> dict[str, Any]:
    from ..chat import TURN_MARK, parse_reply
    from ..generate import TextStream

    ids = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    mark = loaded.tokenizer.convert_tokens_to_ids(TURN_MARK)
    stop = (mark,) if isinstance(mark, int) and mark != loaded.tokenizer.unk_token_id else ()
    stream = TextStream(loaded.model, loaded.tokenizer, ids, settings, stop_ids=stop)
    with stream:
        try:
            for piece in stream:
                typer.echo(piece, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:  # ends this reply, not the conversation
            pass
    typer.echo()
    return parse_reply(stream.text)
