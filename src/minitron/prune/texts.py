"""The text of a pruning run: blocks for importance, for the ranking of candidates, and for the losses in the card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..assets import calibration_text
from ..data.documents import DataError, Source
from ..data.packing import Batch, PackedBlocks, collate
from ..data.token_cache import TokenFolder, tokenize
from ..tokenizer import load_tokenizer
from .importance import check_language

RANK_BLOCKS = 8
HELDOUT_BLOCKS = 16
FEWEST_BLOCKS = 4


@dataclass(frozen=True)
class PruningTexts:
    """Disjoint blocks of tokens for each purpose, and a sentence about where they come from."""

    calibration: Batch
    ranking: Batch
    heldout: Batch
    about: str
    notes: tuple[str, ...] = ()
    """Sentences about text that was skipped."""


def open_text(
    folder: Path,
    vocab_size: int,
    *,
    text: str | None,
    heldout: str | None,
    samples: int,
    length: int,
    seed: int,
    cache: Path | TokenFolder,
) -> PruningTexts:
    """Tokenize, pack and divide text.

    Args:
        folder: checkpoint with a tokenizer.
        vocab_size: of the model.
        text: file, folder or pattern; the bundled passages if None.
        heldout: other text to rank on and to report losses of; blocks of `text` that importance does not see if None.
        samples: most blocks for importance.
        length: tokens of a block.
        seed: decides which blocks are drawn.
        cache: folder for tokenized text.

    Raises:
        DataError: the text is too short, or of a language that the tokenizer does not know.
    """
    if samples < 1:
        raise DataError(f"samples is {samples}; at least one block of text is needed")
    tokenizer: Any = load_tokenizer(folder, vocab_size=vocab_size)
    name = text or "bundled text (passages of public-domain books in English)"
    own = PackedBlocks(tokenize(Source(text or str(calibration_text())), tokenizer, cache), length, seed=seed)
    order = np.random.default_rng(seed).permutation(len(own)).tolist()
    notes = own.cache.notes
    if len(own) < FEWEST_BLOCKS:
        raise DataError(f"{name}: fills {len(own)} blocks of {length} tokens; at least {FEWEST_BLOCKS} are needed")
    if heldout is None:
        spare = max(2, len(own) // 4)
        judged = [own.pieces(i) for i in order[:spare]]
        order = order[spare:]
        rest = "losses on {} other blocks of it, ranking on {} more"
    else:
        other = PackedBlocks(tokenize(Source(heldout), tokenizer, cache), length, seed=seed)
        if len(other) < 2:
            raise DataError(f"{heldout}: fills {len(other)} blocks of {length} tokens; at least 2 are needed")
        notes += other.cache.notes
        judged = [other.pieces(i) for i in np.random.default_rng(seed).permutation(len(other)).tolist()]
        rest = f"losses on {{}} blocks of {heldout}, ranking on {{}} others of it"
    ranked = min(RANK_BLOCKS, len(judged) // 2)
    reported = judged[ranked : ranked + HELDOUT_BLOCKS]
    used = order[:samples]
    calibration = collate([own.pieces(i) for i in used], length)
    check_language(calibration, tokenizer)
    about = f"importance on {len(used)} blocks of {length} tokens of {name}; {rest.format(len(reported), ranked)}"
    return PruningTexts(calibration, collate(judged[:ranked], length), collate(reported, length), about, notes)
