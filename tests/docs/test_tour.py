"""The tour names every room of the package, and only files that exist, each in the room of its row."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "minitron"
TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
NAME = re.compile(r"`([\w/.]+(?:\.(?:py|jinja|md|yaml)|/))`")


def rows() -> list[tuple[str, list[str]]]:
    """(room, files) of each row of the tables; a row without a room continues the one above."""
    found: list[tuple[str, list[str]]] = []
    room = ""
    for line in TOUR.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[0] != "room" and not cells[0].startswith("---"):
            room = cells[0] or room
            found.append(("" if room == "the root" else room.strip("`"), NAME.findall(cells[1])))
    return found


def test_every_file_of_a_row_is_in_its_room() -> None:
    for room, files in rows():
        for name in files:
            places = (PACKAGE / room, (PACKAGE / room).parent)  # the second for a file "in the room above"
            assert any((place / name).exists() for place in places), f"{room}{name}"


def test_every_room_is_in_the_tour() -> None:
    rooms = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE}
    assert rooms == {room for room, _ in rows() if room}


def test_files_in_sentences_exist() -> None:
    sentences = "\n".join(line for line in TOUR.splitlines() if not line.startswith("|"))
    names = NAME.findall(sentences)
    assert len(names) > 10
    for name in names:
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name
