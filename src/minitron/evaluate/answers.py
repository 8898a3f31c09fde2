"""A cache of answers on disk, so that an interrupted evaluation continues where it stopped.

The key of an answer is a hash of everything that it depends on: the model's fingerprint and dtype, the task, its
version, the settings, and the request itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from ..files import writing

_EDITION = 3
"""Part of each key. Increase it when requests are answered differently than before, so that old answers are not
used."""
_SECONDS_BETWEEN_COMMITS = 2.0


def default_cache() -> Path:
    """The default folder of the cache: `$XDG_CACHE_HOME/minitron/eval`, or `~/.cache/minitron/eval`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitron" / "eval"


class Answers:
    """Answers of one model by key, written every two seconds and when it is closed.

    Raises:
        ValueError: the file is not a cache of answers.
    """

    def __init__(self, folder: Path | None, model: str) -> None:
        self.model = model
        """What identifies the model: fingerprint and dtype."""
        self.reused = 0
        """Number of answers that were found in the cache."""
        self.given = 0
        """Answers that were added."""
        path: Path | str = ":memory:"
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{hashlib.sha256(model.encode()).hexdigest()[:16]}.sqlite"
        self._committed = time.monotonic()
        self._path = Path(path)
        try:
            with writing(self._path):
                self._db = sqlite3.connect(path, timeout=60)
                self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path}: no cache of answers ({error}); remove it or name another folder") from None

    def key(self, *parts: Any) -> str:
        """Hash of the model and of JSON values."""
        return hashlib.sha256(json.dumps([_EDITION, self.model, *parts], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The answer, a JSON value; None if there is none."""
        row = self._db.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        self.reused += 1
        return json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Keep an answer."""
        with writing(self._path):
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(value)))
        self.given += 1
        if time.monotonic() - self._committed > _SECONDS_BETWEEN_COMMITS:
            self.commit()

    def commit(self) -> None:
        """Write what was added."""
        with writing(self._path):
            self._db.commit()
        self._committed = time.monotonic()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            self.commit()
        finally:
            self._db.close()
