# SPDX-License-Identifier: BSD-3-Clause
"""`make soak SOAK=SECONDS SEED=TEXT`: everything at once, at random; exit code 1 when something was violated."""

from __future__ import annotations

import argparse
import secrets
import sys

from soak import report
from soak.plan import plan
from soak.soak import Soak


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seed", default="", help="any text; without it a new one is made up")
    parser.add_argument("--seconds", default="", help="how long (default: 3600)")
    parser.add_argument("--plan", action="store_true", help="only show what would be done")
    arguments = parser.parse_args()
    seed, duration_s = arguments.seed or secrets.token_hex(4), float(arguments.seconds or 3600)
    if arguments.plan:
        for event in plan(seed, duration_s):
            print(event)
        return 0
    print(f"seed {seed}: {duration_s:.0f} s", flush=True)
    soak = Soak(seed, duration_s, lambda text: print(text, flush=True))
    try:
        bounds = soak.run()
    except PermissionError as error:
        print(f"a soak needs network namespaces and mounts: {error}", file=sys.stderr)
        return 2
    for line in report.lines(seed, duration_s, soak.setting, bounds):
        print(line)
    return 1 if bounds.violated else 0


if __name__ == "__main__":
    sys.exit(main())
