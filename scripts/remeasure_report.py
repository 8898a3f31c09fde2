"""Measure the models of a report again and write the report with the new speeds; all else in it stays.

    python scripts/remeasure_report.py docs/reports/bundled-half teacher=bundled half=bundled-half

Run it on a quiet machine: the speeds are those of `minitron compress`, every model in turn.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import minitron
from minitron.compress.outcome import speeds_of
from minitron.report.facts import Report, SpeedFacts
from minitron.report.page import write_report
from minitron.text_stream import encode_prompt


def main() -> None:
    """Read, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with report.json and report.html")
    parser.add_argument("models", nargs="+", help="NAME=CHECKPOINT for each model of the report's speeds")
    arguments = parser.parse_args()
    report = Report.from_json(arguments.folder / "report.json")
    given = dict(pair.split("=", 1) for pair in arguments.models)
    measured = [row.model for row in report.speed]
    if list(given) != measured:
        parser.error(f"the report has speeds of {', '.join(measured)}; name these in this order")
    loaded = {name: minitron.load(path, device="cpu") for name, path in given.items()}
    prompt = encode_prompt(next(iter(loaded.values())).tokenizer, report.samples[0].prompt)
    rows = speeds_of({name: found.model for name, found in loaded.items()}, prompt)
    speed = [SpeedFacts(**{**row, "quartiles": tuple(row["quartiles"])}) for row in rows]
    for row in speed:
        print(f"{row.model}: {row.tokens_per_second:,.0f} tokens/s ({row.load or 'nothing else ran'})")
    write_report(replace(report, speed=speed), arguments.folder)


if __name__ == "__main__":
    main()
