"""Vocabularies between Hugging Face's `tokenizer.json` / SentencePiece `.model` and GGUF's keys.

llama.cpp has two tokenizers that matter here: "llama" (SentencePiece: pieces with scores) and "gpt2" (byte-level BPE:
tokens, merges and the name of a pre-tokenizer).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .limits import MAX_JSON_BYTES, CheckpointError, parse_json, require
from .spm import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, SentencePieceModel, read_spm
from .spm import tokenizer_config as spm_config
from .spm import tokenizer_json as spm_json
from .tensors import Checkpoint

HF_JSON_KEY = "tokenizer.huggingface.json"
# llama.cpp's name of a pre-tokenizer -> a part of the regular expression that only it has.
_PRE_BY_REGEX = {
    "llama-bpe": r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    "qwen2": r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
}


@dataclass
class Vocabulary:
    """What GGUF stores about a tokenizer."""

    model: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str = "default"
    special_ids: dict[str, int] = field(default_factory=dict)
    add_space_prefix: bool | None = None
    chat_template: str | None = None
    hf_json: str | None = None
    notes: list[str] = field(default_factory=list)

    def pad_to(self, size: int) -> None:
        """Fill up to the rows of the embedding.

        Raises:
            CheckpointError: there are more tokens than rows.
        """
        missing = size - len(self.tokens)
        require(missing >= 0, f"the tokenizer has {len(self.tokens):,} tokens, the embedding only {size:,} rows")
        self.tokens += [f"[PAD{number}]" for number in range(len(self.tokens), size)]
        self.kinds += [UNUSED] * missing
        if self.scores is not None:
            self.scores += [-10000.0] * missing


def vocabulary_of(checkpoint: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a checkpoint for GGUF, padded to the embedding; None if it has no tokenizer.

    Raises:
        CheckpointError: a tokenizer of a kind that llama.cpp does not have.
    """
    texts = {
        name: _text(checkpoint, name) for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }
    settings = parse_json((texts["tokenizer_config.json"] or "{}").encode(), "tokenizer_config.json")
    if "tokenizer.model" in checkpoint.files:
        data = checkpoint.files["tokenizer.model"]
        found = from_sentencepiece(read_spm(data.read(), data))
    elif texts["tokenizer.json"]:
        found = from_tokenizer_json(texts["tokenizer.json"], settings)
    else:
        return None
    template = texts["chat_template.jinja"] or settings.get("chat_template")
    found.chat_template = template if isinstance(template, str) else None
    config = checkpoint.config
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    for name, number in (("bos", config.bos_token_id), ("eos", eos), ("pad", config.pad_token_id)):
        if isinstance(number, int) and 0 <= number < config.vocab_size:
            found.special_ids[name] = number
    found.pad_to(config.vocab_size)
    return found


