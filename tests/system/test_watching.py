"""A run that was killed and went on, looked at in a real browser through a real TensorBoard."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.metrics import read_metrics
from pretrain.outcome import ExitCode
from tests.system.browser import SHOWN, chromium, show, tensorboard
from tests.system.launching import changes, launched

POINTS = """fetch('data/plugin/scalars/scalars?run=demo%2Ftensorboard&tag={tag}').then(answer => answer.json())
    .then(points => {{ window.points = JSON.stringify(points) }}), 1"""

TEXTS = """fetch('data/plugin/text/text?run=demo%2Ftensorboard&tag=run%2F{name}%2Ftext_summary')
    .then(answer => answer.json()).then(texts => {{ window.texts = JSON.stringify(texts) }}), 1"""


@pytest.mark.slow
def test_a_browser_shows_scalars_and_pictures_of_a_killed_and_resumed_run_each_point_once(
    tmp_path: Path, digits: Path
) -> None:
    folder = tmp_path / "runs/demo"
    fields = changes(data__path=digits, schedule__epochs=0.6, schedule__warmup_epochs=0.1, log_every_steps=1,
                     checkpoint__every_steps=3, evaluation__every_epochs=0.2, ema__decay=0.9)  # fmt: skip
    with launched(tmp_path / "runs", *fields, ranks=0) as run:
        run.wait_for_steps(folder, 8)
        run.process.kill()
        run.end()
    (folder / "show").touch()
    with launched(tmp_path / "runs", *fields, ranks=0) as run:
        assert run.end() == ExitCode.FINISHED, run.output()
    assert not (folder / "show").exists(), "the pictures that were asked for were not drawn"
    with (
        tensorboard(tmp_path / "runs", tmp_path / "tensorboard.log") as address,
        chromium(tmp_path / "profile") as page,
    ):
        show(page, address, SHOWN, cards=6, images=2)
        titles = page.value("Array.from(document.querySelectorAll('tb-truncated-path')).map(one => one.title)")
        assert {"train/loss", "eval/top1", "time/backward", "pictures/training", "pictures/attention"} <= {*titles}
        for kind, name in (("train", "loss"), ("eval", "top1"), ("eval_average", "top1"), ("attention", "step")):
            rows = read_metrics(folder / "metrics.jsonl", kind)
            page.value("window.points = ''")
            page.value(POINTS.format(tag=f"{kind}%2F{name}"))
            points: list[Any] = json.loads(page.wait_for("window.points", f"points of {kind}/{name}"))
            assert [point[1] for point in points] == [row["samples_seen"] for row in rows]
            assert [point[2] for point in points] == pytest.approx([row[name] for row in rows], rel=1e-5)
            assert len({row["samples_seen"] for row in rows}) == len(rows) > 1
        for name, content in (("recipe", "name: lavit_micro"), ("environment", "deepspeed"), ("git", "commit")):
            page.value("window.texts = ''")
            page.value(TEXTS.format(name=name))
            texts = [one["text"] for one in json.loads(page.wait_for("window.texts", f"the text of {name}"))]
            assert len(texts) == 2, "not one a start"
            assert all("<pre><code>" in text and content in text for text in texts)
        page.picture(tmp_path / "seen.png")
        assert (tmp_path / "seen.png").stat().st_size > 10_000
    restarts = [row["restarts"] for row in read_metrics(folder / "metrics.jsonl", "train")]
    assert restarts == sorted(restarts)
    assert set(restarts) == {0, 1}
