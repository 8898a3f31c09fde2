"""Web-like dirt at known rates around clean documents, with a label for every document, so that what a curation does
to each kind of dirt can be counted."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MARKED = {"boilerplate": 0.30, "mojibake": 0.10, "personal data": 0.10}
"""Share of the clean documents that get this dirt; a document gets at most one kind."""
ADDED = {
    "exact copies": 0.25,
    "near copies": 0.15,
    "other languages": 0.15,
    "keyword lists": 0.15,
    "menus": 0.10,
    "evaluation items": 0.10,
}
"""Documents that are added, for each clean one."""
_CHANGED_WORDS = 0.01
"""Of a near copy: a Jaccard similarity of word 5-grams of about 0.9."""
_HEADS = (
    "Home | About us | Contact | Login",
    "Skip to main content",
    "We use cookies to improve your experience. Accept all cookies",
    "Sign up for our newsletter",
    "Share on Facebook",
    "Enable javascript to view this page.",
)
_FEET = (
    "Copyright 2019 All rights reserved.",
    "Privacy policy | Terms of use",
    "Read more",
    "Click here to subscribe",
    "Share on Twitter",
    "Follow us on Instagram",
)
_MENU = (
    *("Home", "Shop", "Cart (0)", "Log in", "Help", "Sitemap", "Next page", "Previous page", "Add to basket", "FAQ"),
    *("Careers", "Press", "Gift cards", "Returns", "Store finder", "Newsletter", "New arrivals", "Sale", "Top rated"),
)
_KEYWORDS = (
    *("cheap", "best", "buy", "online", "free", "shipping", "discount", "hotel", "flight", "casino", "bonus", "loan"),
    *(
        "insurance",
        "credit",
        "review",
        "price",
        "deal",
        "download",
        "watch",
        "movie",
        "game",
        "phone",
        "laptop",
        "shoes",
    ),
)
_FOREIGN = {
    "de": (
        "Der Hund lief schnell durch den dunklen Wald und suchte seinen Herrn.",
        "Am nächsten Morgen war das ganze Dorf unter einer dicken Schneedecke verschwunden.",
        "Sie stellte die Blumen auf den Tisch und öffnete das Fenster.",
        "Niemand wusste, warum der alte Mann jeden Tag zum Bahnhof ging.",
        "Die Kinder spielten im Garten, bis es dunkel wurde.",
    ),
    "fr": (
        "Le chat dormait sur la table pendant que la pluie tombait dehors.",
        "Elle n'avait jamais vu une maison aussi grande que celle de son oncle.",
        "Le lendemain matin, ils partirent ensemble vers la montagne.",
        "Personne ne savait pourquoi le vieil homme restait devant la gare.",
        "Les enfants jouaient dans le jardin jusqu'à la tombée de la nuit.",
    ),
    "es": (
        "El niño jugaba en la calle mientras su madre preparaba la cena.",
        "A la mañana siguiente el pueblo entero estaba cubierto de nieve.",
        "Nadie sabía por qué el anciano iba todos los días a la estación.",
        "Ella abrió la ventana y puso las flores sobre la mesa.",
        "Los perros corrieron por el bosque buscando a su dueño.",
    ),
    "it": (
        "Il cane correva veloce nel bosco e cercava il suo padrone.",
        "La mattina dopo tutto il paese era coperto di neve.",
        "Nessuno sapeva perché il vecchio andasse ogni giorno alla stazione.",
        "Lei aprì la finestra e mise i fiori sul tavolo.",
        "I bambini giocavano in giardino fino al calare della notte.",
    ),
    "fi": (
        "Kissa nukkui pöydällä, kun ulkona satoi vettä.",
        "Seuraavana aamuna koko kylä oli lumen peitossa.",
        "Kukaan ei tiennyt, miksi vanha mies kävi joka päivä asemalla.",
        "Hän avasi ikkunan ja laittoi kukat pöydälle.",
        "Lapset leikkivät puutarhassa pimeän tuloon asti.",
    ),
}
_TYPESET = {r'(^|[\s(])"': "\\1\u201c", '"': "\u201d", "--": "\u2014", "'": "\u2019"}
"""Typographic marks for plain ones, in this order."""


@dataclass(frozen=True)
class Document:
    """A text of the dirty corpus."""

    text: str
    kind: str
    """A key of `MARKED` or `ADDED`, or "clean"."""
    origin: int
    """Number of the clean document or the evaluation item that it was made of; -1 of none."""
    marks: tuple[str, ...] = ()
    """What was put into it."""


def dirty_corpus(clean: Sequence[str], items: Sequence[str], rng: random.Random) -> list[Document]:
    """The clean documents, some of them with dirt in them, and the added ones, in a random order.

    Args:
        clean: texts.
        items: evaluation items, which leak into the corpus.
        rng: decides everything.
    """
    kinds = [kind for kind, share in MARKED.items() for _ in range(round(share * len(clean)))]
    kinds += ["clean"] * (len(clean) - len(kinds))
    rng.shuffle(kinds)
    made = [_marked(text, kind, origin, rng) for origin, (text, kind) in enumerate(zip(clean, kinds, strict=True))]
    for kind, share in ADDED.items():
        for number in range(round(share * len(clean))):
            origin, text = _added(kind, number, clean, items, rng)
            made.append(Document(text, kind, origin))
    rng.shuffle(made)
    return made


def _marked(text: str, kind: str, origin: int, rng: random.Random) -> Document:
    makers: dict[str, Callable[[str, random.Random], tuple[str, tuple[str, ...]]]] = {
        "clean": lambda text, _: (text, ()),
        "boilerplate": _boilerplate,
        "mojibake": _mojibake,
        "personal data": _personal,
    }
    changed, marks = makers[kind](text, rng)
    return Document(changed, kind, origin, marks)


def _boilerplate(text: str, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    heads, feet = rng.sample(_HEADS, 3), rng.sample(_FEET, 3)
    return "\n".join([*heads, text, *feet]), (*heads, *feet)


def _mojibake(text: str, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """The text with typographic quotation marks and dashes, its UTF-8 read as Windows-1252."""
    for pattern, mark in _TYPESET.items():
        text = re.sub(pattern, mark, text)
    # As browsers do, to which every byte is a character.
    broken = "".join(bytes([byte]).decode("cp1252", errors="ignore") or chr(byte) for byte in text.encode())
    return broken, ("â€",)


def _personal(text: str, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    name = rng.choice(("anna.smith", "j.doe", "mary_jones", "contact"))
    address = f"{name}{rng.randrange(1000)}@mail{rng.randrange(100)}.example.com"
    phone = f"+1 {rng.randrange(201, 990)} {rng.randrange(201, 990)} {rng.randrange(1000, 10000)}"
    host = f"{rng.randrange(20, 99)}.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"
    return f"{text}\nPosted by {address} from {host}. Please call {phone} for more information.", (address, phone, host)


def _added(kind: str, number: int, clean: Sequence[str], items: Sequence[str], rng: random.Random) -> tuple[int, str]:
    if kind == "exact copies":
        origin = int(len(clean) * rng.random() ** 3)  # a few documents are copied often
        return origin, clean[origin]
    if kind == "near copies":
        origin = rng.randrange(len(clean))
        return origin, _near_copy(clean[origin], rng)
    if kind == "evaluation items":
        origin = number % len(items)
        text = items[origin]
        # Every second one with other case and punctuation.
        return origin, text if number // len(items) % 2 == 0 else re.sub(r"[.,;:!?]", "", text).upper()
    makers = {"other languages": _foreign, "keyword lists": _keywords, "menus": _menu}
    return -1, makers[kind](rng)


def _near_copy(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    for _ in range(max(1, round(_CHANGED_WORDS * len(words)))):
        words[rng.randrange(len(words))] = rng.choice(("perhaps", "indeed", "again", "today"))
    return " ".join(words)


def _foreign(rng: random.Random) -> str:
    sentences = _FOREIGN[rng.choice(list(_FOREIGN))]
    return "\n\n".join(" ".join(rng.choices(sentences, k=5)) for _ in range(3))


def _keywords(rng: random.Random) -> str:
    phrase = " ".join(rng.choices(_KEYWORDS, k=4))
    words = rng.choices(_KEYWORDS, k=100)
    return f"{phrase} ".join(" ".join(words[i : i + 6]) + " " for i in range(0, len(words), 6)).strip()


def _menu(rng: random.Random) -> str:
    return "\n".join(rng.choices(_MENU, k=60))
