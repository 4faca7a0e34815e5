"""What ``pretrain.evaluate`` found out about a hand-off, and its model card."""

import base64
import re
from typing import Any

from pretrain.report.axes import number
from pretrain.report.curves import as_finite
from pretrain.report.markup import Markup, escaped, joined, table, tag
from pretrain.report.source import StoredEvaluation

_WORST = 15
_TOTALS = {
    "top1": "top-1, %",
    "top5": "top-5, %",
    "mean_class_top1": "top-1, mean over classes, %",
    "loss": "cross-entropy, nats",
    "samples": "pictures",
    "unreadable": "pictures that cannot be read",
}
_CODE = re.compile(r"`([^`\n]+)`")


def show_evaluation(found: StoredEvaluation) -> Markup:
    """Totals, calibration, the worst classes, and the picture of what is taken for what."""
    content = found.content
    rows = [
        [name, number(value)] for key, name in _TOTALS.items() if (value := as_finite(content.get(key))) is not None
    ]
    calibration = _part(content, "calibration")
    if (error := as_finite(calibration.get("expected_calibration_error"))) is not None:
        rows.append(["expected calibration error, %", number(error)])
    real = _part(content, "real")
    if (top1 := as_finite(real.get("top1"))) is not None:
        rows.append(["ReaL top-1, %", number(top1)])
    picture = None
    if found.picture is not None:
        source = f"data:image/png;base64,{base64.b64encode(found.picture).decode()}"
        picture = tag("img", src=source, alt=f"confusion of the worst classes on {found.name}", class_="confusion")
    tables = tag("div", table([], rows, class_="numbers"), _worst(content), class_="beside")
    return tag("section", tag("h3", found.name), tables, picture)


def _part(content: dict[str, Any], key: str) -> dict[str, Any]:
    part = content.get(key)
    return part if isinstance(part, dict) else {}


def _worst(content: dict[str, Any]) -> Markup | None:
    """The classes with the lowest top-1, of those with mistakes."""
    classes = content.get("per_class")
    rows = [
        (share, row)
        for row in (classes if isinstance(classes, list) else [])
        if isinstance(row, dict) and (share := as_finite(row.get("top1"))) is not None
    ]
    names = {str(row.get("id")): row.get("name") for _, row in rows}
    rows.sort(key=lambda pair: pair[0])
    shown = []
    for share, row in [pair for pair in rows if pair[0] < 100][:_WORST]:
        taken = list(_part(row, "confused_with").items())[:2]
        confused = ", ".join(f"{names.get(other, other)} ({times})" for other, times in taken)
        shown.append([row.get("name"), number(round(share, 2)), row.get("samples"), confused])
    if not shown:
        return None
    return table(
        [f"worst of {len(rows):,} classes", "top-1, %", "pictures", "taken for"], shown, class_="numbers worst"
    )


def show_card(text: str) -> Markup:
    """A model card as we write them: headings, tables, paragraphs and code of Markdown; its front matter as it is."""
    front, body = "", text
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        front, body = text[4:].split("\n---\n", 1)
    parts = [_block(block) for block in _blocks(body)]
    folded = tag("details", tag("summary", "front matter"), tag("pre", front)) if front else None
    return tag("article", *parts, folded, class_="card")


def _blocks(text: str) -> list[list[str]]:
    """Lines of Markdown by block: code in fences is one, else empty lines part them."""
    blocks: list[list[str]] = [[]]
    fenced = False
    for line in text.splitlines():
        fence = line.startswith("```")
        if (fence and not fenced) or (not line.strip() and not fenced):
            blocks.append([])
        if line.strip() or fenced:
            blocks[-1].append(line)
        if fence:
            fenced = not fenced
            if not fenced:
                blocks.append([])
    return [block for block in blocks if block]


def _block(lines: list[str]) -> Markup:
    first = lines[0]
    if first.startswith("```"):
        return tag("pre", "\n".join(line for line in lines[1:] if not line.startswith("```")))
    if first.startswith("#"):
        rest = [_block(lines[1:])] if lines[1:] else []
        return joined(tag("h4", _inline(first.lstrip("# "))), *rest)
    if all(line.startswith("|") for line in lines):
        cells = [[_inline(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in lines]
        return table([], [row for row in cells if any(re.search(r"[^-: ]", cell) for cell in row)], class_="fields")
    return tag("p", _inline(" ".join(lines)))


def _inline(text: str) -> Markup:
    parts = _CODE.split(text)  # code at the odd places
    return joined(*(tag("code", part) if place % 2 else escaped(part) for place, part in enumerate(parts)))
