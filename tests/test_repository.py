"""Recipes are valid, versions are pinned once, and the pages name files that exist."""

import importlib.metadata
import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pretrain.fields import dotted_names
from pretrain.recipe import Recipe
from tests.pages import PAGES, ROOT


def test_the_head_of_the_demos_recipe_has_the_command() -> None:
    """``tests/pretrain/test_recipes.py`` starts the others."""
    text = (ROOT / "recipes/demo.yaml").read_text()
    assert "--recipe recipes/demo.yaml" in text.partition("\nname:")[0]


def test_versions_are_pinned_in_constraints_alone() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line) for line in pins)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in named), "pyproject.toml names a version"
    assert {name.lower() for name in named} <= pinned


def test_whatever_an_installation_pulls_in_is_pinned() -> None:
    """On a machine with GPUs the CUDA libraries of torch and DALI, too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])
    pinned = {canonicalize_name(name) for name in pins}
    assert project["build-system"]["requires"] == [f"setuptools=={pins['setuptools']}"], "a wheelhouse would need both"
    wanted = [Requirement(name) for name in [*project["project"]["dependencies"], *extras["remote"], *extras["dev"]]]
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
    assert {path for path, _ in linked[ROOT / "README.md"]} >= {f"docs/{page.name}" for page in PAGES[2:]}


def test_recipe_fields_named_in_the_pages_exist() -> None:
    known = {*dotted_names(Recipe)}
    sections = {name.split(".")[0] for name in known if "." in name}
    named = {
        (page.name, name)
        for page in PAGES
        for name in re.findall(r"`([a-z_]+(?:\.[a-z0-9_]+)+)[`:= ]", page.read_text())
        if name.split(".")[0] in sections and not name.endswith((".py", ".safetensors"))
    }
    assert len(named) > 20
    assert not {(page, name) for page, name in named if name not in known}
