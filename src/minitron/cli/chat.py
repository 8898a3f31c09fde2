"""`minitron chat`: a conversation in the terminal."""

from __future__ import annotations

import io
import re
import sys
from typing import Any, Optional

import typer

from ..characters import require_characters
from ..locate import locate
from .common import DeviceOption, DtypeOption, ModelArgument, quiet_libraries, say, sentence_errors


@sentence_errors
def chat(
    model: Optional[str] = ModelArgument,  # noqa: UP045 (typer reads this annotation at run time)
    system: str = typer.Option("", "--system", help="System message: what the assistant is told first."),
    max_new_tokens: int = typer.Option(256, "--max-new-tokens", "--max-tokens", "-n", help="Longest reply, in tokens."),
    temperature: Optional[float] = typer.Option(  # noqa: UP045
        None, help="0 is greedy; higher is more varied. The checkpoint's own by default, or 0.7."
    ),
    top_p: Optional[float] = typer.Option(  # noqa: UP045
        None, help="Keep the most probable tokens of this total probability. The checkpoint's own by default, or 0.95."
    ),
    seed: Optional[int] = typer.Option(None, help="Same seed, same machine, same replies."),  # noqa: UP045
    dtype: str = DtypeOption,
    device: str = DeviceOption,
) -> None:
    """Chat with a model; /help lists the commands, /quit or Ctrl-D quits.

    Examples:

      minitron chat path/to/Nemotron-Mini-4B-Instruct

      minitron chat path/to/checkpoint --system "Answer in one sentence."
    """
    locate(model)
    from ..sampling_parameters import SamplingParameters

    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    SamplingParameters(**{name: value for name, value in given.items() if value is not None})  # refuses early
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
    settings = SamplingParameters.for_model(config, given, {"temperature": 0.7, "top_p": 0.95})
    for note in settings.notes(config):
        typer.echo(f"note: {note}", err=True)
    if model is None:
        typer.echo(
            "The bundled model is small and was only trained to continue stories; do not expect answers.", err=True
        )
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not text cost one line only
    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            said = input("> ").strip() if sys.stdin.isatty() else _next_line()
            require_characters(said, "the message")
        except EOFError:
            return
        except ValueError as error:  # the conversation continues without this line
            typer.echo(f"{error}; the message was skipped", err=True)
            continue
        command = _command(said)
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            messages = list(start)
        elif command == "/help":
            typer.echo(_HELP)
        elif command is not None:
            typer.echo(
                f"{command}: no such command; /help lists them (// sends a message that begins with /)",
                err=True,
            )
        elif said:
            said = said[1:] if said.startswith("//") else said
            messages = _answered(loaded, [*messages, {"role": "user", "content": said}], settings)


_HELP = """\
/help   show this list
/reset  start a new conversation
/quit   quit (also /exit, Ctrl-D)
Ctrl-C stops a reply. To send a message that begins with /, write two of them: //etc/hosts."""


def _command(said: str) -> str | None:
    """The command that a line is; None for a message."""
    word = said.split(maxsplit=1)[0].lower() if said else ""
    return word if re.fullmatch(r"/[a-z?!-]*", word) else None


def _answered(loaded: Any, messages: list[dict[str, Any]], settings: Any) -> list[dict[str, Any]]:
    """The conversation with its reply; without the last message where that is too long to be answered."""
    from ..chat import fit_conversation
    from ..templates import ChatTemplateError, conversation_ids

    context = loaded.model.config.max_position_embeddings
    reserve = min(settings.max_new_tokens, context // 4)

    def count(turns: list[dict[str, Any]]) -> int:
        return len(conversation_ids(loaded.tokenizer, turns, add_generation_prompt=True))

    try:
        kept, dropped = fit_conversation(messages, count, context, reserve)
    except ChatTemplateError:
        raise
    except ValueError as error:
        typer.echo(str(error), err=True)
        return messages[:-1]
    if dropped:
        turns = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
        typer.echo(f"(the context of {context} tokens is full: {turns} dropped)", err=True)
    return [*kept, _reply(loaded, kept, settings)]


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()


def _reply(loaded: Any, messages: list[dict[str, Any]], settings: Any) -> dict[str, Any]:
    from ..chat import TURN_MARK, parse_reply
    from ..templates import conversation_ids
    from ..text_stream import TextStream

    ids = conversation_ids(loaded.tokenizer, messages, add_generation_prompt=True)
    mark = loaded.tokenizer.convert_tokens_to_ids(TURN_MARK)
    stop = (mark,) if isinstance(mark, int) and mark != loaded.tokenizer.unk_token_id else ()
    stream = TextStream(loaded.model, loaded.tokenizer, ids, settings, stop_ids=stop)
    with stream:
        try:
            for piece in stream:
                typer.echo(piece, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:  # stops this reply, not the conversation
            pass
    typer.echo()
    return parse_reply(stream.text)
