"""Speeds of several models: in turn, the first token apart, and by which engine."""

from __future__ import annotations

import pytest
from model_samples import build

from minitron.bench import speeds


def test_models_take_turns_and_the_first_token_is_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    times = {"slow": (0.5, 4.0), "fast": (0.25, 2.0)}

    def work(model: object, prompt: list[int]) -> tuple[str, object]:
        def once(tokens: int) -> tuple[float, float]:
            turns.append(str(model))
            each, first = times[str(model)]
            return each * (tokens - 1), first

        return "cpu", once

    class Named(str):
        config = type("C", (), {"max_position_embeddings": 100})
        device = type("D", (), {"type": "cpu"})

    monkeypatch.setattr(speeds, "_work", work)
    found, _ = speeds.measure_speeds({"slow": Named("slow"), "fast": Named("fast")}, [1, 2, 3], rounds=4)  # type: ignore[dict-item]
    assert found["slow"].tokens_per_second == pytest.approx(2)
    assert found["fast"].tokens_per_second == pytest.approx(4)
    assert (found["slow"].first_token_seconds, found["fast"].first_token_seconds) == (4.0, 2.0)
    counted = turns[4:]  # two uncounted ones of each
    assert sorted(counted) == ["fast"] * 4 + ["slow"] * 4
    assert all(set(counted[i : i + 2]) == {"slow", "fast"} for i in range(0, 8, 2))


def test_real_models_by_both_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "SECONDS", 0.01)
    model = build().eval()
    found, load = speeds.measure_speeds({"a": model}, [1, 2, 3], rounds=2)
    assert isinstance(load, str)
    assert found["a"].tokens_per_second > 0
    assert found["a"].first_token_seconds > 0
    assert found["a"].quartiles[0] <= found["a"].tokens_per_second <= found["a"].quartiles[1]
    half = build().half().eval()  # no engine of ours
    found, _ = speeds.measure_speeds({"a": half}, [1, 2, 3], rounds=2)
    assert found["a"].engine == "transformers"
