"""SentencePiece models: read without the library, and turned into a `tokenizer.json` that gives the same ids.

A `.model` file is a protobuf; the few fields that matter are read here, with every length checked. Field numbers:
sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .limits import MAX_PIECES, MAX_SENTENCEPIECE_BYTES, CheckpointError, require

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
SPACE = "\u2581"


@dataclass
class SentencePieceModel:
    """The contents of a `.model` file: pieces in the order of their ids, and how text is normalized first."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    kind_of_model: int = _UNIGRAM
    byte_fallback: bool = False
    special_ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    whitespace_as_suffix: bool = False

    @property
    def is_bpe(self) -> bool:
        """Whether pieces are merged pairwise (BPE) rather than chosen by likelihood (unigram)."""
        return self.kind_of_model == _BPE

    def of_kind(self, kind: int) -> list[str]:
        """The pieces of one kind."""
        return [piece for piece, own in zip(self.pieces, self.kinds, strict=True) if own == kind]

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
    most = MAX_SENTENCEPIECE_BYTES
    require(len(data) <= most, f"{where}: {len(data):,} bytes, expected at most {most:,}")
    model = SentencePieceModel()
    try:
        for number, value in _fields(data):
            if number == 1:
                _add_piece(model, _bytes(value))
                if len(model.pieces) > MAX_PIECES:
                    raise CheckpointError(f"{where}: more than {MAX_PIECES:,} pieces; not a SentencePiece model")
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
        elif number == 24:
            model.whitespace_as_suffix = bool(_int(value))
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
        elif number == 5:
            model.escape_whitespaces = bool(_int(value))


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


_MOST_SPLITS = 1 << 29
"""Squares of the lengths of all pieces; 256,000 pieces of usual lengths have some 20 million."""


