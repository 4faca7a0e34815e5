"""What mkdocs.yml adds to docs/: pages from the repository's root, and tables of the recipe's fields."""

import re
from collections import defaultdict
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from pretrain.fields import FieldHelp, field_help
from pretrain.recipe import Recipe

ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
MARKER = re.compile(r"^<!-- fields: (\S+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the root."""
    for name, page in ROOT_PAGES.items():
        text = (Path(config.config_file_path).parent / name).read_text()
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Point links to pages from the root at their names here, and fill in the tables of fields."""
    for name, target in ROOT_PAGES.items():
        markdown = re.sub(rf"\]\((\.\./)?{name}", f"]({target}", markdown)
    sections = MARKER.findall(markdown)
    if not sections:
        return markdown
    tables = field_tables(sections)
    return MARKER.sub(lambda marker: tables[marker[1]], markdown)


def field_tables(sections: list[str]) -> dict[str, str]:
    """Return a Markdown table for each section of a recipe; "recipe" is what is in no section.

    Raises:
        PluginError: a field belongs to none of the sections, or a section has no field.
    """
    fields: dict[str, list[FieldHelp]] = defaultdict(list)
    for field in field_help(Recipe):
        parents = [name for name in sections if f"{field.name}.".startswith(f"{name}.")]
        section = max(parents, key=len, default="recipe" if "." not in field.name else "")
        fields[section].append(field)
    if wrong := {*fields} ^ {*sections}:
        raise PluginError(f"fields without a table, or tables without a field: {', '.join(map(str, sorted(wrong)))}")
    return {name: "\n".join([*_HEAD, *(_row(field, name) for field in fields[name])]) for name in sections}


_HEAD = ("| field | takes | default | meaning |", "|---|---|---|---|")


def _row(field: FieldHelp, section: str) -> str:
    name = field.name.removeprefix(f"{section}.")
    default = "required" if field.default.startswith("required") else field.default.removeprefix("default: ") or "off"
    takes = field.takes.removesuffix(", off unless given")
    cells = (f"`{name}`", takes, default, field.meaning.replace("``", "`"))
    return "| " + " | ".join(cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells) + " |"
