import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from models import create_model
from pretrain.files import digest_of_fields
from pretrain.handoff.folder import CARD, CONFIG, WEIGHTS, is_handoff, load_handoff, read_handoff
from pretrain.handoff.model_card import model_card
from pretrain.outcome import UserError
from tests.pretrain import handoffs
from tests.pretrain.hub_server import publish, serving

ROOT = Path(__file__).parents[2]


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    return create_model("lavit_micro", num_classes=4, image_size=32, **handoffs.SMALL).eval()


def hand_off(folder: Path, model: Any) -> Path:
    return handoffs.hand_off(
        folder,
        model,
        card=lambda content: model_card(content, samples=40, evaluated_at=900, steps=30),
        class_ids=["n0", "n1", "n2", "n3"],
        dataset={"name": "x: y", "fingerprint": "f", "samples": 100},
        recipe={
            "name": "r",
            "data": {"val_split": "val", "augment": {"horizontal_flip": 0.5, "rand_augment": None}},
            "optimizer": {"kind": "sgd", "lr": 0.25, "weight_decay": 0.0, "eps": 1e-8, "momentum": 0.9},
        },
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of(0)


@pytest.fixture(scope="module")
def written(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hand_off(tmp_path_factory.mktemp("handoff") / "h", model)


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "h")
    return tmp_path / "h"


def refused(folder: Path) -> str:
    """The line with which a hand-off is refused."""
    with pytest.raises(UserError) as caught:
        load_handoff(folder)
    line = str(caught.value)
    assert str(folder) in line
    assert "\n" not in line
    return line


def change(folder: Path, alter: Callable[[dict[str, Any]], Any], *, digest: bool) -> None:
    """Alter config.json, which keeps a digest that no longer fits, or has none, as before there was one."""
    config = json.loads((folder / CONFIG).read_text())
    alter(config)
    if not digest:
        del config["config_blake2"]
    (folder / CONFIG).write_text(json.dumps(config))


def test_the_loaded_model_gives_the_same_outputs_bit_for_bit_and_all_files_have_one_mode(
    written: Path, model: Any
) -> None:
    x = torch.randn(2, 3, 32, 32)
    for source in (written, str(written)):
        loaded, config = load_handoff(source)
        assert torch.equal(loaded(x), model(x))
    assert config.class_names == list("abcd")
    assert config.class_ids == ["n0", "n1", "n2", "n3"]
    assert is_handoff(written)
    assert len({path.stat().st_mode for path in written.iterdir()}) == 1


@pytest.mark.parametrize("digest", [True, False])
def test_a_handoff_of_earlier_versions_still_loads(copied: Path, model: Any, digest: bool) -> None:
    """From before class ids, with fields that there are no more; with a digest of its fields, or from before it."""
    config = json.loads((copied / CONFIG).read_text())
    del config["class_ids"], config["config_blake2"]
    config["architecture"]["attention_kernel"] = "triton"
    expected = dict(config["input"])
    config["input"] = {
        "path": "data/x", "cache": None, "train_split": "train", "val_split": "val", **expected, "dtype": "float32",
        "augment": {"horizontal_flip": 0.0}, "shuffle_window": 16, "threads": None, "a_setting_of_the_loader": 1,
    }  # fmt: skip
    if digest:
        config["config_blake2"] = digest_of_fields(config)
    (copied / CONFIG).write_text(json.dumps(config))
    (loaded, found), images = load_handoff(copied), torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert found.class_ids is None
    assert found.input.model_dump(mode="json") == expected


def test_the_card_states_the_results_for_readers_and_for_the_hub(written: Path) -> None:
    text = (written / CARD).read_text()
    assert "50.00 %" in text
    assert "40 images" in text
    assert "10.0 epochs" in text
    assert "after 900 images" in text
    assert "in 30 steps" in text
    assert "(a, b, c, d)" in text
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings == {"augment": {"horizontal_flip": 0.5}, "optimizer": {"kind": "sgd", "lr": 0.25, "momentum": 0.9}}
    card = ModelCard(text).data
    assert card.library_name == "transformers"
    assert (card.license, card.datasets) == ("unknown", ["x: y"])
    assert {"lavit", "image-classification", "custom_code"} <= set(card.tags)


def test_names_from_data_cannot_change_the_card() -> None:
    evil = "x |\n---\n```\n# [y](http://z) <b>&amp;`@www.z\x1b[2J"
    origin = {"weights": "raw", "run": evil, "samples_seen": 1, "weights_blake2": "d", "initialized_from": None}
    content = {
        "architecture": {"name": "lavit_micro"}, "num_classes": 4, "weights": "raw", "samples_seen": 1,
        "input": {"image_size": 32, "mean": [0], "std": [1], "interpolation": "bicubic"},
        "dataset": {"name": evil, "fingerprint": "f", "samples": 100}, "metrics": {"top1": 1, "top5": 1, "loss": 1},
        "class_names": [evil] * 12, "recipe": {"name": "r", "data": {"val_split": evil}, "loss": {"class_tree": evil}},
        "initialized_from": origin | {"dataset": {"name": evil}},
    }  # fmt: skip
    text = model_card(content, samples=1, evaluated_at=1, steps=1, license_id=evil)
    plain = {**content, "dataset": {"name": "x", "fingerprint": "f", "samples": 100}}
    expected = model_card(plain, samples=1, evaluated_at=1, steps=1, license_id="x")
    assert text.count("\n") == expected.count("\n")
    assert text.count("\n```") == expected.count("\n```")
    front, body = re.split(r"^---$", text, flags=re.MULTILINE)[1:]
    assert ModelCard(text).data.datasets == [evil.replace("\n", r"\x0a").replace("\x1b", r"\x1b")]
    named = re.findall(r"x \\\|.*?2J", body)
    assert len(named) == 1 + 10 + 1 + 2 + 1 + 1, "heading, ten classes, data, origin, split, license"
    assert not re.search(r"(?<!\\)[\[\]<>`&#:@]|www\.", "".join(named))
    assert "2 more, in `config.json`" in body
    assert "\x1b" not in front + body


def test_a_single_bit_changed_anywhere_in_the_config_is_refused_or_means_the_same(written: Path, copied: Path) -> None:
    good, config = (written / CONFIG).read_bytes(), read_handoff(written)[0]
    outcomes = []
    for place in range(0, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 0x04
        (copied / CONFIG).write_bytes(bad)
        try:
            found = read_handoff(copied)[0]
        except UserError as error:
            outcomes.append(str(error))
        else:
            assert found == config, f"byte {place}"
    assert not [line for line in outcomes if "\n" in line]
    assert len(outcomes) > len(good) / 7 / 2


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda c: c["architecture"].update(num_classes=5), r"num_classes is 5, but num_classes is 4"),
        (lambda c: c.update(class_names=list("abc")), r"class_names has 3 entries for 4 classes"),
        (lambda c: c.update(class_ids=list("abcde")), r"class_ids has 5 entries for 4 classes"),
        (lambda c: c.update(class_ids=list("abca")), r"class_ids names a class twice"),
        (lambda c: c.update(class_levels=[0]), r"class_levels has 1 entries for 4 classes"),
        (lambda c: c["input"].update(image_size=64), r"input.image_size is \[64, 64\]"),
        (lambda c: c["input"].update(mean=[0.5]), r"input.mean: must be 3 values, each a number, got \[0.5\]"),
        (lambda c: c["architecture"].update(depths=[1, 1, 1, 1]), r"do not fit: Error.* Unexpected key"),
        (lambda c: c["architecture"].update(depths="deep"), r"do not fit: depths"),
        (lambda c: c["architecture"].update(magic=1), r"do not fit: LaViTConfig has no field magic"),
        (lambda c: c.pop("weights"), r"weights is missing"),
        (lambda c: c.update(other=1), r"unknown key other"),
    ],
)
def test_a_config_that_was_altered_is_refused_by_its_digest_and_without_one_by_what_does_not_fit(
    copied: Path, written: Path, alter: Any, message: str
) -> None:
    change(copied, alter, digest=True)
    assert "has other content than when it was handed off" in refused(copied)
    shutil.copy(written / CONFIG, copied / CONFIG)
    change(copied, alter, digest=False)
    assert re.search(message, refused(copied))


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_of_another_handoff_is_refused(copied: Path, tmp_path: Path, file: str) -> None:
    shutil.copy(hand_off(tmp_path / "other", model_of(1)) / file, copied / file)
    assert f"other content than when it was handed off with this {CONFIG}" in refused(copied)


