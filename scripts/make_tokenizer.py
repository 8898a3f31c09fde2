"""Train the bundled model's tokenizer: byte-level BPE with the special tokens and ids of the Nemotron family.

python scripts/make_tokenizer.py OUT_FOLDER TEXT.jsonl[:WEIGHT] ... [--vocab 4096]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# In the order of their ids. Nemotron's chat format uses the <extra_id_N> tokens.
SPECIAL_TOKENS = ["<pad>", "<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]


def texts(sources: list[str]) -> Iterator[str]:
    """Every document of the sources, as often as the weight says."""
    for source in sources:
        name, _, weight = source.partition(":")
        for _ in range(int(weight or 1)):
            with Path(name).open(encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)["text"]


def train(sources: list[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab` tokens that puts <s> before a text."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    # Digits one by one: a small vocabulary has no room for numbers.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(sources), trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL_TOKENS[4:],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()
    tokenizer = train(args.sources, args.vocab, args.context)
    tokenizer.save_pretrained(args.out)
    sample = list(texts(args.sources[:1]))[:200]
    tokens = sum(len(ids) for ids in tokenizer(sample, add_special_tokens=False).input_ids)
    print(f"{len(tokenizer)} tokens; {sum(map(len, sample)) / tokens:.2f} characters a token")


if __name__ == "__main__":
    main()
