"""The tokenizer of a checkpoint as transformers loads it, and what its ids are compared on."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.tokenizer import load_tokenizer

from .limits import MAX_TOKENIZER_BYTES, CheckpointError, parse_json, require
from .spm import CONTROL, UNKNOWN, USER_DEFINED, SentencePieceModel, read_spm, tokenizer_config, tokenizer_json
from .tensors import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[str], list[int]]

TEXTS = (
    "",
    " ",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    " one blank in front,  two inside,   three, and one behind ",
    "\ttabs\tand\n\nlines\n",
    "Windows\r\nlines\r\n\r\n",
    "\r",
    "I'll say it's 3.14159, 1000000 or 2024-11-28; don't YOU'RE THEY'VE",
    "def f(x):\n    return {'a': [x**2, -x]}  # twice\n\n\n        pass",
    "Zürich, naïve café, Ærøskøbing; ЖИЗНЬ, Ελληνικά; العربية; हिन्दी; ไทย",
    "e\u0301 and \u00e9; A\u030a and \u00c5; \ufb01 and \u2460 and \uff21",
    "東京都、日本語と中文。한국어",
    "\U0001f600\U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea \u2603\ufe0f \U00010348",
    "non\u00a0breaking\u2003em\u200bzero\u3000wide\x85next",
    "\u2581literally\u2581",
    "<0x0A> is text",
    "aaaaaaaaaaaaaaaa -------- ________ ========" + " " * 33 + "x",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3,
    "\x01\x1f\x7f control",
    "http://example.org/?q=%20&x=1#top someone@example.org",
    "\u00bd \u00b2 \u2167 \u0663\u0664\u0665 \uff11\uff12\uff13 \u0969",
)
_LONGEST_SYMBOL = 256
_MOST_SYMBOLS = 24
_ALL_SYMBOLS = 2000


def sample_texts(symbols: Iterable[str]) -> list[str]:
    """Texts to compare tokenizers on: of many kinds, and with `symbols` (special tokens and the like) inside."""
    symbols = [symbol for symbol in symbols if 0 < len(symbol) <= _LONGEST_SYMBOL]
    texts = list(TEXTS)
    for symbol in islice(symbols, _MOST_SYMBOLS):
        texts += [
            symbol,
            f"{symbol}System\nbe brief",
            f"the fox{symbol}\nUser",
            f"one {symbol} two",
            f"x{symbol * 2} y",
        ]
    many = symbols[:_ALL_SYMBOLS]
    return [*texts, "".join(many), " a ".join(many)] if many else texts


def first_difference(one: Encode, two: Encode, texts: Iterable[str]) -> str | None:
    """The first text with other ids, in words: text, ids of `one`, ids of `two`; None where all are the same."""
    for text in texts:
        first, second = one(text), two(text)
        if first != second:
            at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
            start = max(0, (min(len(first), len(second)) if at is None else at) - 2)
            return f"{text[:60]!r} gives {_shown(first, start)} here and {_shown(second, start)} there"
    return None


def _shown(ids: list[int], start: int) -> str:
    dots = "... " if start else ""
    return f"[{dots}{', '.join(map(str, ids[start : start + 6]))}{', ...' if len(ids) > start + 6 else ''}]"


def source_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """The tokenizer as transformers loads it from the checkpoint's files; None if there is none.

    Raises:
        CheckpointError: there is one that cannot be read.
    """
    names = {*checkpoint.files, *checkpoint.texts}
    if not names & {"tokenizer.json", "tokenizer.model"}:
        return None
    with tempfile.TemporaryDirectory(prefix="minitron-tokenizer-") as place:
        folder = Path(place)
        for name, data in checkpoint.files.items():
            require(data.size <= MAX_TOKENIZER_BYTES, f"{data}: {data.size:,} bytes, too long for a tokenizer")
            _put(folder / name, data.read())
        for name, text in checkpoint.texts.items():
            _put(folder / name, text.encode())
        _put(folder / "config.json", json.dumps({"model_type": "nemotron"}).encode())
        if "tokenizer.json" not in names:
            _complete(folder, checkpoint)
        try:
            # Texts to compare may be longer than the model's context; transformers would warn.
            return load_tokenizer(folder, template=False, model_max_length=1 << 40)
        except ValueError as error:
            raise CheckpointError(f"the tokenizer: {str(error).replace(f'{folder}: ', '')}") from None


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _complete(folder: Path, checkpoint: Checkpoint) -> None:
    """A SentencePiece model alone gets the `tokenizer.json` that says the same."""
    model = read_spm((folder / "tokenizer.model").read_bytes(), checkpoint.files["tokenizer.model"])
    _put(folder / "tokenizer.json", tokenizer_json(model).encode())
    path = folder / "tokenizer_config.json"
    if not path.exists():
        _put(path, tokenizer_config(model, checkpoint.config.max_position_embeddings).encode())


def backend_values(tokenizer: Any) -> dict[str, Any]:
    """The `tokenizer.json` that a loaded tokenizer works by, its settings included.

    Raises:
        CheckpointError: it is one that is written in Python and has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    require(hasattr(backend, "to_str"), f"the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json")
    return parse_json(backend.to_str().encode(), "tokenizer.json")  # type: ignore[union-attr]


def encoder(tokenizer: Any, special: bool = True) -> Encode:
    """Text to ids by a loaded tokenizer, with or without what it adds around a text."""
    return lambda text: list(tokenizer(text, add_special_tokens=special)["input_ids"])


def sentencepiece_differences(model: SentencePieceModel, data: bytes, other: Encode) -> Iterator[str]:
    """Where `other` gives other ids than the sentencepiece library; nothing where the library is not installed.

    Special tokens in a text are not compared: SentencePiece reads them as text, by its design.
    """
    if importlib.util.find_spec("sentencepiece") is None:
        return
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=data)
    special = model.of_kind(CONTROL) + model.of_kind(UNKNOWN)
    texts = [text for text in sample_texts(model.of_kind(USER_DEFINED)) if not any(s in text for s in special)]
    found = first_difference(processor.encode, other, texts)
    if found:
        yield f"the text {found} (SentencePiece, tokenizer.json)"
