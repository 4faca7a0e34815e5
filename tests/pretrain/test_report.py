import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pretrain.report import curves
from pretrain.report.__main__ import main
from pretrain.report.markup import escaped, tag
from pretrain.report.panels import arrange

BEGAN = 1_700_000_000.0
HOSTILE = "<script>alert(1)</script>\"'&\x00\ud800\u202e"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_row(step: int, **values: float) -> dict[str, Any]:
    """A line of a run of 10 images a step, 100 an epoch and a step a minute."""
    place = {"kind": "train", "samples_seen": 10 * step, "time": BEGAN + 60 * step, "step": step, "epoch": step / 10}
    return place | {"loss": 2 / step, "lr": 1e-3, "skipped_steps": 3 * (step >= 30)} | values


def state(**changes: Any) -> dict[str, Any]:
    told = {"state": "failed", "reason": "rank 1 hangs: computing for 600 s", "step": 40, "total_steps": 100}
    return told | {"samples_seen": 400, "restarts": 1, "world_size": 2, "host": "n1", "updated": BEGAN + 2400} | changes


def write_run(run: Path, *, lr: float = 1e-3, top1: float = 91.25) -> Path:
    """A run with an event of every kind, each at a place of its own."""
    write_lines(run / "metrics.jsonl", [
        *(train_row(step, lr=lr) for step in range(1, 41)),
        {"kind": "eval", "samples_seen": 400, "time": BEGAN + 2400, "step": 40, "epoch": 4.0, "top1": top1},
        {"kind": "eval_average", "samples_seen": 400, "time": BEGAN + 2400, "step": 40, "epoch": 4.0, "top1": 93.5},
    ])  # fmt: skip
    after = {"state": "running", "reason": "", "step": 9, "samples_seen": 90, "time": BEGAN + 540}
    write_lines(run / "events.jsonl", [
        {"event": "start", "time": BEGAN, "step": 0, "samples_seen": 0, "text": "4 ranks", "after": None},
        {"event": "start", "time": BEGAN + 480, "step": 8, "samples_seen": 80, "text": "2 ranks", "after": after},
        {"event": "went back", "time": BEGAN + 720, "step": 12, "samples_seen": 120, "text": "to step 8"},
        {"event": "checkpoint failed", "time": BEGAN + 960, "step": 16, "samples_seen": 160, "text": "no space"},
    ])  # fmt: skip
    spike = {"step": 20, "loss": 9.5, "level": 1.5, "limit": 3.0, "first_position": 190, "last_position": 199}
    write_lines(run / "loss_spikes.jsonl", [spike, spike | {"sample_ids": [1, 2]}])  # computed again after a restart
    bad = {"id": 7, "name": "7.jpg", "shard": "a.tar", "reason": "truncated", "replaced_by": 8, "time": BEGAN + 1440}
    write_lines(run / "bad_samples.jsonl", [bad])
    (run / "hangs").mkdir()
    (run / "hangs/20231114T224120Z-rank-00001.txt").write_text("rank 1 hangs: computing for 600 s\n\nThread 1")
    (run / "run.json").write_text(json.dumps(state()))
    (run / "recipe.yaml").write_text(yaml.safe_dump({"name": run.name, "optimizer": {"lr": lr, "eps": 1e-8}}))
    (run / "ds_config.json").write_text(json.dumps({"train_batch_size": 10}))
    environment = {"git": {"commit": "abc"}, "dataset": {"name": "digits", "samples": 100}}
    (run / "environment.json").write_text(json.dumps(environment))
    return run


