"""All probes, in the order in which they are shown. None of them imports torch or transformers."""

from __future__ import annotations

from .disk import caches
from .finding import Finding, guarded
from .gpu import gpu
from .machine import bandwidth, cores, memory, processor
from .packages import extras, installation, versions


def examine(gpu_driver: bool, measure: bool = True) -> list[Finding]:
    """Examine this machine and this installation.

    Args:
        gpu_driver: whether files of a GPU's driver are there.
        measure: measure the memory's bandwidth, which takes half a second.
    """
    probes = {
        "installation": installation,
        "versions": versions,
        "extras": extras,
        "processor": processor,
        "cores": cores,
        "memory": memory,
        **({"bandwidth": bandwidth} if measure else {}),
        "gpu": lambda: gpu(gpu_driver),
        "caches": caches,
    }
    return [guarded(subject, probe) for subject, probe in probes.items()]
