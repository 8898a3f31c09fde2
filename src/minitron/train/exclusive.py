"""One training in a run folder at a time."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from ..files import check_target, locked
from ..world import World
from .extending import MODEL_FOLDER

F = TypeVar("F", bound=Callable[..., Any])


def alone_in_its_folder(train: F) -> F:
    """Let `train` run only while its first process holds the lock of `run`, and only if `run/model` may be written.

    Raises:
        LockedError: another process trains there.
        TargetError: `run/model` holds files that the export did not write, which it would have to delete.
    """
    signature = inspect.signature(train)

    @functools.wraps(train)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        values = signature.bind(*args, **kwargs).arguments
        world, run = values.get("world") or World(), values["run"]
        lock = locked(run)
        world.first_does(lock.__enter__)
        try:
            world.first_does(lambda: check_target(run / MODEL_FOLDER, folder=True, overwrite=True))
            return train(*args, **kwargs)
        finally:
            if world.first:
                lock.__exit__(None, None, None)

    return guarded  # type: ignore[return-value]
