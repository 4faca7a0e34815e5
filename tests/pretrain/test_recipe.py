from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import without_secrets
from pretrain.arguments import parse_arguments
from pretrain.check import check_recipe_here
from pretrain.console import RunConsole
from pretrain.engine.deepspeed_config import resolve_for
from pretrain.engine.schedule import Schedule
from pretrain.fields import describe_fields
from pretrain.files import lock
from pretrain.outcome import UserError
from pretrain.recipe import Recipe, load_recipe, recipe_differences
from pretrain.run_folder import RunFolder, checkpoint_facts
from pretrain.run_log import RunStatus
from pretrain.run_state import RunState

DEMO = Path(__file__).parents[2] / "recipes/demo.yaml"


def refusal(*assignments: str, path: Path = DEMO) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, list(assignments))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_set_changes_fields_and_reads_values_as_yaml() -> None:
    recipe = load_recipe(DEMO, ["optimizer.lr=1e-3", "name=other", "data.augment.affine=null"])
    assert (recipe.optimizer.lr, recipe.name, recipe.data.augment.affine) == (1e-3, "other", None)
    assert load_recipe(DEMO, ["watch.attention_pictures=3"]).watch.attention_images == 3, "an older name"


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate: the learning rate is optimizer.lr"),
        ("optimizer.weight_decai=1", "unknown key optimizer.weight_decai (did you mean optimizer.weight_decay?)"),
        ("shedule.epochs=1", "unknown key shedule (did you mean schedule?)"),
        ("data.augment.affine.degree=1", "(did you mean data.augment.affine.degrees?)"),
        *(
            (f"{key}=64", f"unknown key {key}: the global batch is deepspeed.train_batch_size")
            for key in ("batch_size", "train_batch_size", "data.batch_size", "schedule.global_batch")
        ),
        *((f"{key}=9", f"unknown key {key}: the number of classes is") for key in ("num_classes", "model.num_classes")),
        ("lr=1", "(did you mean optimizer.lr?)"),
        ("epochs=1", "(did you mean schedule.epochs?)"),
        ("model.image_size=1", "(did you mean data.image_size?)"),
        ("optimizer.name=adamw", "the optimizer is optimizer.kind"),
        ("drop_path=0.1", "(did you mean model.overrides.drop_path?)"),
        ("bf16.enabled=true", "(did you mean deepspeed.bf16?)"),
        ("path=x", "(did you mean data.path or probes.path?)"),
        ("warmup=1", "(did you mean schedule.warmup_epochs?)"),
        ("optimizer.lr=fast", "optimizer.lr: must be a number > 0, got 'fast'"),
        ("optimizer.lr=-1", "optimizer.lr: must be a number > 0, got -1"),
        ("optimizer.layer_decay=1.1", "optimizer.layer_decay: must be a number > 0 and <= 1, got 1.1"),
        ("optimizer.kind=adam", "optimizer.kind: must be 'adamw', 'lamb' or 'sgd', got 'adam'"),
        ("optimizer.betas=[0.9, 2]", "optimizer.betas: must be 2 values, each a number >= 0 and < 1, got [0.9, 2]"),
        ("optimizer=adamw", "optimizer: must be a section of fields, got 'adamw'"),
        ("data.image_size=[1, x]", "must be a whole number or 2 values, each a whole number, got [1, 'x']"),
        ("checkpoint.keep=2.5", "checkpoint.keep: must be a whole number >= 1, got 2.5"),
        ("model.compile=maybe", "model.compile: must be true or false, got 'maybe'"),
        ("ema={}", "ema.decay is missing"),
        ("name=../elsewhere", "name: must be at most 200 letters"),
        (f"name={'x' * 300}", "name: must be at most 200 letters"),
        ("mixing.mixup=true", "mixing.mixup: must be a number >= 0, got true"),
        ("optimizer.betas=[true, 0.9]", "optimizer.betas: must be 2 values"),
        ("checkpoint.keep=true", "checkpoint.keep: must be a whole number >= 1, got true"),
        ("data.path=null", "data.path: must be a path or text, got null"),
        ("schedule.epochs=.inf", "schedule.epochs: must be a number > 0, got inf"),
        ("data.std=[0, 1, 1]", "data.std: must be 3 values, each a number > 0"),
        ("seed=18446744073709551616", "seed: must be a whole number"),
        ("schedule.epochs=1", "the warm-up is longer than the run: schedule.warmup_epochs is 2, schedule.epochs 1"),
        ("optimizer.momentum=0.5", "momentum is not read by adamw"),
        *((f"loss.{one}", "go together") for one in ("classification=semantic_softmax", "class_tree=x")),
        ("deepspeed.train_batch=1", "unknown DeepSpeed key train_batch (did you mean train_batch_size?)"),
        ("deepspeed.gradient_clipping=-1", "gradient_clipping is the largest norm, at least 0.0 (off), got -1"),
        ("optimizer.lr", "write it as key=value"),
    ],
)
def test_a_wrong_assignment_is_blamed_and_the_message_says_what_is_right(assignment: str, text: str) -> None:
    found = refusal(assignment)
    assert found.startswith(f"--set {assignment}: ")
    assert text in found
    assert "nput should" not in found