def test_what_is_no_handoff_names_the_command_that_writes_one(tmp_path: Path) -> None:
    assert "python -m pretrain.export" in refused(tmp_path)
    assert "not a finished hand-off" in refused(tmp_path / "x/y")


def test_a_handoff_that_cannot_be_written_is_reported_in_one_line(tmp_path: Path, model: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written to .*python -m pretrain\.export"):
        hand_off(tmp_path / "file", model)


def test_without_huggingface_hub_a_name_of_the_hub_is_refused_with_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: Path
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"lab/lavit is not a folder.* pip install .*huggingface_hub"):
        load_handoff("lab/lavit")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(written, "lab/lavit")
    load_handoff("lab/lavit")  # a folder that exists wins


FIRST, SECOND = "1" * 40, "2" * 40
PROGRAM = """
import sys
from pretrain.handoff import load_handoff
from pretrain.outcome import UserError
for source in sys.argv[1:]:
    try:
        print(load_handoff(source)[1].weights_blake2)
    except UserError as error:
        print(f"error {error.code:d}:", error)
"""


def load_elsewhere(endpoint: str, home: Path, *sources: str) -> tuple[list[str], str]:
    """Load hand-offs in a process of its own: digests of their weights or errors, and stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}
    command = [sys.executable, "-c", PROGRAM, *sources]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines(), ended.stderr


@pytest.mark.slow
def test_handoffs_load_from_a_hub_by_name_and_by_commit_and_from_its_cache_when_it_is_gone(
    written: Path, tmp_path: Path
) -> None:
    folders = {FIRST: written, SECOND: hand_off(tmp_path / "new", model_of(1))}
    digests = [read_handoff(folder)[0].weights_blake2 for folder in folders.values()]
    files = {commit: {path.name: path.read_bytes() for path in folder.iterdir()} for commit, folder in folders.items()}
    publish(tmp_path / "hub", "lab/lavit", files)
    sources = ("lab/lavit", f"lab/lavit@{FIRST}", "lab/lavit@v9", "lab/none")
    with serving(tmp_path / "hub") as (url, asked):
        found = load_elsewhere(url, tmp_path / "home", *sources)
    for answers, printed in (found, load_elsewhere(url, tmp_path / "home", *sources)):
        assert answers[:2] == [digests[1], digests[0]]
        for name, answer in zip(sources[2:], answers[2:], strict=True):
            assert answer.startswith(f"error 1: {name} is not a folder, and it cannot be fetched")
        assert f"lab/lavit: commit {SECOND} of the Hugging Face Hub" in printed
    assert not [path for path in asked if CARD in path], "the card is not needed to load it"
