from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizer_samples import SPECIAL, small_tokenizer

from minitron import load_tokenizer
from minitron.assets import chat_template


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_the_tokenizer_of_the_folder_is_used_as_it_is(folder: Path) -> None:
    tokenizer, original = load_tokenizer(folder), small_tokenizer()
    text = "The quick brown fox <extra_id_1>User\n"
    assert tokenizer(text).input_ids == original(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == list(range(7))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2, 3)


def test_a_template_is_given_to_a_tokenizer_with_the_marks_and_none_of_its_own(folder: Path) -> None:
    assert load_tokenizer(folder).chat_template == chat_template()
    assert load_tokenizer(folder, template=False).chat_template is None


def test_its_own_template_stays(folder: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).chat_template == "{{ messages[0].content }}"


def test_without_the_marks_no_template_is_invented(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text().replace("<extra_id_1>", "<other_1>")
    (folder / "tokenizer.json").write_text(text)
    data = json.loads((folder / "tokenizer_config.json").read_text())
    data.pop("additional_special_tokens", None)
    data.pop("extra_special_tokens", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(data))
    assert load_tokenizer(folder).chat_template is None


def test_ids_beyond_the_vocabulary_are_refused(folder: Path) -> None:
    size = len(small_tokenizer())
    assert len(load_tokenizer(folder, vocab_size=size)) == size
    with pytest.raises(ValueError, match=rf"ids up to {size - 1}; the model's vocab_size is {size - 1}"):
        load_tokenizer(folder, vocab_size=size - 1)


def test_few_tokens_with_a_high_id_are_refused_too(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="ids up to 5000; the model's vocab_size is 1000"):
        load_tokenizer(folder, vocab_size=1000)


def test_no_tokenizer_is_said_with_the_files_that_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer; expected one of tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[]"])
def test_a_broken_tokenizer_is_a_value_error_that_names_the_folder(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="the tokenizer cannot be read") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
