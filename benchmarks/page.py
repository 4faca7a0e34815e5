"""The tables of docs/performance.md, and its picture, made from the newest results: ``python -m benchmarks.page``.

Between ``<!-- made: NAME -->`` and ``<!-- end: NAME -->`` nothing is typed by hand. Of every benchmark the newest
section of each machine counts; a quick look (``--quick``) never does. A test holds the page to it.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import chart, goals, tables
from benchmarks.report import RESULTS, say
from pretrain.planning.published import PUBLISHED, our_efficiency

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/performance.md"
PICTURE = ROOT / "docs/pictures/performance.png"
VERSIONS = {
    "model": (), "alternatives": ("timm", "torchvision"), "data": ("nvidia-dali", "webdataset", "pillow"),
    "input_settings": ("nvidia-dali",),
    "trainer": ("deepspeed",), "end_to_end": ("deepspeed", "nvidia-dali", "webdataset", "pillow"),
}  # fmt: skip
"""Packages that a table names beside torch."""
Section = dict[str, Any]


def read_results(folder: Path = RESULTS) -> list[Section]:
    """All sections of all results but quick ones, oldest first; each knows its kind and its file.

    Raises:
        ValueError: a file is damaged; it is named.
    """
    sections = []
    for file in sorted(folder.glob("bench-*.json")):
        try:
            content = json.loads(file.read_text())["sections"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file} is no result of python -m benchmarks: {error}; measure again") from None
        for kind, section in content.items():
            rivals = kind == "model" and not all(is_ours(row) for row in section["rows"])
            sections.append(section | {"kind": "alternatives" if rivals else kind, "file": file.name})
    return sorted((one for one in sections if not one["quick"]), key=lambda one: one["when"])


def is_ours(row: dict[str, Any]) -> bool:
    """Whether a row of ``benchmarks.model`` is of a network of ours."""
    return row["model"].startswith("lavit_")


def newest(sections: list[Section], kind: str) -> list[Section]:
    """The newest section of a kind on each machine; those on GPUs first.

    Where our networks were measured beside timm's alone, as in an environment that has timm, ``model`` is our part of
    that.
    """
    found: dict[tuple[str, str, int, int], Section] = {}
    for wanted in (["alternatives"] if kind == "model" else []) + [kind]:
        for section in (section for section in sections if section["kind"] == wanted):
            machine = section["machine"]
            at = machine["device"], machine["name"], len(machine["gpus"]), machine["cores"]
            rows = [row for row in section["rows"] if kind != "model" or is_ours(row)]
            found[at] = section | {"rows": rows}
    return sorted(found.values(), key=lambda section: section["machine"]["device"] == "cpu")


def described(section: Section) -> str:
    """Where a table comes from, in a paragraph."""
    machine, versions = section["machine"], section["versions"]
    where = f"{len(machine['gpus'])} x {machine['name']}" if machine["gpus"] else machine["name"]
    named = ["torch", *(name for part in VERSIONS[section["kind"]] for name in versions if name.startswith(part))]
    facts = [
        f"{where}, {machine['cores']} cores" + (f", driver {machine['driver']}" if machine["driver"] else ""),
        section["when"][:10],
        *(f"{name} {versions[name]}" for name in named),
        f"revision {section['revision']}" + (" and changes" if section["changed"] else ""),
        f"load average {section['load_before']} before it, {section['seconds']} s",
    ]
    conditions = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in section["conditions"].items())
    made = f"`{section['command']}`, `benchmarks/results/{section['file']}`"
    return f"{'; '.join(facts)}. {conditions.capitalize()}. {made}:"


def block(sections: list[Section], kind: str) -> list[str]:
    """The tables of a kind, one for each machine, and what was not measured."""
    table = {"alternatives": tables.model}.get(kind, getattr(tables, kind, None))
    assert table is not None
    lines: list[str] = []
    chosen = newest(sections, kind)
    for section in chosen:
        lines += [described(section), "", *table(section), ""]
        if kind == "alternatives":
            lines += [tables.in_faster_modes(section), ""]
    if not any(section["machine"]["device"] == "cuda" for section in chosen):
        lines += [f"On a GPU: {tables.NOT_MEASURED}."]
    if not any(section["machine"]["device"] == "cpu" for section in chosen):
        lines += [f"On a CPU: {tables.NOT_MEASURED}."]
    return lines


def scaling() -> list[str]:
    """What others published beside what the simulation says of their machines."""
    lines = [
        "| network | GPUs | published | simulated, talk hidden | simulated, not hidden | source |",
        "|---|---|---|---|---|---|",
    ]
    for of in PUBLISHED:
        hidden, open_ = (our_efficiency(of, overlap=overlap) for overlap in (True, False))
        lines.append(
            f"| {of.network} | {of.few} to {of.many} | {of.efficiency:.0%} | {hidden:.0%} "
            f"({100 * (hidden - of.efficiency):+.0f}) | {open_:.0%} ({100 * (open_ - of.efficiency):+.0f}) "
            f"| {of.source}: {of.where} |"
        )
    return lines


def blocks(sections: list[Section]) -> dict[str, list[str]]:
    """Everything on the page that is made, by name."""
    kinds = {kind: block(sections, kind) for kind in VERSIONS}
    return {"goals": goals.table({kind: newest(sections, kind) for kind in VERSIONS}), **kinds, "scaling": scaling()}


def render(page: str, sections: list[Section]) -> str:
    """The page with its blocks made anew.

    Raises:
        ValueError: the page lacks one of them.
    """
    for name, lines in blocks(sections).items():
        begin, end = f"<!-- made: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"{PAGE} has no place for {name}: add the lines {begin} and {end}")
        text = "\n".join([begin, *lines, end])
        page = pattern.sub(lambda _, text=text: text, page)
    return page


def write_page() -> list[Path]:
    """Make page and picture anew; their paths."""
    sections = read_results()
    PAGE.write_text(render(PAGE.read_text(), sections))
    chart.draw({kind: newest(sections, kind) for kind in VERSIONS}, PICTURE)
    return [PAGE, PICTURE]


if __name__ == "__main__":
    say([f"wrote {file}" for file in write_page()])
    sys.exit(0)
