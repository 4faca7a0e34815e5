"""Everything that the rooms say when something is wrong, read from their source."""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "data_pipeline", "pretrain", "slurm", "examples")
SPOKEN = (
    "models/config.py", "data_pipeline/normalise.py", "data_pipeline/reader.py", "data_pipeline/verify.py",
    "pretrain/evaluation/class_match.py", "pretrain/engine/deepspeed_keys.py", "pretrain/survival/watchdog.py",
    "slurm/restart.py", "slurm/standing.py",
)  # fmt: skip
"""Here texts are handed on as values before they are said, so every one of some words counts."""
NOT_FOR_PEOPLE = {"StopIteration", "AssertionError", "EOFError", "BlockingIOError", "ProbesEndedError", "struct.error"}
"""Raised to be caught in the same file."""
NO_PROBLEM = {"ArgumentParser", "add_argument", "print", "ClassMatch", "join"}
"""Calls whose texts tell of nothing wrong."""
HOLE = "\0"
"""Stands for what differs from case to case."""


@dataclass(frozen=True)
class Message:
    """What is said, and where in the source."""

    where: str
    text: str


def messages() -> list[Message]:
    """All of them; passed on texts of others are left out."""
    found = (
        Message(f"{name}:{node.lineno}", " ".join(text.split()))
        for name, tree in _sources().items()
        for node, text in _said(tree, whole=name in SPOKEN)
    )
    return [one for one in dict.fromkeys(found) if len(re.findall(r"[a-z]{2,}", one.text.replace(HOLE, " "))) >= 2]


def texts() -> list[Message]:
    """Every text in the rooms that is no documentation, whether it tells of anything wrong or not."""
    return [
        Message(name, " ".join(_text(node).split()))
        for name, tree in _sources().items()
        for node in _spoken(tree, set())
    ]


@functools.cache
def _sources() -> dict[str, ast.Module]:
    files = (file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")))
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in files}


def _spoken(tree: ast.Module, unless: set[str]) -> Iterator[ast.JoinedStr | ast.Constant]:
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    left_out |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in unless:
            left_out |= {id(inside) for inside in ast.walk(node)}
        elif isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in left_out:
            yield node


def _said(tree: ast.Module, *, whole: bool) -> Iterator[tuple[ast.expr, str]]:
    given: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            given.setdefault(node.targets[0].id, []).append(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if ast.unparse(node.exc.func) not in NOT_FOR_PEOPLE:
                for argument in node.exc.args[:1]:
                    values = given.get(argument.id, []) if isinstance(argument, ast.Name) else [argument]
                    yield from ((value, _text(value)) for value in values)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("parser.error", "warnings.append"):
            yield node, _text(node.args[0])
    for node in _spoken(tree, NO_PROBLEM if whole else set()):
        text = _text(node)
        counts = text.strip().startswith("WARNING ") or (whole and len(text.split()) >= 4)
        if counts and not _is_pattern(text):
            yield node, text


def _is_pattern(text: str) -> bool:
    return any(sign in text for sign in ("(?", "|", "\\S"))


def _text(node: ast.expr) -> str:
    """The constant parts of a text, with holes between them."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return HOLE


def covers(fragment: str, message: Message) -> bool:
    """Whether words of a page occur in a message; dots stand for anything."""
    return _pattern(fragment).search(message.text) is not None


@functools.cache
def _pattern(fragment: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(piece.strip()) for piece in fragment.split("...")))
