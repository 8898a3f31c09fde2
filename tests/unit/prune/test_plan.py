"""Architectures, plans and their file: what can be written can be read, and what cannot be is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from prune_samples import random_plan, random_scores

from minitron.prune.architecture import Architecture, ArchitectureError
from minitron.prune.choose import make_plan, ranking, scores_hash, sorted_plan
from minitron.prune.plan import PlanError, PrunePlan, diff, keep_all, parse_ranges, prefix_plan, to_ranges
from minitron.prune.scores import ScoresError

CONFIG = tiny_config(num_hidden_layers=4)
SHAPE = Architecture.of(CONFIG)  # 4 layers, hidden 32, 6 heads in 2 groups, MLP 96
SMALL = Architecture(layers=3, hidden=20, heads=2, groups=1, ffn=40)


@given(st.lists(st.integers(0, 60), unique=True, min_size=1))
def test_ranges_keep_any_list_in_its_order(indices: list[int]) -> None:
    assert parse_ranges(to_ranges(indices), "x") == tuple(indices) == parse_ranges(indices, "x")


def test_ranges_are_short() -> None:
    assert to_ranges([0, 1, 2, 6, 5, 9, 10]) == "0-2,6,5,9-10"
    assert parse_ranges(" 0 - 2 , 6", "x") == (0, 1, 2, 6)


@pytest.mark.parametrize("text", ["", "1-", "a", "3-1", "-1", "1,,2", "0-99999999", "1.5", None, 7, [1, "2"], [True]])
def test_what_is_no_list_of_indices_is_named(text: Any) -> None:
    with pytest.raises(PlanError, match=r"^channels"):
        parse_ranges(text, "channels")


@given(st.integers(0, 10_000))
def test_a_plan_survives_its_file(seed: int) -> None:
    plan = random_plan(CONFIG, SMALL, seed, source="abc")
    again = PrunePlan.from_dict(json.loads(plan.to_json()))
    assert again == plan
    assert again.hash == plan.hash
    assert plan.target == SMALL


def test_saving_and_loading(tmp_path: Path) -> None:
    plan = make_plan(CONFIG, random_scores(CONFIG), SMALL, source="abc", merge_heads=False)
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert "from  4 layers, hidden 32" in plan.describe()
    assert plan.hash != keep_all(SHAPE, "abc").hash
    assert keep_all(SHAPE, "abc").keeps_everything
    assert not plan.keeps_everything


def test_notes_are_kept_and_are_no_part_of_the_plan(tmp_path: Path) -> None:
    plan = keep_all(Architecture.of(CONFIG), "mark")
    noted = dataclasses.replace(plan, notes=("measured on a busy machine",))
    noted.save(tmp_path / "plan.json")
    again = PrunePlan.load(tmp_path / "plan.json")
    assert again.notes == noted.notes
    assert (again, again.hash) == (plan, plan.hash)
    assert "measured on a busy machine" in again.describe()
    with pytest.raises(PlanError, match="notes must be a list of strings"):
        PrunePlan.from_dict({**plan.as_dict(), "notes": [1]})


def edited(**changes: Any) -> dict[str, Any]:
    values = random_plan(CONFIG, SMALL, source="abc", shuffle=False).as_dict()
    for key, value in changes.items():
        if key in ("groups", "heads", "neurons", "layer", "merge", "extra"):
            values["layers"][1][key] = value
        else:
            values[key] = value
    return values


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"channels": "0-40"}, r"channels: 32 does not exist; the source has 0 to 31"),
        ({"channels": "0-18,5"}, r"channels: 5 is listed twice"),
        ({"channels": []}, r"channels: nothing is kept"),
        ({"neurons": "0-30"}, r"keeps 31 neurons, layer \d keeps 40; all layers of this architecture are equal"),
        ({"neurons": "0-39,96"}, r"layer \d neurons: 96 does not exist"),
        ({"groups": "0,1", "heads": "0,1,5"}, r"3 heads for 2 groups; each group must keep the same number"),
        ({"groups": "0", "heads": "0,5"}, r"head 5 is of group 1 where a head of group 0 is expected"),
        ({"layer": 9}, r"layers: 9 does not exist; the source has 0 to 3"),
        ({"merge": [[0, 1]], "groups": "0", "heads": "0,1"}, r"merge \[0, 1\]: the first must stay, the second go"),
        ({"merge": [[0, 5]], "groups": "0", "heads": "0,1"}, r"both of one group of 3 heads"),
        ({"merge": [1]}, r"merge must be a list of pairs"),
        ({"extra": 1}, r"unknown field 'extra'"),
        ({"format": "x"}, r"format is 'x', expected 'minitron-plan-1'"),
        ({"more": 1}, r"the plan has the unknown field 'more'"),
        ({"source": None}, r"source and scores must be strings"),
        ({"source_shape": {"layers": 4}}, r"source_shape: hidden is missing"),
        ({"layers": []}, r"at least one layer"),
    ],
)
def test_a_plan_edited_into_nonsense_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(edited(**changes)))
    with pytest.raises(PlanError, match=sentence) as error:
        PrunePlan.load(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[1]")
    with pytest.raises(PlanError, match="expected an object"):
        PrunePlan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="no such file"):
        PrunePlan.load(tmp_path / "nothing.json")


def test_difference_of_plans() -> None:
    plan = keep_all(SHAPE, "abc")
    values = plan.as_dict()
    values["channels"] = "0-30"
    values["layers"][2]["neurons"] = "1-95,0"
    lines = diff(plan, PrunePlan.from_dict(values))
    assert lines == ["channels: -31 (1)", "layer 2 neurons: the same in another order"]
    assert diff(plan, plan) == []
    assert "different checkpoints" in diff(plan, keep_all(SHAPE, "abd"))[0]


# --- choosing --------------------------------------------------------------------------------------------------------


def test_the_best_stay_on_every_axis() -> None:
    scores = random_scores(CONFIG, 3)
    plan = make_plan(CONFIG, scores, SMALL, source="abc")
    assert plan.target == SMALL
    assert plan.scores == scores_hash(scores)
    gone = set(range(32)) - set(plan.channels)
    assert scores.channels[list(plan.channels)].min() > scores.channels[list(gone)].max()
    assert [entry.layer for entry in plan.layers] == sorted(scores.layers.topk(3).indices.tolist())
    for entry in plan.layers:
        (group,) = entry.groups
        assert group == int(scores.groups[entry.layer].argmax())
        of_group = scores.heads[entry.layer][3 * group : 3 * group + 3]
        assert sorted(entry.heads) == sorted((of_group.topk(2).indices + 3 * group).tolist())
        neurons = scores.neurons[entry.layer]
        assert neurons[list(entry.neurons)].min() >= neurons.topk(40).values.min()


def test_equal_scores_are_decided_for_the_lower_index() -> None:
    assert ranking(torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64)) == [1, 3, 0, 2]


def test_contiguous_layers_go() -> None:
    scores = random_scores(CONFIG, windows=(2,))
    scores.windows[2][:] = torch.tensor([3.0, 1.0, 2.0])
    target = Architecture(2, 32, 6, 2, 96)
    kept = make_plan(CONFIG, scores, target, source="", depth="contiguous").layers
    assert [entry.layer for entry in kept] == [0, 3]
    lowest = int(scores.layers.argmin())
    kept = make_plan(CONFIG, scores, Architecture(3, 32, 6, 2, 96), source="", depth="contiguous").layers
    assert [entry.layer for entry in kept] == [layer for layer in range(4) if layer != lowest]
    with pytest.raises(PlanError, match=r"no scores of 3 neighbouring layers; there are some of these lengths: 2"):
        make_plan(CONFIG, scores, Architecture(1, 32, 6, 2, 96), source="", depth="contiguous")


def test_heads_are_merged_in_the_order_of_the_paper() -> None:
    """Five of six heads of one group stay, ranked 1..6: head i = K is paired with K + 1 (arXiv:2407.14679, 2.3)."""
    config = tiny_config(num_key_value_heads=1)
    scores = random_scores(config)
    for layer in range(2):
        scores.heads[layer][:] = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    plan = make_plan(config, scores, Architecture(2, 32, 4, 1, 96), source="", merge_heads=True)
    assert plan.layers[0].merge == ((3, 4), (2, 5))  # K = 4, L = 6: i = 4 with 5, i = 3 with 6, counted from 1
    with pytest.raises(PlanError, match="at least half of each group"):
        make_plan(config, scores, Architecture(2, 32, 2, 1, 96), source="", merge_heads=True)


def test_a_sorted_plan_starts_with_every_smaller_plan() -> None:
    scores = random_scores(CONFIG, 5)
    whole = sorted_plan(CONFIG, scores, source="abc")
    part = make_plan(CONFIG, scores, Architecture(4, 20, 4, 2, 40), source="abc", order="importance")
    assert whole.channels[:20] == part.channels
    for big, small in zip(whole.layers, part.layers, strict=True):
        assert big.neurons[:40] == small.neurons
        assert (*big.heads[:2], *big.heads[3:5]) == small.heads
    assert whole.target == SHAPE
    assert prefix_plan(SHAPE, part.target, "abc").layers[0].heads == (0, 1, 3, 4)


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(ScoresError, match="the scores are of 2 layers, the model has 4"):
        make_plan(CONFIG, random_scores(tiny_config()), SMALL, source="")


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("heads=5", r"heads is 5, not a multiple of groups \(2\).*heads=4 or 6 would do"),
        ("heads=4,groups=1", r"is 4 query heads per key/value head, the source has 3; heads=3 is the most"),
        ("ffn=97", r"ffn is 97; it must be from 1 to 96"),
        ("hidden=0", r"hidden is 0; it must be from 1 to 32"),
        ("width=3", r"unknown axis 'width'; expected layers, hidden, heads, groups, ffn"),
        ("ffn=3,ffn=4", r"ffn is given twice"),
        ("ffn=many", r"'many' is not a whole number"),
        ("", r"no axis in it"),
    ],
)
def test_shapes_that_cannot_be(text: str, sentence: str) -> None:
    with pytest.raises(ArchitectureError, match=sentence):
        Architecture.parse(text, CONFIG)


def test_what_is_left_out_stays() -> None:
    assert Architecture.parse("ffn=40, hidden=20", CONFIG) == Architecture(4, 20, 6, 2, 40)
    assert Architecture.parse("heads=3", tiny_config(num_key_value_heads=6)).groups == 3
    small = Architecture.parse("hidden=20,heads=4", CONFIG).config(CONFIG)
    assert (small.head_dim, small.hidden_size, small.num_attention_heads) == (12, 20, 4)
    assert small.rope_parameters == CONFIG.rope_parameters
