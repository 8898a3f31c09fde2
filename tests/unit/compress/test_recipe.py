"""Recipes: YAML is the dataclasses, and every mistake is named."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.assets import bundled_model, recipes
from minitron.compress.recipe import Recipe, RecipeError, load_recipe, parse_count, recipe_from, with_absolute_paths
from minitron.data.documents import Source

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
NAMES = ["bundled", "h200", "laptop", "nemotron-4-15b"]
GOOD: dict[str, Any] = {
    "model": "m",
    "data": ["a.txt"],
    "heldout": ["h.txt"],
    "targets": [{"params": "4B"}],
    "train": {"tokens": 1000},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_with_the_project_are_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    # What a run writes down is the same recipe again.
    assert recipe_from(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_options_override_single_fields_and_the_length() -> None:
    values = {**GOOD, "train": {"tokens": 1000, "lr": 1e-3}}
    recipe = recipe_from(values, {"train": {"hours": 2.0}})
    assert (recipe.train.tokens, recipe.train.hours, recipe.train.lr) == (None, 2.0, 1e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modle": "x"}, "modle: no such field; did you mean model?"),
        ({"train": {"tokens": 1, "lrr": 1}}, "train.lrr: no such field; did you mean lr?"),
        ({"train": {"tokens": "many"}}, "train.tokens is 'many'; expected a whole number"),
        ({"train": {"tokens": 1, "schedule": "line"}}, "train.schedule is 'line'; expected one of 'wsd', 'cosine'"),
        ({"train": {"tokens": 1, "hours": 1.0}}, "give exactly one of steps, tokens and hours"),
        ({"train": {"tokens": 1, "lr": -1.0}}, "lr is -1.0; it must be greater than 0"),
        ({"targets": []}, "targets is empty"),
        ({"targets": [{}]}, "a target needs exactly one of params"),
        ({"targets": [{"params": "4B", "memory": "6GB"}]}, "found params, memory"),
        ({"targets": "4B"}, "targets is '4B'; expected a list"),
        ({"data": []}, "data is empty"),
        ({"heldout": []}, "give heldout or heldout_share"),
        ({"ranking": {"most": 9, "scored": 3}}, "expected 1 <= most <= scored"),
        ({"ranking": {"rungs": [0.25]}}, "expected rising shares from 0.5"),
        ({"correction": {"kind": "full"}}, "correction: tokens is 0; full needs some"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a", "b\ud83d"]}, "prompts[1] is not UTF-8 text: the lone surrogate \\ud83d at character 2"),
        ({"train": 3}, "train.: expected fields and values, found 3"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_from({**GOOD, **change})
    assert says in str(error.value)


def test_the_former_name_of_compensation_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="compensation"):
        recipe = recipe_from({**GOOD, "calibration": {"refit": False, "blocks": 3}})
    assert (recipe.calibration.compensation, recipe.calibration.blocks) == (False, 3)
    with pytest.raises(RecipeError, match="compensation and refit, its former name, are both given"):
        recipe_from({**GOOD, "calibration": {"refit": False, "compensation": True}})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RecipeError, match="data: is missing"):
        recipe_from({key: value for key, value in GOOD.items() if key != "data"})


ALIASES = f"data: [&a {'a' * 60_000}, {'*a, ' * 6_000}]"  # 360 MB, if a message quoted it


@pytest.mark.parametrize(
    "text", ["a: [", "3", "!!python/object/apply:os.system ['true']", "a: \x00", "a: [&a [*a]]", ALIASES]
)
def test_what_is_no_recipe_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: a\ndata: [b]\nmodel: c\n", "r.yaml, line 3: the key 'model' is given twice in one mapp"),
        ("model: a\ntrain:\n  lr: 1.0\n  'lr': 2.0\n", "r.yaml, line 4: the key 'lr' is given twice in one mapp"),
        ('{"model": "a",\n "model": "b"}', "r.yaml, line 2: the key 'model' is given twice"),
        ("targets:\n- {params: 4B, params: 2B}\n", "r.yaml, line 2: the key 'params' is given twice"),
    ],
)  # fmt: skip
def test_a_field_given_twice_is_refused_with_both_lines(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(says)):
        load_recipe(path)


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("\ufeff" + json.dumps(GOOD), encoding="utf-8")
    assert load_recipe(path).model == str(tmp_path / "m")


@pytest.mark.parametrize("values", [{"train": 3}, {"train": "long"}, {"train": ["steps"]}])
def test_options_for_a_part_that_is_no_map_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="train: expected fields and values"):
        recipe_from({**GOOD, **values}, {"train": {"hours": 1.0}})


FIELDS = [field.name for field in dataclasses.fields(Recipe)]
ODD: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**400), 10**400),
        st.floats(),
        st.dates(),
        st.text(max_size=8),
        st.sampled_from(["~nobody-at-all/x", "\0", "a" * 5000, "**/" * 50, "4B", "none", "\ud800", "."]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["params", "lr", "steps", "betas", "rungs", "grid", 1]), inner, max_size=3),
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, 1]), ODD, min_size=1, max_size=3), st.booleans())
def test_odd_values_are_taken_or_refused_in_a_sentence(values: dict[Any, Any], extended: bool) -> None:
    found = with_refusal(lambda: with_absolute_paths({**GOOD, **values}, Path("/nowhere")))
    if found is not None:
        with_refusal(lambda: recipe_from(found, {"train": {"hours": 1.0}} if extended else None).as_dict())


def with_refusal(make: Callable[[], Any]) -> Any:
    """What `make` returns, or None if it refuses in a sentence that is not too long."""
    try:
        return make()
    except RecipeError as error:
        if len(str(error)) > 1000:
            raise
        return None


@pytest.mark.parametrize(
    ("text", "count"), [("20M", 20_000_000), ("1.8B", 1_800_000_000), ("4096", 4096), ("2k", 2000)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "-3", "nan", "many", "1e99"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a number of tokens"):
        parse_count(text)


def test_recipes_of_the_package_are_found_by_name_and_by_path_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(recipes()) == NAMES
    for name, path in zip(NAMES, RECIPES, strict=True):
        assert path.stem == name
        where = {"model": None, "data": None, "heldout": None}
        assert {**load_recipe(name).as_dict(), **where} == {**load_recipe(path).as_dict(), **where}
    laptop = load_recipe("laptop")
    assert laptop.model == "bundled"
    assert all(Path(text).is_file() for text in laptop.data)
    (tmp_path / "laptop").write_text("model: of my own\n")
    with pytest.raises(RecipeError, match=r"^laptop: data: is missing"):
        load_recipe("laptop")
    for name, says in (("lapptop", "no such file"), (str(tmp_path), "a folder; expected a file")):
        with pytest.raises(RecipeError, match=f"{says}; recipes that come with minitron: bundled, h200, laptop, nem"):
            load_recipe(name)


def test_names_of_files_belong_to_the_folder_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "with [brackets]", tmp_path / "here"
    for folder in (home / "teacher", here / "teacher", here / "bundled", here / "nvidia" / "model"):
        folder.mkdir(parents=True)
    (home / "a.txt").write_text("x")
    monkeypatch.chdir(here)

    def loaded(values: dict[str, Any], **options: Any) -> Any:
        (home / "r.yaml").write_text(json.dumps({**GOOD, **values}))
        return load_recipe(Path("..") / home.name / "r.yaml", options)

    base = home.parent / "here" / ".." / home.name
    recipe = loaded({"model": "teacher", "data": ["a.txt:2", "b/*.jsonl", "/abs/c.txt", "../d.txt"]})
    assert recipe.model == str(base / "teacher")
    assert recipe.data[0] == str(base / "a.txt:2")
    assert Source.parse(recipe.data[0]).files()[0].samefile(home / "a.txt")
    assert recipe.data[2] == "/abs/c.txt"
    assert recipe.heldout == (str(base / "h.txt"),)
    (home / "b").mkdir()
    (home / "b" / "e.jsonl").write_text("x")
    assert [path.name for path in Source.parse(recipe.data[1]).files()] == ["e.jsonl"]  # no bracket is a pattern
    assert Path(recipe.data[3]).resolve() == tmp_path / "d.txt"
    # Names of models stay, and a folder of the current one is never meant.
    assert loaded({"model": "bundled-half"}).model == "bundled-half"
    assert loaded({"model": "bundled"}).model == str(bundled_model())
    assert loaded({"model": "someone/model"}).model == "someone/model"
    assert loaded({"model": "nvidia/model"}).model == str(base / "nvidia/model")
    assert loaded({"model": "missing"}).model == str(base / "missing")
    # What options name belongs to the current folder.
    assert loaded({}, data=["mine.txt"]).data == ("mine.txt",)
