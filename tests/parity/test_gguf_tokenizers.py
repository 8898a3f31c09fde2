"""Tokenizers to and from GGUF: llama.cpp must read a text as the checkpoint's tokenizer does, or the writer says so."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import random_state, save_reference, sentencepiece_model, tiny_config
from test_gguf import llama_cpp, llama_cpp_ids
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer

from minitron.checkpoint.gguf.read import open_gguf, read_gguf
from minitron.checkpoint.gguf.tokenizer import LLAMA3, PRE_TOKENIZERS, QWEN2
from minitron.checkpoint.gguf.vocab import add_tokenizer, vocabulary_of
from minitron.checkpoint.hf import open_hf, write_hf
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.spm import read_spm, tokenizer_config, tokenizer_json
from minitron.convert import ConversionOptions, convert

gguf = pytest.importorskip("gguf")

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>"]
SAMPLE = "the quick brown fox jumps over lazy dogs 1234 567 don't I'LL you're wizards \u00e9 \u6771\u4eac\n\n  x=1\r\n"
FRAGMENTS = [
    *["the", "quick", "q", "fox", "123", " 4567", "aaa", "ooo", "?!", "'s", "I'LL", "<extra_id_0>", "<extra_id_1>"],
    *[
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\r",
        "\u2581",
        "\u00a0",
        "\u3000",
        "<extra_id_",
        "<0x0A>",
        "<s>",
        "</s>",
        "<unk>",
    ],
    *["\u00e9", "e\u0301", "\u6771\u4eac", "\ufb01", "\U0001f600", "\U0001f469\u200d\U0001f467", "\u2026"],
]
SIZE = 448
QUICK = ConversionOptions(verify=False)


def texts(count: int = 80) -> list[str]:
    """Random texts, the same in every run."""
    draw = random.Random(0)
    return ["", " ", *("".join(draw.choices(FRAGMENTS, k=draw.randint(1, 6))) for _ in range(count))]


def checkpoint_folder(folder: Path, tokenizer: str, config: dict[str, Any], **model: Any) -> Path:
    """A small model with this `tokenizer.json`."""
    values = tiny_config(**{"vocab_size": SIZE, "num_hidden_layers": 1, "pad_token_id": 0, "head_dim": 8, **model})
    values.num_attention_heads, values.num_key_value_heads = 4, 2
    save_reference(folder, values, random_state(values, torch.bfloat16))
    (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def spm_folder(folder: Path, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = sentencepiece_model(folder, **options)
    model = read_spm(path.read_bytes(), path)
    made = checkpoint_folder(folder, tokenizer_json(model), json.loads(tokenizer_config(model, 64)))
    path.rename(folder / "tokenizer.model")
    return made


def split(*patterns: str) -> Any:
    cuts: list[Any] = [pre.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre.Sequence([*cuts, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(step: Any, *, ignore_merges: bool = False, before: str = "", after: str = "") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = step
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=440, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )  # type: ignore[call-arg]
    tokenizer.train_from_iterator([SAMPLE] * 5 + [SAMPLE.upper()] * 3, trainer)
    surround(tokenizer, before, after)
    return tokenizer


def surround(tokenizer: Tokenizer, before: str, after: str) -> None:
    if before or after:
        single = f"{before} $A {after}".strip()
        tokens = [(token, tokenizer.token_to_id(token)) for token in (*before.split(), *after.split())]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=tokens)


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
BYTE_LEVEL: dict[str, Any] = {
    "gpt-2": lambda: byte_level(pre.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: byte_level(
        pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]), before="<s>"
    ),
    "llama-bpe": lambda: byte_level(split(LLAMA3), ignore_merges=True, before="<s>"),
    "smaug-bpe": lambda: byte_level(split(LLAMA3), before="<s>", after="</s>"),
    "qwen2": lambda: byte_level(split(QWEN2), after="</s>"),
    "default": lambda: byte_level(split(*PRE_TOKENIZERS["default"].patterns)),
}


def assert_read_alike(source: Path, target: Path) -> None:
    """llama.cpp, the source's tokenizer and the one that is read back give the same ids."""
    own, back = AutoTokenizer.from_pretrained(source), target.with_suffix("")
    write_hf(open_gguf(target), back)
    again = AutoTokenizer.from_pretrained(back)
    with llama_cpp(target) as server:
        for text in texts():
            ids = llama_cpp_ids(server, text)
            assert ids == own(text).input_ids, text
            assert ids == again(text).input_ids, text


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_tokenizers(tmp_path: Path, name: str) -> None:
    source = checkpoint_folder(tmp_path / "source", BYTE_LEVEL[name]().to_str(), {**NAMED})
    report = convert(source, tmp_path / "model.gguf", ConversionOptions())
    assert report.texts_compared > 40
    assert read_gguf(tmp_path / "model.gguf").keys["tokenizer.ggml.pre"] == name
    assert_read_alike(source, tmp_path / "model.gguf")


