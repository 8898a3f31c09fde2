"""Token caches: the tokens of texts, created once and mapped from disk.

A cache is a folder named for its text, the tokenizer and how the text was read, so that runs share it. This file knows
tokenizers only by `__call__` and special ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..files import TargetError, new_folder, write_json
from .documents import DataError, Problems, Source, read_all
from .documents.formats import kind_of

CACHE_VERSION = 2
_TEXTS_PER_CALL = 512


class Encoder(Protocol):
    """What a tokenizer must offer; every Hugging Face tokenizer does."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any:
        """Return an object whose `input_ids` holds a list of ids per text."""

    def __len__(self) -> int:
        """Return the number of tokens, special ones included."""
        ...


@dataclass(frozen=True)
class TokenCache:
    """The tokens of a source, one document after another, mapped from disk."""

    tokens: np.ndarray
    """(number of tokens,) uint16, or uint32 for vocabularies above 65,536."""
    starts: np.ndarray
    """(documents + 1,) int64: where each document starts; the last is the number of tokens."""
    text_bytes: np.ndarray
    """(documents,) int64: length of each document's UTF-8 text."""
    key: str
    """Hash of the text, of how it was read, and of the tokenizer."""
    notes: tuple[str, ...] = ()
    """Sentences about text that was skipped."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What `key` is made of, as JSON values: `files` (name and digest of each), `tokenizer`, `field`, and so on."""

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.text_bytes)


class TokenFolder:
    """A folder of token caches. As a context manager it removes what was created in it if the block fails before
    `keep`, so that a run that is refused leaves nothing behind.

    Args:
        path: the folder; created when it is needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []
        self._parents: list[Path] = []

    def prepare(self) -> None:
        """Create the folder if it does not exist."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._parents += missing

    def add(self, cache: Path) -> None:
        """Remember a cache that was created."""
        self._made.append(cache)

    def keep(self) -> None:
        """Keep what was created."""
        self._made.clear()
        self._parents.clear()

    def discard(self) -> None:
        """Remove what was created since the last `keep`, and the folders created for it if they are empty."""
        for cache in self._made:
            shutil.rmtree(cache, ignore_errors=True)
        for folder in sorted(self._parents, key=lambda folder: -len(folder.parts)):
            with suppress(OSError):
                folder.rmdir()
        self._made.clear()
        self._parents.clear()

    def __enter__(self) -> TokenFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An interrupted command may be repeated, and then complete caches are useful.
        if kind is not None and issubclass(kind, Exception):
            self.discard()


def tokenize(source: Source, tokenizer: Encoder, folder: Path | TokenFolder) -> TokenCache:
    """The token cache of one source; see `tokenize_all`."""
    return tokenize_all([source], tokenizer, folder)[0]


def tokenize_all(sources: Sequence[Source], tokenizer: Encoder, folder: Path | TokenFolder) -> list[TokenCache]:
    """The token caches of sources, created on first use in folders named for the text and the tokenizer.

    Each document is stored as bos + tokens + eos, if the tokenizer has these two.

    Raises:
        FileNotFoundError: a source has no file.
        BadTextError: documents that cannot be used, those of all sources in one message.
        DataError: a source has no text, or the cache on disk is damaged.
    """
    if not isinstance(folder, TokenFolder):
        with TokenFolder(folder) as store:
            return tokenize_all(sources, tokenizer, store)
    listings = [source.listing() for source in sources]
    refused = Problems()
    caches: list[TokenCache] = []
    for source, listing in zip(sources, listings, strict=True):
        key, origin = _fingerprint(listing.files, tokenizer, source)
        final = folder.path / f"{Path(source.path).stem or 'text'}-{key[:16]}"
        problems = Problems(source.skip_bad, refused=refused.count)
        if not final.exists():
            _make_cache(final, folder, listing.files, source, tokenizer, key, problems)
        refused.merge(problems)
        if not refused.count:
            caches.append(replace(open_cache(final, listing.notes), origin=origin))
    refused.raise_any()
    return caches


