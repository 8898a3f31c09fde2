"""What untrusted bytes may do: the one place that decides.

Every size, count and name that comes out of a file is checked here, or against a number from here, before memory is
allocated or a path is made from it. Refusals are `CheckpointError`: one sentence that names the file, what was found
and what was expected.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

MIB = 1 << 20

MAX_JSON_BYTES = 256 * MIB
"""config.json, tokenizer.json, shard indices. A 256,000-token tokenizer.json takes about 35 MB."""
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
MAX_PICKLE_BYTES = 256 * MIB
"""The pickled structure of a torch file, without its storages."""
MAX_YAML_BYTES = MIB
MAX_YAML_NODES = 100_000
"""Nodes after aliases are followed: a "billion laughs" file reaches it at once, a real config has a few hundred."""
MAX_YAML_DEPTH = 100
MAX_TOKENIZER_BYTES = 256 * MIB
MAX_ARCHIVE_MEMBERS = 200_000
MAX_ARCHIVE_HEADER_READ = MIB
MAX_INFLATION = 20
"""A gzip archive may unpack to this many times its size (weights shrink by a third at best) ..."""
MIN_INFLATED_BYTES = 256 * MIB
"""... or to this many bytes, whichever is more."""
MAX_TENSORS = 1_000_000
MAX_CHUNKS = 4_000_000
MAX_RANK = 8
MAX_DIMENSION = 1 << 40
MAX_LAYERS = 10_000
MAX_LABELS = 1_000_000

_HEADER_COUNTS = {"num_hidden_layers": MAX_LAYERS, "num_labels": MAX_LABELS}
_HEADER_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, in one sentence: the file, what was found, what was expected."""


def require(condition: object, message: str) -> None:
    """Raise `CheckpointError(message)` unless `condition` holds."""
    if not condition:
        raise CheckpointError(message)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: no such file, too large, not UTF-8, not JSON, or not an object.
    """
    return parse_json(read_small_file(path, max_bytes), path)


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """The JSON object in `data`; `where` names its source in errors."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 text at byte {error.start}; expected JSON") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from None
    require(isinstance(value, dict), f"{where}: found a JSON {type(value).__name__}, expected an object")
    return value


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


def parse_yaml(data: bytes, where: object) -> dict[str, Any]:
    """The YAML mapping in `data`, plain types only.

    Raises:
        CheckpointError: too large, tags that would build Python objects, alias bombs, duplicate keys, not a mapping.
    """
    try:
        import yaml
    except ImportError:
        raise CheckpointError(f"{where}: reading YAML needs PyYAML: pip install 'minitron[nemo]'") from None
    require(len(data) <= MAX_YAML_BYTES, f"{where}: {len(data):,} bytes of YAML, expected at most {MAX_YAML_BYTES:,}")
    opened = data.count(b"[") + data.count(b"{") - data.count(b"]") - data.count(b"}")
    require(opened <= MAX_YAML_DEPTH, f"{where}: {opened:,} brackets are not closed; not YAML of plain values")
    try:
        loader = yaml.SafeLoader(data)
        node = loader.get_single_node()
        _count_yaml_nodes(node, where)
        value = loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        sentence = " ".join(str(error).split())
        raise CheckpointError(f"{where}: not YAML of plain values ({sentence})") from None
    require(isinstance(value, dict), f"{where}: found a YAML {type(value).__name__}, expected a mapping")
    return value


def _count_yaml_nodes(root: Any, where: object) -> None:
    """Refuse more than MAX_YAML_NODES nodes, counting an aliased node as often as it is referred to."""
    pending, count = [root], 0
    while pending:
        node = pending.pop()
        count += 1
        require(count <= MAX_YAML_NODES, f"{where}: more than {MAX_YAML_NODES:,} YAML nodes (aliases are followed)")
        children = getattr(node, "value", None)
        if not isinstance(children, list):
            continue
        keys = [pair[0].value for pair in children if isinstance(pair, tuple) and isinstance(pair[0].value, str)]
        twice = {key for key in keys if keys.count(key) > 1} if len(keys) != len(set(keys)) else None
        require(not twice, f"{where}: the YAML key {sorted(twice or [''])[0]!r} stands twice in one mapping")
        for child in children:
            pending.extend(child if isinstance(child, tuple) else (child,))


def member_path(name: str, where: object) -> PurePosixPath:
    """The relative path that an archive member, a shard index or a metadata file names, once it is known to be tame.

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
    require(len(shape) <= MAX_RANK, f"{where}: {len(shape)} dimensions, expected at most {MAX_RANK}")
    total = item_bytes
    for size in shape:
        require(
            isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= MAX_DIMENSION,
            f"{where}: dimension {size!r}, expected a whole number from 0 to {MAX_DIMENSION:,}",
        )
        total *= size
    return total


def check_config_numbers(config: dict[str, Any], where: object) -> None:
    """Refuse sizes that would hang or exhaust the program before any tensor is looked at."""
    for key, most in _HEADER_COUNTS.items():
        value = config.get(key)
        require(value is None or _is_count(value, most), f"{where}: {key} is {value!r}, expected 0 to {most:,}")
    for key in _HEADER_SIZES:
        value = config.get(key)
        require(
            value is None or _is_count(value, MAX_DIMENSION),
            f"{where}: {key} is {value!r}, expected a whole number up to {MAX_DIMENSION:,}",
        )
    labels = config.get("id2label")
    require(labels is None or isinstance(labels, dict), f"{where}: id2label is {type(labels).__name__}, expected a map")


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
