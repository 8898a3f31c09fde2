"""A small byte-level BPE tokenizer with the special tokens of the Nemotron-Mini format."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
TEXT = [
    "Hey, are you conscious? Can you talk to me?",
    "Complete the paragraph: our solar system is",
    "HuggingFace is a company based in Paris and New York",
    "The quick brown fox jumps over the lazy dog; the dog sleeps.",
]


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Some 420 tokens; ids 0 to 6 are `SPECIAL`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
        model_input_names=["input_ids", "attention_mask"],
    )
