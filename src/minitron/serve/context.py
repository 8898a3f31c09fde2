"""What every route needs: the settings, the models, the counters."""

from __future__ import annotations

from dataclasses import dataclass, field

from .metrics import Metrics
from .served import Served
from .settings import ServeSettings


@dataclass
class Context:
    """Of one server."""

    settings: ServeSettings
    served: Served
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    """Whether the server finishes what it has begun and takes nothing new."""
