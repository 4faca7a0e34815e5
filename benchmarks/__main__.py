"""All benchmarks: ``python -m benchmarks``, or ``make bench``; 15 minutes on two idle cores."""

import argparse
import subprocess
import sys

BENCHMARKS = ("model", "data", "trainer", "end_to_end")


def main(arguments: list[str] | None = None) -> int:
    """Run each in a process of its own; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    options, rest = parser.parse_known_args(arguments)
    commands = [[sys.executable, "-m", f"benchmarks.{name}", *rest] for name in options.only]
    return max(subprocess.run(command, check=False).returncode != 0 for command in commands)


if __name__ == "__main__":
    sys.exit(main())
