"""Whether a converted checkpoint reads text as its source does: before anything is written, and read back after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .gguf.vocab import end_ids
from .limits import CheckpointError, require
from .spm import CONTROL, UNKNOWN, USER_DEFINED, SentencePieceModel, read_spm, tokenizer_json
from .tensors import Checkpoint
from .tokenizer_source import (
    Encode,
    encoder,
    first_difference,
    sample_texts,
    sentencepiece_differences,
    source_tokenizer,
)

_NAMES = ("bos", "eos", "pad", "unk")


def target_differences(checkpoint: Checkpoint, kind: str) -> list[str]:
    """In which texts a target of this kind would give other ids than the source, in sentences.

    For GGUF see `Vocabulary.differences`; a Hugging Face folder is as good as the `tokenizer.json` in it.
    """
    names = {*checkpoint.files, *checkpoint.texts}
    if "tokenizer.model" not in checkpoint.files or "tokenizer.json" not in names:
        return list(checkpoint.differences)
    data = checkpoint.files["tokenizer.model"]
    model = read_spm(data.read(), data)
    made = checkpoint.texts.get("tokenizer.json")
    if made is not None and kind != "nemo":  # made of this SentencePiece model
        own = Tokenizer.from_str(made)
        return [*checkpoint.differences, *sentencepiece_differences(model, data.read(), encode_bare(own))]
    if made is not None or kind != "nemo":
        return []
    bare = encoder(source_tokenizer(checkpoint), special=False)
    found = list(sentencepiece_differences(model, data.read(), bare))
    return found or _json_differences(model, bare)


def _json_differences(model: SentencePieceModel, bare: Encode) -> list[str]:
    """As `sentencepiece_differences`, where that library may not be installed."""
    own = encode_bare(Tokenizer.from_str(tokenizer_json(model)))
    special = model.of_kind(CONTROL) + model.of_kind(UNKNOWN)
    texts = [text for text in sample_texts(model.of_kind(USER_DEFINED)) if not any(s in text for s in special)]
    shown = first_difference(own, bare, texts)
    return [f"the text {shown} (tokenizer.model, tokenizer.json)"] if shown else []


def encode_bare(tokenizer: Tokenizer) -> Encode:
    """Text to ids without what the tokenizer adds around a text."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def require_exact(differences: list[str], *, lossy: bool) -> list[str]:
    """The differences as notes where they are allowed.

    Raises:
        CheckpointError: there are some and `lossy` is false.
    """
    if differences and not lossy:
        listed = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise CheckpointError(f"the tokenizer cannot be converted exactly: {listed}; --lossy converts it anyway")
    return [f"not exact: {difference}" for difference in differences]


def verify_tokenizer(source: Checkpoint, written: Checkpoint, target: Path, *, lossy: bool = False) -> int:
    """Compare ids of sample texts, the texts of all tokens, and special ids; returns the number of texts compared.

    Args:
        source, written: both sides, as they are read from their files.
        target: for errors.
        lossy: ids may differ; names and special tokens may not.

    Raises:
        CheckpointError: anything differs.
    """
    one: Any = source_tokenizer(source)
    two: Any = source_tokenizer(written)
    if one is None or two is None:
        return 0
    where = f"{target}: verification of the tokenizer failed"
    size = min(source.config.vocab_size, max(one.get_vocab().values(), default=-1) + 1)
    names = list(range(size))
    pairs = zip(one.convert_ids_to_tokens(names), two.convert_ids_to_tokens(names), strict=True)
    other = next(
        (f"{number} is {a!r}, was {b!r}" for number, (b, a) in enumerate(pairs) if b is not None and a != b), None
    )
    require(other is None, f"{where}: token {other}")
    _compare_special(source, written, one, two, where)
    if lossy:
        return 0
    texts = sample_texts([*dict.fromkeys([*one.all_special_tokens, *one.get_added_vocab(), *two.get_added_vocab()])])
    found = first_difference(encoder(one), encoder(two), texts)
    require(found is None, f"{where}: the text {found} (source, target)")
    return len(texts)


def _compare_special(
    source: Checkpoint,
    written: Checkpoint,
    one: Any,
    two: Any,
    where: str,
) -> None:
    for name in _NAMES:
        key = f"{name}_token_id"
        own, configured, found = getattr(one, key), getattr(source.config, key, None), getattr(two, key)
        allowed = {own, *(configured if isinstance(configured, list) else [configured]), *_ends(source, name)}
        require(own is None or found in allowed, f"{where}: {key} is {found}, was {own}")
    ends = set(end_ids(source)), set(end_ids(written))
    inside = {number for number in ends[0] if number < source.config.vocab_size}
    require(inside <= ends[1], f"{where}: tokens that end a text are {sorted(ends[1])}, were {sorted(inside)}")
    same = _templates(one) == _templates(two)
    require(
        same, f"{where}: chat templates are {sorted(_templates(two))}, were {sorted(_templates(one))} or read otherwise"
    )


def _ends(source: Checkpoint, name: str) -> list[int]:
    return end_ids(source) if name == "eos" else []


def _templates(tokenizer: Any) -> dict[str, str]:
    found = tokenizer.chat_template
    return {"default": found} if isinstance(found, str) else dict(found or {})
