"""A hand-off in transformers: what the folder holds, and its use in an environment without this project."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from data_pipeline.loader import EvalLoader
from data_pipeline.transforms import IMAGENET_MEAN, IMAGENET_STD, InputConfig
from models import create_model
from pretrain.files import digest_of_fields
from pretrain.handoff.folder import CONFIG, HandoffConfig, load_handoff
from pretrain.handoff.transformers_files import CODE, PREPROCESSOR
from pretrain.outcome import UserError
from tests.data_pipeline.datasets import CPU, stored
from tests.data_pipeline.images import photographs
from tests.pretrain import handoffs
from tests.pretrain.hub_server import publish, serving
from tests.pretrain.test_handoff import FIRST, load_elsewhere

ROOT = Path(__file__).parents[2]
MODELS = Path(models.__file__).parent
PACKAGES = ("torch", "transformers", "pillow", "accelerate")


def imported(name: str) -> set[str]:
    """Files of the package that a file of it imports, which must be in the form that transformers finds."""
    tree = ast.walk(ast.parse((MODELS / name).read_text()))
    nodes = [node for node in tree if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module and "." not in node.module for node in nodes)
    return {f"{node.module}.py" for node in nodes}


def test_the_code_is_the_wrapper_and_all_that_it_imports() -> None:
    assert imported(CODE[0]) == set(CODE[1:]), "older releases of transformers follow its imports, not theirs"
    for name in CODE[1:]:
        assert imported(name) <= set(CODE[1:])
    assert not [path for path in MODELS.glob("*.py") if "from models" in path.read_text()]


@pytest.fixture(scope="module")
def handoff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model("lavit_micro", num_classes=4, image_size=64, drop_path=0.1, **handoffs.SMALL).eval()
    with torch.no_grad():
        model.head.weight.mul_(30)  # scores that differ
    return handoffs.hand_off(tmp_path_factory.mktemp("run") / "hand-off.1", model)


def test_the_files_are_the_projects_own_and_the_config_serves_both(handoff: Path) -> None:
    for name in CODE:
        assert (handoff / name).read_bytes() == (MODELS / name).read_bytes()
    config = json.loads((handoff / CONFIG).read_text())
    source = ast.parse((MODELS / CODE[0]).read_text())
    classes = {f"{Path(CODE[0]).stem}.{node.name}" for node in source.body if isinstance(node, ast.ClassDef)}
    assert set(config["auto_map"].values()) == classes
    (kept,) = (
        ast.literal_eval(node.value.args[0])
        for node in source.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "HANDOFF_FIELDS"
    )
    assert kept == {*HandoffConfig.model_fields, "config_blake2"} - {"architecture"}


def test_classes_of_one_name_have_labels_of_their_own(tmp_path: Path) -> None:
    model = create_model("lavit_micro", num_classes=3, image_size=32, **handoffs.SMALL)
    folder = handoffs.hand_off(tmp_path, model, class_names=["crane", "ox", "crane"], class_ids=["n1", "n2", "n3"])
    config = json.loads((folder / CONFIG).read_text())
    assert config["id2label"] == {"0": "crane (n1)", "1": "ox", "2": "crane (n3)"}
    assert config["label2id"] == {"crane (n1)": 0, "ox": 1, "crane (n3)": 2}
    assert load_handoff(folder)[1].class_names == ["crane", "ox", "crane"]


def test_a_rectangle_has_no_image_processor(tmp_path: Path) -> None:
    model = create_model("lavit_micro", num_classes=3, image_size=(32, 64), **handoffs.SMALL)
    folder = handoffs.hand_off(tmp_path, model)
    assert not (folder / PREPROCESSOR).exists()
    load_handoff(folder)


@pytest.mark.parametrize("name", [*CODE, PREPROCESSOR])
def test_a_changed_or_missing_file_is_refused(handoff: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(handoff, tmp_path / "h")
    with (tmp_path / "h" / name).open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=rf"h/{name} has other content than when it was handed off: copy it again$"):
        load_handoff(tmp_path / "h")
    (tmp_path / "h" / name).unlink()
    with pytest.raises(UserError, match=rf"not a finished hand-off: .*h/{name} is missing"):
        load_handoff(tmp_path / "h")


def test_load_handoff_runs_no_code_of_the_folder_and_reads_no_file_elsewhere(handoff: Path, tmp_path: Path) -> None:
    shutil.copytree(handoff, tmp_path / "h")
    for name in CODE:
        (tmp_path / "h" / name).write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    config = json.loads((tmp_path / "h" / CONFIG).read_text())
    del config["config_blake2"]
    config["files_blake2"] = {}
    (tmp_path / "h" / CONFIG).write_text(json.dumps(config | {"config_blake2": digest_of_fields(config)}))
    load_handoff(tmp_path / "h")
    assert not (tmp_path / "ran").exists()
    config["files_blake2"] = {"../x": "0"}
    (tmp_path / "h" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="files_blake2"):
        load_handoff(tmp_path / "h")


@pytest.fixture(scope="module")
def elsewhere() -> Path:
    """The interpreter of an environment with PACKAGES, and nothing of this project, at the pinned versions."""
    folder, pins = ROOT / ".venv-hub", ROOT / "constraints.txt"
    made_for = f"{sys.version}\n{PACKAGES}\n{pins.read_text()}"
    if not (folder / "made-for").exists() or (folder / "made-for").read_text() != made_for:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        options = ["--quiet", "--no-compile", "--constraint", pins]  # only the modules that are imported are compiled
        subprocess.run([folder / "bin/pip", "install", *options, *PACKAGES], check=True)
        (folder / "made-for").write_text(made_for)
    return folder / "bin/python"


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_handoff_is_used_and_fine_tuned_where_this_project_is_not_installed(
    handoff: Path, elsewhere: Path, tmp_path: Path
) -> None:
    model, config = load_handoff(handoff)
    photos = photographs(tmp_path / "photos")
    size, ratio = config.input.size, config.input.eval_crop_ratio
    settings = InputConfig(path=photos.path, image_size=size, eval_crop_ratio=ratio, threads=1)
    assert (settings.mean, settings.std) == (config.input.mean, config.input.std) == (IMAGENET_MEAN, IMAGENET_STD)
    loader = EvalLoader(photos, settings, batch_size=len(photos), rank=0, world_size=1, device=CPU)
    (batch,) = loader
    loader.close()
    (tmp_path / "reference").mkdir()
    for row, number in enumerate(batch.sample_ids.tolist()):
        (tmp_path / f"reference/{row}.jpg").write_bytes(stored(photos, number))
    tensors = {"native": torch.randn(5, 3, 64, 64), "other": torch.randn(2, 3, 96, 32)}
    with torch.no_grad():
        logits = {f"{name}.logits": model(images) for name, images in tensors.items()}
        maps = {
            f"maps.{stage}": one.contiguous() for stage, one in enumerate(model.forward_features(tensors["native"]))
        }
    tensors |= logits | maps | {"pixels": batch.images.float(), "std": torch.tensor(config.input.std)}
    save_file(tensors, tmp_path / "reference/tensors.safetensors")

    publish(tmp_path / "hub", "lab/lavit", {FIRST: {path.name: path.read_bytes() for path in handoff.iterdir()}})
    with serving(tmp_path / "hub") as (url, _):
        answers, _ = load_elsewhere(url, tmp_path / "home", "lab/lavit")
    assert answers == [config.weights_blake2], "downloaded, for transformers without a network"
    script = [elsewhere, "-I", Path(__file__).with_name("hub_session.py"), handoff, tmp_path / "reference", tmp_path]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stderr
