"""The contact sheet shows what is trained on, and paths that are no dataset get the command that builds one."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_pipeline.dataset import Dataset
from data_pipeline.mixing import mix
from data_pipeline.preview import CELL, COLUMNS, LINE, main, preview, thumbnail, to_pixels
from data_pipeline.transforms import InputConfig, MixingConfig
from tests.data_pipeline.datasets import run_build, training
from tests.data_pipeline.images import class_folders, jpeg

DATA = {"image_size": 32, "augment": {"horizontal_flip": 0.5, "random_erasing": {"probability": 0.5}}, "threads": 1}


@pytest.mark.parametrize("mixing", [{}, {"cutmix": 1.0, "label_smoothing": 0.1}])
def test_the_sheet_shows_the_first_batch_as_it_is_trained_on(mixing, tmp_path, monkeypatch, capsys):
    images, dest, sheet = class_folders(tmp_path / "in", 5), tmp_path / "out", tmp_path / "sheet.png"
    assert run_build(images, dest, "--val-fraction", "0.2") == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"seed": 3, "data": {"path": "elsewhere", **DATA}, "mixing": mixing}))
    assert main([str(dest), "--recipe", str(recipe), "--output", str(sheet), "--count", "10"]) == 0
    shown = np.asarray(Image.open(sheet))

    dataset, config = Dataset.open(dest, "train"), InputConfig(path=dest, **DATA)
    with training(dataset, config, seed=3, global_batch=10, micro_batch=10) as loader:
        batch = next(iter(loader))
    mixed, _ = mix(batch.images, batch.labels, batch.rows, config=MixingConfig(**mixing), num_classes=3, seed=3, step=0)
    assert torch.equal(mixed, batch.images) != bool(mixing)
    for index, pixels in enumerate(to_pixels(mixed, config.mean, config.std)):
        x, y = index % COLUMNS * CELL, index // COLUMNS * (CELL + LINE)
        assert np.array_equal(shown[y : y + CELL, x : x + CELL], np.asarray(thumbnail(pixels)))
    captions = []
    monkeypatch.setattr("data_pipeline.preview.draw_grid", lambda _, texts: captions.extend(texts))
    preview(dataset, config, MixingConfig(**mixing), seed=3, count=10)
    plain = [dataset.class_names[label] for label in batch.labels.tolist()]
    assert (captions == plain) != bool(mixing)
    assert all(set(caption.replace("%", "").replace(",", "").split()) - {str(n) for n in range(101)} <= {"ant", "bee",
               "cat"} for caption in captions)  # fmt: skip


@pytest.mark.parametrize(
    ("folders", "command"),
    [
        (("ant", "bee"), "python -m data_pipeline.build {} data/in --val-fraction 0.1"),
        (("train/ant", "val/ant"), "python -m data_pipeline.build {} data/in"),
        ((), "python -m data_pipeline.build SOURCE {}"),
    ],
)
def test_a_folder_that_is_no_dataset_gets_the_command_that_builds_one(folders, command, tmp_path, capsys):
    root = tmp_path / "in"
    root.mkdir()
    for name in folders:
        (root / name).mkdir(parents=True)
        (root / name / "0.jpg").write_bytes(jpeg(1))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"path": "x", **DATA}}))
    assert main([str(root), "--recipe", str(recipe), "--output", str(tmp_path / "sheet.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(command.format(root))
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("data: [1", "is no recipe"),
        ("- a\n- b", "is no recipe"),
        ("data: {image_size: 32, augment: {horizontal_flip: 2}}", "augment.horizontal_flip"),
        ("data: {image_siez: 32}", "image_siez"),
    ],
)
def test_a_wrong_recipe_gets_one_line(content, words, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    assert main(["there/is/none", "--recipe", str(recipe)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert str(recipe) in line
