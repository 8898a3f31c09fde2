"""What the verbs share: errors as one line, quiet libraries, checks of output files, and numbers in words."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ..characters import first_surrogate, require_characters
from ..checkpoint.limits import CheckpointNote
from ..files import WriteError, check_target

if TYPE_CHECKING:
    from ..light.summary import Summary

F = TypeVar("F", bound=Callable[..., Any])

MODEL_HELP = "Checkpoint (Hugging Face, GGUF, NeMo, LoRA), repository id, `bundled` or `bundled-half`."
ModelArgument = typer.Argument(None, help=f"{MODEL_HELP} Default: `bundled`.")
DtypeOption = typer.Option("auto", "--dtype", help="auto, bf16, fp16 or fp32.")
DEVICE_HELP = "auto, cpu, cuda, cuda:1, ..."
DeviceOption = typer.Option("auto", "--device", help=DEVICE_HELP)
JSON_HELP = "Print one JSON object on stdout, progress on stderr."
JsonOption = typer.Option(False, "--json", help=JSON_HELP)


def sentence_errors(verb: F) -> F:
    """Turn errors of `verb` into one line on stderr: exit code 2 for bad input, 1 for a failure of the disk and for
    anything unexpected.

    MINITRON_DEBUG=1 shows the traceback instead.
    """

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> Any:
        if os.environ.get("MINITRON_DEBUG"):
            return verb(*args, **kwargs)
        show_notes()
        try:
            _require_text(kwargs)
            return verb(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output closed the pipe; that is no error
            sys.stderr.close()
            raise typer.Exit(0) from None
        except WriteError as error:
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(1) from None
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            typer.echo(f"error: text that is not UTF-8 (byte 0x{byte:02x} at position {error.start})", err=True)
            raise typer.Exit(2) from None
        except (ValueError, OSError) as error:
            text = str(error) if getattr(error, "keeps_lines", False) else one_line(error)
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(2) from None
        except Exception as error:
            typer.echo(f"error: {type(error).__name__}: {one_line(error)} (MINITRON_DEBUG=1 shows more)", err=True)
            raise typer.Exit(1) from None

    return run  # type: ignore[return-value]


def _require_text(arguments: dict[str, Any]) -> None:
    """Refuse arguments that are not UTF-8, unless they are names of files, which may be any bytes."""
    for name, value in arguments.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and first_surrogate(text) is not None and not os.path.exists(text):
                require_characters(text, f"--{name.replace('_', '-')}")


PICTURES = (".png", ".svg", ".pdf")


def check_output(file: Path | None, suffixes: Sequence[str] = (), sources: Iterable[str] = ()) -> None:
    """Refuse an output file that could not be written, or that is part of the input, before any work is done.

    Args:
        file: the output file, if there is one.
        suffixes: the endings that its name may have; all if empty.
        sources: paths of the input.

    Raises:
        ValueError: its folder does not exist; it is a folder; it has another suffix; it is part of a source.
    """
    if file is None:
        return
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{file}: there is no folder {file.absolute().parent}")
    if file.is_dir():
        raise ValueError(f"{file} is a folder; give the name of a file")
    if suffixes and file.suffix.lower() not in suffixes:
        raise ValueError(f"{file}: expected a name that ends with {' or '.join(suffixes)}")
    check_target(file, folder=False, overwrite=True, sources=map(Path, sources))


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def quiet_libraries() -> None:
    """Keep transformers' progress bars and notes off the terminal; errors still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as their_logging

    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()


_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "C:/Windows/System32/nvcuda.dll")
"""Files of the drivers of NVIDIA, of Windows in WSL, of AMD, and of NVIDIA on Windows."""


def no_gpu() -> bool:
    """Whether the machine has no driver of a GPU that torch could use, as far as files tell without importing torch."""
    return not any(map(os.path.exists, _GPU_DEVICES))


def show_notes() -> None:
    """Print notes about a checkpoint as plain lines, not as Python warnings with a file and line number."""
    others = warnings.showwarning

    def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, CheckpointNote):
            typer.echo(f"note: {message}", err=True)
        else:
            others(message, category, *args, **kwargs)

    warnings.showwarning = show


def say(sentence: str) -> None:
    """One line on stderr."""
    typer.echo(sentence, err=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def speed_of(summary: Summary) -> str:
    """The speed of a generation in words: the first token, whose time is that of the prompt, and the tokens after
    it."""
    text = f"{summary.new_tokens} tokens, the first after {summary.first_token_seconds:.2f} s"
    if summary.decode_tokens_per_second:
        text += f", then {summary.decode_tokens_per_second:,.0f} tokens/s"
    return text + (f" ({summary.load})" if summary.load else "")


def human_bytes(count: float) -> str:
    """Bytes in the unit a person would use: '8.4 GB', decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """A number of parameters or tokens: '4.19B', '6.3M'."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit:
            return f"{count / limit:.2f}{unit}"
    return f"{count:.0f}"
