"""HTML that escapes by default."""

import html
import re
from typing import Any

_NEVER_CLOSED = {"img", "input", "meta", "br"}
_NOT_IN_HTML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Control characters, halves of surrogates, and what turns the direction of the text around it."""


class Markup(str):
    """Text that is HTML already; any other text is escaped where it is put in."""

    __slots__ = ()


def escaped(content: Any) -> Markup:
    """Content as HTML; what has no place in it becomes U+FFFD."""
    if isinstance(content, Markup):
        return content
    return Markup(html.escape(_NOT_IN_HTML.sub("\ufffd", str(content)), quote=True))


def tag(name: str, /, *inside: Any, **attributes: Any) -> Markup:
    """An element with its content.

    Args:
        name: of the element.
        inside: its content; escaped unless it is ``Markup``.
        attributes: a trailing ``_`` is dropped, other ``_`` become ``-``; None leaves an attribute out, True gives it
            no value.
    """
    opened = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        plain = key.rstrip("_").replace("_", "-")
        opened += f" {plain}" if value is True else f' {plain}="{escaped(value)}"'
    if name in _NEVER_CLOSED:
        return Markup(f"<{opened}>")
    return Markup(f"<{opened}>{joined(*inside)}</{name}>")


def joined(*parts: Any) -> Markup:
    """Parts one after another; None is left out."""
    return Markup("".join(escaped(part) for part in parts if part is not None))


def table(head: list[Any], rows: list[list[Any]], *, class_: str | None = None) -> Markup:
    """A table; the first cell of a row is its heading. It scrolls by itself where it is wider than the page."""
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))) if head else None
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("div", tag("table", top, tag("tbody", *body), class_=class_), class_="wide")