def _fingerprint(files: Sequence[Path], tokenizer: Encoder, source: Source) -> tuple[str, dict[str, Any]]:
    """The key of a cache, and what it is made of."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {tokenizer.bos_token_id} {tokenizer.eos_token_id} ".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spelled = (backend.to_str() if backend is not None else repr(sorted(_vocabulary(tokenizer)))).encode()
    digest.update(spelled)
    how = {"field": source.field, "encoding": source.encoding, "skip_bad": source.skip_bad}
    digest.update(json.dumps(how, sort_keys=True).encode())
    contents: list[list[str]] = []
    for path in files:
        # The same bytes are another text in a file of another kind.
        digest.update(f"{kind_of(path)} {path.suffix.lower()}".encode())
        try:
            with path.open("rb") as content:
                found = hashlib.file_digest(content, "sha256")
            digest.update(found.digest())
            contents.append([_name_in(path, source), found.hexdigest()[:16]])
        except OSError as error:  # reading the file reports it, with the problems of other files
            digest.update(repr(error).encode())
    mark = hashlib.sha256(spelled).hexdigest()[:16]
    return digest.hexdigest(), {"files": contents, "tokenizer": mark, **how}


def _name_in(path: Path, source: Source) -> str:
    """What a file is called in messages: its path within the folder that was given, or its name."""
    folder = Path(source.path)
    return path.relative_to(folder).as_posix() if folder.is_dir() and path.is_relative_to(folder) else path.name


def _vocabulary(tokenizer: Any) -> Iterable[tuple[str, int]]:
    return tokenizer.get_vocab().items()


def _make_cache(
    final: Path, store: TokenFolder, files: Sequence[Path], source: Source, tokenizer: Encoder, key: str,
    problems: Problems,
) -> None:  # fmt: skip
    """Write a cache; nothing of it stays if a document is refused."""
    store.prepare()
    try:
        with new_folder(final, record=False) as work:
            meta = _write_tokens(work, files, source, tokenizer, problems)
            if problems.refuses:
                raise _RefusedError
            write_json(work / "meta.json", {"version": CACHE_VERSION, "key": key, **meta})
    except _RefusedError:
        return
    except TargetError:
        if final.exists():  # another process was faster, with the same content
            return
        raise
    store.add(final)


class _RefusedError(Exception):
    """Leaves the block that writes a cache, which removes what was written."""


def _write_tokens(
    folder: Path, files: Sequence[Path], source: Source, tokenizer: Encoder, problems: Problems
) -> dict[str, Any]:
    """Write the tokens and where documents start; the description of both."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    lengths: list[int] = []
    text_bytes: list[int] = []
    digest = hashlib.sha256()
    with (folder / "tokens.bin").open("wb") as sink:
        for texts in _grouped(read_all(files, source.field, source.encoding, problems)):
            if problems.refuses:
                continue  # read on for what else is wrong
            # Not verbose: documents longer than the context are cut into blocks, which needs no warning.
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
            for text, ids in zip(texts, encoded.input_ids, strict=True):
                raw = np.asarray([*before, *ids, *after], dtype=dtype).tobytes()
                digest.update(raw)
                sink.write(raw)
                lengths.append(len(raw) // dtype().itemsize)
                text_bytes.append(len(text.encode()))
        _sync(sink)
    if not lengths and not problems.refuses:
        others = " and the other files" if len(files) > 1 else ""
        raise DataError("; ".join([f"{files[0]}{others}: no text in it", *problems.notes()]))
    with (folder / "documents.npy").open("wb") as sink:
        np.save(sink, np.array([lengths, text_bytes], dtype=np.int64))
        _sync(sink)
    return {
        "files": [str(path) for path in files],
        "dtype": np.dtype(dtype).name,
        "vocabulary": len(tokenizer),
        "documents": len(lengths),
        "tokens": sum(lengths),
        "text_bytes": sum(text_bytes),
        "tokens_sha256": digest.hexdigest(),
        "notes": problems.notes(),
    }


def _grouped(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == _TEXTS_PER_CALL:
            yield group
            group = []
    if group:
        yield group


def _sync(sink: Any) -> None:
    sink.flush()
    os.fsync(sink.fileno())


def open_cache(folder: Path, notes: Sequence[str] = ()) -> TokenCache:
    """Map a token cache from disk, after comparing it with its checksum.

    Args:
        folder: the cache.
        notes: further sentences about the text.

    Raises:
        DataError: a part is missing or does not match.
    """
    advice = "delete this folder, and it is created again"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        documents = np.load(folder / "documents.npy", allow_pickle=False)
        with (folder / "tokens.bin").open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: damaged token cache ({error}); {advice}") from None
    if found != meta["tokens_sha256"] or documents.sum(axis=1).tolist() != [meta["tokens"], meta["text_bytes"]]:
        raise DataError(f"{folder}: the tokens do not match their checksum; {advice}")
    starts = np.concatenate([[0], np.cumsum(documents[0])])
    return TokenCache(tokens, starts, documents[1], meta["key"], (*notes, *meta.get("notes", ())))
