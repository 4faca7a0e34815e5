"""Compare runs in one HTML file that loads nothing: ``python -m pretrain.report RUN [RUN ...] [--output FILE]``."""

import argparse
import base64
import html
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import DEFAULT_SIZE_GUIDANCE, EventAccumulator

from data_pipeline.errors import without_secrets
from pretrain.fault_tolerance.spikes import replay_command
from pretrain.files import json_lines, read_sealed, write_atomically
from pretrain.outcome import ExitCode, UserError

SETTINGS = ("recipe.yaml", "ds_config.json", "environment.json")
POINTS, MARKS = 4_000, 1_000  # at which a curve is thinned by half; events of one kind that are drawn
CHART = {"displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""}
FIRST_PANELS = ("train: loss", "eval: top1", "eval: loss", "train: lr", "train: grad_norm", "train: images_per_second")
COLUMNS = ("state", "reason", "step", "samples_seen", "restarts", "world_size", "top1", "handoff_top1", "seconds",
           "images_per_second")  # fmt: skip
"""Fields of run.json and summary.json in the table of runs."""


class Curve(list[tuple[float, float]]):
    """Images seen and value, in bounded memory: of every four points the lowest and the highest stay."""

    def add(self, x: float, y: float) -> None:
        """Add a point."""
        self.append((x, y))
        if len(self) == POINTS:
            fours, value = [self[at : at + 4] for at in range(0, POINTS, 4)], itemgetter(1)
            self[:] = [one for four in fours for one in sorted({min(four, key=value), max(four, key=value)})]


@dataclass
class Run:
    """What the page shows of a run folder.

    Settings are leaves of three files by dotted name, curves go by kind and field of metrics.jsonl, an event is its
    kind, images seen and text, images are PNG in base64, notes say what is missing or damaged.
    """

    path: Path
    status: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    events: list[tuple[str, float, str]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def mapping(self, name: str) -> dict[str, Any]:
        """A file of JSON or YAML; empty, with a note, where it is missing or damaged."""
        try:
            return dict(without_secrets(read_sealed(self.path / name)))
        except (FileNotFoundError, UserError) as error:
            self.notes.append(f"{name} cannot be read: {error}")
            return {}

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Lines of a file that need not exist; damaged ones are counted in a note."""
        damaged = 0
        try:
            for row in json_lines(self.path / name) if (self.path / name).exists() else ():
                damaged += row is None
                if row is not None:
                    yield row
        except OSError as error:
            self.notes.append(f"{name} cannot be read: {error}")
        if damaged:
            self.notes.append(f"{name}: {damaged:,} damaged lines are left out")


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: it is no run folder.
    """
    run = Run(path)
    if not any((path / name).exists() for name in ("run.json", "metrics.jsonl", *SETTINGS)):
        raise UserError(f"{path} is no run folder: it has no run.json, recipe.yaml or metrics.jsonl; give runs/NAME")
    run.status = run.mapping("run.json") | (run.mapping("summary.json") if (path / "summary.json").exists() else {})
    run.settings = {name: dict(leaves(run.mapping(name))) for name in SETTINGS}
    for row in run.rows("metrics.jsonl"):
        numbers = {key: float(x) for key, x in row.items() if type(x) in (int, float) and abs(x) < 1e300}
        for key in numbers.keys() - {"samples_seen", "step", "epoch"} if "samples_seen" in numbers else ():
            run.curves.setdefault((str(row.get("kind")), key), Curve()).add(numbers["samples_seen"], numbers[key])
    if not run.curves:
        run.notes.append("nothing was measured yet")
    read_events(run)
    for file in sorted((path / "evaluation").glob("*.json")):
        run.evaluations[file.stem] = run.mapping(f"evaluation/{file.name}")
    try:
        for name, png in read_images(path):
            run.images[name] = base64.b64encode(png).decode()
    except OSError as error:
        run.notes.append(f"images are left out: {error}")
    return run


def read_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """The newest image of each tag in TensorBoard's files, and the plots of evaluations."""
    board = EventAccumulator(str(path / "tensorboard"), size_guidance=dict.fromkeys(DEFAULT_SIZE_GUIDANCE, 1))
    for tag in board.Reload().Tags()["images"] if (path / "tensorboard").is_dir() else ():
        yield tag, board.Images(tag)[0].encoded_image_string
    for file in sorted((path / "evaluation").glob("*.png")):
        yield file.stem, file.read_bytes()


def read_events(run: Run) -> None:
    """Collect restarts, rollbacks, loss spikes, bad samples and what else happened."""
    clock = run.curves.get(("train", "time"), [(0.0, 0.0)])
    seen_then, times = zip(*clock, strict=True)
    counts: Counter[str] = Counter()

    def add(kind: str, row: dict[str, Any], text: str) -> None:
        seen, time = row.get("samples_seen"), row.get("time")
        if not isinstance(seen, int):  # known by its time only
            seen = np.interp(time, times, seen_then) if isinstance(time, int | float) else 0
        counts[kind] += 1
        if counts[kind] <= MARKS:
            run.events.append((kind, float(seen), text[:300]))

    starts = 0
    for row in run.rows("events.jsonl"):
        kind, before = str(row.get("event")), row["after"] if isinstance(row.get("after"), dict) else {}
        text = f"{row.get('text')} {before.get('state', '')} {before.get('reason', '')}"
        starts += kind == "start"
        if kind != "start" or starts > 1:
            add({"went back": "rollback", "start": "restart"}.get(kind, kind), row, text)
    for row in run.rows("slurm/history.jsonl"):
        if row.get("event") == "end" and row.get("cause") != "finished":
            add("end of a Slurm attempt", row, f"{row.get('cause')}: {row.get('reason')}")
    for row in run.rows("loss_spikes.jsonl"):
        step = row.get("step")
        command = f"; {replay_command(run.path, step)}" if isinstance(step, int) else ""
        add("loss spike", row, f"step {step}: loss {row.get('loss')}, level {row.get('level')}{command}")
    for row in run.rows("bad_samples.jsonl"):
        add("bad sample", row, f"{row.get('name')} in {row.get('shard')}: {row.get('reason')}")
    run.notes += [f"{kind}: {MARKS:,} of {count:,} are drawn" for kind, count in counts.items() if count > MARKS]


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested mappings by dotted name."""
    for key, value in content.items():
        if isinstance(value, dict) and value and prefix.count(".") < 8:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)[:300]


def show(content: Any) -> str:
    """Anything from data as plain text: numbers rounded, control characters replaced."""
    text = f"{content:.6g}" if isinstance(content, float) else "" if content is None else str(content)
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def panels(runs: list[Run]) -> dict[str, list[tuple[int, str, Curve]]]:
    """Curves by panel: ``eval`` and ``eval_average`` share one, and so do fields that differ behind a slash."""
    found: dict[str, list[tuple[int, str, Curve]]] = {}
    for number, run in enumerate(runs):
        for (kind, key), curve in run.curves.items():
            family, _, variant = kind.partition("_")
            stem, _, part = ("seconds", "", key) if kind == "time" else key.partition("/")
            if key != "time":
                label = " ".join(filter(None, (str(run.path), variant, part)))
                found.setdefault(f"{family}: {stem}", []).append((number, label, curve))
    return {name: found.pop(name) for name in FIRST_PANELS if name in found} | found


def render(runs: list[Run]) -> str:
    """The page.

    Raises:
        UserError: plotly is not installed.
    """
    from jinja2 import Environment  # noqa: PLC0415 - slow to import

    try:
        from plotly import colors, graph_objects, offline  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UserError(f"{error}: pip install --constraint constraints.txt plotly") from None
    palette = colors.qualitative.D3
    restarts = [place for run in runs for kind, place, _ in run.events if kind in ("restart", "rollback")][:MARKS]
    last = max((curve[-1][0] for run in runs for curve in run.curves.values()), default=1.0)

    def plain(content: Any) -> str:  # plotly takes some HTML in texts
        return html.escape(show(content))

    def draw(title: str, traces: list[Any], height: int = 380) -> str:
        figure = graph_objects.Figure(traces)
        for place in restarts:
            figure.add_vline(place, line={"dash": "dot", "width": 1, "color": "#8c959f"})
        figure.update_layout(
            title=plain(title), height=height, template="plotly_white", showlegend=True, legend_orientation="h",
            legend_y=-0.25, margin={"l": 60, "r": 10, "t": 50, "b": 40}, xaxis_title="images seen",
            xaxis_range=[0, last],
        )  # fmt: skip
        return str(figure.to_html(full_html=False, include_plotlyjs=False, config=CHART))

    charts, marks = [], []
    for title, lines in panels(runs).items():
        traces = []
        for place, (number, label, curve) in enumerate(lines):
            x, y = zip(*curve, strict=True)
            color = palette[(number if len(runs) > 1 else place) % len(palette)]
            dash = "dash" if len(runs) > 1 and place and lines[place - 1][0] == number else "solid"
            traces.append(graph_objects.Scatter(x=x, y=y, name=plain(label), line={"color": color, "dash": dash}))
        charts.append(draw(title, traces))
    for number, run in enumerate(runs):
        kinds, seen, texts = zip(*run.events, strict=True) if run.events else ((), (), ())
        events = graph_objects.Scatter(x=seen, y=list(map(plain, kinds)), name=plain(run.path), mode="markers")
        marker = {"color": palette[number % len(palette)], "symbol": "line-ns-open", "size": 14}
        marks.append(events.update(hovertext=list(map(plain, texts)), marker=marker))
    names = dict.fromkeys((file, name) for run in runs for file in SETTINGS for name in run.settings[file])
    settings = [[f"{file}: {name}", *(run.settings[file].get(name) for run in runs)] for file, name in names]
    environment = Environment(autoescape=True)
    environment.filters["show"] = show
    return environment.from_string(Path(__file__).with_suffix(".html").read_text()).render(
        runs=runs, columns=COLUMNS, differences=[row for row in settings if len(set(row[1:])) > 1], panels=charts,
        events=draw("", marks, 280) if any(run.events for run in runs) else "", plotly_js=offline.get_plotlyjs(),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Write one HTML page about one or several runs: table, differences, events, curves, images, settings."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.report", description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the only RUN, or here")
    options = parser.parse_args(arguments)
    try:
        output = options.output or (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
        write_atomically(output, render([read_run(path) for path in options.runs]).encode())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return ExitCode.WILL_FAIL_AGAIN
    print(f"wrote {output}")  # noqa: T201
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
