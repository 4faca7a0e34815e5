"""The walls of the house stand where the README draws them."""

import ast
import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from tests.commands import PAGES, ROOT

ROOMS = ("models", "data_pipeline", "pretrain", "slurm")
MAY_IMPORT = {
    "models": set(),
    "data_pipeline": set(),
    "pretrain": {"models", "data_pipeline"},
    "slurm": {"pretrain"},
}


def imported_rooms(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {name.split(".")[0] for name in names}
    return found & {*ROOMS, "examples", "tests", "benchmarks"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way_only(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        outside = imported_rooms(file.read_text()) - {room}
        assert outside <= MAY_IMPORT[room], f"{file.relative_to(ROOT)} imports {outside - MAY_IMPORT[room]}"


def test_the_picture_of_the_house_shows_the_imports_of_today() -> None:
    from PIL import Image

    drawn = json.loads(Image.open(ROOT / "docs/pictures/house.png").text["house"])
    today = json.loads(json.dumps(runpy.run_path(str(ROOT / "docs/plot_house.py"))["read_house"]()))
    assert drawn == today, "draw it again: python docs/plot_house.py docs/pictures/house.png"
    assert {*today["modules"]} == {*ROOMS, "examples"}
    assert {*today["imports"]} >= {"slurm -> pretrain", "pretrain -> models", "pretrain -> data_pipeline"}


def test_the_check_of_imports_sees_every_form() -> None:
    source = "import models.lavit\ndef f():\n    from slurm import launch\n    from pretrain.recipe import Recipe"
    assert imported_rooms(source) == {"models", "slurm", "pretrain"}


def python_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [ROOT / name for name in listed if (ROOT / name).exists()]


def test_source_files_that_the_pages_name_exist() -> None:
    known = {path for file in python_files() for path in (str(file.relative_to(ROOT)), file.name)}
    for page in PAGES:
        named = set(re.findall(r"`([\w./]+\.py)`", page.read_text()))
        assert named <= known, f"{page.name} names {named - known}"


def test_links_between_pages_lead_somewhere_and_the_readme_has_all_pages() -> None:
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


def test_no_file_outgrows_its_room() -> None:
    long = {str(f.relative_to(ROOT)): n for f in python_files() if (n := len(f.read_text().splitlines())) > 400}
    assert not long


def test_the_training_loop_reads_in_one_screen() -> None:
    tree = ast.parse((ROOT / "pretrain/train.py").read_text())
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno < 80


def test_there_is_no_room_for_odds_and_ends() -> None:
    assert not [f for f in python_files() if re.fullmatch(r"utils?|helpers?|misc|common", f.stem)]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_valid_and_says_how_to_start_it(path: Path) -> None:
    from models import list_models
    from pretrain.engine.deepspeed_config import read_deepspeed_config
    from pretrain.recipe import load_recipe

    recipe = load_recipe(path)
    assert recipe.model.name in list_models()
    read_deepspeed_config(ROOT / "ds_config.json", recipe.deepspeed)
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"--recipe recipes/{path.name}" in head


def test_versions_are_pinned_in_one_place() -> None:
    import tomllib

    pins = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line) for line in pins)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in named), "a version stands in pyproject.toml"
    assert {name.lower() for name in named} <= pinned


def test_deepspeed_config_is_plain_json() -> None:
    assert json.loads((ROOT / "ds_config.json").read_text())["zero_optimization"]["stage"] == "auto"
