"""Every command and every Python example that README, the pages and the doors show is run, or it is said by what.

Commands of the doors in ``HERE`` are run as they stand, in a folder that looks like the repository after `make demo`.
Those of ``ELSEWHERE`` are run by other tests, in which the module and every flag must occur. ``NOT_RUN`` names the
others, with the reason. The arguments of all of them must be understood, and the files that they name must exist.
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from deepspeed.launcher.runner import parse_args as parse_launcher

from pretrain.outcome import UserError
from pretrain.recipe import describe_fields, load_recipe
from tests.commands import PAGES, ROOT, Command, blocks, commands

HERE = {
    "data_pipeline.verify", "docs/plot_curve.py", "docs/plot_house.py", "pretrain.evaluate", "pretrain.export",
    "pretrain.plan", "pretrain.report", "deepspeed --module pretrain.evaluate", "touch",
}  # fmt: skip
ELSEWHERE = {
    "data_pipeline.build": (
        "tests/data_pipeline/test_build.py",
        "tests/data_pipeline/test_sources.py",
        "tests/data_pipeline/test_build_interrupted.py",
    ),
    "benchmarks.page": ("tests/benchmarks/test_page.py",),
    "pretrain.convert": ("tests/pretrain/test_convert.py",),
    "pretrain.evaluate --real": ("tests/pretrain/test_evaluation.py",),
    "examples.segmentation": ("tests/examples/test_examples.py",),
    "examples.detection": ("tests/examples/test_examples.py",),
    "deepspeed pretrain/main.py": (
        "tests/system/launching.py",
        "tests/system/test_profile.py",
        "tests/system/test_bad_input.py",
    ),
    "slurm.incarnation": ("tests/slurm/test_pieces.py",),
    "slurm.job": ("tests/slurm/test_pieces.py",),
    "slurm.launch": ("tests/slurm/runs.py", "tests/slurm/test_sites.py"),
    "slurm.release": ("tests/slurm/runs.py",),
    "slurm.status": ("tests/slurm/runs.py",),
    "slurm.stop": ("tests/slurm/runs.py",),
    "tensorboard": ("tests/system/browser.py",),
    "make demo": (".ci/run",),
    "make lint": (".ci/run",),
    "make setup": (".ci/run",),
    "make test": (".ci/run",),
    "tests.system.soak": ("tests/system/test_soak.py",),
    "tests.system.browser": ("tests/system/test_watching.py",),
}
NOT_RUN = {
    ".ci/run": "it is what runs all tests",
    "make setup CUDA=12": "another environment of some gigabytes",
    "source .venv/bin/activate": "a shell's own word",
    "deepspeed --quiet": "a switch of the launcher, which `make demo` gives",
    "deepspeed --module pretrain.evaluate RUN_OR_HANDOFF --data DEST": "a rank a GPU; with two ranks it is run",
    "hf upload ORGANIZATION/NAME runs/NAME/handoff": "publishes on the Hub, which the page says was not tried",
    "pip install --constraint constraints.txt huggingface_hub": "`make setup` installs it here",
    "make bench": "takes ten minutes; a dated file in benchmarks/results says that it was run",
    "make soak N=100": "takes an hour; tests/system/test_soak.py runs ten rounds",
    "grep ^step": "on a log; that its lines begin so is what tests/pretrain/test_console.py checks",
    "scontrol requeue": "what slurm.incarnation calls, said by its name; tests/slurm lives by it",
    "scontrol show job": "Slurm's own",
    "python3 -m venv ../venv-timm": "takes 6 GB; done by hand, CONTRIBUTING.md says with which versions",
    "../venv-timm/bin/pip install torch torchvision timm numpy safetensors pydantic fsspec pytest pytest-timeout": "too",  # noqa: E501
    "../venv-timm/bin/python -m benchmarks.model --sizes small --note timm": "too",
    "../venv-timm/bin/python -m pytest tests/models tests/pretrain/test_timm_handoff.py": "too",
    "python3 -m venv ../venv-trackers": "done by hand, CONTRIBUTING.md says with which versions",
    "../venv-trackers/bin/pip install torch tensorboard numpy wandb trackio pytest pytest-timeout": "too",
    "../venv-trackers/bin/python -m pytest tests/pretrain/test_trackers.py": "too",
    "pip install --constraint constraints.txt wandb": "would change the environment of the tests",
}
WITHOUT_ARGUMENTS = ("benchmarks.index", "benchmarks.page")
MEASURES = "takes minutes by hand; a dated file in benchmarks/results says that it was run"


class Understood(BaseException):
    """Arguments were parsed, and that is enough."""


def door(words: list[str]) -> tuple[str, list[str]]:
    """What a command starts, by a name of its own, and the arguments for it."""
    if words[0] == "deepspeed":
        with contextlib.redirect_stderr(io.StringIO()):
            given = parse_launcher(words[1:])
        kind = "--module " if given.module else ""
        return f"deepspeed {kind}{given.user_script}", given.user_args
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    if words[0] == "python":
        return words[1], words[2:]
    if words[0] == "make":
        return " ".join(words[:2]), words[2:]
    return words[0], words[1:]


def cases() -> list[Any]:
    """Each form of each command once, by the page that has it first."""
    first: dict[tuple[str, ...], Command] = {}
    for command in commands():
        for form in command.forms():
            first.setdefault(tuple(form), command)
    return [pytest.param(list(form), one.text, id=f"{one.page}: {' '.join(form)}") for form, one in first.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, straight: Path, digits: Path) -> Path:
    """A folder that looks like the repository where the demo was run, and where no test can spoil anything."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("benchmarks", "data_pipeline", "examples", "models", "pretrain", "recipes", "slurm", "ds_config.json"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("docs/pictures", "runs", "data", "folder"):
        (folder / name).mkdir(parents=True)
    for script in (ROOT / "docs").glob("*.py"):
        (folder / "docs" / script.name).symlink_to(script)
    (folder / "data/digits").symlink_to(digits)
    for name in ("demo", "again"):
        shutil.copytree(straight, folder / "runs" / name)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder, and a process that is afterwards as it was, whatever doors and libraries set in it."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with mock.patch.dict(os.environ):
        yield place


