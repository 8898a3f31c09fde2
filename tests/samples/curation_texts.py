"""Texts for tests of curation: ordinary ones, web-like dirt, and what breaks careless code."""

from __future__ import annotations

import random

_WORDS = (
    "the of and to a in that it is was for on as with his he be at by had not are but from or have an they which one "
    "you were all her she there would their we him been has when who will no more if out so up said what its about "
    "house garden river morning evening children mountain window letter journey question answer remember yellow"
)
WORDS = _WORDS.split()
ADVERSARIAL = [
    "a",
    " ",
    "\n",
    "\n\n\n",
    "\u3000\u2003a\u00a0b\x85c\u2028d\x1ce",
    "...",
    ". . .",
    "a... b....  c......\nd ...\n\u2026\n",
    "\u2022 one\n - two\n\u2022 three\r\n- four\rfive\v six\f",
    "ab c d e f g h i j k\na bc d e f g h i j k\nabc d e f g h i j k",
    "1 2 3 4 5 6 7 8 9 10 11 12 1 2 3 4 5 6 7 8 9 10 11 12",
    "# ## ### a#b #\n#\n",
    "x" * 5000,
    ("word " * 3000).strip(),
    "\n".join(["same line"] * 30),
    "\n\n".join(["same paragraph, twice as long"] * 9),
    "the be to of and that have with" * 4,
    "\U0001f600 \U0001f600 caf\u00e9 na\u00efve \u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\ufeffhead",
    "trailing space \n \n leading",
    "\r\n\r\n",
    "a\r\n\r\nb\n\n\nc",
    "\U0010ffff\u00ad\u200b",
]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + rng.choice(".!?\u2026;")


def ordinary(rng: random.Random) -> str:
    lines = [
        " ".join(sentence(rng, rng.randint(3, 14)) for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 9))
    ]
    return rng.choice(["\n", "\n\n", "\n \n"]).join(lines)


def dirty(rng: random.Random) -> str:
    """A text with repetition, symbols, bullets, strange spaces and scripts in random shares."""
    alphabet = rng.choice(
        [
            "ab \n",
            "a.\u2026#- \n\n",
            "the of\n\u2022",
            "x y\tz\r\n\u2028",
            "\u4f60\u597d\u3002 \uff0c\n",
            "1234 ,.!?\"'\n",
            "{}[]()<> javascript\n",
        ]
    )
    text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 400)))
    if rng.random() < 0.5:
        piece = ordinary(rng)
        text = rng.choice([text, piece]) + "\n" + piece + rng.choice(["", "\n" + piece, "\n\n" + text])
    return text


def many(count: int, seed: int = 0) -> list[str]:
    """`count` texts of all kinds, the adversarial ones first."""
    rng = random.Random(seed)
    made = list(ADVERSARIAL)
    while len(made) < count:
        made.append(ordinary(rng) if rng.random() < 0.4 else dirty(rng))
    return made
