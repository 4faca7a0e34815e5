"""All that is measured side by side with the alternatives: ``python -m benchmarks``, or ``make bench``.

    python -m benchmarks                          # model, data, trainer, end to end; fifteen minutes on two cores
    python -m benchmarks --only data end_to_end
    python -m benchmarks --quick                  # a minute or two: shows that everything works, measures nothing well

Each runs in a process of its own, one after the other, at sizes that suit the device, and writes its section of
benchmarks/results/bench-DATE-MACHINE.json; then the tables of docs/performance.md are made anew (but for --quick).
Nothing else should run on the machine meanwhile.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import RESULTS, add_common, say

BENCHMARKS = ("model", "data", "trainer", "end_to_end")


def command(name: str, options: argparse.Namespace) -> list[str]:
    """How a benchmark is started."""
    line = [sys.executable, "-m", f"benchmarks.{name}", "--results", str(options.results)]
    line += ["--note", options.note] if options.note else []
    return [*line, *(["--quick"] if options.quick else [])]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="some of them")
    add_common(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run them; 1 if any failed, after all have run."""
    options = parse(arguments)
    failed = []
    for name in options.only:
        began = time.monotonic()
        say([f"--- {name}"])
        status = subprocess.run(command(name, options), cwd=Path(__file__).parent.parent, check=False).returncode
        say([f"--- {name}: {'done' if status == 0 else f'FAILED with {status}'} in {time.monotonic() - began:.0f} s"])
        failed += [name] if status else []
    if not options.quick and options.results == RESULTS:
        from benchmarks.page import write_page  # noqa: PLC0415 - the other doors need no matplotlib

        say([f"wrote {file}" for file in write_page()])
    if failed:
        say([f"failed: {', '.join(failed)}; their sections were not written"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