def test_the_pages_have_commands() -> None:
    assert {page.name for page in PAGES} > {"README.md", "CONTRIBUTING.md", "data.md", "cluster.md"}
    assert len(cases()) > 60
    assert NOT_RUN.keys() <= {command.text for command in commands()}, "no page has it any more"


@pytest.mark.parametrize(("words", "text"), cases())
def test_a_command_is_understood_and_something_runs_it(words: list[str], text: str, here: Path) -> None:
    missing = [word for word in words if re.match(r"(recipes|docs|tests|\.ci|pretrain)/|\w+\.txt$|ds_config", word)
               and not ((ROOT / word).exists() or (here / word).exists())]  # fmt: skip
    assert not missing, "no such file"
    if text in NOT_RUN:
        return
    name, arguments = door(words)
    is_mention = not arguments and (text.endswith("...") or text in {" ".join(words), f"python -m {name}"})
    understand(name, arguments, is_mention)
    flags = [word for word in arguments if word.startswith("--")]
    elsewhere = next((ELSEWHERE[key] for flag in flags if (key := f"{name} {flag}") in ELSEWHERE), ELSEWHERE.get(name))
    if elsewhere:
        read = "".join((ROOT / file).read_text() for file in elsewhere)
        assert said_in(read, name), f"{name} does not occur in {elsewhere}"
        assert not [flag for flag in flags if flag not in read and flag != "--help"], f"not given in {elsewhere}"
    elif name.split(".")[0] == "benchmarks":
        assert any(f"python -m {name}" in file.read_text() for file in (ROOT / "benchmarks/results").iterdir()), (
            MEASURES
        )
    else:
        assert name in HERE, "nothing runs it: add its door to HERE, or the test that runs it to ELSEWHERE"
        if not is_mention:
            run(name, arguments, here)


