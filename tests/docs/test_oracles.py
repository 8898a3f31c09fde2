"""`make oracles`: where its package cannot be had it says so in one sentence, and leaves nothing half installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def oracles() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oracles", ROOT / "scripts" / "oracles.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_package_index_it_says_so(
    oracles: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert oracles.main(tmp_path / "home") == 1
    said = capsys.readouterr().out
    assert said.startswith("megatron-core==0.16.1 cannot be installed here, so its tests did not run: ERROR")
    assert len(said.splitlines()) == 1
    assert not list((tmp_path / "home").iterdir())


def test_its_tests_exist_and_look_where_it_installs(oracles: ModuleType) -> None:
    for variable, name in oracles.TESTS.items():
        assert variable in (ROOT / name).read_text(encoding="utf-8")
    assert "oracles:" in (ROOT / "Makefile").read_text(encoding="utf-8")
