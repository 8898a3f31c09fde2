"""Limits for untrusted bytes, all in one place.

Every size, count and name that comes out of a file is checked here, or against a number from here, before memory is
allocated or a path is made from it. Refusals are `CheckpointError`: one sentence that names the file, what was found
and what was expected.
"""

from __future__ import annotations

import gc
import json
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

MIB = 1 << 20

MAX_JSON_BYTES = 64 * MIB
"""tokenizer.json (256,000 tokens with 500,000 merges: 16 to 33 MB) and shard indices (138,240 tensors: 13 MB)."""
MAX_JSON_MEMORY = 128 * MIB
"""Memory that the values of a JSON text may take, as `json_memory` estimates it."""
MAX_TOKENIZER_JSON_MEMORY = 320 * MIB
"""The same for tokenizer.json: 256,000 tokens with 500,000 merges are estimated at 104 to 235 MB (merges as texts or as
lists) and take 79 to 149 MB beside the text; a character of four bytes adds 66 MB to the estimate."""
MAX_JSON_DEPTH = 100
MAX_CONFIG_BYTES = 4 * MIB
"""config.json, generation_config.json, adapter_config.json: a few kB, unless there are thousands of labels."""
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself. `MAX_JSON_MEMORY` allows about 120,000 tensors in one file."""
MAX_PICKLE_BYTES = 64 * MIB
"""The pickled structure of a torch file, without its storages."""
MAX_PICKLE_STEPS = 2_000_000
"""Opcodes: torch.save takes 32 for each tensor, torch.distributed.checkpoint about 110 for each chunk."""
MAX_PICKLE_MEMORY = 160 * MIB
"""Memory that the objects of a pickle may take."""
MAX_ODD_KEYS = 10_000
"""Dictionary keys that are not strings: numbers chosen for equal hashes would make a larger dictionary quadratic."""
MAX_YAML_BYTES = 128 * 1024
MAX_YAML_NODES = 10_000
"""Nodes after aliases are followed: a "billion laughs" file reaches it at once, a real config has a few hundred."""
MAX_YAML_DEPTH = 50
MAX_YAML_TEXT = 1 * MIB
"""Characters of all scalars after aliases are followed: errors and names are made from them."""
MAX_YAML_SCALAR = 64
"""Characters of a YAML number, true, false or null; texts may be longer."""
MAX_TOKENIZER_BYTES = 64 * MIB
MAX_SENTENCEPIECE_BYTES = 16 * MIB
"""A model of 256,000 pieces takes about 4.5 MB."""
MAX_PIECES = 1_000_000
MAX_ARCHIVE_MEMBERS = 100_000
MAX_ARCHIVE_HEADER = 64 * 1024
"""Bytes of one extended header of a tar member."""
MAX_INFLATION = 20
"""A gzip archive may unpack to this many times its size (normally distributed weights shrink by a fifth) ..."""
MIN_INFLATED_BYTES = 64 * MIB
"""... or to this many bytes, whichever is more."""
MAX_TENSORS = 200_000
"""Tensors of a checkpoint. 384 experts in each of 60 layers, with a scale for each matrix, make 138,240."""
MAX_CHUNKS = 200_000
"""Chunks of a distributed checkpoint."""
MAX_SHARING = 16
"""The tensors of a torch file may claim this many times the size of the file: tied weights share a storage."""
MAX_RANK = 8
MAX_DIMENSION = 1 << 40
MAX_LAYERS = 10_000
MAX_LABELS = 20_000
MAX_MESSAGE = 1_000
"""Characters of an error message: names and values in it come from the file."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file, what was found and what was expected.

    The message quotes the file, so it is limited to `MAX_MESSAGE` characters and has no control characters.
    """

    def __init__(self, message: str) -> None:
        if len(message) > MAX_MESSAGE:
            message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
        if not message.isprintable():
            message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(message)


class CheckpointNote(UserWarning):
    """A warning about a checkpoint that the user should know about; nothing is stopped."""


_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 3, 80, 80, 80


def shown(value: object) -> str:
    """A value from a file as an error message quotes it: short, however large or deep the value is."""
    return _SHORT.repr(value)


def require(condition: object, message: str) -> None:
    """Raise `CheckpointError(message)` unless `condition` holds."""
    if not condition:
        raise CheckpointError(message)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Disable garbage collection in the block: parsing makes many objects, every collection visits all, and none is
    garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: no such file, too large, not UTF-8, not JSON, or not an object.
    """
    return parse_json(read_small_file(path, max_bytes), path)


