"""Versions are pinned once, and the pages name what exists, are short and open with a command."""

import ast
import importlib.metadata
import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pretrain.fields import dotted_names
from pretrain.recipe import CHANGEABLE, Recipe
from tests.pages import PAGES, ROOT, SITE

PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_versions_are_pinned_in_constraints_alone() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", f"{name}=={version}") for name, version in PINS.items())
    named = [*PROJECT["project"]["dependencies"], *(name for extra in EXTRAS.values() for name in extra)]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in named), "pyproject.toml names a version"
    assert {canonicalize_name(name) for name in named} <= {canonicalize_name(name) for name in PINS}


def test_whatever_an_installation_pulls_in_is_pinned() -> None:
    """On a machine with GPUs the CUDA libraries of torch and DALI, too."""
    pinned = {canonicalize_name(name) for name in PINS}
    assert PROJECT["build-system"]["requires"] == [f"setuptools=={PINS['setuptools']}"], "a wheelhouse would need both"
    installed = re.search(r"^EXTRAS \?= (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split(",")
    names = [*PROJECT["project"]["dependencies"], *(name for extra in installed for name in EXTRAS[extra])]
    wanted = [Requirement(name) for name in names]
    seen: set[str] = set()
    while wanted:
        one = wanted.pop()
        if str(one) in seen:
            continue
        seen.add(str(one))
        assert canonicalize_name(one.name) in pinned, f"{one} is not pinned in constraints.txt"
        needs = [Requirement(text) for text in importlib.metadata.requires(one.name) or ()]
        chosen = ("", *one.extras)
        wanted += [n for n in needs if n.marker is None or any(n.marker.evaluate({"extra": e}) for e in chosen)]
    assert len(seen) > 100


def test_pre_commit_has_the_pinned_version_of_ruff() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["rev"] == f"v{PINS['ruff']}"


def test_pages_are_short_and_open_with_a_command() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
    for page in SITE:
        lines = page.read_text().splitlines()
        assert len(lines) <= 130, page.name
        assert lines[0].startswith("# "), page.name
        assert lines[1:3] == ["", "```bash"], page.name


def test_every_page_is_on_the_site() -> None:
    named = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    assert len(named) == len({*named})
    assert {*named} == {page.name for page in SITE} | {"index.md", "contributing.md", "security.md"}


def test_the_page_of_recipe_fields_has_every_section_and_what_may_change_on_a_resume() -> None:
    text = (ROOT / "docs/recipe.md").read_text()
    tables = {*re.findall(r"^<!-- fields: (\S+) -->$", text, re.MULTILINE)}
    assert tables >= {"recipe"} | {name.split(".")[0] for name in dotted_names(Recipe) if "." in name}
    may_change = text.partition("When a run is resumed")[2].partition("\n\n")[0]
    removed = {"model.overrides.attention_kernel"}  # old recipes have it
    assert {*re.findall(r"`([\w.]+)`", may_change)} == {*CHANGEABLE, "gradient_clipping", "name"} - removed


def test_source_files_named_in_the_pages_exist() -> None:
    packages = ("models", "data_pipeline", "pretrain", "slurm", "benchmarks", "examples", "tests")
    sources = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    known = {name for path in sources for name in (str(path.relative_to(ROOT)), path.name)}
    for page in PAGES:
        named = set(re.findall(r"`([\w./]+\.py)`", page.read_text()))
        assert named <= known, f"{page.name} names {named - known}"


def test_links_between_pages_resolve_and_the_readme_links_every_page() -> None:
    linked = {page: re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()) for page in PAGES}
    for page, links in linked.items():
        for path, anchor in links:
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name} links to {path}"
            if anchor:
                titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in slugs, f"{page.name} links to {path}#{anchor}"
    assert {path for path, _ in linked[ROOT / "README.md"]} >= {f"docs/{page.name}" for page in SITE}


def test_recipe_fields_named_in_the_pages_exist() -> None:
    known = {*dotted_names(Recipe), *CHANGEABLE}
    sections = {name.split(".")[0] for name in known if "." in name}
    named = {
        (page.name, name)
        for page in PAGES
        for name in re.findall(r"`([a-z_]+(?:\.[a-z0-9_]+)+)[`:= ]", page.read_text())
        if name.split(".")[0] in sections and not name.endswith((".py", ".safetensors"))
    }
    assert len(named) > 20
    assert not {(page, name) for page, name in named if name not in known}


def test_messages_explained_in_troubleshooting_are_those_of_the_code() -> None:
    sources = [path for package in ("data_pipeline", "pretrain", "slurm") for path in (ROOT / package).rglob("*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    quoted = re.findall(r"\*\*(`[^*]+`)\.\*\*", (ROOT / "docs/troubleshooting.md").read_text())
    messages = [message for line in quoted for message in re.findall(r"`([^`]+)`", line)]
    assert len(messages) > 20
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split("..."))):
            assert any(part in text for text in texts), f"no message has {part!r}"
