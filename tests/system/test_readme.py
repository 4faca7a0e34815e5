"""The commands of the README and the first ones of each page, and the snippets of all, run as written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from pretrain.ports import free_port
from pretrain.recipe import load_recipe
from tests.pages import ROOT, SITE, blocks, snippets
from tests.system.launching import changes

pytestmark = pytest.mark.slow
QUICKSTART = ROOT / "docs/quickstart.md"
EXAMPLES = {
    "R": "recipes/demo.yaml", "RUN": "runs/demo", "RUN_OR_HANDOFF": "runs/demo", "HANDOFF": "runs/demo/handoff",
    "STEP": "20", "SOURCE": "digits", "DEST": "data/digits", "OUT.onnx": "model.onnx", "FILE.html": "report.html",
    "FILE.png": "sheet.png", "N": "8", "ID": "apache-2.0", "A:B": "0:2",
}  # fmt: skip
"""What stands in for the words in capitals."""
ELSEWHERE = ("slurm.", "examples.", "demo-cnn", "downloads/imagenet", "my_images", "--steps 300:", "fashion")
"""Run by tests of their own, or below; step 300 is beyond the run that stands in for the demo."""


def commands() -> list[str]:
    """``python``, ``deepspeed`` and ``torchrun`` commands of the README and the first ones of each page, each once.

    A command that another one only adds options to is left out.
    """
    readme = ROOT / "README.md"
    found = re.findall(r"`((?:python|deepspeed) [^`]+)`", readme.read_text())
    shown = [block for block in blocks(readme, "bash") if "my_images" not in block]
    shown += [blocks(page, "bash")[0] for page in SITE] + blocks(QUICKSTART, "bash")
    lines = re.sub(r" *\\\n *", " ", "".join(shown))
    found += re.findall(r"^((?:python|deepspeed|torchrun) .*?)(?: {2,}#.*)?$", lines, re.MULTILINE)
    complete = [one for one in found if len(one.split()) > 3 and not one.endswith("...")]
    words = dict.fromkeys(words_of(one) for one in complete if not any(name in one for name in ELSEWHERE))
    longer = {one[:length] for one in words for length in range(len(one))}
    return [shlex.join(one) for one in words if one not in longer]


def words_of(command: str) -> tuple[str, ...]:
    text = re.sub(r"\[[^]]*\.\.\.\]", "", command)
    words = [EXAMPLES.get(word, word) for word in shlex.split(re.sub(r"[\[\]]", " ", text))]
    if words[0] == "deepspeed" and "--num_accelerators" not in words:
        words[1:1] = ["--num_accelerators", "2"]
    return tuple(words)


def runnable(language: str) -> list[tuple[str, str]]:
    """Snippets except those of other packages, which test_timm_registration.py and test_transformers.py run."""
    return [
        (page, block) for page, block in snippets(language) if not re.search(r"timm|torchvision|transformers", block)
    ]


def environment() -> dict[str, str]:
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, straight: Path, digits: Path) -> Path:
    """A folder laid out like the repository after ``make demo``."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("data_pipeline", "examples", "models", "pretrain", "slurm", "ds_config.json"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "data").mkdir()
    shutil.copytree(digits, folder / "data/digits")
    shutil.copytree(straight, folder / "runs/demo")
    return folder


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command: str, checkout: Path) -> None:
    words = shlex.split(command)
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(free_port())]
    if "pretrain/main.py" in words:
        words += changes(schedule__epochs=0.1, schedule__warmup_epochs=0, name=f"readme-{commands().index(command)}")
    ended = subprocess.run(words, cwd=checkout, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_lines_about_own_images_run_as_written(checkout: Path) -> None:
    for number in range(120):
        image = checkout / f"my_images/class{number % 3}/{number}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 60), (80 * (number % 3), number, 90)).save(image)
    (block,) = (block for block in blocks(ROOT / "README.md", "bash") if "my_images" in block)
    lines = [line.partition("  #")[0].split() for line in block.splitlines() if not line.startswith("tensorboard")]
    assert len(lines) == 5
    for line in lines:
        words = [*line]
        if words[0] == "deepspeed":
            words[1:1] = ["--master_port", str(free_port())]
            words += changes(schedule__epochs=0.5, schedule__warmup_epochs=0)
        ended = subprocess.run(words, cwd=checkout, env=environment(), capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {path.name for path in (checkout / "runs/mine").iterdir()} >= {"evaluation", "handoff", "tensorboard"}
    assert (checkout / "preview.png").stat().st_size > 0


@pytest.mark.parametrize(("page", "code"), runnable("python"))
def test_a_python_snippet_runs(page: str, code: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    exec(code, {"images": torch.randn(2, 3, 32, 32)})


@pytest.mark.parametrize(("page", "text"), runnable("yaml"))
def test_a_recipe_snippet_is_valid(page: str, text: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "recipes/demo.yaml").read_text())
    for section, fields in yaml.safe_load(text).items():
        recipe[section] = {**recipe.get(section, {}), **fields}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    load_recipe(tmp_path / "recipe.yaml")