@pytest.mark.parametrize(("before", "after"), [("", ""), ("<s>", "</s>")])
@pytest.mark.parametrize("options", [{"add_dummy_prefix": False}, {"user_defined_symbols": []}], ids=["bare", "prefix"])
def test_sentencepiece(tmp_path: Path, options: dict[str, Any], before: str, after: str) -> None:
    source = spm_folder(tmp_path / "source", **options)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    surround(tokenizer, before, after)
    tokenizer.save(str(source / "tokenizer.json"))
    convert(source, tmp_path / "model.gguf", ConversionOptions())
    keys = read_gguf(tmp_path / "model.gguf").keys
    assert keys["tokenizer.ggml.add_bos_token"] == bool(before)
    assert keys["tokenizer.ggml.add_eos_token"] == bool(after)
    assert_read_alike(source, tmp_path / "model.gguf")


@pytest.mark.parametrize("without", ["tokenizer.model", "tokenizer.json"])
def test_one_of_the_two_files_is_enough(tmp_path: Path, without: str) -> None:
    source = spm_folder(tmp_path / "source", add_dummy_prefix=False)
    expected = Tokenizer.from_file(str(source / "tokenizer.json"))
    (source / without).unlink()
    convert(source, tmp_path / "model.gguf", QUICK)
    with llama_cpp(tmp_path / "model.gguf") as server:
        for text in texts(30):
            assert llama_cpp_ids(server, text) == expected.encode(text).ids, text


@pytest.mark.parametrize(
    ("kind", "absent"),
    [("llama", "add_bos_token"), ("llama", "add_space_prefix"), ("llama", "token_type"), ("gpt2", "add_bos_token")],
)
def test_keys_that_are_left_out(tmp_path: Path, kind: str, absent: str) -> None:
    """A file of somebody else: what llama.cpp does without a key is what the tokenizer does that is read."""
    if kind == "llama":
        source = spm_folder(tmp_path / "source", user_defined_symbols=[], bos_id=1, unk_id=0, eos_id=2, pad_id=3)
    else:
        source = checkpoint_folder(tmp_path / "source", BYTE_LEVEL["llama-bpe"]().to_str(), {**NAMED})
    convert(source, tmp_path / "whole.gguf", QUICK)
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "nemotron")
    dropped = {"general.architecture", "tokenizer.huggingface.json", f"tokenizer.ggml.{absent}"}
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in dropped:
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if array else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_hf(open_gguf(tmp_path / "model.gguf"), tmp_path / "back")
    again = AutoTokenizer.from_pretrained(tmp_path / "back")
    plain = [text for text in texts(40) if absent != "token_type" or "<" not in text]
    with llama_cpp(tmp_path / "model.gguf") as server:
        for text in plain:
            assert llama_cpp_ids(server, text) == again(text).input_ids, text


# --- what llama.cpp has not ---------------------------------------------------------------------------------------


def normalized() -> Tokenizer:
    tokenizer = byte_level(split(QWEN2))
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    return tokenizer


def stripping() -> Tokenizer:
    tokenizer = byte_level(pre.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, normalized=False)])
    return tokenizer


def overlapping() -> Tokenizer:
    tokenizer = byte_level(pre.ByteLevel(add_prefix_space=False))
    tokenizer.add_special_tokens(["[[a]", "a]]b"])
    return tokenizer


