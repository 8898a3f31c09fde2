"""What a compression does, as data. A YAML file in `recipes/` is these dataclasses, field by field.

Names of files in a recipe are relative to its folder. The recipes in `recipes/` come with the package and have names.
"""

from __future__ import annotations

import dataclasses
import glob
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..assets import BUNDLED, bundled_model, recipes
from ..checkpoint.limits import MAX_YAML_BYTES, read_small_file, shown
from ..checkpoint.typed_values import fill
from ..checkpoint.yaml_values import parse_yaml
from ..prune.search import Grid
from ..train.schedule import TrainConfig

BUDGETS = ("params", "non_embedding_params", "memory", "speed", "keep")


class RecipeError(ValueError):
    """A recipe with a mistake; the message names the field and what would be right."""


@dataclass(frozen=True)
class Target:
    """How large a model may be: exactly one budget, which no result exceeds."""

    params: str | None = None
    """Most parameters in all, as in "4B"."""
    non_embedding_params: str | None = None
    """Most parameters without embedding and LM head, as in "2.6B"."""
    memory: str | None = None
    """Most bytes of weights and of the cache at a full context, as in "6GB"."""
    speed: str | None = None
    """Least speed of decoding on this machine, as in "20tok/s"."""
    keep: str | None = None
    """The shape itself, as in "heads=24,ffn=9216,hidden=3072,layers=32"; nothing is searched."""
    name: str | None = None
    """What the model is called in the run folder and the report; `step-1` and so on if None."""

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(f"a target needs exactly one of {', '.join(BUDGETS)}; found {', '.join(given) or 'none'}")

    @property
    def budget(self) -> tuple[str, str]:
        """(kind, value)."""
        kind = next(name for name in BUDGETS if getattr(self, name) is not None)
        return kind, getattr(self, kind)


@dataclass(frozen=True)
class Calibration:
    """The text that importance is measured on: the first blocks of the training data."""

    blocks: int = 1024
    """Sequences; the paper's number (arXiv:2407.14679, section 2.2)."""
    compensation: bool = True
    """Fit norms and output projections to the source on these sequences after a cut (`prune.compensation`). Not part of
    the paper's recipe; better at every length measured here, by less the longer (docs/studies/compensation.md)."""


@dataclass(frozen=True)
class Correction:
    """Fine-tuning of the teacher on the data before anything else (arXiv:2408.11796)."""

    kind: Literal["none", "full", "lora", "norms"] = "none"
    """Which of the teacher's weights change."""
    tokens: int = 0
    lr: float = 9e-5
    """A fifth of the learning rate that the teacher was trained with is the paper's advice."""


@dataclass(frozen=True)
class Ranking:
    """How one of the shapes that meet a budget is chosen."""

    grid: Grid | None = None
    """Shapes to look at; those of `prune.search.Grid.around` if None."""
    scored: int = 48
    """Shapes whose loss right after pruning is measured; more that meet the budget are thinned evenly."""
    score_blocks: int = 64
    """Held-out sequences that this loss is measured on."""
    most: int = 8
    """How many of them are retrained for a while, some of every depth. 1 takes the best without retraining."""
    tokens: int = 1_800_000_000
    """Tokens of retraining for a shape that is never dropped (400 steps in the paper)."""
    rungs: tuple[float, ...] = (0.5, 0.75)
    """Shares of it after which the worse half is dropped; not before half, since ranks change until then."""


@dataclass(frozen=True)
class Recipe:
    """A compression. The defaults are those of the paper where it states them."""

    model: str
    """Folder or repository id of the checkpoint: the teacher of every target."""
    data: tuple[str, ...]
    """`PATH[:WEIGHT]` of text to train and calibrate on."""
    targets: tuple[Target, ...]
    """From large to small; each is pruned from the previous one and retrained by the teacher."""
    train: TrainConfig
    """Of each target's distillation: length, batch, learning rate."""
    heldout: tuple[str, ...] = ()
    """Text that is measured and never trained on."""
    heldout_share: float = 0.0
    """Part of the documents of `data` that is held out too."""
    field: str = "text"
    """Which field or column holds the text, in files that have some."""
    encoding: str = "utf-8"
    """Of files of text without a byte-order mark."""
    skip_bad: bool = False
    """Skip documents that cannot be used instead of refusing the run."""
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    correction: Correction = dataclasses.field(default_factory=Correction)
    ranking: Ranking = dataclasses.field(default_factory=Ranking)
    prompts: tuple[str, ...] = ("Once upon a time", "The most important thing is", "In the year 1900")
    """Each model continues them in the report."""

    def __post_init__(self) -> None:
        if not self.targets:
            raise RecipeError("targets is empty; it must name at least one budget")
        if not self.data:
            raise RecipeError("data is empty; it must name at least one text")
        if not self.heldout and not self.heldout_share:
            raise RecipeError("give heldout or heldout_share: candidates are compared on text they are not trained on")
        if not self.prompts:
            raise RecipeError("prompts is empty; the report shows how each model continues at least one")
        if self.ranking.most < 1 or self.ranking.scored < self.ranking.most:
            raise RecipeError(
                f"ranking: most is {self.ranking.most} and scored {self.ranking.scored}; expected 1 <= most <= scored"
            )
        rungs = self.ranking.rungs
        if list(rungs) != sorted(set(rungs)) or any(not 0.5 <= rung < 1 for rung in rungs):
            raise RecipeError(f"ranking: rungs is {list(rungs)}; expected rising shares from 0.5 to less than 1")
        if self.correction.kind != "none" and self.correction.tokens <= 0:
            raise RecipeError(f"correction: tokens is {self.correction.tokens}; {self.correction.kind} needs some")

    def target_name(self, index: int) -> str:
        """What target number `index` is called."""
        return self.targets[index].name or f"step-{index + 1}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in YAML; fields that are None are omitted."""
        return _plain(dataclasses.asdict(self))


