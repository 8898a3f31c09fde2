"""Drafts that are tried whether or not they pay: tiny models and short texts give them no gain."""

from __future__ import annotations

import math

import pytest

from minitron.engine import draft_choice
from minitron.engine.draft_length import DraftLength


class Always(DraftLength):
    """Drafts one token, two, and so on, at any speed."""

    def next(self, left: int = 1 << 30) -> int:
        super().next(left)
        return self._steps % self.most + 1


def force_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every text of a test be drafted."""
    monkeypatch.setattr(draft_choice, "DraftLength", Always)
    monkeypatch.setattr(draft_choice, "_pace", draft_choice._Pace(math.inf))
    monkeypatch.setattr(draft_choice, "SUMMED_PER_SECOND", math.inf)
