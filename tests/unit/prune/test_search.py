"""Enumeration against the paper's tables, and budgets that can and cannot be met."""

from __future__ import annotations

import pytest
from checkpoint_samples import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron import NemotronConfig
from minitron.prune.architecture import Architecture, ArchitectureError
from minitron.prune.search import (
    BUDGETS,
    PAPER_GRIDS,
    Budget,
    Grid,
    Machine,
    SearchError,
    enumerate_architectures,
    parse_quantity,
    thin_out,
    unused,
)

SOURCE = NemotronConfig.preset("nemotron-4-15b")
# arXiv:2407.14679, Table 19: layers, heads, MLP, embedding.
TABLE_19 = {
    (32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096), (31, 32, 12800, 5120),
    (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096), (30, 32, 12800, 5120), (30, 32, 16128, 4608),
    (30, 48, 13824, 4608), (30, 48, 16384, 4096), (29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608),
}  # fmt: skip


def shapes(candidates: list) -> set[tuple[int, int, int, int]]:
    found = [candidate.architecture for candidate in candidates]
    assert {shape.groups for shape in found} == {8}
    return {(shape.layers, shape.heads, shape.ffn, shape.hidden) for shape in found}


def test_the_fifteen_candidates_for_8b_are_those_of_table_19() -> None:
    grid, budget = PAPER_GRIDS["paper-8b"]
    candidates = enumerate_architectures(SOURCE, budget, grid)
    assert len(candidates) == 15
    assert shapes(candidates) == TABLE_19
    # The tolerance that the paper states gives another set.
    literal = shapes(enumerate_architectures(SOURCE, Budget("params", 7.6e9, 8.4e9), grid))
    assert len(literal) == 18
    assert len(literal & TABLE_19) == 13


def test_eighteen_candidates_for_4b() -> None:
    grid, budget = PAPER_GRIDS["paper-4b"]
    assert (budget.low, budget.high) == (0.95 * 4e9, 1.05 * 4e9)
    candidates = enumerate_architectures(SOURCE, budget, grid)
    assert len(candidates) == len(shapes(candidates)) == 18
    assert (32, 24, 9216, 3072) in shapes(candidates)  # Minitron 4B
    assert [c.parameters for c in candidates] == sorted(c.parameters for c in candidates)


def test_costs_are_those_of_the_published_shape() -> None:
    """4.19B parameters, 2.62B without embeddings (the paper's Table 3); 131,072 bytes of cache a token."""
    grid, budget = PAPER_GRIDS["paper-4b"]
    machine = Machine(context=4096, bytes_per_second=20e9)
    found = {c.architecture: c for c in enumerate_architectures(SOURCE, budget, grid, machine)}
    four = found[Architecture(32, 3072, 24, 8, 9216)]
    assert round(four.parameters / 1e9, 2) == 4.19
    assert round(four.non_embedding_parameters / 1e9, 2) == 2.62
    assert four.memory_bytes == 2 * four.parameters + 2 * 32 * 8 * 128 * 2 * 4096
    read = four.memory_bytes - 2 * 256000 * 3072 + 2 * 3072  # of the embedding one row
    assert four.tokens_per_second == pytest.approx(20e9 / read)


@pytest.mark.parametrize("kind", BUDGETS)
def test_no_candidate_exceeds_a_budget_of_any_kind(kind: str) -> None:
    goal = {"params": "4B", "non_embedding_params": "2.6B", "memory": "9GB", "speed": "2.5tok/s"}[kind]
    machine = Machine(context=2048, bytes_per_second=20e9)
    budget = Budget.parse(kind, goal, 0.1)
    candidates = enumerate_architectures(SOURCE, budget, None, machine)
    value = parse_quantity(kind, goal)
    for found in candidates:
        number = budget.of(found)
        assert number == budget.measure(found.architecture.config(SOURCE), machine)
        assert value <= number <= 1.1 * value if kind == "speed" else 0.9 * value <= number <= value
    everything = [
        a
        for a in Grid.around(SOURCE).shapes()
        if budget.low <= budget.measure(a.config(SOURCE), machine) <= budget.high
    ]
    assert {c.architecture for c in candidates} == set(everything)
    assert unused(budget, candidates) is None


SMALL = tiny_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
BELOW = [shape.config(SMALL) for shape in Grid.around(SMALL).shapes()]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BUDGETS), st.floats(0.05, 2.0), st.sampled_from([0.0, 0.001, 0.05, 0.3]))
def test_a_budget_is_kept_or_refused(kind: str, share: float, tolerance: float) -> None:
    machine = Machine(context=64, bytes_per_second=1e9)
    whole = Budget(kind, 1, 2).measure(SMALL, machine)
    budget = Budget.parse(kind, f"{whole / share if kind == 'speed' else round(whole * share)}", tolerance)
    sizes = [budget.measure(config, machine) for config in BELOW]
    kept = [size for size in sizes if budget.allows(size)]
    inside = [size for size in sizes if budget.low <= size <= budget.high]
    if budget.allows(whole):
        with pytest.raises(SearchError, match="nothing needs to be cut"):
            enumerate_architectures(SMALL, budget, None, machine)
        return
    if not kept:
        with pytest.raises(SearchError, match=r"no shape of the grid has at .*; the nearest has"):
            enumerate_architectures(SMALL, budget, None, machine)
        return
    candidates = enumerate_architectures(SMALL, budget, None, machine)
    found = [budget.of(candidate) for candidate in candidates]
    assert all(budget.allows(size) for size in found)
    if inside:
        assert sorted(found) == sorted(inside)
        assert unused(budget, candidates) is None
    else:  # the shapes nearest to the budget stand in
        best = min(kept) if kind == "speed" else max(kept)
        assert best in found
        assert "nearest within the budget" in (unused(budget, candidates) or "")


