"""Hostile input for every reader; prints counts, and exits 1 where a reader crashes, hangs or leaves its folder.

python -m tests.torture [--cases N] [--reader NAME] [--seed S] [--case I] [--processes P]
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.torture.run import BUGS, bugs, run, table


def main() -> int:
    """The command; returns the exit code."""
    from tests.torture.readers import READERS
    from tests.torture.seeds import make_seeds

    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="of each reader")
    parser.add_argument("--reader", choices=READERS, action="append", help="by default all; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="do this one again, and show what is said of it")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", type=Path, help="folder for the inputs, which are kept")
    options = parser.parse_args()
    names = options.reader or list(READERS)
    cases = range(options.cases) if options.case is None else range(options.case, options.case + 1)
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        seeds = options.keep or Path(scratch) / "seeds"
        if not seeds.is_dir():
            make_seeds(seeds)
        processes = 1 if options.case is not None else options.processes
        tallies = run(names, cases, options.seed, seeds, Path(scratch), processes)
    if options.case is not None:
        for name, tally in tallies.items():
            for verdict, text in tally.messages.values():
                print(f"{name}: {verdict}\n{text}")
    print(table(tallies))
    found = bugs(tallies, options.seed)
    print(f"\n{found}" if found else "\nnothing lost, nothing escaped")
    return int(any(tally.counts[verdict] for tally in tallies.values() for verdict in BUGS) or bool(found))


if __name__ == "__main__":
    sys.exit(main())
