"""A checkpoint's tokenizer as GGUF's keys, and back.

llama.cpp's reading of the keys is compared with the tokenizer as transformers loads it; `Vocabulary.differences` lists
where they differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

from ..limits import CheckpointError, parse_json, require
from ..spm import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, merges_of, read_spm
from ..tensors import Checkpoint
from ..tokenizer_source import backend_values, encoder, first_difference, sample_texts, source_tokenizer
from .tokenizer import (
    GPT2,
    LLAMA3,
    PRE_TOKENIZERS,
    QWEN2,
    Vocabulary,
    config_json,
    llama_cpp_json,
    pre_tokenizer,
    sentencepiece_of,
    vocabulary_from_keys,
)

HF_JSON_KEY = "tokenizer.huggingface.json"
EOS_IDS_KEY = "nemotron.eos_token_ids"
"""Our own key: every token that ends a text; llama.cpp has room for three."""
_STOPS = ("eos", "eot", "eom")
# Other spellings of patterns whose name is known.
_SPELLINGS = {
    LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"): LLAMA3,
    QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"): QWEN2,
    GPT2.removesuffix(r"|\s+"): GPT2,
}


def vocabulary_of(checkpoint: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a checkpoint for GGUF, padded to the embedding; None if it has no tokenizer.

    Raises:
        CheckpointError: a tokenizer of a kind that llama.cpp does not have.
    """
    tokenizer = source_tokenizer(checkpoint)
    if tokenizer is None:
        return None
    values = backend_values(tokenizer)
    found = from_tokenizer_json(values)
    if found.model == "llama":
        _take_scores(found, checkpoint)
    templates = tokenizer.chat_template
    found.chat_templates = {"default": templates} if isinstance(templates, str) else dict(templates or {})
    _set_special_ids(found, checkpoint, tokenizer)
    if found.model == "llama":
        _choose_prefix(found, values, tokenizer)
    found.pad_to(checkpoint.config.vocab_size)
    found.differences += rule_differences(found, tokenizer)
    return found


def rule_differences(vocabulary: Vocabulary, tokenizer: Any) -> list[str]:
    """Where llama.cpp, with these keys, would give other ids than a loaded tokenizer: the first text that shows it."""
    from tokenizers import Tokenizer

    rules = Tokenizer.from_str(llama_cpp_json(vocabulary))
    texts = sample_texts(vocabulary.symbols())
    found = first_difference(encoder(tokenizer), lambda text: rules.encode(text).ids, texts)
    if found is None:
        return []
    behind = vocabulary.add_space_prefix and any(kind == USER_DEFINED for kind in vocabulary.kinds)
    reason = "llama.cpp puts a space behind every special token, too: " if behind else ""
    return [f"{reason}the text {found} (the tokenizer, llama.cpp)"]


def from_tokenizer_json(values: dict[str, Any]) -> Vocabulary:
    """GGUF's view of a BPE `tokenizer.json`, byte-level or SentencePiece-like.

    Raises:
        CheckpointError: not BPE, or BPE of another kind.
    """
    model = values.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise CheckpointError(f"tokenizer.json: a model of type {kind!r}; llama.cpp's Nemotron reads BPE")
    found = _tokens(values, model)
    pairs = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges", [])
    ]
    steps = [*_steps(values.get("pre_tokenizer"), "pretokenizers")]
    if any(step.get("type") == "ByteLevel" for step in steps):
        _as_byte_level(found, values, model, steps)
        found.merges = [" ".join(pair) for pair in pairs]
    else:
        replaced = [*_steps(values.get("normalizer"), "normalizers"), *steps]
        require(
            any(SPACE in (step.get("content"), step.get("replacement"), step.get("prepend")) for step in replaced),
            "tokenizer.json: BPE that is neither byte-level nor SentencePiece's; llama.cpp reads these two",
        )
        _as_sentencepiece(found, values, model, pairs)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            found.differences.append(f"the tokenizer has {key} {model[key]!r}; llama.cpp has no such thing")
    found.differences += overlapping(found.symbols())
    return found


def _tokens(values: dict[str, Any], model: dict[str, Any]) -> Vocabulary:
    vocab, added = model.get("vocab"), values.get("added_tokens") or []
    good = isinstance(vocab, dict) and all(type(number) is int and number >= 0 for number in vocab.values())
    require(good and isinstance(added, list), "tokenizer.json: vocab is not a map from token to number")
    assert isinstance(vocab, dict)
    by_id = {number: token for token, number in vocab.items()}
    kinds = dict.fromkeys(by_id, NORMAL)
    flagged = []
    for entry in added:
        number, token = entry.get("id"), entry.get("content")
        require(type(number) is int and isinstance(token, str), f"tokenizer.json: an added token {entry!r}"[:200])
        by_id[number] = token
        kinds[number] = CONTROL if entry.get("special") else USER_DEFINED
        flagged += [(token, flag) for flag in ("lstrip", "rstrip", "single_word") if entry.get(flag)]
    require(by_id and max(by_id) < 1 << 24, "tokenizer.json: token numbers are too large or there are none")
    size = max(by_id) + 1
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    found = Vocabulary("gpt2", tokens, [kinds.get(number, UNUSED) for number in range(size)])
    if flagged:
        token, flag = flagged[0]
        found.differences.append(f"the token {token!r} has {flag}; llama.cpp takes it wherever its text stands")
    return found