def test_a_grid_below_any_model() -> None:
    bundled = tiny_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
    found = set(Grid.around(bundled).shapes())
    assert Architecture(4, 128, 2, 2, 512) in found
    assert Architecture.of(bundled) in found
    for config in (bundled, SOURCE, NemotronConfig.preset("nemotron-3-8b"), tiny_config(num_key_value_heads=1)):
        for shape in Grid.around(config).shapes():
            shape.check_within(Architecture.of(config))
    assert {s.groups == s.heads for s in Grid.around(NemotronConfig.preset("nemotron-3-8b")).shapes()} == {True}
    paper = PAPER_GRIDS["paper-4b"][0]
    assert set(Grid.around(SOURCE).hidden) >= {3072, 3584, 4096, 4608}
    assert set(Grid.around(SOURCE).heads) >= set(paper.heads)


def test_fixed_axes() -> None:
    grid = Grid.around(SOURCE).fixed(layers=32, ffn=9216)
    assert {(shape.layers, shape.ffn) for shape in grid.shapes()} == {(32, 9216)}
    with pytest.raises(ArchitectureError, match="unknown axis 'width'"):
        grid.fixed(width=3)


def test_a_budget_that_cannot_be_met_names_the_nearest() -> None:
    with pytest.raises(
        SearchError, match=r"the model has 8\.27B parameters itself, which is within .* at most 12\.00B"
    ):
        enumerate_architectures(NemotronConfig.preset("minitron-8b"), Budget.parse("params", "12B"))
    with pytest.raises(
        SearchError, match=r"has at most 100\.00M parameters; the nearest has \d\.\d\dB parameters \(\d"
    ):
        enumerate_architectures(SOURCE, Budget.parse("params", "100M"))
    with pytest.raises(SearchError, match=r"has at least 900 tokens/s; the nearest has 90\.88 tokens/s \(\d+ layers"):
        enumerate_architectures(SOURCE, Budget.parse("speed", "900"), None, Machine(bytes_per_second=2e11))
    with pytest.raises(SearchError, match=r"; the nearest have 1\.99B .* and 2\.0\dB parameters \(\d+ layers"):
        enumerate_architectures(SOURCE, Budget("params", 2.0e9, 2.0001e9))
    with pytest.raises(SearchError, match=r"no shape of the grid can be cut out of a model of 2 layers.*layers is 29"):
        enumerate_architectures(tiny_config(), *reversed(PAPER_GRIDS["paper-4b"]))
    with pytest.raises(SearchError, match="needs the bandwidth"):
        enumerate_architectures(SOURCE, Budget.parse("speed", "3"))


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("params", "4B", 4e9), ("params", "350M", 3.5e8), ("non_embedding_params", "2.6b", 2.6e9),
        ("params", "4000000", 4e6), ("memory", "6GB", 6e9), ("memory", "6 GiB", 6 * 2**30), ("memory", "800MB", 8e8),
        ("speed", "20tok/s", 20), ("speed", "2.5", 2.5), ("speed", "7 tokens/s", 7), ("params", "4e9", 4e9),
    ],
)  # fmt: skip
def test_quantities(kind: str, text: str, value: float) -> None:
    assert parse_quantity(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [("params", "4GB"), ("params", "-4B"), ("params", "four"), ("memory", "6tok/s"), ("speed", "20GB"), ("speed", "0")],
)
def test_what_is_no_quantity(kind: str, text: str) -> None:
    with pytest.raises(SearchError, match=rf"--{kind} is '{text}'; expected something like"):
        parse_quantity(kind, text)


def test_bad_windows_and_machines() -> None:
    with pytest.raises(SearchError, match="tolerance is 1"):
        Budget.parse("params", "4B", 1)
    with pytest.raises(SearchError, match="budget is 'size'"):
        Budget("size", 1, 2)
    with pytest.raises(SearchError, match="expected 0 < low <= high"):
        Budget("params", 2, 1)
    with pytest.raises(SearchError, match="dtype is 'int3'"):
        Machine("int3")


def test_thinning_keeps_small_and_large() -> None:
    candidates = enumerate_architectures(SOURCE, *reversed(PAPER_GRIDS["paper-4b"]))
    some = thin_out(candidates, 5)
    assert len(some) == 5
    assert (some[0], some[-1]) == (candidates[0], candidates[-1])
    assert thin_out(candidates, 100) == candidates
    assert len(thin_out(candidates, 1)) == 1