def page_of(*runs: Path) -> str:
    output = runs[0].parent / "page.html"
    assert main([*map(str, runs), "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """All elements with their attributes; asserts that they close in order."""

    VOID = ("img", "input", "meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((name, dict(attributes)))
        if name not in self.VOID:
            self._open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop() == name


def marks(page: str, kind: str, by: str = "samples") -> list[float]:
    """Where the marks of a kind stand on the time line, in images or in minutes."""
    svg = re.search(r'<svg [^>]*class="timeline">.*?</svg>', page, re.DOTALL)
    assert svg
    row = svg[0].split(f">{kind} (")[1].split('class="row"')[0]
    group = re.search(rf'<g class="by-{by} k\d">(.*?)</g>', row, re.DOTALL)
    assert group
    end = {"samples": 400, "time": 40}[by]
    pixels = [float(x) + 1.5 for x in re.findall(r'<rect x="([\d.]+)"', group[1])]
    return [(pixel - 176) / (1080 - 176 - 14) * end for pixel in pixels]


PLACES = {
    "restart": 80, "failed or killed": None, "hang": 280, "went back": 120, "checkpoint failed": 160,
    "steps skipped": 300, "loss spike": 200, "bad sample": 240,
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_every_kind_of_event_stands_where_it_happened(tmp_path: Path, kind: str) -> None:
    page = page_of(write_run(tmp_path / "run"))
    expected = [90, 400] if kind == "failed or killed" else [PLACES[kind]]
    assert marks(page, kind) == pytest.approx(expected, abs=0.5)  # a pixel is 0.45 images
    assert marks(page, kind, "time") == pytest.approx([place / 10 for place in expected], abs=0.05)


def test_a_restart_tells_how_the_start_before_ended(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    assert "restart 1 at step 8, 2 ranks; before: it ended without a word" in page


def test_over_time_a_curve_has_a_gap_where_its_run_was_down(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    figure = page.split("<b>training loss</b>")[1].split("</figure>")[0]
    by_samples, by_time = re.findall(r'<path d="([^"]+)"', figure)
    assert by_samples.count("M") == 1
    stretches = by_time.split("M")[1:]
    assert [stretch.count("L") + 1 for stretch in stretches] == [7, 4, 29]  # started again at step 8, went back at 12


def test_on_a_cluster_the_reasons_are_those_of_the_batch_script(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    begin = {"event": "begin", "job": "7", "restart": 0, "time": BEGAN - 9, "nodes": ["n1"], "ranks": 4, "step": 0}
    end = {"event": "end", "job": "7", "restart": 0, "time": BEGAN + 460, "cause": "node lost", "reason": "n3 is down",
           "action": "requeue", "node": "n3", "step": 8}  # fmt: skip
    last = end | {"restart": 1, "time": BEGAN + 2410, "cause": "preempted", "reason": "SIGTERM"}
    write_lines(run / "slurm/history.jsonl", [begin, end, begin | {"restart": 1}, last])
    page = page_of(run)
    assert "before: node lost: n3 is down" in page
    assert "without a word" not in page
    assert marks(page, "failed or killed") == pytest.approx([90], abs=0.5)  # told once, though two files know of it
    assert marks(page, "stopped or preempted") == pytest.approx([400], abs=0.5)


def test_a_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "evaluation").mkdir()
    (run / "evaluation/digits-val.json").write_text(json.dumps({"top1": 93.5, "samples": 360}))
    (run / "evaluation/digits-val-confusion.png").write_bytes(PNG)
    (run / "handoff").mkdir()
    (run / "handoff/README.md").write_text(
        "---\na: b\n---\n# card\n\nsee http://example.org/x `code`\n\n| a | b |\n|---|---|"
    )
    page = page_of(run)
    elements = Elements(page).found
    for name, attributes in elements:
        assert name not in ("link", "iframe", "object", "embed", "base", "a")
        for key in {"src", "href", "xlink:href", "action", "srcset", "data", "poster"} & attributes.keys():
            assert (name, key) == ("img", "src")
            assert str(attributes[key]).startswith("data:image/png;base64,")
    assert sum(name == "img" for name, _ in elements) == 1
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(", page)
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(str(attributes["content"]) for _, attributes in elements if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert {name for name, _ in elements} >= {"article", "code", "svg"}


def test_all_text_from_a_run_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<img src=x onerror=y>")
    before = Elements(page_of(run)).found
    write_lines(run / "events.jsonl", [{"event": "start", "time": BEGAN + 60 * at, "step": at, "samples_seen": 10 * at,
                                        "text": HOSTILE, "after": {"reason": HOSTILE, "state": HOSTILE}}
                                       for at in (0, 8)])  # fmt: skip
    write_lines(run / "bad_samples.jsonl", [{"name": HOSTILE, "shard": HOSTILE, "reason": HOSTILE, "time": BEGAN}])
    write_lines(run / "metrics.jsonl", [{"kind": HOSTILE, "samples_seen": at, HOSTILE: at} for at in (1, 2)])
    (run / "recipe.yaml").write_text(yaml.safe_dump({HOSTILE.replace("\ud800", ""): [HOSTILE.replace("\ud800", "")]}))
    (run / "run.json").write_text(json.dumps(state(reason=HOSTILE)))
    (run / "handoff").mkdir()
    (run / "handoff/README.md").write_text("# <script>\n\n| <b> |\n\n`<i>`")
    (run / "evaluation").mkdir()
    (run / "evaluation/<b>.json").write_text(json.dumps({"per_class": [{"name": HOSTILE, "id": "1", "top1": 3}]}))
    found = Elements(page_of(run)).found
    assert sum(name == "script" for name, _ in found) == 1
    assert not {"b", "i", "img"} & {name for name, _ in found} - {name for name, _ in before}
    assert not any(key.startswith("on") for _, attributes in found for key in attributes)


def test_what_is_put_into_an_element_is_escaped_once() -> None:
    assert tag("p", "a<b", tag("b", "&"), title='"') == '<p title="&quot;">a&lt;b<b>&amp;</b></p>'
    assert escaped("\x00\ud800") == "\ufffd\ufffd"


DAMAGE: dict[str, tuple[str, bytes, str]] = {
    "cut in the middle of a line": ("metrics.jsonl", b'{"kind": "a", "samples_seen": 1}\n{"kind": "tr', "1 of 2 lines"),
    "lines that are no measurements": ("metrics.jsonl", b'[]\n3\n{"kind": 3, "samples_seen": 1}\n\xff', "4 of 4 lines"),
    "numbers that are none": ("metrics.jsonl", b'{"kind":"train","samples_seen":1e999,"loss":1}', "1 of 1 lines"),
    "a number too large": ("metrics.jsonl", b'{"kind":"a","samples_seen":2,"loss":' + b"9" * 400 + b"}", "nothing was"),
    "values that are not finite": (
        "metrics.jsonl", b'{"kind":"a","samples_seen":1,"loss":NaN}\n{"kind":"a","samples_seen":2,"loss":Infinity}',
        "no value is finite",
    ),
    "nothing measured": ("metrics.jsonl", b"", "nothing was measured yet"),
    "no state": ("run.json", b"", "run.json cannot be read"),
    "a state of texts": ("run.json", b'{"state": 3, "step": "a"}', "run.json has no number in step"),
    "a recipe that is no mapping": ("recipe.yaml", b"- 1", "recipe.yaml cannot be read"),
    "a recipe that is no YAML": ("recipe.yaml", b"a: [", "recipe.yaml cannot be read"),
    "a recipe that holds itself": ("recipe.yaml", b"a: &x [*x]\nb: &y {c: *y}", "recipe"),
    "an environment cut short": ("environment.json", b'{"git": ', "environment.json cannot be read"),
    "a dataset that is none": ("environment.json", b'{"dataset": 3, "git": null}', "dataset"),
    "events that are none": ("events.jsonl", b'{"event": 3}\n{"event":"start","time":NaN}\n[', "1 damaged lines"),
    "marks without a place": ("bad_samples.jsonl", b'{"time": 1e300}\n{"time": "x", "name": []}\n{', "1 damaged lines"),
    "spikes of nothing": ("loss_spikes.jsonl", b'{"step": NaN, "last_position": Infinity}', "loss spike (1)"),
    "a hang without a reason": ("hangs/x-rank-y.txt", b"", "no reason written"),
    "a history of nothing": ("slurm/history.jsonl", b'{"event":"end","time":3}', "None: None"),
    "a report that is none": ("evaluation/a-val.json", b'{"top1":"x","per_class":[3,{"top1":"y"}],"real":3}', "a-val"),
    "a report cut short": ("evaluation/a-val.json", b'{"top1', "a-val.json cannot be read"),
    "a card that is none": ("handoff/README.md", b"---\nnever ends \xff\n```\nopen", "never ends"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_costs_what_is_damaged_and_is_told(tmp_path: Path, what: str) -> None:
    name, content, told = DAMAGE[what]
    run = write_run(tmp_path / "run")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_bytes(content)
    page = page_of(run)
    Elements(page)
    assert told in page
    assert "What ran" in page


def test_a_picture_that_is_none_is_left_out_and_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "evaluation").mkdir()
    (run / "evaluation/a-val.json").write_text('{"top1": 1}')
    (run / "evaluation/a-val-confusion.png").write_bytes(b"<svg onload=alert(1)>")
    page = page_of(run)
    assert "a-val-confusion.png is left out" in page
    assert "<img" not in page


def test_a_run_that_failed_at_once_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: run")
    (run / "failure.txt").write_text("rank 3: out of memory")
    page = page_of(run)
    for told in ("run.json is missing", "nothing was measured yet", "the last start failed: rank 3: out of memory"):
        assert told in page
    Elements(page)


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    cases = {
        "no such folder": [str(tmp_path / "nothing")],
        "is no run folder": [str(tmp_path / "empty")],
        "given twice": [str(run), f"{run}/", "--output", "x"],
        "at most 8": [str(run / str(number)) for number in range(9)] + ["--output", "x"],
        "say with --output": [str(run), str(run)],
        "cannot be written": [str(run), "--output", str(tmp_path / "nowhere/page.html")],
    }
    for told, arguments in cases.items():
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_the_page_of_one_run_lies_in_its_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert main([str(run)]) == 0
    assert (run / "report.html").exists()


def test_a_long_run_makes_a_small_page_that_keeps_its_spikes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = 200_000
    rows = [
        f'{{"kind":"train","samples_seen":{n},"time":{BEGAN + n},"loss":{1 + n % 7 / 100}}}\n' for n in range(1, lines)
    ]
    rows[123_456] = f'{{"kind":"train","samples_seen":123457,"time":{BEGAN + 123457},"loss":50}}\n'
    (run / "metrics.jsonl").write_text("".join(rows))
    write_lines(run / "bad_samples.jsonl", [{"name": str(n), "time": BEGAN + n} for n in range(20_000)])
    page = page_of(run)
    assert len(page) < 400_000
    assert "bad sample (20,000)" in page
    assert page.count("<td>bad sample</td>") == 20
    assert "of 20,007 in all" in page
    path = re.search(r'class="line r0 c0"[^>]*><path d="M([^"]+)"', page)
    assert path
    points = np.array([point.split(",") for point in path[1].split("L")], float)
    assert len(points) <= 2 * curves.COLUMNS + 2
    top = points[points[:, 1].argmin()]
    assert top[0] == pytest.approx(56 + 123457 / (lines - 1) * (520 - 66), abs=0.1)
    assert (np.diff(points[:, 0]) >= 0).all()


def test_thinning_keeps_the_lowest_and_the_highest_of_every_column() -> None:
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.uniform(0, 1, 10_000)), rng.normal(size=10_000)
    kept = curves.thinned(x, y, 0.0, 1.0)
    columns = (x * curves.COLUMNS).astype(int)
    for column in np.unique(columns):
        inside = np.flatnonzero(columns == column)
        assert {inside[y[inside].argmin()], inside[y[inside].argmax()]} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert len(kept) <= 2 * curves.COLUMNS + 2


def test_runs_are_compared_by_recipe_results_and_curves(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=3e-3, top1=92.75))
    assert re.search(r">optimizer\.lr</th><td>0\.001</td><td>0\.003</td>", page)
    assert "optimizer.eps</th><td>" in page.split("What ran")[1]
    assert "optimizer.eps" not in page.split("What differs")[1].split("<h2>")[0]
    assert re.search(r">eval: top1</th><td>91\.25</td><td>92\.75</td>", page)
    figure = page.split("<b>training loss</b>")[1].split("</figure>")[0]
    assert {"line r0 c0", "line r1 c1"} <= set(re.findall(r'class="(line [^"]+)"', figure))
    Elements(page)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "x/run"), write_run(tmp_path / "y/run"))
    assert str(tmp_path / "x/run") in page.split("<h2>")[0]


def test_the_average_is_drawn_beside_the_raw_weights(tmp_path: Path) -> None:
    figure = page_of(write_run(tmp_path / "run")).split("<b>top-1 accuracy, %</b>")[1].split("</figure>")[0]
    assert re.findall(r'data-label="(\w+)"', figure.split("by-time")[0]) == ["raw", "average"]


def test_a_metric_that_nobody_foresaw_has_a_picture_and_stages_share_one(tmp_path: Path) -> None:
    new = {"weight_norm/stage1": 1.0, "weight_norm/stage2": 2.0, "time/forward": 0.3, "time/backward": 0.6, "mfu": 0.4}
    rows = [train_row(step, **{name: value * step for name, value in new.items()}) for step in (1, 2, 3)]
    write_lines(tmp_path / "metrics.jsonl", [*rows, {"kind": "probe", "samples_seen": 9, "knn": 1.0}])
    panels = {panel.title: panel for panel in arrange([curves.read_curves(tmp_path / "metrics.jsonl")]).panels}
    labels = {title: [line.label for line in panel.lines] for title, panel in panels.items()}
    assert labels["train: weight norm"] == ["stage1", "stage2"]
    assert labels["train: time"] == ["forward", "backward"]
    assert labels["train: mfu"] == labels["probe: knn"] == [""]


def test_reading_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, pretrain.report.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