_MOST_COMPARED = 20_000


def overlapping(symbols: Iterable[str]) -> list[str]:
    """Special tokens that can share letters in a text: llama.cpp takes the longest first, tokenizers the leftmost."""
    symbols = list(islice(symbols, _MOST_COMPARED))
    heads = {symbol[:cut] for symbol in symbols for cut in range(1, min(len(symbol), 64))}
    for symbol in symbols:
        if any(symbol[cut:] in heads for cut in range(max(1, len(symbol) - 64), len(symbol))):
            return [f"the end of the special token {symbol!r} can be the beginning of another"]
    return []


def _steps(step: Any, inner: str) -> Iterator[dict[str, Any]]:
    """The single steps of a normalizer or pre-tokenizer."""
    if isinstance(step, dict):
        if isinstance(step.get(inner), list):
            for each in step[inner]:
                yield from _steps(each, inner)
        else:
            yield step


# --- byte-level BPE ----------------------------------------------------------------------------------------------


def _as_byte_level(
    found: Vocabulary, values: dict[str, Any], model: dict[str, Any], steps: list[dict[str, Any]]
) -> None:
    found.hf_json = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    patterns = tuple(pattern for step in steps for pattern in _patterns(step))
    ignores = bool(model.get("ignore_merges"))
    names = [name for name, rule in PRE_TOKENIZERS.items() if rule.patterns == patterns]
    exact = [name for name in names if PRE_TOKENIZERS[name].ignore_merges == ignores]
    found.pre = (exact or names or ["default"])[0]
    if not names:
        found.differences.append(
            f"llama.cpp has no name for the pre-tokenizer {' then '.join(patterns)[:100]!r}, 'default' splits otherwise"
        )
    elif not exact and not _merges_reach_all(found, model):
        found.differences.append(f"ignore_merges is {ignores}; llama.cpp's {found.pre} has the opposite")
    for step in _steps(values.get("normalizer"), "normalizers"):
        found.differences.append(f"the normalizer {step.get('type')}; llama.cpp has none for byte-level BPE")
    if model.get("unk_token") is not None and len({token for token in found.tokens if len(token) == 1}) < 256:
        found.differences.append(f"bytes without a token become {model['unk_token']!r}; llama.cpp leaves them out")


