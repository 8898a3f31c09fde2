"""Personal data and secrets in a text, replaced by what they are: addresses, numbers, keys. Nothing of them is kept."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .recipe import PersonalData


@dataclass(frozen=True)
class _Kind:
    name: str
    pattern: re.Pattern[str]
    valid: Callable[[str], bool] = lambda _: True
    needs: str = ""
    """A character without which there is nothing to look for."""


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
# In this order: a key may hold what looks like a number, a card number what looks like a telephone number.
_KINDS = {
    "keys": (_Kind("KEY", re.compile("|".join(_KEYS))),),
    "emails": (
        _Kind(
            "EMAIL",
            re.compile(r"(?<![A-Za-z0-9._%+'-])[A-Za-z0-9._%+'-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
            needs="@",
        ),
    ),
    "ips": (
        _Kind("IP", re.compile(rf"(?<![\w.-])(?:{_BYTE}\.){{3}}{_BYTE}(?![\w-]|\.\w)", re.ASCII), _public, "."),
        _Kind("IP", re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])"), _public, ":"),
    ),
    "cards": (_Kind("CARD", re.compile(r"(?<![\w.-])[2-6](?:[ -]?[0-9]){12,18}(?![\w-])"), _card),),
    "phones": (
        _Kind(
            "PHONE",
            re.compile(r"(?<![\w+])\+[1-9][0-9]{0,2}(?:[ .-]?(?:\([0-9]{1,4}\)|[0-9]{1,4})){2,6}(?!\w)"),
            lambda text: 8 <= sum(map(str.isdigit, text)) <= 15,
            "+",
        ),
        _Kind(
            "PHONE",
            re.compile(
                r"(?<![\w.+-])(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-. ])[2-9][0-9]{2}[-.][0-9]{4}(?![\w-]|\.\w)"
            ),
        ),
    ),
}  # fmt: skip
_DIGIT = re.compile("[0-9]")


def replacer(settings: PersonalData) -> Callable[[str, Counter[str]], str]:
    """A function that replaces what it finds in a text by `<EMAIL>` and the like, and counts it by that name."""
    names = [name for name in _KINDS if getattr(settings, name)]

    def run(text: str, counts: Counter[str]) -> str:
        digits = _DIGIT.search(text) is not None
        for name in names:
            if not digits and name in ("ips", "cards", "phones"):
                continue
            for kind in _KINDS[name]:
                if kind.needs in text:
                    text = _replace(kind, text, counts)
        return text

    return run


def _replace(kind: _Kind, text: str, counts: Counter[str]) -> str:
    def substitute(match: re.Match[str]) -> str:
        if not kind.valid(match[0]):
            return match[0]
        counts[kind.name] += 1
        return f"<{kind.name}>"

    return kind.pattern.sub(substitute, text)
