"""Moved to `minitron.train.loop`; see docs/deprecations.md."""

from ..submodules import moved

__getattr__ = moved(__name__, "minitron.train.loop")
