"""Write the report of runs: ``python -m pretrain.report RUN [RUN ...] [--output FILE.html]``."""

import argparse
import sys
from pathlib import Path

from pretrain.files import write_atomically
from pretrain.outcome import ExitCode, UserError
from pretrain.report.chart import COLOURS
from pretrain.report.page import render
from pretrain.report.source import RunRecord, read_run


def main(arguments: list[str] | None = None) -> int:
    """Write one HTML page about a run, or several side by side: curves, events, evaluation, recipe, environment."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.report", description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs/NAME; it may still be running")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default for one run: RUN/report.html")
    options = parser.parse_args(arguments)
    try:
        output = options.output
        if output is None and len(options.runs) > 1:
            raise UserError("several runs: say with --output FILE where their page goes")
        records = read_runs(options.runs)
        output = output or options.runs[0] / "report.html"
        page = render(records).encode()
        try:
            write_atomically(output, page)
        except OSError as error:
            raise UserError(
                f"{output} cannot be written: {error.strerror}: choose another place with --output"
            ) from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return ExitCode.WILL_FAIL_AGAIN
    for record in records:
        for note in record.notes:
            print(f"WARNING {record.path}: {note.splitlines()[0]}", file=sys.stderr)  # noqa: T201
    print(f"report of {', '.join(record.name for record in records)} in {output} ({len(page) / 1e6:.2f} MB)")  # noqa: T201
    return ExitCode.FINISHED


def read_runs(paths: list[Path]) -> list[RunRecord]:
    """Read runs for one page, each under a name of its own.

    Raises:
        UserError: one is no run folder or stands twice, or they are too many to be told apart.
    """
    if len(paths) > COLOURS:
        raise UserError(f"{len(paths)} runs: at most {COLOURS} can be told apart on one page")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a run is given twice")
    records = [read_run(path) for path in paths]
    names = [record.name for record in records]
    for record in records:
        if names.count(record.name) > 1:
            record.name = str(record.path)
    return records


if __name__ == "__main__":
    sys.exit(main())