def _text(checkpoint: Checkpoint, name: str) -> str | None:
    if name in checkpoint.texts:
        return checkpoint.texts[name]
    if name not in checkpoint.files:
        return None
    data = checkpoint.files[name]
    require(data.size <= MAX_JSON_BYTES, f"{data}: {data.size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
    try:
        return data.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{data}: not UTF-8 text at byte {error.start}") from None


def from_sentencepiece(model: SentencePieceModel) -> Vocabulary:
    """GGUF's view of a SentencePiece model: the same pieces, scores and kinds."""
    require(model.is_bpe, "a unigram SentencePiece model; llama.cpp's Nemotron reads BPE ones")
    kinds = [kind if 1 <= kind <= BYTE else NORMAL for kind in model.kinds]
    ids = {name: model.pieces.index(piece) for name in ("unk", "bos", "eos", "pad") if (piece := model.special(name))}
    return Vocabulary(
        "llama",
        list(model.pieces),
        kinds,
        scores=list(model.scores),
        special_ids=ids,
        add_space_prefix=model.add_dummy_prefix,
    )


def from_tokenizer_json(text: str, settings: dict[str, Any]) -> Vocabulary:
    """GGUF's view of a BPE `tokenizer.json`, byte-level or SentencePiece-like.

    Raises:
        CheckpointError: not BPE.
    """
    values = parse_json(text.encode(), "tokenizer.json")
    model = values.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise CheckpointError(f"tokenizer.json: a model of type {kind!r}; llama.cpp's Nemotron reads BPE")
    vocab, added = model.get("vocab"), values.get("added_tokens") or []
    good = isinstance(vocab, dict) and all(type(number) is int and number >= 0 for number in vocab.values())
    require(good and isinstance(added, list), "tokenizer.json: vocab is not a map from token to number")
    assert isinstance(vocab, dict)
    by_id = {number: token for token, number in vocab.items()}
    kinds = dict.fromkeys(by_id, NORMAL)
    for entry in added:
        number, token = entry.get("id"), entry.get("content")
        require(type(number) is int and isinstance(token, str), f"tokenizer.json: an added token {entry!r}"[:200])
        by_id[number] = token
        kinds[number] = CONTROL if entry.get("special") else USER_DEFINED
    require(by_id and max(by_id) < 1 << 24, "tokenizer.json: token numbers are too large or there are none")
    size = max(by_id) + 1
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    types = [kinds.get(number, UNUSED) for number in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    found = Vocabulary("gpt2", tokens, types, hf_json=text)
    found.special_ids = _special_ids(tokens, settings, model)
    if model.get("byte_fallback"):
        return _as_sentencepiece(found, model, values)
    found.merges = merges
    found.pre, known = _pre_tokenizer(values.get("pre_tokenizer"))
    if not known:
        found.notes.append(
            "llama.cpp has no name for this pre-tokenizer; 'default' is written, which may split otherwise"
        )
    return found


def _special_ids(tokens: list[str], settings: dict[str, Any], model: dict[str, Any]) -> dict[str, int]:
    ids = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if name == "unk" and token is None:
            token = model.get("unk_token")
        if isinstance(token, str) and token in tokens:
            ids[name] = tokens.index(token)
    return ids


def _as_sentencepiece(found: Vocabulary, model: dict[str, Any], values: dict[str, Any]) -> Vocabulary:
    """SentencePiece's BPE saved as `tokenizer.json` only: the score of a piece is the rank of its merge."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges", [])):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    found.model, found.hf_json = "llama", None
    last = len(ranks) + 1
    found.scores = [-float(ranks.get(token, last)) for token in found.tokens]
    for number, token in enumerate(found.tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found.kinds[number] = BYTE
        elif token == model.get("unk_token"):
            found.kinds[number] = UNKNOWN
    found.add_space_prefix = _adds_prefix(values)
    return found


def _adds_prefix(values: dict[str, Any]) -> bool:
    """Whether text gets a space in front: by a Metaspace pre-tokenizer or a Prepend normalizer."""
    pending: list[Any] = [values.get("normalizer"), values.get("pre_tokenizer")]
    while pending:
        step = pending.pop()
        if not isinstance(step, dict):
            continue
        pending += [*(step.get("normalizers") or []), *(step.get("pretokenizers") or [])]
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            return True
        if step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
    return False


def _pre_tokenizer(step: Any) -> tuple[str, bool]:
    """llama.cpp's name of a pre-tokenizer, and whether it is known."""
    steps = step.get("pretokenizers", [step]) if isinstance(step, dict) else []
    kinds = [each.get("type") for each in steps]
    patterns = [str(each.get("pattern", {}).get("Regex", "")) for each in steps if each.get("type") == "Split"]
    for name, part in _PRE_BY_REGEX.items():
        if any(part in pattern for pattern in patterns):
            return name, True
    if kinds == ["ByteLevel"]:
        return "gpt-2", bool(steps[0].get("use_regex", True))
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm", True
    return "default", False


# --- and back --------------------------------------------------------------------------------------------------


def add_tokenizer(checkpoint: Checkpoint, keys: dict[str, Any]) -> None:
    """Write the tokenizer of a GGUF file into the checkpoint's texts, as far as the keys allow."""
    model, tokens = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.tokens")
    template = keys.get("tokenizer.chat_template")
    if isinstance(template, str):
        checkpoint.texts["chat_template.jinja"] = template
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        checkpoint.notes.append("the GGUF file has no vocabulary: no tokenizer is written")
        return
    kinds = _list(keys, "token_type", len(tokens), NORMAL)
    names = {"unk": "unknown", "bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {name: keys.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    special = {name: number for name, number in ids.items() if type(number) is int and 0 <= number < len(tokens)}
    length = checkpoint.config.max_position_embeddings
    if model == "llama":
        count = len(tokens)
        while count and kinds[count - 1] == UNUSED:
            count -= 1  # rows of padding
        spm = SentencePieceModel(
            tokens[:count],
            _list(keys, "scores", len(tokens), 0.0)[:count],
            kinds[:count],
            kind_of_model=2,
            byte_fallback=BYTE in kinds,
            special_ids={"unk": -1, "bos": -1, "eos": -1, "pad": -1, **special},
            add_dummy_prefix=bool(keys.get("tokenizer.ggml.add_space_prefix", True)),
            remove_extra_whitespaces=bool(keys.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        )
        checkpoint.texts["tokenizer.json"] = spm_json(spm)
        checkpoint.texts["tokenizer_config.json"] = spm_config(spm, length)
        return
    kept = keys.get(HF_JSON_KEY)
    if isinstance(kept, str):
        parse_json(kept.encode(), HF_JSON_KEY)
        checkpoint.texts["tokenizer.json"] = kept
    elif model == "gpt2":
        checkpoint.texts["tokenizer.json"] = _byte_level_json(tokens, kinds, keys)
        checkpoint.notes.append("the pre-tokenizer was rebuilt from its name; compare with the original tokenizer.json")
    else:
        checkpoint.notes.append(f"a vocabulary of kind {model!r}: no tokenizer is written")
        return
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[number] for name, number in special.items()},
    }
    checkpoint.texts["tokenizer_config.json"] = json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _list(keys: dict[str, Any], name: str, size: int, default: Any) -> list[Any]:
    values = keys.get(f"tokenizer.ggml.{name}")
    if values is None:
        return [default] * size
    require(isinstance(values, list) and len(values) == size, f"tokenizer.ggml.{name}: not one value for each token")
    return values


def _byte_level_json(tokens: list[str], kinds: list[int], keys: dict[str, Any]) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = keys.get("tokenizer.ggml.merges")
    require(isinstance(merges, list), "tokenizer.ggml.merges: missing; a byte-level vocabulary needs them")
    assert isinstance(merges, list)
    vocab = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(str(merge).split(" ", 1)) for merge in merges]
    known = [
        pair for pair in pairs if len(pair) == 2 and pair[0] in vocab and pair[1] in vocab and "".join(pair) in vocab
    ]
    require(len(known) == len(pairs), "tokenizer.ggml.merges: names tokens that are not in the vocabulary")
    tokenizer = Tokenizer(models.BPE(vocab, known))
    pre = keys.get("tokenizer.ggml.pre")
    first: list[Any] = []
    if pre == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif pre == "llama-bpe":
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        first = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    pieces = list(zip(tokens, kinds, strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in pieces if k == CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in pieces if k == USER_DEFINED])
    return tokenizer.to_str()
