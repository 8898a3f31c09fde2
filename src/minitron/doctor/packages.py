"""Installed packages beside the ranges that are allowed and the releases that are tested."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib import metadata
from typing import Any

from .. import tested
from ..version import __version__
from .finding import Finding

PYTHON = (3, 11)
"""The oldest release that is allowed."""
HARMLESS = ("tqdm", "jinja2", "typer")
"""Packages of which an untested release within the range is not worth a note."""


@cache
def _requirements() -> dict[str, tuple[Any, ...]]:
    """Requirements by extra, from the metadata of the installed package; '' has those that are always needed.

    `minitron[a,b]`, an extra made of others, and `dev` are left out.
    """
    from packaging.requirements import Requirement

    found: dict[str, list[Any]] = {"": []}
    for line in metadata.requires("minitron") or ():
        requirement = Requirement(line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if requirement.name.lower() != "minitron":
            found.setdefault(extra[1] if extra else "", []).append(requirement)
    found.pop("dev", None)
    return {extra: tuple(requirements) for extra, requirements in found.items()}


def installed(name: str) -> str | None:
    """The installed release of a package, None if it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installation() -> Finding:
    """This package and the Python that runs it."""
    version = ".".join(map(str, sys.version_info[:3]))
    facts = {"minitron": __version__, "python": version, "executable": sys.executable, "platform": sys.platform}
    text = f"minitron {__version__}, Python {version}"
    if sys.version_info < PYTHON:
        advice = f"minitron needs Python {'.'.join(map(str, PYTHON))} or newer: make an environment with one."
        return Finding("installation", "problem", text, facts, (advice,))
    stated = installed("minitron")
    if stated != __version__:
        advice = (
            f"The metadata are those of minitron {stated}. Install again: pip install -c constraints.txt ."
            if stated
            else "minitron runs from its sources and is not installed: pip install -c constraints.txt ."
        )
        return Finding("installation", "note", text, facts, (advice,))
    return Finding("installation", "ok", text, facts)


def versions() -> Finding:
    """The required packages: missing or outside their range is a problem, untested is a note."""
    try:
        ranges = {r.name.lower(): r.specifier for r in _requirements()[""]}
    except metadata.PackageNotFoundError:
        ranges = {}
    rows, problems, notes = [], [], []
    for name, pinned in tested.PINNED.items():
        have, allowed = installed(name), ranges.get(name)
        right = have is not None and (allowed is None or allowed.contains(have, prereleases=True))
        rows.append(
            {"name": name, "installed": have, "tested": pinned, "allowed": str(allowed or ""), "in_range": right}
        )
        if have is None:
            problems.append(f"{name} is missing: pip install '{name}{allowed or ''}'")
        elif not right:
            problems.append(f"{name} {have} is outside {allowed}: pip install '{name}{allowed}'")
        elif have.split("+")[0] != pinned and name not in HARMLESS:
            notes.append(f"{name} {have} (tested: {pinned})")
    advice = [*problems]
    if notes:
        advice.append(f"Other releases than the tested ones: {'; '.join(notes)}. constraints.txt has the tested ones.")
    if any(note.startswith("transformers ") for note in notes):
        advice.append("On an untested transformers the first generation of a process checks itself.")
    status = "problem" if problems else "note" if notes else "ok"
    text = ", ".join(f"{row['name']} {row['installed'] or 'missing'}" for row in rows)
    return Finding("versions", status, text, {"packages": rows}, tuple(advice))


def extras() -> Finding:
    """Which extras are complete, and the command for each of the others."""
    try:
        groups = {extra: names for extra, names in _requirements().items() if extra}
    except metadata.PackageNotFoundError:
        return Finding("extras", "unknown", "minitron is not installed as a package, so its extras are not known")
    lacking = {
        extra: [r.name for r in requirements if not _satisfied(r)] for extra, requirements in sorted(groups.items())
    }
    complete = [extra for extra, missing in lacking.items() if not missing]
    advice = [
        f"{extra}: pip install 'minitron[{extra}]' (brings {', '.join(missing)})"
        for extra, missing in lacking.items()
        if missing
    ]
    text = f"complete: {', '.join(complete) or 'none'}"
    if advice:
        text += f"; not complete: {', '.join(extra for extra, missing in lacking.items() if missing)}"
    return Finding("extras", "ok", text, {"missing": lacking}, tuple(advice))


def _satisfied(requirement: Any) -> bool:
    have = installed(requirement.name)
    return have is not None and requirement.specifier.contains(have, prereleases=True)
