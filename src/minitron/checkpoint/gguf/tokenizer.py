"""llama.cpp's two tokenizers, as a `tokenizer.json` that follows their rules.

"llama": SentencePiece's pieces with scores. Special tokens are cut out first, the longest ones first; every stretch of
text between them gets a blank in front (`add_space_prefix`); then pairs are merged by score. "gpt2": byte-level BPE
whose pre-tokenizer has a name. Source: llama-vocab.cpp of ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..limits import CheckpointError, require
from ..spm import CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, SentencePieceModel, decoder, merges_of

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"\p{N}{1,3}" + _REST
QWEN2 = _CONTRACTIONS + r"\p{N}" + _REST


@dataclass(frozen=True)
class PreTokenizer:
    """How llama.cpp splits text before byte-level BPE: one pattern after another, and how words become tokens."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    aliases: tuple[str, ...] = ()


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(
        (GPT2,), aliases=("phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "gigachat", "mellum", "modern-bert")
    ),
    "smollm": PreTokenizer(
        (r"\p{N}", GPT2),
        aliases=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    "llama-bpe": PreTokenizer(
        (LLAMA3,), True, True, ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
    ),
    "smaug-bpe": PreTokenizer((LLAMA3,), aliases=("dbrx", "glm4", "chatglm-bpe")),
    "qwen2": PreTokenizer((QWEN2,), aliases=("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "grok-2")),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
"""Those whose rules are known here word for word; llama.cpp has more, some of which only come near their originals."""

_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2}, "gpt2": {"bos": 11, "eos": 11}}
"""The tokens that llama.cpp adds around a text if a file says that it should, but not which ones."""


def pre_tokenizer(name: str) -> PreTokenizer | None:
    """The rules behind a name; None if they are not known here."""
    return next((rule for own, rule in PRE_TOKENIZERS.items() if name == own or name in rule.aliases), None)


@dataclass
class Vocabulary:
    """What GGUF stores about a tokenizer.

    `special_ids` has bos, eos, eot, eom, unk and pad as far as there are such; `notes` are sentences for the user,
    `differences` those about texts that llama.cpp would read otherwise.
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str = "default"
    special_ids: dict[str, int] = field(default_factory=dict)
    add_space_prefix: bool | None = None
    add_bos: bool = False
    add_eos: bool = False
    eos_ids: list[int] = field(default_factory=list)
    chat_templates: dict[str, str] = field(default_factory=dict)
    hf_json: str | None = None
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def pad_to(self, size: int) -> None:
        """Fill up to the rows of the embedding.

        Raises:
            CheckpointError: there are more tokens than rows, or two tokens have the same text.
        """
        missing = size - len(self.tokens)
        require(missing >= 0, f"the tokenizer has {len(self.tokens):,} tokens, the embedding only {size:,} rows")
        taken = set(self.tokens)
        names = (name for number in range(len(self.tokens), 2 * size + 1) if (name := f"[PAD{number}]") not in taken)
        self.tokens += [next(names) for _ in range(missing)]
        self.kinds += [UNUSED] * missing
        if self.scores is not None:
            self.scores += [-10000.0] * missing
        if len(set(self.tokens)) < size:
            twice = next(token for token, number in Counter(self.tokens).items() if number > 1)
            raise CheckpointError(f"the tokenizer has two tokens {twice!r}; llama.cpp refuses a file with such")

    def symbols(self) -> list[str]:
        """Tokens that are found in a text as a whole: special and user-defined ones."""
        pairs = zip(self.tokens, self.kinds, strict=True)
        return [token for token, kind in pairs if kind in (CONTROL, UNKNOWN, USER_DEFINED)]

    def token(self, name: str) -> str | None:
        """The text of a special token: "bos", "eos", ..."""
        number = self.special_ids.get(name)
        return None if number is None else self.tokens[number]


def vocabulary_from_keys(keys: dict[str, Any]) -> Vocabulary | None:
    """The vocabulary in the header of a GGUF file, with llama.cpp's defaults for keys that are missing.

    None if there is none, or one of another kind than "llama" and "gpt2".

    Raises:
        CheckpointError: lists of different lengths, merges of tokens that are not there.
    """
    model, tokens = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.tokens")
    texts = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
    if model not in _DEFAULT_IDS or not texts:
        return None
    assert isinstance(tokens, list)
    size, pre = len(tokens), str(keys.get("tokenizer.ggml.pre", "default"))
    if len(set(tokens)) < size:
        twice = next(token for token, number in Counter(tokens).items() if number > 1)
        raise CheckpointError(f"tokenizer.ggml.tokens: {twice[:80]!r} appears twice; llama.cpp refuses such a file")
    kinds = _list(keys, "token_type", size, NORMAL)
    require(all(type(kind) is int for kind in kinds), "tokenizer.ggml.token_type: not whole numbers")
    found = Vocabulary(model, list(tokens), kinds, pre=pre)
    names = {"unk": "unknown", "pad": "padding"}
    for name in ("unk", "bos", "eos", "eot", "eom", "pad"):
        number = keys.get(f"tokenizer.ggml.{names.get(name, name)}_token_id")
        if type(number) is int and 0 <= number < size:
            found.special_ids[name] = number
    found.add_space_prefix = model == "llama" and bool(keys.get("tokenizer.ggml.add_space_prefix", True))
    rule = pre_tokenizer(pre)
    adds = model == "llama" or bool(rule and rule.adds_bos)
    for name, default in (("bos", adds), ("eos", False)):
        added = keys.get(f"tokenizer.ggml.add_{name}_token", default)
        require(isinstance(added, bool), f"tokenizer.ggml.add_{name}_token is {added!r}, expected true or false")
        if added and _DEFAULT_IDS[model][name] < size:
            found.special_ids.setdefault(name, _DEFAULT_IDS[model][name])
        setattr(found, f"add_{name}", added and name in found.special_ids)
    stops = [found.special_ids[name] for name in ("eos", "eot", "eom") if name in found.special_ids]
    found.eos_ids = list(dict.fromkeys(stops))
    found.chat_templates = _templates(keys, found.notes)
    if model == "llama":
        found.scores = _list(keys, "scores", size, 0.0)
        good = all(type(score) is float and math.isfinite(score) for score in found.scores)
        require(good, "tokenizer.ggml.scores: not finite numbers")
        return found
    merges = keys.get("tokenizer.ggml.merges")
    require(isinstance(merges, list), "tokenizer.ggml.merges: missing; a byte-level vocabulary needs them")
    found.merges = [str(merge) for merge in merges or [] if merge]
    if rule is None:
        found.differences.append(
            f"the rules of llama.cpp's pre-tokenizer {pre!r} are not known here; known are {', '.join(PRE_TOKENIZERS)}"
        )
    return found


def _list(keys: dict[str, Any], name: str, size: int, default: Any) -> list[Any]:
    values = keys.get(f"tokenizer.ggml.{name}")
    if values is None:
        return [default] * size
    require(isinstance(values, list) and len(values) == size, f"tokenizer.ggml.{name}: not one value for each token")
    return values


def _templates(keys: dict[str, Any], notes: list[str]) -> dict[str, str]:
    start = "tokenizer.chat_template"
    found = {"default": keys[start]} if isinstance(keys.get(start), str) else {}
    named = {key.removeprefix(f"{start}."): text for key, text in keys.items() if key.startswith(f"{start}.")}
    for name, text in sorted(named.items()):
        if isinstance(text, str) and name.replace("_", "").replace("-", "").isalnum():
            found[name] = text
        else:
            notes.append(f"the chat template {name[:40]!r} is skipped; a name may have letters, digits, - and _")
    return found


def sentencepiece_of(vocabulary: Vocabulary) -> SentencePieceModel:
    """A vocabulary of kind "llama" as a SentencePiece model, without the rows of padding at its end."""
    count = len(vocabulary.tokens)
    while count and vocabulary.kinds[count - 1] == UNUSED:
        count -= 1
    assert vocabulary.scores is not None
    return SentencePieceModel(
        vocabulary.tokens[:count],
        vocabulary.scores[:count],
        vocabulary.kinds[:count],
        kind_of_model=2,
        byte_fallback="<0x0A>" in vocabulary.tokens,  # llama.cpp finds them by their names, whatever their kind
        special_ids={"unk": -1, "bos": -1, "eos": -1, "pad": -1, **vocabulary.special_ids},
        add_dummy_prefix=bool(vocabulary.add_space_prefix),
        remove_extra_whitespaces=False,
    )


def llama_cpp_json(vocabulary: Vocabulary) -> str:
    """Text of a `tokenizer.json` that splits as llama.cpp splits with these keys, BOS and EOS included.

    Raises:
        CheckpointError: merges of tokens that are not in the vocabulary.
    """
    from tokenizers import AddedToken

    tokenizer = _llama(vocabulary) if vocabulary.model == "llama" else _gpt2(vocabulary)
    _add_template(tokenizer, vocabulary)
    pieces = list(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
    special = [token for token, kind in pieces if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in pieces if kind == USER_DEFINED])
    return tokenizer.to_str()


def _llama(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, models, normalizers

    spm = sentencepiece_of(vocabulary)
    numbers = {piece: number for number, piece in enumerate(spm.pieces)}
    unk, bytes_ = vocabulary.token("unk"), spm.byte_fallback
    tokenizer = Tokenizer(models.BPE(numbers, merges_of(spm), unk_token=unk, fuse_unk=True, byte_fallback=bytes_))
    prefix = [normalizers.Prepend(SPACE)] if spm.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])  # type: ignore[assignment]
    tokenizer.decoder = decoder(spm.add_dummy_prefix)
    return tokenizer


def _gpt2(vocabulary: Vocabulary) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in vocabulary.merges or []]
    known = [pair for pair in pairs if len(pair) == 2 and {*pair, "".join(pair)} <= numbers.keys()]
    require(len(known) == len(pairs), "tokenizer.ggml.merges: names tokens that are not in the vocabulary")
    rule = pre_tokenizer(vocabulary.pre) or PRE_TOKENIZERS["default"]
    tokenizer = Tokenizer(models.BPE(numbers, known, ignore_merges=rule.ignore_merges))  # type: ignore[arg-type]
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def _add_template(tokenizer: Any, vocabulary: Vocabulary) -> None:
    from tokenizers import processors

    bos = vocabulary.token("bos") if vocabulary.add_bos else None
    eos = vocabulary.token("eos") if vocabulary.add_eos else None
    if not (bos or eos):
        return
    single = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    names = {"bos": bos, "eos": eos}
    used = {text: vocabulary.special_ids[name] for name, text in names.items() if text}
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[*used.items()])


def config_json(vocabulary: Vocabulary, max_length: int) -> str:
    """Text of the `tokenizer_config.json` that goes with `llama_cpp_json`."""
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    named = {f"{name}_token": vocabulary.token(name) for name in ("unk", "bos", "eos", "pad")}
    values |= {name: token for name, token in named.items() if token is not None}
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
