"""Structured output over the JSON schemas of a public benchmark (arXiv 2501.10868), 400 of them.

    python benchmarks/schemas.py [--model FOLDER] [--outputs 3] [--first 400] [--json FILE] [--smoke]

Counts the schemas that are accepted, the instances on which the mask and the benchmark disagree, and the random outputs
that do not validate; measures the time to compile a schema and to compute a mask. Needs no weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "samples"))

from json_schemas import FILE, Found, check, masking_model, read_schemas

from minitron.assets import bundled_model


def summary(found: dict[str, Found]) -> dict[str, Any]:
    accepted = {name: one for name, one in found.items() if one.accepted}
    masks = sorted(seconds for one in accepted.values() for seconds in one.mask_seconds)
    compiling = sorted(one.compile_seconds for one in found.values())
    return {
        "schemas": len(found),
        "accepted": len(accepted),
        "refused": Counter(one.reason.split("supported: ")[-1][:70] for one in found.values() if not one.accepted),
        "valid instances": sum(one.valid for one in accepted.values()),
        "of these refused by the mask": sum(len(one.valid_refused) for one in accepted.values()),
        "invalid instances": sum(one.invalid for one in accepted.values()),
        "of these accepted by the mask": sum(len(one.invalid_accepted) for one in accepted.values()),
        "schemas without a disagreement": sum(
            not one.valid_refused and not one.invalid_accepted for one in accepted.values()
        ),
        "finished outputs": sum(one.finished for one in accepted.values()),
        "of these not valid": sum(len(one.wrong_outputs) for one in accepted.values()),
        "unfinished outputs": sum(one.unfinished for one in accepted.values()),
        "masks": len(masks),
        "mask microseconds": {
            "median": round(1e6 * statistics.median(masks), 1),
            "p99": round(1e6 * masks[len(masks) * 99 // 100], 1),
            "largest": round(1e6 * masks[-1], 1),
        },
        "compile milliseconds": {
            "median": round(1e3 * statistics.median(compiling), 2),
            "largest": round(1e3 * compiling[-1], 2),
        },
    }


def main() -> int:
    """Check and print; 0 if every finished output is valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder with a tokenizer; the bundled model's by default")
    parser.add_argument("--outputs", type=int, default=3, help="random outputs of each schema")
    parser.add_argument("--first", type=int, help="only so many schemas")
    parser.add_argument("--json", type=Path, help="file for the disagreements of each schema")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if not FILE.exists():
        print(f"no data sets in {FILE.parents[1]}; set MINITRON_DATA")
        return 0
    rows = read_schemas()[: 10 if options.smoke else options.first]
    model = masking_model(options.model or bundled_model())
    found = {row["id"]: check(model, row, options.outputs) for row in rows}
    print(json.dumps(summary(found), indent=2))
    if options.json:
        details = {
            name: {
                "reason": one.reason,
                "valid_refused": one.valid_refused,
                "invalid_accepted": one.invalid_accepted,
                "wrong_outputs": one.wrong_outputs,
            }
            for name, one in found.items()
            if one.reason or one.valid_refused or one.invalid_accepted or one.wrong_outputs
        }
        options.json.write_text(json.dumps(details, indent=1, ensure_ascii=False), encoding="utf-8")
    return 1 if any(one.wrong_outputs for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
