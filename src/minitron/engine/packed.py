"""Moved to `minitron.engine.model_weights`; see docs/deprecations.md."""

from ..submodules import moved

__getattr__ = moved(__name__, "minitron.engine.model_weights")
