"""Moved to `minitron.train.schedule`; see docs/deprecations.md."""

from ..submodules import moved

__getattr__ = moved(__name__, "minitron.train.schedule")
