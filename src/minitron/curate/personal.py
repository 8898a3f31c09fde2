"""Personal data and secrets in a text, replaced by what they are: addresses, numbers, keys. Nothing of them is kept."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import personal_kernels as kernels
from .recipe import PersonalData
from .texts import Texts


@dataclass(frozen=True)
class _Kind:
    name: str
    pattern: re.Pattern[str]
    shape: int
    """Flag of `personal_kernels` without which a text has nothing to look for."""
    valid: Callable[[str], bool] = lambda _: True


def _public(text: str) -> bool:
    """Whether a text is the address of a machine that anybody can reach; others are nobody's."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def luhn(text: str) -> bool:
    """Whether the digits of a text have the check digit of a card number (ISO/IEC 7812-1)."""
    total = 0
    for index, digit in enumerate(reversed([int(c) for c in text if c.isdigit()])):
        total += digit if index % 2 == 0 else (2 * digit - 9 if digit > 4 else 2 * digit)
    return total % 10 == 0


def _card(text: str) -> bool:
    digits = [c for c in text if c.isdigit()]
    return 13 <= len(digits) <= 19 and digits[0] in "23456" and luhn(text)


_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_KEYS = (
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\s\S]{1,8192}?-----END (?:[A-Z]+ )*PRIVATE KEY-----",
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b",
    r"\bgithub_pat_[A-Za-z0-9_]{22,255}\b",
    r"\bglpat-[A-Za-z0-9_-]{20,64}\b",
    r"\bnpm_[A-Za-z0-9]{36}\b",
    r"\bhf_[A-Za-z0-9]{30,64}\b",
    r"\bsk-(?:[a-z]{2,8}-)?[A-Za-z0-9_-]{20,255}\b",
    r"\bsk_live_[A-Za-z0-9]{16,64}\b",
    r"\bxox[abprs]-[A-Za-z0-9-]{10,255}\b",
    r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",
    r"\beyJ[A-Za-z0-9_-]{8,4096}\.eyJ[A-Za-z0-9_-]{8,4096}\.[A-Za-z0-9_-]{8,4096}",
)
_EMAIL_DOMAIN = re.compile(r"(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_EMAIL_NAME = re.compile(r"[A-Za-z0-9._%+'-]*\Z")
_LONGEST_NAME = 64
_KINDS = {
    "keys": (_Kind("KEY", re.compile("|".join(_KEYS)), kernels.KEY),),
    "emails": (
        _Kind(
            "EMAIL",
            re.compile(rf"(?<![A-Za-z0-9._%+'-])[A-Za-z0-9._%+'-]{{1,{_LONGEST_NAME}}}@{_EMAIL_DOMAIN.pattern}"),
            kernels.AT,
        ),
    ),
    "ips": (
        _Kind(
            "IP",
            re.compile(rf"(?<![\w.-])(?:{_BYTE}\.){{3}}{_BYTE}(?![\w-]|\.\w)", re.ASCII),
            kernels.DOTTED,
            _public,
        ),
        _Kind(
            "IP",
            re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])"),
            kernels.COLONS,
            _public,
        ),
    ),
    "cards": (_Kind("CARD", re.compile(r"(?<![\w.-])[2-6](?:[ -]?[0-9]){12,18}(?![\w-])"), kernels.DIGITS, _card),),
    "phones": (
        _Kind(
            "PHONE",
            re.compile(r"(?<![\w+])\+[1-9][0-9]{0,2}(?:[ .-]?(?:\([0-9]{1,4}\)|[0-9]{1,4})){2,6}(?!\w)"),
            kernels.PLUS,
            lambda text: 8 <= sum(map(str.isdigit, text)) <= 15,
        ),
        _Kind(
            "PHONE",
            re.compile(
                r"(?<![\w.+-])(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-. ])[2-9][0-9]{2}[-.][0-9]{4}(?![\w-]|\.\w)"
            ),
            kernels.THREE_FOUR,
        ),
    ),
}  # fmt: skip


def replacer(settings: PersonalData) -> Callable[[str, Counter[str]], str]:
    """A function that replaces what it finds in a text by `<EMAIL>` and the like, and counts it by that name.

    It tries every pattern; `replace_all` gives the same texts and tries those that can match.
    """
    kinds = _kinds(settings)

    def run(text: str, counts: Counter[str]) -> str:
        for kind in kinds:
            text = _replace(kind, text, counts)
        return text

    return run


def _kinds(settings: PersonalData) -> list[_Kind]:
    # In the order of _KINDS: a key may hold what looks like a number, a card number what looks like a telephone number.
    return [kind for name, kinds in _KINDS.items() if getattr(settings, name) for kind in kinds]


def replace_all(texts: Texts, settings: PersonalData, counts: Counter[str]) -> Texts:
    """The texts with what `replacer` replaces, which is counted; the same object if nothing was found."""
    kinds = _kinds(settings)
    shapes = kernels.shapes(texts)
    suspects = np.flatnonzero(shapes & np.uint8(sum({kind.shape for kind in kinds})))
    changed: dict[int, bytes] = {}
    for index in suspects.tolist():
        before = text = texts[index]
        # What is put in holds no shape of its own and no two neighbours become one: the shapes stay a superset.
        for kind in kinds:
            if shapes[index] & kind.shape:
                text = _replace_emails(text, counts) if kind.shape == kernels.AT else _replace(kind, text, counts)
        if text != before:
            changed[index] = text.encode()
    return texts.replaced(changed)


def _replace_emails(text: str, counts: Counter[str]) -> str:
    """As the pattern of `_KINDS` does, which tries every character; this one looks around each @ only."""
    pieces: list[str] = []
    done = 0
    at = text.find("@")
    while at >= 0:
        name = _EMAIL_NAME.search(text, max(0, at - _LONGEST_NAME - 1), at)
        domain = _EMAIL_DOMAIN.match(text, at + 1)
        # A name that reaches back into the last address, or that is too long, is none.
        if name is not None and domain is not None and 0 < len(name[0]) <= _LONGEST_NAME and name.start() >= done:
            pieces += [text[done : name.start()], "<EMAIL>"]
            counts["EMAIL"] += 1
            done = domain.end()
        at = text.find("@", at + 1)
    return "".join((*pieces, text[done:])) if pieces else text


_EVERYTHING = replacer(PersonalData())
_LONGEST = 9000
"""Characters of the longest kind, a private key."""


def masked(text: str, characters: int) -> str:
    """The beginning of a text for a report: at most so many characters, all personal data replaced."""
    return _EVERYTHING(text[: characters + _LONGEST], Counter())[:characters]


def _replace(kind: _Kind, text: str, counts: Counter[str]) -> str:
    def substitute(match: re.Match[str]) -> str:
        if not kind.valid(match[0]):
            return match[0]
        counts[kind.name] += 1
        return f"<{kind.name}>"

    return kind.pattern.sub(substitute, text)