def _patterns(step: dict[str, Any]) -> list[str]:
    """What a step of a pre-tokenizer splits by; a pattern that no name has, where it does something else."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return [r"\p{N}"]
    pattern = step.get("pattern", {}).get("Regex") if isinstance(step.get("pattern"), dict) else None
    if kind == "Split" and isinstance(pattern, str):
        pattern = _SPELLINGS.get(pattern, pattern)
        if step.get("behavior") == "Isolated" and not step.get("invert"):
            return [pattern]
        # The other way to say that matches are the words; the same where the pattern leaves nothing out.
        if step.get("behavior") == "Removed" and step.get("invert"):
            return [pattern if pattern.endswith(r"|\s+") else f"only {pattern}"]
    return [f"{kind} {json.dumps(step, sort_keys=True)}"]


def _merges_reach_all(found: Vocabulary, model: dict[str, Any]) -> bool:
    """Whether every token comes out of its own text by merges, so that `ignore_merges` changes nothing."""
    from tokenizers import Tokenizer

    bare = {"version": "1.0", "added_tokens": [], "model": {**model, "ignore_merges": False}}
    tokenizer = Tokenizer.from_str(json.dumps(bare))
    normal = [token for token, kind in zip(found.tokens, found.kinds, strict=True) if kind == NORMAL]
    return all(len(each.ids) == 1 for each in tokenizer.encode_batch(normal))


# --- SentencePiece -----------------------------------------------------------------------------------------------


def _as_sentencepiece(
    found: Vocabulary, values: dict[str, Any], model: dict[str, Any], pairs: list[tuple[str, ...]]
) -> None:
    """SentencePiece's BPE: the score of a piece is the rank of its merge."""
    found.model = "llama"
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    found.scores = [-float(ranks.get(token, len(pairs) + 1)) for token in found.tokens]
    symbols = set(_cut_symbols(values))
    for number, token in enumerate(found.tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            found.kinds[number] = BYTE
        elif token == model.get("unk_token") and found.kinds[number] == CONTROL:
            found.kinds[number] = UNKNOWN
        elif token in symbols and found.kinds[number] == NORMAL:
            found.kinds[number] = USER_DEFINED
    if not model.get("byte_fallback") or found.kinds.count(BYTE) < 256:
        found.differences.append("the tokenizer has no byte pieces; llama.cpp fails at a character without a piece")
    for step in _steps(values.get("normalizer"), "normalizers"):
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        known = step in ({"type": "Prepend", "prepend": SPACE}, spaces)
        if not known:
            what = json.dumps(step.get("pattern")) if step.get("type") == "Replace" else ""
            found.differences.append(f"the normalizer {step.get('type')} {what}".rstrip() + "; llama.cpp has no such")
    expected = merges_of(sentencepiece_of(found))
    order = [token for token, _ in groupby("".join(pair) for pair in pairs)]
    if set(expected) != set(pairs) or len(order) != len(set(order)):
        found.differences.append("its merges are not those of SentencePiece, where any two pieces that make one merge")


def _cut_symbols(values: dict[str, Any]) -> list[str]:
    """The user-defined symbols that a pre-tokenizer of `spm.tokenizer_json` cuts out."""
    symbols = []
    for step in _steps(values.get("pre_tokenizer"), "pretokenizers"):
        pattern = step.get("pattern", {}).get("Regex") if isinstance(step.get("pattern"), dict) else None
        if step.get("type") == "Split" and pattern:
            symbols += [re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in re.split(r"(?<!\\)\|", pattern)]
    return symbols


def _take_scores(found: Vocabulary, checkpoint: Checkpoint) -> None:
    """The scores of the SentencePiece model in the checkpoint, where it is the one of the `tokenizer.json`."""
    if "tokenizer.model" not in checkpoint.files:
        return
    data = checkpoint.files["tokenizer.model"]
    spm = read_spm(data.read(), data)
    same = spm.is_bpe and spm.pieces == found.tokens[: len(spm.pieces)]
    if same and set(merges_of(spm)) == set(merges_of(sentencepiece_of(found))):
        assert found.scores is not None
        found.scores[: len(spm.scores)] = spm.scores
    else:
        found.notes.append("tokenizer.model is not the tokenizer of tokenizer.json; the latter is written")


def _choose_prefix(found: Vocabulary, values: dict[str, Any], tokenizer: Any) -> None:
    """Whether text gets a space in front: what fits the tokenizer's ids."""
    steps = [*_steps(values.get("normalizer"), "normalizers"), *_steps(values.get("pre_tokenizer"), "pretokenizers")]
    named = any(step.get("type") == "Prepend" for step in steps) or any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
    )
    found.add_space_prefix = named
    if rule_differences(found, tokenizer):
        found.add_space_prefix = not named
        if rule_differences(found, tokenizer):
            found.add_space_prefix = named


# --- special tokens ----------------------------------------------------------------------------------------------


def _set_special_ids(found: Vocabulary, checkpoint: Checkpoint, tokenizer: Any) -> None:
    """BOS, EOS and the others, and what is put around a text."""
    config, size = checkpoint.config, len(found.tokens)
    before, after = _around(tokenizer, found)
    stops = end_ids(checkpoint)
    bos = before[0] if before else _first(tokenizer.bos_token_id, config.bos_token_id)
    eos = after[-1] if after else _first(*stops, tokenizer.eos_token_id)
    if not after and tokenizer.eos_token_id in stops:
        eos = tokenizer.eos_token_id
    found.add_bos, found.add_eos = bool(before), bool(after)
    found.eos_ids = [number for number in dict.fromkeys([*after, *stops]) if number < size]
    rest = [number for number in found.eos_ids if number != eos]
    ids = {"bos": bos, "eos": eos, "unk": tokenizer.unk_token_id}
    ids |= {"pad": _first(config.pad_token_id, tokenizer.pad_token_id)} | dict(zip(_STOPS[1:], rest, strict=False))
    rows = range(config.vocab_size)
    found.special_ids = {name: number for name, number in ids.items() if type(number) is int and number in rows}
    if len(rest) > 2:
        found.notes.append(f"llama.cpp ends a text at three tokens at most; it will not at {rest[2:]}")
    if "eos" not in found.special_ids:
        found.notes.append("no token ends a text; llama.cpp takes one by its own default (2 or 11)")
    if _differ(config.pad_token_id, tokenizer.pad_token_id):
        found.notes.append(f"pad_token_id is {config.pad_token_id}, the tokenizer's {tokenizer.pad_token_id}")


