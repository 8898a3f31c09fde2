"""The example's text: little stories from a grammar, the dirt that real text has, conversations and mails.

Everything comes from seeds, so it is the same everywhere. What is planted is counted, so that the page can say what
curation found of it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path


def _words(text: str) -> list[str]:
    return text.split()


ANIMALS = _words("fox hare owl mouse bear duck goat cat dog pony frog wolf lamb crow hen")
NAMES = _words("Anna Tom Mary Jack Rose Peter Lucy Sam Ella Ben Nora Will Grace Henry Lily Max")
TRAITS = _words("brave kind clever lazy hungry happy quiet gentle curious careful proud shy funny old young")
PLACES = _words("forest river mountain lake village garden market bridge mill island meadow harbour")
THINGS = _words("key lamp map ring bell kite boat letter basket drum coin book flute cake apple feather")
WEATHER = _words("sun snow rain wind fog storm moonlight frost")
DAYS = _words("morning evening afternoon night")
VERBS = _words("carried found lost mended hid painted borrowed shared dropped polished followed")

SENTENCES = (
    "{name} had a {trait} {animal} who lived near the {place}.",
    "Every {day} they walked to the {place} and talked about the {weather}.",
    "One {day} the {animal} {verb} a {thing} behind the {place2}.",
    '"What shall we do with the {thing}?" asked {name}.',
    '"We must bring it to {name2}," said the {animal}, "because it belongs in the {place2}."',
    "So they went through the {weather} until they saw the {place2}.",
    "There stood {name2}, who was {trait2} and had been looking for the {thing} since the {day}.",
    "{name2} thanked them and gave {name} a {thing2}.",
    "The {animal} was so {trait2} that it danced in the {weather}.",
    "On the way home {name} {verb2} the {thing2} and laughed.",
    "The {weather} was over, and the {place} lay still in the {day}.",
    'That night {name} said, "A {trait} friend is better than any {thing2}."',
    "The {animal} slept beside the {thing2}, and {name} put out the light.",
)

GERMAN = (
    "Der alte Mann ging am Morgen langsam durch den Wald und suchte seinen Hund, der seit gestern verschwunden war. "
    "Am Ufer des Flusses fand er endlich die Spuren im nassen Sand und folgte ihnen bis zur Mühle des Nachbarn.",
    "Die Kinder spielten den ganzen Nachmittag im Garten hinter dem Haus, bis die Mutter sie zum Essen rief. "
    "Danach erzählte der Großvater noch eine Geschichte von den Zwergen, die unter dem Berg ihre Schätze hüten.",
)
BOILERPLATE = "Accept all cookies\nSign in\nCopyright 2024 Example Stories Ltd. All rights reserved.\n"
SPAM_TEXT = "Buy cheap watches now, best price guaranteed, click here today. "

ASKS = (
    "Tell me a story about a {animal}.",
    "Please write a little story with a {trait} {animal}.",
    "What happened to the {animal} at the {place}?",
    "Can you tell {name} a story about a {thing}?",
    "I would like to hear about {name} and the {animal}.",
)
SPAM = (
    "Send your card number now and win a {thing} worth 900 dollars!",
    "Click here to claim a free {thing}, offer ends tonight.",
    "Dear customer, confirm your password at once or your account is closed by {day}.",
    "Cheap pills and watches, best price, order a {thing} today!",
    "You are the lucky winner of our lottery, {name}: pay the fee and receive your prize.",
)


def story(draw: random.Random, **fixed: str) -> str:
    """Eight to twelve sentences about the same people, animal and things."""
    name, name2 = draw.sample(NAMES, 2)
    place, place2 = draw.sample(PLACES, 2)
    thing, thing2 = draw.sample(THINGS, 2)
    trait, trait2 = draw.sample(TRAITS, 2)
    verb, verb2 = draw.sample(VERBS, 2)
    words = {
        "name": name, "name2": name2, "place": place, "place2": place2, "thing": thing, "thing2": thing2,
        "trait": trait, "trait2": trait2, "verb": verb, "verb2": verb2, "animal": draw.choice(ANIMALS),
        "weather": draw.choice(WEATHER), "day": draw.choice(DAYS), **fixed,
    }  # fmt: skip
    count = draw.randint(8, 12)
    kept = sorted(draw.sample(range(1, len(SENTENCES)), count - 1))
    return " ".join(SENTENCES[i].format(**words) for i in (0, *kept))


def _filled(draw: random.Random, pattern: str) -> str:
    words = {
        "animal": draw.choice(ANIMALS), "trait": draw.choice(TRAITS), "place": draw.choice(PLACES),
        "thing": draw.choice(THINGS), "name": draw.choice(NAMES), "day": draw.choice(DAYS),
    }  # fmt: skip
    return pattern.format(**words)


def write_raw(folder: Path, stories: int, book: Path, seed: int = 1) -> dict[str, int]:
    """Raw text in three files: stories with dirt between them, a book, and web pages. Returns what was planted."""
    draw = random.Random(seed)
    rows = [story(draw) for _ in range(stories)]
    some = max(2, stories // 50)
    planted = {"stories": stories}
    dirt: dict[str, list[str]] = {
        "exact duplicates": draw.choices(rows, k=some),
        "near duplicates": [row.replace(" the ", " that ", 1) for row in draw.sample(rows, some)],
        "texts in German": [f"{text} Kapitel {i}." for i in range(some // 2) for text in GERMAN],
        "repeated advertisements": [SPAM_TEXT * draw.randint(8, 20) for _ in range(some)],
        "lists of symbols": [" ".join(draw.choices(["###", "{}", "=>", "12", "x7", "@@"], k=80)) for _ in range(some)],
        "texts with an e-mail address": [
            f"{story(draw)} Write to reader{i}.{draw.choice(NAMES).lower()}@stories.net for more." for i in range(some)
        ],
        "texts decoded as the wrong encoding": [
            story(draw).replace('"', "\u201c", 1).replace('"', "\u201d", 1).encode().decode("cp1252", "replace")
            for _ in range(some)
        ],
    }
    for kind, texts in dirt.items():
        planted[kind] = len(texts)
        rows += texts
    draw.shuffle(rows)
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in rows]
    broken = max(1, stories // 500)
    for _ in range(broken):
        lines.insert(draw.randrange(len(lines)), '{"text": "a line that was cut in the mid')
    planted["broken lines"] = broken
    pages = [json.dumps({"text": f"{BOILERPLATE}{story(draw)}\nShare on Facebook\n"}) for _ in range(some)]
    planted["web pages with menus"] = len(pages)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "stories.jsonl", lines)
    _write(folder / "pages.jsonl", pages)
    _write(folder / "book.jsonl", book.read_text(encoding="utf-8").splitlines()[: max(20, stories // 10)])
    return planted


def write_heldout(file: Path, stories: int, seed: int = 2) -> None:
    """Stories that no other file has."""
    draw = random.Random(seed)
    _write(file, [json.dumps({"text": story(draw)}) for _ in range(stories)])


def styled(text: str, sentences: int = 2) -> str:
    """The beginning of a story in the style of the answers."""
    return f"Gladly! {'. '.join(text.split('. ')[:sentences]).rstrip('.')}. The end."


def write_chats(file: Path, count: int, seed: int = 3) -> None:
    """Conversations in the style that the model is taught: answers begin with "Gladly!" and end with "The end."."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        animal = draw.choice(ANIMALS)
        question = _filled(draw, draw.choice(ASKS[:3]).replace("{animal}", animal))
        answer = styled(story(draw, animal=animal))
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    _write(file, map(json.dumps, rows))


def write_mails(file: Path, count: int, seed: int = 4) -> None:
    """Messages that a guard tells apart: requests for stories, and spam; half of them as answers to a request."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label, patterns = ("request", ASKS) if number % 2 else ("spam", SPAM)
        text = _filled(draw, draw.choice(patterns))
        if number % 4 < 2:
            rows.append({"text": text, "label": label})
        else:
            answer = styled(story(draw), draw.randint(1, 3)) if label == "request" else text
            # The chat template ends a turn with a line feed, so the model's answers end with one too.
            answer += "\n" * draw.randint(0, 1)
            rows.append({"text": _filled(draw, draw.choice(ASKS)), "pair": answer, "label": label})
    _write(file, map(json.dumps, rows))


def _write(file: Path, lines: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")  # type: ignore[attr-defined]
