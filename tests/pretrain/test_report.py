import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from pretrain.outcome import ExitCode
from pretrain.report import Curve, main

HOSTILE = "<script>alert(1)</script>\"'&\x00\u202e"
ROOT = Path(__file__).parents[2]
READ_AND_MEASURE = """
import resource, sys
from pathlib import Path
from pretrain.report import read_run
read_run(Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_row(step: int) -> dict[str, Any]:
    return {"kind": "train", "samples_seen": 10 * step, "time": 1e9 + step, "step": step, "loss": 2 / step}


def write_run(run: Path, *, lr: float = 1e-3) -> Path:
    """A run with an event of every kind, and names that no page should take for HTML."""
    evaluations = [{"kind": kind, "samples_seen": 400, "top1": 91.25} for kind in ("eval", "eval_average")]
    write_lines(run / "metrics.jsonl", [*map(train_row, range(1, 41)), *evaluations])
    after = {"state": "failed", "reason": f"rank 1: {HOSTILE}"}
    write_lines(run / "events.jsonl", [
        {"event": "start", "samples_seen": 0, "text": "4 ranks", "after": None},
        {"event": "start", "samples_seen": 80, "text": "2 ranks", "after": after},
        {"event": "went back", "samples_seen": 120, "text": "to step 8"},
        {"event": "checkpoint failed", "samples_seen": 160, "text": "no space"},
    ])  # fmt: skip
    write_lines(run / "loss_spikes.jsonl", [{"step": 20, "samples_seen": 200, "loss": 9.5, "level": 1.5}])
    write_lines(run / "bad_samples.jsonl", [{"name": HOSTILE, "shard": "a.tar", "reason": "cut", "time": 1e9 + 30}])
    (run / "run.json").write_text(json.dumps({"state": "failed", "reason": HOSTILE, "step": 40, "restarts": 1}))
    (run / "recipe.yaml").write_text(yaml.safe_dump({"name": run.name, "optimizer": {"lr": lr, "eps": 1e-8}}))
    for name in ("ds_config.json", "environment.json"):
        (run / name).write_text(json.dumps({"dataset": {"classes": HOSTILE}}))
    classes = [
        {"name": HOSTILE, "top1": 12.5, "samples": 8},
        {"name": "cat", "top1": 100.0, "samples": 8},
        {"name": "none", "top1": None},
    ]
    (run / "evaluation").mkdir()
    (run / "evaluation/x-val.json").write_text(json.dumps({"top1": 56.25, "per_class": classes}))
    with SummaryWriter(str(run / "tensorboard")) as board:
        board.add_image("images/training", np.zeros((3, 4, 4)))
    return run


class Page(HTMLParser):
    """Elements of a page, and its text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data if self.elements[-1:] and self.elements[-1][0] != "script" else ""


def report(*runs: Path, to: Path) -> str:
    assert main([*map(str, runs), "--output", str(to)]) == ExitCode.FINISHED
    return to.read_text()


def charts(page: str) -> list[list[dict[str, Any]]]:
    """Traces of each chart, as plotly is given them."""
    starts = re.finditer(r"Plotly\.newPlot\(\s*\"[^\"]+\",\s*", page)
    return [json.JSONDecoder().raw_decode(page, match.end())[0] for match in starts]


def test_two_runs_are_compared_with_events_images_and_differences(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=3e-3), to=tmp_path / "page.html")
    shown = Page(page)
    assert re.search(r"recipe\.yaml: optimizer\.lr\s*0\.001\s*0\.003", shown.text)
    assert "optimizer.eps" not in shown.text.split("Events")[0], "it does not differ"
    marks, *curves = charts(page)
    assert marks[0]["y"] == ["restart", "rollback", "checkpoint failed", "loss spike", "bad sample"]
    assert marks[0]["x"] == [80, 120, 160, 200, 300], "the bad sample by its time"
    losses = next(chart for chart in curves if len(chart[0]["x"]) == 40)
    assert [len(trace["x"]) for trace in losses] == [40, 40]
    assert {trace["name"] for chart in curves for trace in chart} >= {str(tmp_path / "a"), f"{tmp_path / 'b'} average"}
    images = [attributes for tag, attributes in shown.elements if tag == "img"]
    assert [one["alt"] for one in images] == ["images/training"] * 2


def test_names_from_data_stay_text_and_nothing_is_loaded(tmp_path: Path) -> None:
    hostile = write_run(tmp_path / "<script>alert(1)<")
    page = report(hostile, to=tmp_path / "page.html")
    shown = Page(page)
    assert "<script>alert(1)" not in page, "also within plotly's JSON"
    assert sum(tag == "script" for tag, _ in shown.elements) == page.count("<script")
    assert "<script>alert(1)</script>\"'&\ufffd\ufffd" in shown.text, "a class name is shown as it is"
    for chart in charts(page):  # plotly would take tags in these texts
        assert not [text for trace in chart for text in (trace["name"], *trace.get("hovertext", ())) if "<" in text]
    loaded = {"src", "href", "srcset", "data", "action"}
    sources = [attributes[name] for _, attributes in shown.elements for name in loaded & attributes.keys()]
    assert all(source is not None and source.startswith("data:") for source in sources)
    assert '"showSendToCloud": false' in page, "a chart could be uploaded by a click"
    (policy,) = [a["content"] for tag, a in shown.elements if tag == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_a_damaged_file_costs_that_file_only(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "recipe.yaml").write_text("{")
    (run / "events.jsonl").write_text('{"event": "start"\n[1]\n' + "[" * 100_000)
    (run / "run.json").unlink()
    (run / "metrics.jsonl").write_text('{"kind": 3, "samples_seen": 1' + "0" * 400 + "}\n" + json.dumps(train_row(3)))
    text = Page(report(run, to=tmp_path / "page.html")).text
    for note in ("recipe.yaml cannot be read", "run.json cannot be read", "events.jsonl: 3 damaged lines"):
        assert note in text


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert main([str(path)]) == ExitCode.WILL_FAIL_AGAIN
        assert capsys.readouterr().err.startswith(f"error: {path} is no run folder")


def test_a_spike_survives_thinning() -> None:
    curve = Curve()
    for place in range(100_000):
        curve.add(place, 50.0 if place == 12_345 else 1.0)
    assert len(curve) < 5_000
    assert (12_345, 50.0) in curve


def test_memory_is_bounded_by_what_is_drawn_not_by_the_length_of_the_run(tmp_path: Path) -> None:
    """100,000 lines may take 50 MB more than one line, as 1,000,000 may take 500 MB."""
    peaks = []
    for lines in (1, 100_000):
        write_lines(tmp_path / f"{lines}/metrics.jsonl", list(map(train_row, range(1, lines + 1))))
        command = [sys.executable, "-c", READ_AND_MEASURE, str(tmp_path / str(lines))]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        peaks.append(int(ended.stdout))
    assert peaks[1] - peaks[0] < 50_000
