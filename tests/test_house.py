"""The walls of the house stand where the README draws them."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


def test_the_check_of_imports_sees_every_form() -> None:
    source = "import models.lavit\ndef f():\n    from slurm import launch\n    from pretrain.recipe import Recipe"
    assert imported_rooms(source) == {"models", "slurm", "pretrain"}


def python_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [ROOT / name for name in listed if (ROOT / name).exists()]


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
    assert json.loads((ROOT / "ds_config.json").read_text())["zero_optimization"]["stage"] in range(4)
