"""Fields of pydantic models as text: what one takes, what is wrong with a value, and which key was meant."""

import difflib
import shutil
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def explain(
    model: type[BaseModel], content: Any, error: ValidationError, hint: Callable[[str], str] | None = None
) -> list[tuple[str, str]]:
    """Turn pydantic's report on ``content`` into lines without its jargon, one for each field.

    ``hint`` gives what follows an unknown key; without it, that is the most similar one of its section.

    Returns:
        pairs of a dotted key, "" for the model itself, and a text that names it.
    """
    found: dict[str, str] = {}  # a field of several types has one error for each of them
    for detail in error.errors():
        location, field = _locate(model, detail["loc"])
        key, value = ".".join(location), content
        if detail["type"] == "extra_forbidden":
            key = ".".join(map(str, detail["loc"]))
            text = f"unknown key {key}" + (hint(key) if hint else did_you_mean(*similar(model, key)))
        elif detail["type"] == "missing" and len(location) == len(detail["loc"]):
            text = f"{key} is missing"
        elif detail["type"] == "value_error":  # a check of the model itself, with a message of its own
            text = f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
        else:
            for part in location:
                value = value[part] if isinstance(value, dict) and part in value else detail["input"]
            kind = "a section of fields" if field is None else describe(field.annotation, field.metadata)
            text = f"{key}: must be {kind}, got {shown(value)}"
        found.setdefault(key, text)
    return [*found.items()]


def did_you_mean(*keys: str) -> str:
    """The question that follows an unknown key; "" without any candidate."""
    return f" (did you mean {' or '.join(keys)}?)" if keys else ""


def similar(model: type[BaseModel], key: str, cutoff: float = 0.6) -> list[str]:
    """The most similar key in the section of an unknown one, if there is one."""
    *path, last = key.split(".")
    location, _ = _locate(model, path)
    prefix = "".join(f"{part}." for part in location)
    siblings = [name.removeprefix(prefix) for name in dotted_names(model) if name.startswith(prefix)]
    names = dict.fromkeys(name.split(".")[0] for name in siblings)
    return [prefix + name for name in difflib.get_close_matches(last, names, n=1, cutoff=cutoff)]


def dotted_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Names of all fields that are no sections."""
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        yield from [f"{prefix}{name}"] if inner is None else dotted_names(inner, f"{prefix}{name}.")


def section_of(kind: Any) -> type[BaseModel] | None:
    """The model that a field of this type holds, also where it may be left out."""
    for member in get_args(kind) if _is_union(kind) else (kind,):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def describe(kind: Any, metadata: Iterable[Any] = ()) -> str:
    """What a field of a type takes, such as "a number > 0"."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(members[0], members[1:])
    if _is_union(kind):
        inner = [describe(member, metadata) for member in members if member is not types.NoneType]
        return " or ".join([*inner, *(["null"] if types.NoneType in members else [])])
    choices = members if origin is Literal else ()
    if isinstance(kind, type) and issubclass(kind, Enum):
        choices = tuple(member.value for member in kind)
    if choices:
        return " or ".join(filter(None, [", ".join(map(repr, choices[:-1])), repr(choices[-1])]))
    if origin is tuple and members[-1] is not Ellipsis:
        return f"{len(members)} values, each {describe(members[0])}"
    if origin in (tuple, list):
        return f"a list of values, each {describe(members[0])}"
    if kind not in _KINDS:
        return "a section of fields"
    bounds = [
        f"{sign} {limit:g}" if isinstance(limit, float) else f"{sign} {limit}"
        for entry in metadata
        for each in (entry.metadata if isinstance(entry, FieldInfo) else [entry])
        for name, sign in _BOUNDS.items()
        if (limit := getattr(each, name, None)) is not None
    ]
    return f"{_KINDS[kind]} {' and '.join(bounds)}".rstrip()


def shown(value: Any) -> str:
    """A value as YAML and JSON write it, shortened."""
    text = repr(value)
    text = {"None": "null", "True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 80 else f"{text[:79]}…"


class FieldHelp(NamedTuple):
    """A field of a model as text."""

    name: str  # dotted
    takes: str  # such as "a number > 0"
    default: str  # such as "required" or "default: 1"; "" for a section that is off unless it is given
    meaning: str


def field_help(model: type[BaseModel], prefix: str = "", when: str = "") -> Iterator[FieldHelp]:
    """Yield every field of a model and of its sections, except the sections that are always on.

    ``prefix`` is of their names; ``when`` names the section that must be on for them to count.
    """
    for name, field in model.model_fields.items():
        inner, key = section_of(field.annotation), f"{prefix}{name}"
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        off = inner is not None and default is None and not field.is_required()
        if inner is None or off:
            takes = "section, off unless given" if off else describe(field.annotation, field.metadata)
            given = f"required{when}" if field.is_required() else f"default: {_default(default)}"
            yield FieldHelp(key, takes, "" if off else given, " ".join((field.description or "").split()))
        if inner is not None:
            yield from field_help(inner, f"{key}.", f" where {key} is given" if off else when)


def describe_fields(model: type[BaseModel]) -> Iterator[str]:
    """Yield lines of help for every field of a model: its name, what it takes, its default and its meaning."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 100)
    for each in field_help(model):
        yield f"  {each.name}: {each.takes}" + (f" ({each.default})" if each.default else "")
        yield from textwrap.wrap(each.meaning, width, initial_indent=6 * " ", subsequent_indent=6 * " ")


def _default(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_default, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else shown(value)


def _locate(model: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str], FieldInfo | None]:
    """The part of a location that names fields, and the last of them; what follows are types and indices."""
    names: list[str] = []
    field, section = None, model
    for part in location:
        if section is None or part not in section.model_fields:
            break
        names.append(str(part))
        field = section.model_fields[str(part)]
        section = section_of(field.annotation)  # type: ignore[assignment]
    return names, field


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (types.UnionType, Union)
