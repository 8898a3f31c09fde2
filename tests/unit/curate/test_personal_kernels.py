"""The fast search for personal data replaces exactly what the patterns replace."""

from __future__ import annotations

import random
from collections import Counter

from curation_texts import many, ordinary

from minitron.curate.personal import masked, replace_all, replacer
from minitron.curate.personal_kernels import AT, COLONS, DIGITS, DOTTED, KEY, PLUS, THREE_FOUR, shapes
from minitron.curate.recipe import PersonalData
from minitron.curate.texts import Texts

_PIECES = [
    *("a@b.com", "x.y@z.co.uk", "@", ".c@d.com", "o'n%b-c@", "a" * 63 + "@b.io", "a" * 64 + "@b.io", "a" * 65 + "@b.i"),
    *("8.8.8.8", "1.2.3", "255.255.255.255", "1.2.3.4.5", ".", "9", "2001:4860:4860::8888", "::1", ":", "f:", "1:3:4"),
    *("4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", " 1", "-2", "--", "41111111111111112", "0" * 14),
    *("+1 650 253 0000", "+", "+4", "415-555-2671", "(212) 555-0123", "555.0123", "212 555-0123", "\u0663", "\u4f60"),
    *("AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "sk-" + "abcDEF123456" * 4, "sk_live_" + "a1" * 10, "task-force"),
    *("xoxb-123456789012-abcdef", "AIza" + "Sy0_-" * 7, "hf_" + "AbCdEfGh12" * 3, "npm_" + "a1B2" * 9, "eyJ", "\n"),
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVPmB92K27uhbUJU1p1r",
]  # fmt: skip


def test_it_replaces_what_the_patterns_replace() -> None:
    rng = random.Random(3)
    texts = [*many(200, seed=9), "", *_PIECES]
    around = [*_PIECES, " ", "word", ", "]
    texts += ["".join(rng.choices(around, k=rng.randint(1, 7))) for _ in range(4000)]
    for _ in range(50):
        words = ordinary(rng).split(" ")
        words.insert(rng.randrange(len(words)), rng.choice(_PIECES))
        texts.append(" ".join(words))
    for settings in (PersonalData(), PersonalData(emails=False, keys=False), PersonalData(ips=False, phones=False)):
        expected_counts: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        run = replacer(settings)
        expected = [run(text, expected_counts) for text in texts]
        found = replace_all(Texts.of(texts), settings, counts)
        assert found.to_list() == expected
        assert counts == expected_counts
        assert sum(counts.values()) > 400


def test_each_kind_has_a_shape_and_plain_text_has_none() -> None:
    texts = ["AKIA", "@", "1.2.3.4", "a:b:", "1234 5678 9012 3", "+4", "555-1234", "Plain words, 12 of them; no more."]
    assert shapes(Texts.of(texts)).tolist() == [KEY, AT, DOTTED, COLONS, DIGITS, PLUS, THREE_FOUR, 0]


def test_texts_without_personal_data_are_the_same_object() -> None:
    texts = Texts.of(["one", "two"])
    assert replace_all(texts, PersonalData(), Counter()) is texts


def test_a_beginning_is_masked_even_where_it_is_cut() -> None:
    text = "x" * 230 + " jane.doe@example.com and more"
    assert masked(text, 240) == "x" * 230 + " <EMAIL> a"
    key = "-----BEGIN PRIVATE KEY-----\n" + "a" * 5000 + "\n-----END PRIVATE KEY-----"
    assert masked(f"see {key}", 50) == "see <KEY>"
