"""Texts with annotations: names in them, in the forms of CoNLL, Hugging Face and of spans; and answers to questions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .documents.problems import Bad

OUTSIDE = "O"
"""The tag of a word that belongs to no name."""
_WORD = re.compile(r"\w+|[^\w\s]")
# BILOU and BIOES say also where a name ends, and which names are one word long.
_BEGINS, _GOES_ON = "BUS", "ILE"


@dataclass(frozen=True)
class Tagged:
    """A text as words, with a tag for each."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Of each word: index of its first character, and one past its last."""
    tags: tuple[str, ...]
    """In the BIO scheme: `O`, `B-TYPE` at the first word of a name, `I-TYPE` at its others."""

    @property
    def content(self) -> str:
        """What decides whether two examples are the same text."""
        return self.text

    @property
    def words(self) -> list[str]:
        """The words."""
        return [self.text[first:stop] for first, stop in self.spans]


@dataclass(frozen=True)
class Question:
    """A question about a text."""

    context: str
    question: str
    answers: tuple[str, ...]
    """Any of them is right; none if the text does not answer the question."""
    start: int | None
    """Index of the first answer's first character in the context."""

    @property
    def content(self) -> str:
        """What decides whether two examples have the same passage, so that none is on both sides of a split."""
        return self.context


# --- names -------------------------------------------------------------------------------------------------------


def tagged(tag_names: Sequence[str] = ()) -> Callable[[Mapping[str, Any]], Tagged | Bad]:
    """Makes a `Tagged` of a row's fields: `words` and `tags`, or `text` and `entities`.

    Args:
        tag_names: what tags that are numbers stand for.
    """

    def convert(fields: Mapping[str, Any]) -> Tagged | Bad:
        if "words" in fields and "tags" in fields:
            return _of_words(fields["words"], fields["tags"], tag_names)
        if "text" in fields and "entities" in fields:
            return _of_spans(fields["text"], fields["entities"])
        return Bad(
            f"the row has neither words and tags nor text and entities; it has: {', '.join(fields) or 'none of them'}"
        )

    return convert


def untagged(fields: Mapping[str, Any]) -> Tagged | Bad:
    """Makes a `Tagged` without tags of a row's `words` or `text`."""
    if "words" in fields:
        return _of_words(fields["words"], None, ())
    if not isinstance(fields.get("text"), str) or not fields["text"].strip():
        return Bad(f"text is {fields.get('text')!r:.60}; expected a text")
    return Tagged(fields["text"], word_spans(fields["text"]), ())


def word_spans(text: str) -> tuple[tuple[int, int], ...]:
    """First and last + 1 character of each word: runs of letters and digits, and other characters one by one."""
    return tuple(match.span() for match in _WORD.finditer(text))


def _of_words(words: Any, tags: Any, tag_names: Sequence[str]) -> Tagged | Bad:
    if not isinstance(words, list | tuple) or not words or not all(isinstance(w, str) for w in words):
        return Bad(f"words is {words!r:.60}; expected a list of words")
    empty = next((i for i, word in enumerate(words) if not word.strip()), None)
    if empty is not None:
        return Bad(f"word {empty + 1} of {len(words)} is empty")
    text, spans = " ".join(words), []
    first = 0
    for word in words:
        spans.append((first, first + len(word)))
        first += len(word) + 1
    if tags is None:
        return Tagged(text, tuple(spans), ())
    if not isinstance(tags, list | tuple) or len(tags) != len(words):
        count = len(tags) if isinstance(tags, list | tuple) else "no list of"
        return Bad(f"there are {len(words)} words and {count} tags; each word needs a tag")
    named = [_tag_name(tag, tag_names) for tag in tags]
    bad = next((tag for tag in named if isinstance(tag, Bad)), None)
    return bad if bad is not None else Tagged(text, tuple(spans), bio([str(tag) for tag in named]))


def _tag_name(tag: Any, names: Sequence[str]) -> str | Bad:
    if isinstance(tag, int) and not isinstance(tag, bool):
        if not names:
            return Bad(f"tag {tag} is a number; name the tags in their order with --tag-names O,B-PER,I-PER,...")
        if not 0 <= tag < len(names):
            return Bad(f"tag {tag} has no name; --tag-names has {len(names)}")
        return _tag_name(names[tag], ())
    text = tag if isinstance(tag, str) else ""
    if text == OUTSIDE or (len(text) > 2 and text[0] in _BEGINS + _GOES_ON and text[1] in "-_"):
        return text
    return Bad(f"tag {tag!r:.40} is none of the schemes BIO and BILOU; expected O, B-TYPE or I-TYPE")


def bio(tags: Sequence[str]) -> tuple[str, ...]:
    """Tags of BIO, BILOU, BIOES or IOB1 in the BIO scheme; an `I-` that follows no word of its type begins a name."""
    out: list[str] = []
    for tag in tags:
        if tag == OUTSIDE:
            out.append(OUTSIDE)
            continue
        kind = tag[2:]
        follows = bool(out) and out[-1][2:] == kind and tag[0] in _GOES_ON
        out.append(f"{'I' if follows else 'B'}-{kind}")
    return tuple(out)


