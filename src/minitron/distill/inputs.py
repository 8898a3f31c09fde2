"""Moved to `minitron.train.inputs`; see docs/deprecations.md."""

from ..submodules import moved

__getattr__ = moved(__name__, "minitron.train.inputs")
