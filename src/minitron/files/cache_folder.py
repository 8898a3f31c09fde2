"""Where files are cached that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(part: str) -> Path:
    """The folder of one kind of cached files, `~/.cache/minitron/PART`, or of all of them if `part` is empty.

    It may be deleted at any time. The environment variable MINITRON_CACHE names another folder in place of
    `~/.cache/minitron`.
    """
    named = os.environ.get("MINITRON_CACHE")
    return (Path(named).expanduser() if named else Path.home() / ".cache" / "minitron") / part
