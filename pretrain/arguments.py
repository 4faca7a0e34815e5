"""What every command about a run takes: recipe, DeepSpeed's configuration, changed fields, where it lives."""

import argparse
from pathlib import Path


def add_run_arguments(parser: argparse._ActionsContainer, *, runs: str | None = None) -> None:
    """Add ``--recipe``, ``--deepspeed_config`` and ``--set``, and ``--runs`` where ``runs`` says what it is.

    They are parsed to ``recipe``, ``deepspeed_config``, ``assignments`` and ``runs``.
    """
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file that defines the run")
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        default=Path("ds_config.json"),
        metavar="FILE",
        help="DeepSpeed's configuration; the recipe's deepspeed section is laid over it (default: ds_config.json)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="change a field of the recipe, for example optimizer.lr=1e-3; may be repeated",
    )
    if runs is not None:
        parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help=f"{runs} (default: runs)")