Parts = dict[str, dict[str, Any]]


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        RecipeError: no such recipe.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = recipes()
    if str(name) in known:
        return known[str(name)]
    what = "a folder; expected a file" if path.is_dir() else "no such file"
    raise RecipeError(f"{name}: {what}; recipes that come with minitron: {', '.join(known)}")


def load_recipe(path: str | Path, values: dict[str, Any] | None = None, parts: Parts | None = None) -> Recipe:
    """Read a recipe from a YAML (or JSON) file. Relative names of files in it are relative to its folder.

    Args:
        path: the file, or the name of a recipe that comes with the package.
        values: fields that replace those of the file, taken as they are.
        parts: fields of its parts (`train`, ...) that replace single ones; a new length replaces any other.

    Raises:
        RecipeError: not YAML, a field given twice (with both lines), an unknown field (the nearest known one is
            named), a value of another kind.
    """
    path = find_recipe(path)
    try:
        found = parse_yaml(read_small_file(path, MAX_YAML_BYTES), path)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    except ValueError as error:  # CheckpointError, which names the file
        raise RecipeError(str(error)) from None
    try:
        return recipe_from({**with_absolute_paths(found, path.absolute().parent), **(values or {})}, parts)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None


def with_absolute_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a recipe with its names of files made absolute; they are relative to `folder`.

    `model` may also be a name, `bundled` or a repository id, which stays.
    """
    values = dict(values)
    model = values.get("model")
    try:
        if isinstance(model, str):
            values["model"] = _located_model(model, folder)
        for name in ("data", "heldout"):
            if isinstance(values.get(name), list | tuple):
                values[name] = [_located(text, folder) if isinstance(text, str) else text for text in values[name]]
    except (OSError, RuntimeError) as error:  # longer than a name may be; "~" of an unknown user
        raise RecipeError(f"model, data or heldout: {shown(str(error))}; expected the name of a file") from None
    return values


def _located_model(model: str, folder: Path) -> str:
    if (folder / Path(model).expanduser()).exists():
        return _located(model, folder)
    # What has such a name in the current folder is not what the recipe means.
    if model in BUNDLED:
        return str(bundled_model(BUNDLED[model])) if Path(model).exists() else model
    repository = model.count("/") == 1 and not model.startswith((".", "~", "/")) and not model.endswith("/")
    return model if repository and not Path(model).exists() else _located(model, folder)


def _located(text: str, folder: Path) -> str:
    if not text.strip():
        return text  # refused where it is used
    if glob.has_magic(text) and not (folder / text).exists():
        return str(Path(glob.escape(str(folder))) / Path(text).expanduser())
    return str(folder / Path(text).expanduser())


def recipe_from(values: dict[str, Any], parts: Parts | None = None) -> Recipe:
    """A recipe of plain values; `parts` as for `load_recipe`.

    Raises:
        RecipeError: see `load_recipe`.
    """
    values = _renamed(dict(values))
    for name, fields in (parts or {}).items():
        before = values.get(name) or {}
        if not isinstance(before, dict):
            raise RecipeError(f"{name}: expected fields and values, found {shown(before)}")
        if {"tokens", "hours", "steps"} & set(fields) and name == "train":
            before = {k: v for k, v in before.items() if k not in ("tokens", "hours", "steps")}
        values[name] = {**before, **fields}
    try:
        return fill(Recipe, values)
    except RecipeError:
        raise
    except ValueError as error:  # of TrainConfig and Grid
        raise RecipeError(str(error)) from None


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Values with the former names of fields replaced; see docs/deprecations.md."""
    calibration = values.get("calibration")
    if not isinstance(calibration, dict) or "refit" not in calibration:
        return values
    if "compensation" in calibration:
        raise RecipeError("calibration: compensation and refit, its former name, are both given; keep compensation")
    warnings.warn("calibration.refit is called calibration.compensation now", DeprecationWarning, stacklevel=2)
    return {**values, "calibration": {{"refit": "compensation"}.get(k, k): v for k, v in calibration.items()}}


def parse_count(text: str) -> int:
    """ "20M", "1.8B", "4096" as a number of tokens.

    Raises:
        RecipeError: something else.
    """
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    body = text.strip().upper()
    unit = units.get(body[-1:], 1)
    try:
        value = float(body[:-1] if body[-1:] in units else body) * unit
        if 1 <= value < 1e18:
            return round(value)
    except ValueError:
        pass
    raise RecipeError(f"{text!r} is not a number of tokens; expected something like 20M or 1.8B")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