INEXACT: dict[str, tuple[Any, str]] = {
    "a normalizer": (normalized, "normalizer NFC"),
    "a space in front": (lambda: byte_level(pre.ByteLevel(add_prefix_space=True)), "no name for the pre-tokenizer"),
    "another pattern": (lambda: byte_level(split(r"\s+|\S+")), "no name for the pre-tokenizer"),
    "stripped blanks": (stripping, "'<tool>' has lstrip"),
    "overlapping tokens": (overlapping, "can be the beginning of another"),
    "two tokens in front": (
        lambda: byte_level(pre.ByteLevel(add_prefix_space=False), before="<s> <extra_id_0>"),
        "llama.cpp puts BOS and EOS",
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_llama_cpp_reads_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    make, sentence = INEXACT[name]
    source = checkpoint_folder(tmp_path / "source", make().to_str(), {**NAMED})
    with pytest.raises(CheckpointError, match=rf"cannot be converted exactly: .*{sentence}.*--lossy"):
        convert(source, tmp_path / "model.gguf", ConversionOptions())
    assert not (tmp_path / "model.gguf").exists()
    report = convert(source, tmp_path / "model.gguf", ConversionOptions(lossy=True, verify=False))
    assert any(sentence in note for note in report.notes)


SPM_INEXACT: dict[str, tuple[dict[str, Any], str]] = {
    "a space behind each symbol": (
        {},
        "llama.cpp puts a space behind every special .* the text .*<extra_id_0>",
    ),
    "normalization": ({"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False}, "normalizer Precompiled"),
    "blanks": ({"remove_extra_whitespaces": True, "add_dummy_prefix": False}, "normalizer Replace"),
    "space behind": ({"treat_whitespace_as_suffix": True, "user_defined_symbols": []}, "normalizer Replace"),
    "no bytes": ({"byte_fallback": False, "vocab_size": 150, "add_dummy_prefix": False}, "no byte pieces"),
}


@pytest.mark.parametrize("name", SPM_INEXACT)
def test_options_of_sentencepiece_that_llama_cpp_has_not(tmp_path: Path, name: str) -> None:
    options, sentence = SPM_INEXACT[name]
    source = spm_folder(tmp_path / "source", **options)
    with pytest.raises(CheckpointError, match=rf"cannot be converted exactly: .*{sentence}.*--lossy"):
        convert(source, tmp_path / "model.gguf", ConversionOptions())


def wordpiece() -> Tokenizer:
    words = {"[UNK]": 0, "the": 1, "fox": 2, "##es": 3}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre.Whitespace()  # type: ignore[assignment]
    return tokenizer


def words_of_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre.Whitespace()  # type: ignore[assignment]
    return tokenizer


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (wordpiece, "a model of type 'WordPiece'"),
        (words_of_bpe, "neither byte-level nor SentencePiece"),
        (lambda: Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)])), "a model of type 'Unigram'"),
    ],
)
def test_tokenizers_of_other_kinds(tmp_path: Path, make: Any, sentence: str) -> None:
    source = checkpoint_folder(tmp_path / "source", make().to_str(), {})
    for lossy in (False, True):
        with pytest.raises(CheckpointError, match=sentence):
            convert(source, tmp_path / "model.gguf", ConversionOptions(lossy=lossy))


def test_a_sentencepiece_model_that_is_not_the_tokenizer(tmp_path: Path) -> None:
    """transformers reads tokenizer.json: GGUF gets that one, and NeMo, which would read the other, is refused."""
    (tmp_path / "other").mkdir()
    source = spm_folder(tmp_path / "source", add_dummy_prefix=False)
    shutil.copy(sentencepiece_model(tmp_path / "other", vocab_size=380), source / "tokenizer.model")
    report = convert(source, tmp_path / "model.gguf", ConversionOptions())
    assert any("tokenizer.model is not the tokenizer of tokenizer.json" in note for note in report.notes)
    assert_read_alike(source, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"cannot be converted exactly: the text .*SentencePiece"):
        convert(source, tmp_path / "model.nemo", ConversionOptions())


# --- tokens that end a text, and templates --------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[3], [5, 4, 3], [3, 4, 5, 10]])
def test_several_tokens_that_end_a_text(tmp_path: Path, ends: list[int]) -> None:
    source = spm_folder(tmp_path / "source", add_dummy_prefix=False)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    report = convert(source, tmp_path / "model.gguf", ConversionOptions())
    keys = read_gguf(tmp_path / "model.gguf").keys
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    assert {keys[name] for name in names if name in keys} == set(ends[:3])
    assert keys[names[0]] == 3  # that of the tokenizer
    assert any("[10]" in note for note in report.notes) == (len(ends) > 3)
    convert(tmp_path / "model.gguf", tmp_path / "back", ConversionOptions())
    found = json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"]
    assert set(found if isinstance(found, list) else [found]) == set(ends)


