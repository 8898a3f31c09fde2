"""A tiny checkpoint on disk with a tokenizer that reads English, random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minitron import NemotronConfig, NemotronForCausalLM

SPECIAL_TOKENS = ["<pad>", "<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>"]
SAMPLE = [
    "the cat sat on the mat and the dog ran to the sea",
    "hello little cat, hello old dog",
    "System User Assistant",
]


def make_text_checkpoint(folder: Path, vocab_size: int = 512, max_shard_size: str = "5GB") -> Path:
    """Save model and tokenizer into `folder` and return it; context 64."""
    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        SAMPLE, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=0,
    )
    NemotronForCausalLM(config).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_byte_tokenizer(folder: Path, extra: int = 0) -> int:
    """Save a byte-level tokenizer with <pad>, <s>, </s> as 0, 1, 2 and `extra` more tokens; its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", *alphabet, *(f"<extra_{i}>" for i in range(extra))]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(names)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    return len(names)
