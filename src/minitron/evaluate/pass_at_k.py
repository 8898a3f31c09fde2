"""HumanEval's metric: the unbiased estimate of pass@k (Chen et al. 2021, section 2.1)."""

from __future__ import annotations

import math

from .sandbox import Checks, Limits, run_tests


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that at least one of `k` programs out of `samples` is among the `correct` ones.

    Raises:
        ValueError: fewer samples than k, or more correct ones than samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(
            f"{correct} correct of {samples} samples and k of {k}; k must be from 1 to the number of samples"
        )
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def program_of(document: dict[str, str], completion: str) -> str:
    """The prompt followed by a completion."""
    return f"{document['prompt']}{completion}\n"


def checks_of(document: dict[str, str]) -> Checks:
    """The tests of a problem, which may use other functions of its prompt."""
    return Checks(document["entry_point"], document["test"], document["prompt"])


def count_correct(document: dict[str, str], completions: list[str], limits: Limits | None = None) -> int:
    """How many completions pass the tests; each runs in the sandbox.

    Raises:
        SandboxError: this machine cannot isolate programs.
        ValueError: the tests themselves cannot run.
    """
    limits, checks = limits or Limits(), checks_of(document)
    return sum(run_tests(program_of(document, completion), checks, limits).passed for completion in completions)
