"""`--quiet`: a verb without its progress."""

from __future__ import annotations

import functools
import inspect
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Annotated, Any, TextIO, TypeVar, get_type_hints

import typer

F = TypeVar("F", bound=Callable[..., Any])

_KEPT = ("note:", "warning:", "error:", "stopped by ")
"""How lines begin that are shown all the same."""

QuietOption = typer.Option("--quiet", "-q", help="No progress on stderr: only notes, warnings and errors.")


class _WithoutProgress(io.TextIOBase):
    """In place of stderr: passes on lines that are no progress. Not a terminal, so progress bars stay away."""

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner
        self._line = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            shown = line.rpartition("\r")[2]
            if shown.startswith(_KEPT):
                self._inner.write(shown + "\n")
        self._line = self._line.rpartition("\r")[2]
        return len(text)

    def flush(self) -> None:
        if not self.closed:
            self._inner.flush()


@contextmanager
def without_progress() -> Iterator[None]:
    """In this block, stderr shows notes, warnings and errors alone."""
    inner = sys.stderr
    shown = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        with redirect_stderr(inner):
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        with redirect_stderr(_WithoutProgress(inner)):  # type: ignore[type-var]
            yield
    finally:
        warnings.showwarning = shown


def with_quiet(verb: F) -> F:
    """Add the option `--quiet` to a verb that prints progress."""
    own = inspect.signature(verb)
    hints = getattr(verb, "__annotations__", {}) if hasattr(verb, "__signature__") else _hints(verb)
    parameters = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in own.parameters.values()]
    quiet = inspect.Parameter(
        "quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, QuietOption]
    )

    @functools.wraps(verb)
    def run(*args: Any, quiet: bool = False, **kwargs: Any) -> Any:
        if not quiet:
            return verb(*args, **kwargs)
        with without_progress():
            return verb(*args, **kwargs)

    run.__signature__ = own.replace(parameters=[*parameters, quiet])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*parameters, quiet)}
    return run  # type: ignore[return-value]


def _hints(verb: Any) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(verb, include_extras=True).items() if name != "return"}