def merges_of(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The merges that give a BPE model's segmentation: every split of a piece into two pieces, best score first."""
    ids = {
        piece: number
        for number, (piece, kind) in enumerate(zip(model.pieces, model.kinds, strict=True))
        if kind in (NORMAL, USER_DEFINED)
    }
    letters = sum(len(piece) ** 2 for piece in ids)
    require(letters <= _MOST_SPLITS, "the pieces of the tokenizer are too long: whole texts instead of words")
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
    """The same tokenizer for the `tokenizers` library: text of a `tokenizer.json`.

    `differences` says in which texts it gives other ids.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    symbols = model.of_kind(USER_DEFINED)
    unk = model.special("unk")
    if model.is_bpe:
        vocab = {piece: number for number, piece in enumerate(model.pieces)}
        core: Any = models.BPE(
            vocab,
            merges_of(model),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=bool(symbols),  # a symbol that the pre-tokenizer has cut out is one token
        )
    else:
        pairs = list(zip(model.pieces, model.scores, strict=True))
        core = models.Unigram(pairs, model.special_ids["unk"], model.byte_fallback)
    tokenizer = Tokenizer(core)
    if steps := _normalizers(model):
        tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    patterns = []
    if BYTE in model.kinds and (symbols or not model.is_bpe):
        patterns.append(_WHOLE_BYTE_NAME if model.is_bpe else _BYTE_NAME)
    if symbols:
        # Not added tokens: these would be cut out before the space in front of the text is there, and normalizers
        # would be applied to their own text.
        patterns.insert(0, alternation(symbols))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)  # type: ignore[assignment]
    tokenizer.decoder = decoder(model.add_dummy_prefix, model.whitespace_as_suffix)
    special = [piece for piece, kind in zip(model.pieces, model.kinds, strict=True) if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return tokenizer.to_str()


# Text that is spelled like a byte piece is text; `ignore_merges` and the unigram model would take it for the piece.
_BYTE_NAME = r"<(?=0x[0-9A-F]{2}>)"
_WHOLE_BYTE_NAME = r"\A<(?=0x[0-9A-F]{2}>\z)"


def alternation(symbols: list[str]) -> str:
    """A regular expression that finds any of `symbols`, the longest first."""
    return "|".join(re.escape(symbol) for symbol in sorted(symbols, key=lambda symbol: (-len(symbol), symbol)))


def _normalizers(model: SentencePieceModel) -> list[Any]:
    """SentencePiece's normalizer, step by step: the space in front, the map of characters, white space."""
    from tokenizers import Regex, normalizers

    space = SPACE if model.escape_whitespaces else " "
    added: list[Any] = []
    if model.add_dummy_prefix:
        end = normalizers.Replace(Regex(r"(?m)(?<=.)\z"), space)
        added = [end if model.whitespace_as_suffix else normalizers.Prepend(space)]
    steps: list[Any] = _character_map(model.charsmap)
    if model.remove_extra_whitespaces:
        trailing = Regex((f"[ {SPACE}]" if model.escape_whitespaces else " ") + r"+\z")
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A "), "")]
        if model.add_dummy_prefix and model.whitespace_as_suffix:
            steps += [*added, normalizers.Replace(trailing, space)]
        else:  # a text of blanks has nothing left to put a space in front of
            steps += [normalizers.Replace(trailing, ""), *added]
    else:
        steps = added + steps
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return steps


# Unassigned, and a control character to the rules of grapheme clusters.
_CUT = "\ufff0"
# Where a cluster can have several characters and yet the few bytes that tokenizers looks up as one key.
_INSIDE_CLUSTER = (
    r"(?<=\r)(?=\n)|(?m)(?<=.)(?=[\p{M}\x{200c}\x{200d}\x{ff9e}\x{ff9f}])"
    r"|(?<=[\x{600}-\x{605}\x{6dd}\x{70f}\x{8e2}])"
)
_BETWEEN_MARKS = r"(?<=\p{M})(?=\p{M})"


def _character_map(charsmap: bytes) -> list[Any]:
    """The map of characters (NFKC and the like).

    tokenizers looks up a grapheme cluster as one key and drops what lies behind the first hit, so clusters are cut into
    characters. SentencePiece's keys of several characters compose a letter with its first mark, then with the next:
    here NFC does, while the marks behind are kept apart.
    """
    from tokenizers import Regex, normalizers

    if not charsmap:
        return []
    restore = normalizers.Replace(_CUT, "")
    steps: list[Any] = [normalizers.Replace(Regex(_INSIDE_CLUSTER), _CUT), normalizers.Precompiled(charsmap), restore]
    if composes(charsmap):
        steps += [normalizers.Replace(Regex(_BETWEEN_MARKS), _CUT), normalizers.NFC(), restore] * 2
    return steps


def composes(charsmap: bytes) -> bool:
    """Whether a map of characters composes letters with combining marks, as those of Unicode's NFC and NFKC do."""
    units = _units(charsmap)
    node, base = 0, _children(units, 0)
    for byte in "e\u0301".encode():
        node = base ^ byte
        if node >= len(units) or units[node] & (1 << 31 | 0xFF) != byte:
            return False
        base = _children(units, node)
    return bool(units[node] >> 8 & 1)


def _units(charsmap: bytes) -> tuple[int, ...]:
    """The map's double-array trie (darts-clone): a unit has the byte that leads to it, and where its children are.

    Raises:
        CheckpointError: a map that is cut.
    """
    size = int.from_bytes(charsmap[:4], "little")
    require(len(charsmap) >= 8 and 4 <= size <= len(charsmap) - 4 and size % 4 == 0, "a normalization map that is cut")
    return struct.unpack(f"<{size // 4}I", charsmap[4 : 4 + size])


def _children(units: tuple[int, ...], node: int) -> int:
    return node ^ ((units[node] >> 10) << ((units[node] & (1 << 9)) >> 6))


def maps_sequences(charsmap: bytes) -> bool:
    """Whether a map of characters has keys of more than one character."""
    units = _units(charsmap)

    def children(node: int) -> int:
        return _children(units, node)

    pending = [(children(0), 0)]  # where children are, bytes of the character so far left to come
    for _ in range(len(units) + 1):
        if not pending:
            return False
        base, left = pending.pop()
        for byte in range(1, 256):
            node = base ^ byte
            if node >= len(units) or units[node] & (1 << 31 | 0xFF) != byte:
                continue
            rest = left - 1 if left else (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
            if not rest and _has_child(units, children(node)):
                return True
            if rest:
                pending.append((children(node), rest))
    return False


def _has_child(units: tuple[int, ...], base: int) -> bool:
    return any(base ^ byte < len(units) and units[base ^ byte] & (1 << 31 | 0xFF) == byte for byte in range(1, 256))


def decoder(prefix: bool, suffix: bool = False) -> Any:
    """Pieces to text: marks of spaces, byte pieces, and the space that was added in front (or behind)."""
    from tokenizers import decoders

    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        parts.append(decoders.Strip(content=" ", left=int(not suffix), right=int(suffix)))
    return decoders.Sequence(parts)


def differences(model: SentencePieceModel) -> list[str]:
    """In which texts `tokenizer_json` gives other ids than SentencePiece, in sentences; empty: in none."""
    from tokenizers import Tokenizer, models, normalizers

    found = []
    steps = _character_map(model.charsmap)
    symbols = model.of_kind(USER_DEFINED)
    if model.charsmap and maps_sequences(model.charsmap) and not composes(model.charsmap):
        found.append("the normalization has rules for several characters at once, which tokenizers does not apply")
    mapped = [symbol for symbol in symbols if steps and normalizers.Sequence(steps).normalize_str(symbol) != symbol]
    if mapped:
        found.append(f"the user-defined symbol {mapped[0]!r} is changed by the normalization, and then not found")
    if unused := model.of_kind(UNUSED):
        found.append(f"the piece {unused[0]!r} is marked as unused; SentencePiece never writes it")
    if not model.is_bpe:
        return found
    normal = [index for index, kind in enumerate(model.kinds) if kind == NORMAL and len(model.pieces[index]) > 1]
    scores = {model.scores[index] for index in normal}
    if len(scores) < len(normal):
        found.append("several pieces have the same score; SentencePiece then merges from the left, not in their order")
    if symbols:
        merges = merges_of(model)
        plain = Tokenizer(models.BPE({piece: number for number, piece in enumerate(model.pieces)}, merges))
        pieces = [model.pieces[index] for index in normal]
        never = [piece for piece, ids in zip(pieces, plain.encode_batch(pieces), strict=True) if len(ids.ids) > 1]
        if never:
            found.append(f"no merges lead to the piece {never[0]!r}; a text that is this piece alone has other ids")
    return found


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
