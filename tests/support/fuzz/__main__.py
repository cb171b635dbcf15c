"""``python -m fuzz``: run random transformers through the chain and say what became of them."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from fuzz.run import run


def main() -> int:
    """Run cases and print a summary; 1 if any was wrong."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=60, help="how many (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the first block of cases (0)")
    parser.add_argument("--until", choices=("capture", "prepare", "export"), help="the last step; else drawn")
    parser.add_argument("--failures", type=Path, default=Path("runs/fuzz"), help="folder for failing cases")
    parser.add_argument("--shrink", action="store_true", help="make failing cases as plain as still fails")
    options = parser.parse_args()
    start = time.monotonic()
    tally = run(
        options.cases, options.seed, options.failures, options.until, shrink=options.shrink, progress=True
    )
    print(tally.summary())
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
