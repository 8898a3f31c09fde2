"""Keep messages and progress bars of other packages that tell the user nothing off the terminal; which bar to draw."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LARGE_BYTES = 1_000_000_000
"""Reading or writing less than this is too quick for a progress bar."""

# transformers imports torchao where it is installed. torchao reports each GPU kernel that does not load on this
# machine, and registers its enums in a way that torch warns about.
_IMPORT_MESSAGES = (("torchao", "Failed to load "), ("torch.utils._pytree", "<enum "))


class _Beginning(logging.Filter):
    """Drops records whose message begins with a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.text)


def drop_import_messages() -> None:
    """Keep the messages of importing torchao off the terminal; other log messages stay."""
    for name, text in _IMPORT_MESSAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Beginning) for known in logger.filters):
            logger.addFilter(_Beginning(text))


@contextmanager
def progress_bars(nbytes: int) -> Iterator[None]:
    """In this block, let transformers show progress bars for large work on a terminal only.

    Args:
        nbytes: bytes to be read or written.
    """
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    if not shown or (nbytes >= LARGE_BYTES and sys.stderr.isatty()):
        yield
        return
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings():  # the hub's client warns if the environment disables its own bars
            warnings.simplefilter("ignore")
            theirs.enable_progress_bar()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, where stderr is no terminal and is shown all the same."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", {})


def bar_class() -> tuple[Any, bool]:
    """tqdm's class for where this process shows its output, and whether a person watches the bar move.

    In a notebook it is a widget; without ipywidgets it is text.
    """
    if in_notebook():
        with warnings.catch_warnings():  # tqdm warns if ipywidgets is missing, and then draws text
            warnings.simplefilter("ignore")
            from tqdm.autonotebook import tqdm
        return tqdm, True
    from tqdm import tqdm

    return tqdm, sys.stderr.isatty()
