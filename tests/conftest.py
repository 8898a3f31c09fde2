"""Settings for every test."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from typing import Any

import pytest
import torch

# The models of these tests are so small that starting a second thread costs more than it does.
torch.set_num_threads(1)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of the programs that tests start do not spin while they wait: other workers need the processors.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton's kernels run in its interpreter where there is no GPU. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What a machine may lack. Any other skip is a failure: it would hide a renamed module or a missing dependency.
ALLOWED_SKIPS = {
    "a CUDA device": r"needs a CUDA device",
    "user namespaces, for the sandbox": r"namespaces",
    "data sets too large for the repository": r"MINITRON_DATA|no data sets in",
    "megatron-core, which wants an environment of its own": r"MINITRON_MEGATRON",
    "NeMo Guardrails, which wants an environment of its own": r"MINITRON_GUARDRAILS",
    "datatrove and NeMo Curator, which want an environment of their own": r"MINITRON_CURATORS",
    "root's right to mount a small disk": r"root|mount|/dev/full",
    "a kernel with large pages": r"large pages",
    "a processor with AVX512-BF16": r"no AVX512-BF16",
    "two processors that threads can be moved between": r"^one processor$|does not place threads",
    "POSIX signals and /proc": r"^signals$|reads /proc",
    "a browser": r"chromium",
    "the package index": r"package index",
    "an optional cache of transformers": r"hqq is not installed",
    "the curate extra, which the dev extra includes": r"minitron\[curate\]",
    "the serve extra, which the dev extra includes": r"minitron\[serve\]",
    "Ray, an extra of its own": r"minitron\[ray\]",
    "a library of the system": r"no libseccomp",
}


def _not_allowed(reason: str) -> bool:
    return not any(re.search(pattern, reason) for pattern in ALLOWED_SKIPS.values())


def _fail_unknown_skip(report: Any) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if report.skipped and not hasattr(report, "wasxfail") and _not_allowed(reason):
        report.outcome = "failed"
        report.longrepr = f"{reason}\nA skip with a reason that tests/conftest.py does not list is a failure."


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report = yield
    _fail_unknown_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    _fail_unknown_skip(report)
    return report
