"""Sinks for measurements besides ``metrics.jsonl``: TensorBoard always, wandb if the recipe asks for it."""

import importlib
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import without_secrets
from data_pipeline.files import write_atomically
from pretrain.outcome import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Tracker = Literal["wandb"]
AXIS = "samples_seen"
EVENT_FILE = "events.out.tfevents."


class Sink:
    """A place for measurements; the x axis of all is samples seen. Whatever one raises ends it, and not the run."""

    def scalars(self, kind: str, samples_seen: int, values: Mapping[str, float]) -> None:
        """Take one measurement a name; ``kind`` is what they belong to, such as "train" or "eval"."""

    def image(self, name: str, samples_seen: int, pixels: NDArray[np.uint8]) -> None:
        """Take an image, (height, width, 3)."""

    def text(self, name: str, samples_seen: int, markdown: str) -> None:
        """Take a text."""

    def flush(self) -> None:
        """Bring to disk what was taken."""

    def close(self) -> None:
        """Flush, and take nothing any more."""


class TensorBoard(Sink):
    """Event files for ``tensorboard --logdir``, opened by the first measurement.

    Args:
        folder: where they are; those of previous attempts stay.
        purge_from: whatever they hold at so many samples seen or more is no longer shown.
    """

    def __init__(self, folder: Path, *, purge_from: int) -> None:
        self._folder, self._purge_from = folder, purge_from

    @cached_property
    def _writer(self) -> "SummaryWriter":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import
        _date_back(self._folder, int(time.time()))
        writer = SummaryWriter(str(self._folder), purge_step=self._purge_from)
        compared = {name: ["Multiline", [f"eval/{name}", f"eval_average/{name}"]] for name in ("top1", "top5", "loss")}
        writer.add_custom_scalars({"evaluation: weights and their average": compared})
        return writer

    def scalars(self, kind: str, samples_seen: int, values: Mapping[str, float]) -> None:
        """One point a value, under ``kind/name``."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, samples_seen)

    def image(self, name: str, samples_seen: int, pixels: NDArray[np.uint8]) -> None:
        """An image."""
        self._writer.add_image(name, pixels, samples_seen, dataformats="HWC")

    def text(self, name: str, samples_seen: int, markdown: str) -> None:
        """A text."""
        self._writer.add_text(name, without_secrets(markdown), samples_seen)

    def flush(self) -> None:
        """Bring the event file up to date."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def _date_back(folder: Path, now: int) -> None:
    """Rename event files that are dated now or later, so that the next one, dated ``now``, sorts behind all of them.

    TensorBoard reads a folder in the order of names, which begin with the clock of their writer: after a clock
    that was ahead, what a resumed run adds would not be shown.
    """
    files = sorted(folder.glob(f"{EVENT_FILE}*"))
    dates = [file.name.removeprefix(EVENT_FILE).partition(".")[0] for file in files]
    if any(date >= f"{now:010d}" for date in dates):
        for index, (file, date) in enumerate(zip(files, dates, strict=True)):
            rest = file.name.removeprefix(EVENT_FILE + date)
            file.rename(folder / f"{EVENT_FILE}{now - len(files) + index:010d}{rest}")


class Wandb(Sink):
    """Weights & Biases. Texts are left out: the recipe is the configuration.

    wandb holds a row back until one with a higher step comes, and refuses a lower step after a restart. So it is given
    samples seen as a metric of its own, which is the x axis of all others, and each row is complete at once.

    Args:
        run: its folder, which also has wandb's own files and an id that distinguishes it from another of its name.
        configuration: shown with the run.
    """

    def __init__(self, run: Path, configuration: dict[str, Any]) -> None:
        self._library: Any = importlib.import_module("wandb")
        token = run / "tracker_id.txt"
        if not token.exists():
            write_atomically(token, secrets.token_hex(4).encode())
        # The console stays ours, and what a killed process sent is on disk after a second, not after fifteen.
        wanted = {"console": "off", "x_transaction_log_flush_interval": 1.0}
        settings = {name: wanted[name] for name in wanted.keys() & self._library.Settings.model_fields.keys()}
        stdin, sys.stdin = sys.stdin, Path(os.devnull).open()  # noqa: SIM115
        try:  # on a terminal it would ask for an account, and all ranks would wait for the answer: let it fail instead
            self._library.init(
                project="lavit-pretrain", resume="allow", config=without_secrets(configuration), name=run.name,
                dir=str(run), id=f"{run.name}-{token.read_text()}", settings=self._library.Settings(**settings),
            )  # fmt: skip
        finally:
            sys.stdin.close()
            sys.stdin = stdin
        self._library.define_metric(AXIS)
        self._library.define_metric("*", step_metric=AXIS)

    def scalars(self, kind: str, samples_seen: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._library.log({AXIS: samples_seen} | {f"{kind}/{name}": value for name, value in values.items()})

    def image(self, name: str, samples_seen: int, pixels: NDArray[np.uint8]) -> None:
        """An image."""
        self._library.log({AXIS: samples_seen, name: self._library.Image(pixels)})

    def close(self) -> None:
        """Send the rest."""
        self._library.finish()


def check_trackers(names: Sequence[Tracker]) -> None:
    """Refuse what is not installed.

    Raises:
        UserError: one is not; with the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"watch.sinks: {name} is not installed: pip install {name}, or leave it out")


def open_trackers(
    names: Sequence[Tracker], run: Path, configuration: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Sink]:
    """The sinks that a recipe asks for; one that cannot be opened is left out with a warning."""
    sinks: dict[str, Sink] = {}
    for name in names:
        try:
            sinks[name] = Wandb(run, configuration)
        except Exception as error:  # noqa: BLE001 - a service's library may raise anything
            say(f"WARNING {name} takes no measurements until the next start ({type(error).__name__}: {error})")
    return sinks
