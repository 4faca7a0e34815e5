"""Arguments of every command about a run: recipe, DeepSpeed's configuration, changed fields, folder."""

import argparse
from pathlib import Path

from pretrain.fields import describe_fields
from pretrain.outcome import ExitCode
from pretrain.recipe import Recipe

DESCRIPTION = """\
Train a LaViT, or another network, from a recipe, in the folder runs/NAME. Started again, a run resumes from its newest
checkpoint.

  deepspeed --num_accelerators 2 pretrain/main.py --recipe recipes/demo.yaml     (two processes)
  deepspeed pretrain/main.py --recipe recipes/demo.yaml --set name=other --set optimizer.lr=1e-3

Ctrl-C or SIGTERM saves and exits; the same command resumes, also with another number of processes.
"""


def add_run_arguments(parser: argparse._ActionsContainer, *, runs: str | None = None) -> None:
    """Add ``--recipe``, ``--deepspeed_config`` and ``--set``, and ``--runs`` where ``runs`` describes it.

    They are parsed to ``recipe``, ``deepspeed_config``, ``assignments`` and ``runs``.
    """
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file that defines the run")
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        default=_default_configuration(),
        metavar="FILE",
        help="DeepSpeed's configuration; the recipe's deepspeed section overrides it (default: ds_config.json of "
        "the current folder, else of the folder that holds pretrain/; here: %(default)s)",
    )
    add_set_argument(parser, "change a field of the recipe, for example optimizer.lr=1e-3")
    if runs is not None:
        parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help=f"{runs} (default: runs)")


def add_set_argument(parser: argparse._ActionsContainer, what: str) -> None:
    """Add ``--set``, which is parsed to ``assignments``."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help=f"{what}; may be repeated",
    )


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--device``, which is handed to ``use_gpu`` or ``choose_device``."""
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="compute on GPUs or on the CPU (default: auto, on GPUs if there are any)",
    )


def add_trust_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--trust-factory``."""
    parser.add_argument(
        "--trust-factory",
        action="store_true",
        help="import and call the function that a run or hand-off names (model.factory); it runs as you",
    )


def _default_configuration() -> Path:
    here = Path("ds_config.json")
    return here if here.exists() else Path(__file__).resolve().parents[1] / here


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of ``pretrain/main.py``."""
    epilog = "\n".join(
        [
            "exit status:",
            *(f"  {code.value:<3} {code.name.lower().replace('_', ' ')}" for code in ExitCode),
            "",
            "fields of a recipe, for --set:",
            *describe_fields(Recipe),
        ]
    )
    parser = argparse.ArgumentParser(
        prog="deepspeed pretrain/main.py",
        description=DESCRIPTION,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser, runs="folder that holds the run folders")
    add_device_argument(parser)
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="profile these steps: trace, summary and on a GPU a memory snapshot in runs/NAME/profile/",
    )
    parser.add_argument(
        "--profile-ranks", choices=("first", "all"), default="first", help="which ranks are profiled (default: first)"
    )
    parser.add_argument("--verbose", action="store_true", help="show all that DeepSpeed prints while it starts")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher, which also sets it
    return parser.parse_args(arguments)