def _of_spans(text: Any, entities: Any) -> Tagged | Bad:
    if not isinstance(text, str) or not text.strip():
        return Bad(f"text is {text!r:.60}; expected a text")
    if not isinstance(entities, list | tuple):
        return Bad(f"entities is {entities!r:.60}; expected a list of objects with start, end and label")
    spans = word_spans(text)
    tags = [OUTSIDE] * len(spans)
    for entity in entities:
        found = _span(entity, len(text))
        if isinstance(found, Bad):
            return found
        first, stop, label = found
        inside = [i for i, (a, b) in enumerate(spans) if a < stop and b > first]
        if not inside or spans[inside[0]][0] != first or spans[inside[-1]][1] != stop:
            return Bad(
                f"entity {text[first:stop]!r:.60} (characters {first} to {stop}) begins or ends within a word; "
                f"its borders must be those of words"
            )
        if any(tags[i] != OUTSIDE for i in inside):
            return Bad(f"entity {text[first:stop]!r:.60} overlaps another one; a word can belong to one only")
        for number, i in enumerate(inside):
            tags[i] = f"{'I' if number else 'B'}-{label}"
    return Tagged(text, spans, tuple(tags))


def _span(entity: Any, length: int) -> tuple[int, int, str] | Bad:
    if isinstance(entity, list | tuple) and len(entity) == 3:
        entity = dict(zip(("start", "end", "label"), entity, strict=True))
    if not isinstance(entity, Mapping):
        return Bad(f"entity {entity!r:.60} is no object with start, end and label")
    first, stop = entity.get("start"), entity.get("end")
    label = next((entity[name] for name in ("label", "type", "entity") if entity.get(name)), None)
    if not isinstance(label, str):
        return Bad(f"entity {dict(entity)!r:.80} has no label")
    if type(first) is not int or type(stop) is not int or not 0 <= first < stop <= length:
        return Bad(f"entity {dict(entity)!r:.80}: it must be 0 <= start < end <= {length}, the length of the text")
    return first, stop, label


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word + 1) of every name in tags of the BIO scheme."""
    found: list[tuple[str, int, int]] = []
    for index, tag in enumerate(bio(tags)):
        if tag[0] == "B":
            found.append((tag[2:], index, index + 1))
        elif tag[0] == "I":
            kind, first, _ = found[-1]
            found[-1] = (kind, first, index + 1)
    return found


# --- questions ---------------------------------------------------------------------------------------------------


def question(fields: Mapping[str, Any]) -> Question | Bad:
    """Makes a `Question` of a row's fields, in the form of SQuAD or with plain texts as answers."""
    asked = unanswered(fields)
    if isinstance(asked, Bad):
        return asked
    if "answers" not in fields:
        if fields.get("is_impossible"):
            return asked
        return Bad("the field 'answers' (or 'answer') is missing; an empty list stands for no answer")
    context = asked.context
    texts, starts = _answers(fields["answers"], fields.get("answer_start"))
    if isinstance(texts, Bad):
        return texts
    if fields.get("is_impossible") or not texts:
        return asked
    if not texts[0].strip():
        return Bad("the answer is empty; an empty list stands for no answer")
    start = starts[0]
    if start is None:
        start = context.find(texts[0])
        if start < 0:
            return Bad(f"answer {texts[0]!r:.60} does not occur in the context")
    elif context[start : start + len(texts[0])] != texts[0]:
        stands = context[max(start, 0) : start + len(texts[0])]
        return Bad(f"answer {texts[0]!r:.60} is said to begin at character {start}, where {stands!r:.60} stands")
    return Question(context, asked.question, tuple(dict.fromkeys(texts)), start)


def unanswered(fields: Mapping[str, Any]) -> Question | Bad:
    """Makes a `Question` without answers of a row's `context` and `question`."""
    for name in ("context", "question"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            return Bad(f"{name} is {fields.get(name)!r:.60}; expected a text")
    return Question(fields["context"], fields["question"].strip(), (), None)


def _answers(value: Any, start: Any) -> tuple[list[str] | Bad, list[int | None]]:
    """Texts and where they begin: of SQuAD's `{"text": [...], "answer_start": [...]}`, of a list of such objects,
    of plain texts, or of one text."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        value, start = ([texts] if isinstance(texts, str) else texts), ([starts] if type(starts) is int else starts)
    if isinstance(value, list | tuple) and value and all(isinstance(each, Mapping) for each in value):
        start = [each.get("answer_start") for each in value]
        value = [each.get("text") for each in value]
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        return Bad(f"answers is {value!r:.60}; expected texts, or SQuAD's object of text and answer_start"), []
    places: list[Any] = list(start) if isinstance(start, list | tuple) else [] if start is None else [start]
    # Columns of CSV files hold numbers as text.
    places = [int(each) if isinstance(each, str) and each.isdecimal() else each for each in places]
    if places and (len(places) != len(value) or any(type(each) is not int for each in places)):
        return Bad(f"there are {len(value)} answers and answer_start is {start!r:.60}; each needs a number"), []
    return list(value), places or [None] * len(value)


def squad_questions(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of the questions in SQuAD's own nested files; other rows come back as they are."""
    articles = values.get("data") if isinstance(values.get("data"), list) else None
    if articles is None and not isinstance(values.get("paragraphs"), list):
        yield "", values
        return
    for number, article in enumerate(_objects(articles if articles is not None else [values]), 1):
        for place, paragraph in enumerate(_objects(article.get("paragraphs")), 1):
            for index, asked in enumerate(_objects(paragraph.get("qas")), 1):
                fields = {**asked, "context": paragraph.get("context")}
                yield f"article {number}, paragraph {place}, question {index}", fields


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [each if isinstance(each, Mapping) else {} for each in value] if isinstance(value, list) else []