def _around(tokenizer: Any, found: Vocabulary) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text: none or one each, which is what llama.cpp has."""
    bare, full = (encoder(tokenizer, special)("a b") for special in (False, True))
    start = next((at for at in range(len(full) + 1) if full[at : at + len(bare)] == bare), 0)
    before, after = full[:start], full[start + len(bare) :]
    if len(before) > 1 or len(after) > 1:
        found.differences.append(f"the tokenizer puts {before} and {after} around a text; llama.cpp puts BOS and EOS")
    return before[:1], after[-1:]


def _first(*numbers: Any) -> int | None:
    return next((number for number in numbers if type(number) is int and number >= 0), None)


def _differ(one: Any, two: Any) -> bool:
    return type(one) is int and type(two) is int and one != two


def end_ids(checkpoint: Checkpoint) -> list[int]:
    """Every token that ends a text: of generation_config.json, or of the config where that names none."""
    values: dict[str, Any] = {}
    name = "generation_config.json"
    if name in checkpoint.texts:
        values = parse_json(checkpoint.texts[name].encode(), name)
    elif name in checkpoint.files:
        values = parse_json(checkpoint.files[name].read(), checkpoint.files[name])
    told = values.get("eos_token_id")
    told = checkpoint.config.eos_token_id if told is None else told
    numbers = told if isinstance(told, list) else [told]
    return [number for number in numbers if type(number) is int and number >= 0]


# --- and back ----------------------------------------------------------------------------------------------------


def add_tokenizer(checkpoint: Checkpoint, keys: dict[str, Any]) -> None:
    """Write the tokenizer of a GGUF file into the checkpoint's texts, as llama.cpp would read it."""
    vocabulary = vocabulary_from_keys(keys)
    if vocabulary is None:
        kind = keys.get("tokenizer.ggml.model")
        what = "the GGUF file has no vocabulary" if kind in (None, "no_vocab", "none") else f"a vocabulary of {kind!r}"
        checkpoint.notes.append(f"{what}: no tokenizer is written")
        return
    for name, text in vocabulary.chat_templates.items():
        place = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        checkpoint.texts[place] = text
    _add_ends(checkpoint, vocabulary, keys)
    length = checkpoint.config.max_position_embeddings
    checkpoint.texts["tokenizer.json"] = llama_cpp_json(vocabulary)
    checkpoint.texts["tokenizer_config.json"] = config_json(vocabulary, length)
    kept = keys.get(HF_JSON_KEY)
    if isinstance(kept, str) and vocabulary.model == "gpt2" and _agrees(checkpoint, vocabulary, kept):
        checkpoint.texts["tokenizer.json"] = kept
        vocabulary.differences.clear()
    vocabulary.differences += overlapping(vocabulary.symbols())
    if vocabulary.scores is not None:
        own = [score for score, kind in zip(vocabulary.scores, vocabulary.kinds, strict=True) if kind == NORMAL]
        if len(own) > 1 and len(set(own)) == 1:
            vocabulary.differences.append("all pieces have one score; llama.cpp then merges from the left")
    checkpoint.notes += vocabulary.notes
    checkpoint.differences += vocabulary.differences


def _add_ends(checkpoint: Checkpoint, vocabulary: Vocabulary, keys: dict[str, Any]) -> None:
    """Several tokens that end a text stand in generation_config.json, since the config has room for one."""
    kept, size = keys.get(EOS_IDS_KEY), len(vocabulary.tokens)
    ids = list(vocabulary.eos_ids)
    if isinstance(kept, list) and set(ids) <= set(kept):
        ids = [number for number in kept if type(number) is int and 0 <= number < size]
    if len(ids) > 1 and "generation_config.json" in checkpoint.texts:
        values = json.loads(checkpoint.texts["generation_config.json"])
        checkpoint.texts["generation_config.json"] = json.dumps({**values, "eos_token_id": ids}, indent=2) + "\n"


def _agrees(checkpoint: Checkpoint, vocabulary: Vocabulary, kept: str) -> bool:
    """Whether the `tokenizer.json` that was stored in the file still agrees with its keys."""
    from tokenizers import Tokenizer

    parse_json(kept.encode(), HF_JSON_KEY)
    try:
        whole = Tokenizer.from_str(kept)
    except Exception as error:  # the library raises plain Exceptions
        raise CheckpointError(f"{HF_JSON_KEY}: not a tokenizer.json ({error})") from None
    if pre_tokenizer(vocabulary.pre) is None:
        return True  # its rules are not known here; the kept file is the better witness
    rules = Tokenizer.from_str(checkpoint.texts["tokenizer.json"])
    texts = sample_texts(vocabulary.symbols())
    found = first_difference(lambda text: whole.encode(text).ids, lambda text: rules.encode(text).ids, texts)
    if found:
        checkpoint.notes.append(f"{HF_JSON_KEY} says something else than the file's other keys: the text {found}")
    return found is None
