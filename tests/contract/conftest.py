from __future__ import annotations

from pathlib import Path

import pytest
from model_samples import build
from tokenizer_samples import small_tokenizer
from transformers import PreTrainedTokenizerFast

import minitron


@pytest.fixture
def registered() -> None:
    """Our classes in the Auto classes. This lasts; upstream is reached by its own module in tests that need it."""
    minitron.register()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


@pytest.fixture(scope="session")
def page_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint as the page's examples load it: a causal language model and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build(vocab_size=len(tokenizer), pad_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