@pytest.mark.parametrize(
    ("way", "kept_in"), [("hf", "files"), ("gguf", "files"), ("gguf", "config"), ("nemo", "files"), ("nemo2", "config")]
)
def test_chat_templates_of_several_names(tmp_path: Path, way: str, kept_in: str) -> None:
    named = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag-2": "\u00e9 {{ documents }}"}
    source = spm_folder(tmp_path / "source", add_dummy_prefix=False)
    if kept_in == "config":
        config = json.loads((source / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        (source / "additional_chat_templates").mkdir()
        for name, text in named.items():
            place = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            (source / place).write_text(text, encoding="utf-8")
    middle = tmp_path / ("m.gguf" if way == "gguf" else "m.nemo" if way == "nemo" else "m")
    convert(source, middle, ConversionOptions(to=way))
    if way == "gguf":
        keys = read_gguf(middle).keys
        assert sorted(keys["tokenizer.chat_templates"]) == ["rag-2", "tool_use"]
        assert keys["tokenizer.chat_template.tool_use"] == "{{ tools }}"
        with llama_cpp(middle):
            pass
    convert(middle, tmp_path / "back", ConversionOptions())
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == named


def test_a_name_of_a_template_makes_no_path(tmp_path: Path) -> None:
    source = spm_folder(tmp_path / "source", add_dummy_prefix=False)
    convert(source, tmp_path / "model.gguf", ConversionOptions())
    data = (tmp_path / "model.gguf").read_bytes()
    assert b"tokenizer.ggml.pre" in data
    keys = read_gguf(tmp_path / "model.gguf").keys | {"tokenizer.chat_template.../../../x": "evil"}
    checkpoint = open_gguf(tmp_path / "model.gguf")
    add_tokenizer(checkpoint, keys)
    assert not any("evil" in text for text in checkpoint.texts.values())
    assert any("../x" in note for note in checkpoint.notes)


# --- verification -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({"add_bos": True}, "the text .* gives"),
        ({"add_space_prefix": True}, "the text .* gives"),
        ({"chat_templates": {"default": "x"}}, "chat templates"),
        ({"special_ids": {"bos": 3, "eos": 3, "pad": 0, "unk": 1}}, "bos_token_id is 3, was 2"),
    ],
    ids=["bos", "prefix", "template", "id"],
)
def test_a_damaged_tokenizer_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: dict[str, Any], sentence: str
) -> None:
    import minitron.checkpoint.gguf.write as module

    def damaged(checkpoint: Any) -> Any:
        found = vocabulary_of(checkpoint)
        for name, value in damage.items():
            setattr(found, name, value)
        return found

    monkeypatch.setattr(module, "vocabulary_of", damaged)
    source = spm_folder(tmp_path / "source", add_dummy_prefix=False)
    with pytest.raises(CheckpointError, match=f"verification of the tokenizer failed: {sentence}"):
        convert(source, tmp_path / "model.gguf", ConversionOptions())
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("scores", ["x"] * SIZE, "not finite numbers"),
        ("scores", [float("nan")] * SIZE, "not finite numbers"),
        ("scores", [0.0], "not one value for each token"),
        ("token_type", ["x"] * SIZE, "not whole numbers"),
        ("tokens", ["a"] * SIZE, "'a' appears twice"),
        ("tokens", [*map(str, range(300)), "a" * 40_000, *map(str, range(301, SIZE))], "too long"),
        ("add_bos_token", "yes", "expected true or false"),
    ],
)
def test_impossible_keys(tmp_path: Path, key: str, value: Any, sentence: str) -> None:
    source = spm_folder(tmp_path / "source", add_dummy_prefix=False)
    convert(source, tmp_path / "model.gguf", QUICK)
    keys = read_gguf(tmp_path / "model.gguf").keys | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(CheckpointError, match=sentence):
        add_tokenizer(open_gguf(tmp_path / "model.gguf"), keys)


def test_a_kept_tokenizer_json_that_contradicts_the_keys(tmp_path: Path) -> None:
    """llama.cpp obeys the keys; so does the tokenizer that is read, and it is said."""
    source = checkpoint_folder(tmp_path / "source", BYTE_LEVEL["gpt-2"]().to_str(), {**NAMED})
    convert(source, tmp_path / "model.gguf", ConversionOptions())
    keys = read_gguf(tmp_path / "model.gguf").keys | {"tokenizer.ggml.add_bos_token": True}
    checkpoint = open_gguf(tmp_path / "model.gguf")
    add_tokenizer(checkpoint, keys)
    assert Tokenizer.from_str(checkpoint.texts["tokenizer.json"]).encode("the").ids[0] == 2
    assert any("says something else" in note for note in checkpoint.notes)


def test_padding_does_not_collide_with_tokens(tmp_path: Path) -> None:
    """llama.cpp ends with an assertion where two tokens have one text."""
    tokenizer = byte_level(pre.ByteLevel(add_prefix_space=False))
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"[PAD{size + 1}]"])
    source = checkpoint_folder(tmp_path / "source", tokenizer.to_str(), {**NAMED})
    assert len(vocabulary_of(open_hf(source)).tokens) == SIZE  # type: ignore[union-attr]
    convert(source, tmp_path / "model.gguf", ConversionOptions())
    assert_read_alike(source, tmp_path / "model.gguf")