def understand(name: str, arguments: list[str], is_mention: bool) -> None:
    """Let the door's own parser read the arguments."""
    if name.startswith("make "):
        subprocess.run(["make", "-n", *name.split()[1:], *arguments], cwd=ROOT, check=True, capture_output=True)
        return
    module = name.removeprefix("deepspeed --module ").replace("deepspeed pretrain/main.py", "pretrain.main")
    if not re.fullmatch(r"(?!tests)\w+(\.\w+)+", module) or module in WITHOUT_ARGUMENTS:
        assert is_mention or module not in WITHOUT_ARGUMENTS
        return
    found = importlib.import_module(f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module)
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)
        raise Understood

    sys.argv = [module, *arguments]
    told = io.StringIO()
    with mock.patch.object(argparse.ArgumentParser, "parse_args", only_parse), contextlib.redirect_stderr(told):
        try:
            getattr(found, "parse_arguments", found.main)()
        except Understood:
            return
        except UserError as refused:
            told.write(str(refused))
        except SystemExit as ended:
            told.write("" if ended.code else "\0")
    assert is_mention or told.getvalue().endswith("\0"), told.getvalue()


def said_in(read: str, name: str) -> bool:
    """Whether a file of tests has to do with a door."""
    words = name.replace("deepspeed ", "").split(".")
    if len(words) == 2 and "/" not in name and words[0]:
        return bool(re.search(rf"{words[0]}\.{words[1]}\b|from {words[0]} import .*\b{words[1]}\b", read))
    return name.replace("deepspeed ", "") in read


def run(name: str, arguments: list[str], here: Path) -> None:
    """Run a command as it stands, in the folder of the demo."""
    if name == "touch" or name.startswith("deepspeed"):
        quick = ["--num_accelerators", "2"] if name.startswith("deepspeed") else []
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        words = [*name.split()[:1], *quick, *name.split()[1:], *arguments]
        environment = os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        ended = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return
    sys.argv = [name, *arguments]
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
        return
    found = importlib.import_module(f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name)
    with contextlib.redirect_stdout(io.StringIO()):
        assert found.main() in (None, 0)


@pytest.mark.parametrize(("page", "shown"), blocks("python"))
def test_a_shown_piece_of_python_runs(page: str, shown: str, here: Path) -> None:
    if "timm" in shown:  # needs an environment of its own
        assert page in (ROOT / "tests/pretrain/test_timm_handoff.py").read_text()
        return
    exec(shown, {"images": torch.randn(2, 3, 32, 32)})


@pytest.mark.parametrize(("page", "shown"), blocks("yaml"))
def test_a_shown_piece_of_a_recipe_is_valid(page: str, shown: str, here: Path) -> None:
    recipe = yaml.safe_load((ROOT / "recipes/demo.yaml").read_text())
    for section, fields in yaml.safe_load(shown).items():
        recipe[section] = {**recipe.get(section, {}), **fields}
    (here / "shown.yaml").write_text(yaml.safe_dump(recipe))
    load_recipe(here / "shown.yaml")


def test_fields_of_a_recipe_that_pages_name_exist() -> None:
    known = {line.split()[0] for line in describe_fields()}
    sections = {name.split(".")[0] for name in known if "." in name}
    named = {
        (page.name, name)
        for page in PAGES
        for name in re.findall(r"`([a-z_]+(?:\.[a-z0-9_]+)+)[`:= ]", page.read_text())
        if name.split(".")[0] in sections and not name.endswith((".py", ".safetensors"))
    }
    assert len(named) > 20
    assert not {(page, name) for page, name in named if name not in known}