def test_the_file_and_the_assignments_are_each_blamed_for_their_own(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(DEMO.read_text().replace("lr: 2.0e-3", "lrr: 2.0e-3"))
    missing = f"{path}: optimizer.lr is missing; unknown key optimizer.lrr (did you mean optimizer.lr?)"
    assert refusal(path=path) == missing
    assert set(refusal("schedule.epochs=0", path=path).split("; --set ")) == {
        missing, "schedule.epochs=0: schedule.epochs: must be a number > 0, got 0"
    }  # fmt: skip
    assert refusal("optimizer.kind=sgd", "optimizer.eps=1.0e-3") == (
        "--set optimizer.kind=sgd --set optimizer.eps=1.0e-3: optimizer: eps is not read by sgd: leave it out"
    )
    assert refusal("optimizer.kind=lamb", "optimizer.weight_decay=0").endswith("use kind adamw")
    assert load_recipe(path, ["optimizer={lr: 1.0e-3}"]).optimizer.lr == 1e-3


def test_a_learning_rate_that_would_rise_to_its_end_is_refused() -> None:
    recipe = load_recipe(DEMO, ["schedule.min_lr=0.01", "optimizer.lr_for_batch=64"])
    for batch, fails in ((64, True), (640, False)):
        config = {"train_batch_size": batch, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}
        with pytest.raises(UserError, match=r"schedule.min_lr .0.01. is above the peak") if fails else nullcontext():
            resolve_for(recipe, config, world_size=1)


@pytest.mark.parametrize(("steps", "log", "checkpoint"), [(1, 1, 10), (336, 3, 33), (9000, 50, 900), (10**6, 50, 1000)])
def test_intervals_follow_from_the_length_of_the_run_unless_given(steps: int, log: int, checkpoint: int) -> None:
    for given, expected in ((("null", "null"), (log, checkpoint)), (("7", "8"), (7, 8))):
        intervals = [f"log_every_steps={given[0]}", f"checkpoint.every_steps={given[1]}"]
        schedule = Schedule(load_recipe(DEMO, ["schedule={epochs: 1}", *intervals]), steps, 1)
        assert (schedule.log_every, schedule.checkpoint_every) == expected


@pytest.mark.parametrize("password", ["hunter2", "hun@ter2"])
def test_what_may_be_a_secret_of_a_url_is_not_shown(
    password: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://me:{password}@host/data?X-Amz-Signature=hunter2&sig=hunter2"
    recipe = load_recipe(DEMO, [f"data.path={url}", f"data.cache={{folder: {tmp_path / 'cache'}, gigabytes: 1}}"])
    assert recipe.data.path == url, "a run needs it"
    with pytest.raises(UserError) as caught:
        check_recipe_here(recipe, RunFolder(tmp_path / "none"))
    monkeypatch.setattr("sys.argv", ["main.py", "--set", f"data.path={url}"])
    folder = RunFolder(tmp_path / "run")
    folder.write_description(recipe, {}, {})
    folder.write_state(RunState(state="failed", reason=f"OSError: {url}\x1b[2J"))
    RunConsole(enabled=True, total_steps=1, first_step=0, global_batch=1).say(f"[b]{url}: \x1b[2J:smile:\n(see {url})")
    printed = capsys.readouterr().out
    assert printed == "[b]memory://host/data: \\x1b[2J:smile:\n(see memory://host/data)\n"
    shown = [str(caught.value), refusal(f"optimizer.lr={url}"), *folder.path.glob("*.json")]
    for text in (part if isinstance(part, str) else part.read_text() for part in shown):
        assert "ter2" not in text
    assert "memory://host/data" in shown[0]
    assert without_secrets({"a": ["is it? yes@no", Path("x"), ("http://h/a@1/b",)]}) == {
        "a": ["is it? yes@no", Path("x"), ("http://h/a@1/b",)]
    }


def test_a_missing_recipe_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    assert "a.yaml" in refusal(path=tmp_path / "b.yaml")


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [1\n", "name: x\n", "\x00"])
def test_what_is_not_a_recipe_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    assert str(path) in refusal(path=path)


def test_a_resume_may_change_how_it_runs_but_not_what_it_computes() -> None:
    old = load_recipe(DEMO).model_dump(mode="json")
    allowed = load_recipe(DEMO, ["log_every_steps=1", "checkpoint.keep=5", "data.threads=4", "data.path=elsewhere"])
    assert recipe_differences(old, allowed.model_dump(mode="json")) == []
    removed = load_recipe(DEMO, ["model.overrides.attention_kernel=triton", "data.preallocate_hint=[375, 500]"])
    assert recipe_differences(removed.model_dump(mode="json"), old) == []
    changed = load_recipe(DEMO, ["optimizer.lr=1e-4", "data.augment.affine.degrees=3", "seed=1"])
    lines = recipe_differences(old, changed.model_dump(mode="json"))
    assert [line.split(":")[0] for line in lines] == ["data.augment.affine.degrees", "optimizer.lr", "seed"]


@pytest.mark.parametrize("batch", [{}, {"train_batch_size": "auto"}, {"train_batch_size": None}])
def test_a_resume_without_its_global_batch_names_it(tmp_path: Path, batch: dict[str, Any]) -> None:
    folder, recipe, clipping = RunFolder(tmp_path), load_recipe(DEMO), {"gradient_clipping": 1.0}
    folder.write_description(recipe, {"train_batch_size": 64, **clipping}, {})
    folder.check_recipe(recipe, {"train_batch_size": 64, **clipping})
    text = rf"^train_batch_size must be given as a number, got {batch.get('train_batch_size')!r}: {tmp_path} .* 64$"
    with pytest.raises(UserError, match=text):
        folder.check_recipe(recipe, batch | clipping)
    with pytest.raises(UserError, match=r"another recipe \(train_batch_size: 64 -> 32\)"):
        folder.check_recipe(recipe, {"train_batch_size": 32, **clipping})


@pytest.mark.parametrize("file", ["ds_config.json", "recipe.yaml"])
def test_a_damaged_description_of_a_run_is_refused_and_one_without_a_digest_is_not(tmp_path: Path, file: str) -> None:
    folder, recipe, deepspeed = RunFolder(tmp_path), load_recipe(DEMO), {"train_batch_size": 64, "zero": 1}
    folder.write_description(recipe, deepspeed, {})
    path = tmp_path / file
    text = path.read_text()
    for content in ("[1]", "null", "{"):
        path.write_text(content)
        with pytest.raises(UserError, match=rf"{file} cannot be read \(.*\): put it back"):
            folder.check_recipe(recipe, deepspeed)
    changed = text.replace("digits", "numbers").replace('"zero"', '"one"')  # what a resume would not look at
    path.write_text(changed)
    with pytest.raises(
        UserError, match=rf"{file} has other content than when it was written: .* take blake2 out of it"
    ):
        folder.check_recipe(recipe, deepspeed)
    path.write_text("".join(line for line in changed.splitlines(True) if "blake2" not in line).replace("1,\n}", "1\n}"))
    folder.check_recipe(recipe, deepspeed)


def test_a_checkpoint_knows_what_its_run_may_not_change(tmp_path: Path) -> None:
    folder, recipe = RunFolder(tmp_path), load_recipe(DEMO)
    manifest = checkpoint_facts(recipe, {}, None)
    folder.check_checkpoint(tmp_path, manifest, load_recipe(DEMO, ["name=fork", "data.path=x", "checkpoint.keep=9"]))
    for change in ("seed=1", "ema.decay=0.5", "data.mean=[0.4,0.4,0.4]", "model.overrides.drop_path=0.3"):
        with pytest.raises(UserError, match=rf"another recipe \({change.split('=')[0].split('.')[0]}"):
            folder.check_checkpoint(tmp_path, manifest, load_recipe(DEMO, [change]))
    del manifest["recipe"]["seed"], manifest["recipe"]["data"]["mean"]  # as a version without these fields wrote it
    folder.check_checkpoint(tmp_path, manifest, load_recipe(DEMO, ["seed=1"]))


def test_why_a_start_fails_is_recorded_unless_the_run_is_anothers_or_finished(tmp_path: Path) -> None:
    def fail(path: Path, reason: str) -> bool:
        return RunStatus(RunFolder(path), first=True).fail(reason)

    assert fail(tmp_path / "none", "a mistyped name")
    assert not (tmp_path / "none").exists()
    fail(tmp_path, "no data")
    state = RunFolder(tmp_path).read_state()
    assert state is not None
    assert (state.state, state.reason) == ("failed", "no data")
    held = lock(tmp_path / ".lock")
    assert held is not None
    fail(tmp_path, "another process trains it")
    held.close()
    RunFolder(tmp_path).write_state(RunState("finished", "all done"))
    fail(tmp_path, "it is finished")
    assert (state := RunFolder(tmp_path).read_state()) is not None
    assert (state.state, state.reason) == ("finished", "all done")


def test_the_help_has_what_each_field_takes_its_default_and_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = list(describe_fields(Recipe))
    for line in (
        "optimizer.lr: a number > 0 (required)",
        "optimizer.kind: 'adamw', 'lamb' or 'sgd' (default: adamw)",
        "ema: section, off unless given",
        "ema.decay: a number >= 0 and < 1 (required where ema is given)",
    ):
        assert f"  {line}" in lines
    assert max(map(len, lines)) <= 100
    names = [line.startswith("  ") and line[2] != " " for line in lines]
    assert not any(first and second for first, second in pairwise([*names, True])), "a field without a description"


def test_the_repositorys_deepspeed_configuration_is_used_where_the_folder_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(["--recipe", "r"]).deepspeed_config == DEMO.parents[1] / "ds_config.json"
    (tmp_path / "ds_config.json").touch()
    assert parse_arguments(["--recipe", "r"]).deepspeed_config == Path("ds_config.json")