def parse_json(data: bytes, where: object, max_memory: int = MAX_JSON_MEMORY) -> dict[str, Any]:
    """The JSON object in `data`; `where` names its source in errors.

    Raises:
        CheckpointError: its values would take more than `max_memory` (nothing is parsed then); not UTF-8, not JSON,
            not an object; nested deeper than MAX_JSON_DEPTH.
    """
    needed = json_memory(data)
    require(
        needed <= max_memory,
        f"{where}: {len(data):,} bytes of JSON with so many values that they would take about {needed:,} bytes of "
        f"memory, expected at most {max_memory:,}",
    )
    try:
        with collector_paused():
            value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 text at byte {error.start}; expected JSON") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from None
    require(isinstance(value, dict), f"{where}: found a JSON {type(value).__name__}, expected an object")
    require(_depth(value) <= MAX_JSON_DEPTH, f"{where}: JSON nested more than {MAX_JSON_DEPTH} levels deep")
    if _SURROGATE.search(data):  # half of a character can be written in JSON, but can be neither printed nor saved
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{where}: half a surrogate pair, {error.object[error.start]!r}, in a text") from None
    return value


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Bytes of memory that a byte of JSON stands for: the objects of CPython, with the slots that hold them.
_JSON_COSTS = {"{": 130, "[": 80, ",": 40, ":": 50, '"': 28}


def json_memory(data: bytes) -> int:
    """Estimated bytes of the values in a JSON text once it is parsed, including the text itself as characters.

    Counts what opens and separates values, in blocks, at memory speed; nothing is parsed. Punctuation within texts is
    counted too. Of indices, headers and tokenizers the estimate is 0.97 to 1.37 times what they take.
    """
    import numpy as np  # here, so that a program that only asks for help does not load it

    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(data), MIB):
        counts += np.bincount(np.frombuffer(data, np.uint8, min(MIB, len(data) - start), start), minlength=256)
    # CPython stores a text with 1, 2 or 4 bytes a character, as its largest character needs.
    width = 4 if counts[0xF0:].any() else 2 if counts[0xC4:].any() else 1
    return len(data) * width + sum(int(counts[ord(mark)]) * cost for mark, cost in _JSON_COSTS.items())


def _depth(value: Any) -> int:
    """Levels of containers in a parsed JSON value."""
    level, depth = [value], 0
    while level:
        depth += 1
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
    return depth


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """The whole of a file that is expected to be small.

    Raises:
        CheckpointError: no such file, not a regular file, or longer than `max_bytes`.
    """
    require(path.exists(), f"{path}: no such file")
    require(path.is_file(), f"{path}: not a regular file")
    size = path.stat().st_size
    require(size <= max_bytes, f"{path}: {size:,} bytes, expected at most {max_bytes:,}")
    return path.read_bytes()


def member_path(name: str, where: object) -> PurePosixPath:
    """The relative path that an archive member, a shard index or a metadata file names, after checking that it is safe.

    Raises:
        CheckpointError: an absolute path, a drive, `..`, a backslash, a NUL or another control character.
    """
    path = PurePosixPath(name)
    bad = (
        not name
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or re.match(r"[A-Za-z]:", name) is not None
        or any(ord(char) < 32 for char in name)
        or len(name) > 1024
    )
    require(not bad, f"{where}: refers to {name[:80]!r}; expected a relative path that stays inside the checkpoint")
    return path


def file_inside(folder: Path, name: str, where: object) -> Path:
    """`folder / name` for a name read from a file; the name must stay inside `folder`.

    A file that the user's own folder links to elsewhere is accepted (Hugging Face caches are made of links).
    """
    return folder / member_path(name, where)


def tensor_bytes(shape: tuple[int, ...], item_bytes: int, where: object) -> int:
    """Bytes of a dense tensor whose shape came from a file; impossible dimensions are refused."""
    if len(shape) > MAX_RANK:
        raise CheckpointError(f"{where}: {len(shape)} dimensions, expected at most {MAX_RANK}")
    total = item_bytes
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_DIMENSION:
            raise CheckpointError(
                f"{where}: dimension {shown(size)}, expected a whole number from 0 to {MAX_DIMENSION:,}"
            )
        total *= size
    return total
