"""The record of a forward pass's code: a replacement stays noticed, whatever is recorded after it."""

from __future__ import annotations

import pytest

import minitron.heads
import minitron.model
from minitron.written_code import record, replaced_code


def test_a_later_record_does_not_take_a_replacement_for_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replaced_code() == ""
    with monkeypatch.context() as patch:
        patch.setattr(minitron.model.NemotronMLP, "forward", lambda self, x: x)
        patch.setattr(minitron.heads, "check_ids", lambda *args, **kwargs: None)
        record("minitron.heads")
        assert replaced_code() in ("NemotronMLP.forward", "minitron.heads.check_ids")
        patch.undo()
    assert replaced_code() == ""
