"""The page: one file of HTML that needs nothing else, with or without JavaScript."""

import base64
import hashlib
import time
from pathlib import Path

import numpy as np

from pretrain.report.axes import number
from pretrain.report.chart import Axis, Rule, colour_class, dash, draw, interruptions
from pretrain.report.comparison import differences, fields, results, standing
from pretrain.report.curves import COLUMNS
from pretrain.report.evaluations import show_card, show_evaluation
from pretrain.report.markup import Markup, joined, tag
from pretrain.report.panels import Overview, Panel, arrange
from pretrain.report.source import RunRecord
from pretrain.report.timeline import draw_timeline, list_marks, stamp

_HERE = Path(__file__).parent
_UNITS = ((86400.0, "days", 3), (3600.0, "hours", 2), (60.0, "minutes", 2), (1.0, "seconds", 0))
"""Of wall time: seconds in it, its name, and how many of it an axis has at least."""


def render(records: list[RunRecord]) -> str:
    """The page of one run, or of several side by side; their names must differ."""
    names = ", ".join(record.name for record in records)
    style, script = ((_HERE / name).read_text() for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Untrusted text is escaped; should that ever fail, a browser still runs and loads nothing but what stands here.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{names}: report"),
        tag("style", Markup(style)),
    )
    body = tag("body", tag("main", *_sections(records)), tag("script", Markup(script)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _sections(records: list[RunRecord]) -> list[Markup | None]:
    axes = _axes(records)
    overview = arrange([record.metrics for record in records])
    heading = records[0].name if len(records) == 1 else f"{len(records)} runs compared"
    return [
        tag("header", tag("h1", heading), tag("p", _subtitle(records), class_="subtitle")),
        _notes(records),
        tag("section", standing(records)),
        tag("section", tag("h2", "What differs"), differences(records)) if len(records) > 1 else None,
        _events(records, axes),
        _curves(records, overview, axes),
        tag("section", tag("h2", "All measurements"), results(records))
        if overview.panels or overview.constant
        else None,
        _evaluations(records),
        _setup(records),
        tag("footer", f"Written by pretrain.report on {stamp(time.time())} UTC. Times are UTC."),
    ]


def _subtitle(records: list[RunRecord]) -> str:
    if len(records) > 1:
        return ", ".join(record.name for record in records)
    environment, recipe = records[0].environment, records[0].recipe
    model, dataset = recipe.get("model"), environment.get("dataset")
    facts = [
        str(model.get("name")) if isinstance(model, dict) else "",
        f"on {dataset.get('name')}" if isinstance(dataset, dict) else "",
    ]
    return " ".join(fact for fact in facts if fact)


def _notes(records: list[RunRecord]) -> Markup | None:
    """What is missing or damaged, before anything else."""
    lines = [
        tag("li", joined(tag("b", record.name), ": ", note) if len(records) > 1 else note)
        for record in records
        for note in record.notes
    ]
    return tag("ul", *lines, class_="notes") if lines else None


def _axes(records: list[RunRecord]) -> list[Axis]:
    """Samples seen, and wall time where every run that measured something tells of it."""
    curves = [(number, curve) for number, record in enumerate(records) for curve in record.metrics.curves.values()]
    marked = [(number, mark) for number, record in enumerate(records) for mark in record.marks]
    seen = [float(curve.samples[-1]) for _, curve in curves] + [mark.samples or 0.0 for _, mark in marked]
    sizes = {record.epoch_size for record in records}
    epoch_size = sizes.pop() if len(sizes) == 1 else None
    axes = [Axis("samples", max(seen, default=0.0) or 1.0, epoch_size=epoch_size)]
    began = tuple(np.nan if record.began is None else record.began for record in records)
    times = [float(np.nanmax(curve.time)) - began[number] for number, curve in curves if np.isfinite(curve.time).any()]
    times += [mark.time - began[number] for number, mark in marked if mark.time is not None]
    longest = max((value for value in times if np.isfinite(value)), default=0.0)
    if longest > 0:
        unit, name = next((unit, name) for unit, name, least in _UNITS if longest >= least * unit)
        axes.append(Axis("time", longest / unit, unit, name, began=began))
    return axes


def _curves(records: list[RunRecord], overview: Overview, axes: list[Axis]) -> Markup | None:
    if not overview.panels:
        return None
    rules = [rule for run, record in enumerate(records) for rule in interruptions(run, record.marks)]
    figures = [_figure(panel, axes, rules, len(records)) for panel in overview.panels]
    drawn = f"the lowest and highest in each of {COLUMNS} columns are drawn, so that no spike is lost"
    said = [f"Where there are more than {2 * COLUMNS} values, {drawn}."]
    if rules:
        said.append("A dashed vertical line is a restart, or where the weights went back.")
    if any("broken" in figure for figure in figures):
        said.append("\u00d7 marks values that are not finite.")
    if overview.constant:
        said.append(f"Never changed: {'; '.join(overview.constant[:40])}.")
    if overview.left_out:
        said.append(f"{overview.left_out:,} further pictures are left out.")
    return tag(
        "section", tag("h2", "Curves"), tag("div", *figures, class_="figures"),
        tag("p", " ".join(said), class_="note"),
    )  # fmt: skip


def _controls(records: list[RunRecord], axes: list[Axis]) -> Markup:
    """Switches of time line and curves, which work by CSS alone."""
    parts = []
    if len(axes) > 1:
        choices = [("samples", "images seen"), ("time", "wall time")]
        parts += [
            tag("label", tag("input", type="radio", name="x", id=f"x-{name}", checked=name == "samples"), text)
            for name, text in choices
        ]
    if len(records) > 1:
        for run, record in enumerate(records):
            box = tag("input", type="checkbox", id=f"show-{run}", checked=True)
            parts.append(tag("label", box, tag("span", class_=f"key c{run}"), record.name))
    return tag("form", *parts, class_="controls", autocomplete="off")


def _figure(panel: Panel, axes: list[Axis], rules: list[Rule], runs: int) -> Markup:
    labels = []
    for line in {line.series: line for line in panel.lines}.values():
        if not line.label and runs > 1:
            continue
        sample = tag(
            "svg", tag("line", x1=0, x2=18, y1=4, y2=4, stroke_dasharray=dash(line, runs)), viewBox="0 0 18 8",
            class_=f"sample {colour_class(line, runs) if runs == 1 else 'ink'}",
        )  # fmt: skip
        value = number(float(line.curve.values[-1])) if runs == 1 else ""
        labels.append(tag("span", sample if line.label else None, " ".join(filter(None, (line.label, value)))))
    if panel.left_out:
        labels.append(tag("span", f"and {panel.left_out} more"))
    picture = draw(panel, axes, rules, runs) or tag("p", "no value is finite", class_="empty")
    caption = tag("figcaption", tag("b", panel.title), tag("span", *labels, class_="legend"), tag("output"))
    return tag("figure", caption, picture)


def _events(records: list[RunRecord], axes: list[Axis]) -> Markup:
    parts = []
    for run, record in enumerate(records):
        name = tag("h3", tag("span", class_=f"key c{run}"), record.name) if len(records) > 1 else None
        line = draw_timeline(run, record.marks, axes)
        if line is None:
            parts.append(joined(name, tag("p", "Nothing happened that is worth a mark.", class_="note")))
            continue
        listed = tag("details", tag("summary", f"list of {len(record.marks):,} events"), list_marks(record.marks))
        parts.append(joined(name, line, listed))
    return tag("section", tag("h2", "Events"), _controls(records, axes), *parts)


def _evaluations(records: list[RunRecord]) -> Markup | None:
    parts = []
    for record in records:
        if record.evaluations:
            name = tag("h3", record.name) if len(records) > 1 else None
            parts.append(joined(name, *(show_evaluation(found) for found in record.evaluations)))
    return tag("section", tag("h2", "Evaluation of the hand-off"), *parts) if parts else None


def _setup(records: list[RunRecord]) -> Markup | None:
    """What each run was: model card, recipe, DeepSpeed's configuration, environment; folded."""
    parts = []
    for record in records:
        contents = {"recipe": record.recipe, "ds_config": record.deepspeed, "environment": record.environment}
        folded = [
            tag("details", tag("summary", name), fields(content)) for name, content in contents.items() if content
        ]
        if record.card:
            folded.insert(0, tag("details", tag("summary", "model card"), show_card(record.card)))
        if folded:
            parts.append(joined(tag("h3", record.name) if len(records) > 1 else None, *folded))
    return tag("section", tag("h2", "What ran"), *parts) if parts else None
