"""Semantic near duplicates: texts whose embeddings have at least a given cosine.

As for near duplicates (`near`), the longer text of a pair ranks first, and a text is removed for one that stays. All
pairs are compared, in blocks: n documents of h numbers cost n^2 h multiplications.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 1024
"""Texts that are compared with all that stay at once."""


def semantic_duplicates(
    embeddings: np.ndarray[Any, np.dtype[np.float16]],
    digests: np.ndarray[Any, np.dtype[np.uint64]],
    sizes: np.ndarray[Any, np.dtype[np.int64]],
    alive: np.ndarray[Any, np.dtype[np.bool_]],
    similarity: float,
) -> dict[int, tuple[int, float]]:
    """Texts to remove: number -> (number of the text that stays for it, their cosine).

    Args:
        embeddings: (texts, size) of length 1; a row of zeros is like no other.
        digests, sizes, alive: see `near.near_duplicates`.
        similarity: least cosine of duplicates.
    """
    order = np.lexsort((digests[:, 1], digests[:, 0], -sizes))
    order = order[alive[order]]
    removed: dict[int, tuple[int, float]] = {}
    staying: list[int] = []
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        rows = embeddings[block].astype(np.float32)
        best, place = np.full(len(block), -1.0, dtype=np.float32), np.zeros(len(block), dtype=np.int64)
        for first in range(0, len(staying), 16 * BLOCK):
            others = np.asarray(staying[first : first + 16 * BLOCK])
            cosines = rows @ embeddings[others].astype(np.float32).T
            nearest = cosines.argmax(axis=1)
            value = cosines[np.arange(len(block)), nearest]
            better = value > best
            best[better], place[better] = value[better], others[nearest[better]]
        within = rows @ rows.T
        for row, text in enumerate(block.tolist()):
            mine = [k for k in range(row) if int(block[k]) not in removed]
            if mine:
                nearest = mine[int(within[row, mine].argmax())]
                if within[row, nearest] > best[row]:
                    best[row], place[row] = within[row, nearest], block[nearest]
            if best[row] >= similarity:
                removed[text] = (int(place[row]), float(best[row]))
            else:
                staying.append(text)
    return removed
