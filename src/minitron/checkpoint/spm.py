"""SentencePiece models: read without the library, and turned into a `tokenizer.json` that gives the same ids.

A `.model` file is a protobuf; the few fields that matter are read here, with every length checked. Field numbers:
sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .limits import MAX_TOKENIZER_BYTES, CheckpointError, require

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
SPACE = "\u2581"


@dataclass
class SentencePieceModel:
    """What a `.model` file says: pieces in the order of their ids, and how text is normalised before."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    kind_of_model: int = _UNIGRAM
    byte_fallback: bool = False
    special_ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    @property
    def is_bpe(self) -> bool:
        """Whether pieces are merged pairwise (BPE) rather than chosen by likelihood (unigram)."""
        return self.kind_of_model == _BPE

    def special(self, name: str) -> str | None:
        """The piece that is unk, bos, eos or pad; None if the model has none."""
        number = self.special_ids[name]
        if 0 <= number < len(self.pieces):
            return self.pieces[number]
        # NeMo trains with pad disabled and gives the role to a piece of this name.
        wanted = f"<{name}>"
        return wanted if wanted in self.pieces else None


def read_spm(data: bytes, where: object) -> SentencePieceModel:
    """Parse a SentencePiece model.

    Raises:
        CheckpointError: not such a file; cut or corrupted.
    """
    require(len(data) <= MAX_TOKENIZER_BYTES, f"{where}: {len(data):,} bytes, expected at most {MAX_TOKENIZER_BYTES:,}")
    model = SentencePieceModel()
    try:
        for number, value in _fields(data):
            if number == 1:
                _add_piece(model, _bytes(value))
            elif number == 2:
                _read_trainer(model, _bytes(value))
            elif number == 3:
                _read_normalizer(model, _bytes(value))
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{where}: not a SentencePiece model, or cut ({error})") from None
    require(model.pieces, f"{where}: no pieces in it; not a SentencePiece model")
    known = model.kind_of_model in (_UNIGRAM, _BPE)
    require(known, f"{where}: a SentencePiece model of kind {model.kind_of_model}, expected unigram or BPE")
    return model


def _add_piece(model: SentencePieceModel, data: bytes) -> None:
    piece, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            piece = _bytes(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3:
            kind = _int(value)
    model.pieces.append(piece)
    model.scores.append(score)
    model.kinds.append(kind)


def _read_trainer(model: SentencePieceModel, data: bytes) -> None:
    ids = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
    for number, value in _fields(data):
        if number == 3:
            model.kind_of_model = _int(value)
        elif number == 35:
            model.byte_fallback = bool(_int(value))
        elif number in ids:
            model.special_ids[ids[number]] = _signed(_int(value))


def _read_normalizer(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 2:
            model.charsmap = _bytes(value)
        elif number == 3:
            model.add_dummy_prefix = bool(_int(value))
        elif number == 4:
            model.remove_extra_whitespaces = bool(_int(value))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and raw values of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise IndexError(f"a field of wire type {wire} at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError(f"a number of more than 64 bits at byte {at}")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise IndexError("a number where text is expected")
    return value


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise IndexError("text where a number is expected")
    return value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def merges_of(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The merges that give a BPE model's segmentation: every split of a piece into two pieces, best score first."""
    ids = {
        piece: number
        for number, (piece, kind) in enumerate(zip(model.pieces, model.kinds, strict=True))
        if kind in (NORMAL, USER_DEFINED)
    }
    found = []
    for piece, number in ids.items():
        if model.kinds[number] != NORMAL:
            continue
        splits = [
            (ids[piece[:cut]], ids[piece[cut:]])
            for cut in range(1, len(piece))
            if piece[:cut] in ids and piece[cut:] in ids
        ]
        found.extend((-model.scores[number], number, split) for split in sorted(splits))
    found.sort(key=lambda merge: merge[:2])
    return [(model.pieces[left], model.pieces[right]) for _, _, (left, right) in found]


def tokenizer_json(model: SentencePieceModel) -> str:
    """The same tokenizer for the `tokenizers` library: text of a `tokenizer.json`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    unk = model.special("unk")
    if model.is_bpe:
        vocab = {piece: number for number, piece in enumerate(model.pieces)}
        core: Any = models.BPE(vocab, merges_of(model), unk_token=unk, fuse_unk=True, byte_fallback=model.byte_fallback)
    else:
        pairs = list(zip(model.pieces, model.scores, strict=True))
        core = models.Unigram(pairs, model.special_ids["unk"], model.byte_fallback)
    tokenizer = Tokenizer(core)
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r" \z"), "")]
        if not model.add_dummy_prefix:  # else the one space that is left is the prefix
            steps.append(normalizers.Replace(Regex(r"\A "), ""))
    elif model.add_dummy_prefix:
        # Metaspace adds no prefix to text that begins with a space, SentencePiece does.
        steps.append(normalizers.Replace(Regex(r"\A "), "  "))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    # "first": only the start of the text gets a space, not what follows a special token, as in SentencePiece.
    scheme = "first" if model.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)  # type: ignore[assignment]
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        parts.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(parts)  # type: ignore[assignment]
    pieces = list(zip(model.pieces, model.kinds, strict=True))
    special = [
        AddedToken(piece, normalized=False, special=True) for piece, kind in pieces if kind in (UNKNOWN, CONTROL)
    ]
    tokenizer.add_special_tokens(special)
    # normalized: these are found after the normalizer has seen the text as a whole, as SentencePiece finds them.
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece, kind in pieces if kind == USER_DEFINED])
    return tokenizer.to_str()


def tokenizer_config(model: SentencePieceModel, max_length: int) -> str:
    """Text of the `tokenizer_config.json` that goes with `tokenizer_json`.

    `model_input_names` asks for an attention mask; the conversion script of transformers 4.46 asked for token types
    instead, with which `generate` fails.
    """
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    values |= {f"{name}_token": model.special(name) for name in ("unk", "bos", "eos", "pad") if model.special(name)}
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
