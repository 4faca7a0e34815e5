"""docs/performance.md is what the newest results say, and nothing in its tables was typed."""

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import chart, page
from pretrain.planning.published import PUBLISHED, our_efficiency
from pretrain.planning.scaling import Network
from tests.benchmarks.sections import CPU, H100, model_rows

TEXT = page.PAGE.read_text()
AT = {"versions": {"torch": "2.0"}, "revision": "abc", "changed": False, "load_before": 0.1, "seconds": 9,
      "command": "c", "file": "bench.json", "quick": False}  # fmt: skip


def made(kind: str, when: str, machine: dict, **seconds: float) -> dict:
    conditions = {"batch": 2, "precision": "fp32"}
    return AT | {
        "kind": kind,
        "when": when,
        "machine": machine,
        "conditions": conditions,
        "rows": model_rows(**seconds),
    }


def test_the_page_is_what_the_newest_results_give() -> None:
    assert page.render(TEXT, page.read_results()) == TEXT, "run python -m benchmarks.page"


def test_no_number_in_a_table_was_typed() -> None:
    rest = re.sub(r"<!-- made: (\w+) -->\n.*?<!-- end: \1 -->", "", TEXT, flags=re.DOTALL)
    assert not [line for line in rest.splitlines() if line.startswith("|")]
    assert "<!--" not in rest


def test_the_picture_is_of_the_newest_results() -> None:
    results = page.read_results()
    newest = {kind: page.newest(results, kind) for kind in page.VERSIONS}
    assert Image.open(page.PICTURE).text["Comment"] == chart.digest(newest), "run python -m benchmarks.page"


def test_every_result_that_the_page_cites_is_there() -> None:
    cited = set(re.findall(r"`benchmarks/results/([^`]+)`", TEXT)) - {"bench-DATE-MACHINE.json"}
    assert cited
    for name in cited:
        assert [*page.RESULTS.glob(name)], name


def test_the_newest_of_each_machine_counts_and_a_quick_look_never() -> None:
    old, new = (made("model", f"2026-01-0{day}T00:00:00", CPU, lavit_small=day) for day in (1, 2))
    gpu = made("model", "2025-01-01T00:00:00", H100, lavit_small=0.1)
    assert page.newest([gpu, old, new], "model") == [gpu, new]
    text = "\n".join(page.block([gpu, old, new], "model"))
    assert "not measured." not in text
    assert "On a GPU: not measured." in page.block([old, new], "model")
    assert page.block([], "data") == ["On a GPU: not measured.", "On a CPU: not measured."]


def test_a_gpus_only_run_beside_timms_networks_fills_the_rows_of_both(tmp_path: Path) -> None:
    rows = model_rows(lavit_small=0.1, pvt_v2_b2=0.15, swin_tiny_patch4_window7_224=0.2)
    file = {"sections": {"model": made("model", "2026-01-01T00:00:00", H100) | {"rows": rows}}}
    file["sections"]["model"]["conditions"]["precision"] = "bf16"
    (tmp_path / "bench-a.json").write_text(json.dumps(file))
    found = page.read_results(tmp_path)
    goals = [line for line in page.blocks(found)["goals"] if "| GPU |" in line]
    assert sum("not measured" not in line for line in goals) == 3, goals  # both rivals, and MFU
    model, alternatives = (page.block(found, kind) for kind in ("model", "alternatives"))
    assert any("pvt_v2_b2" in line for line in alternatives)
    assert any("| lavit_small | compiled" in line for line in model)
    assert not any("pvt_v2_b2" in line for line in model)
    alone = made("model", "2025-01-01T00:00:00", H100, lavit_small=0.3)
    assert page.newest([*found, alone], "model") == [alone], "a run of our own counts before that"


def test_each_network_is_compared_in_the_mode_that_is_better_for_it() -> None:
    rows = [row for row in model_rows(lavit_small=0.2, pvt_v2_b2=0.3) if row["mode"] == "eager"]
    rows += [row for row in model_rows(lavit_small=0.1, pvt_v2_b2=0.4) if row["mode"] == "compiled"]
    section = made("alternatives", "2026-01-01T00:00:00", CPU) | {"rows": rows}
    assert "lavit_small (compiled) over: pvt_v2_b2 (eager) 3.000 (" in "\n".join(page.block([section], "alternatives"))
    (panel,) = chart.panels({kind: [section] if kind == "alternatives" else [] for kind in page.VERSIONS})
    assert [name for name, *_ in panel[1]] == ["lavit_small, compiled", "pvt_v2_b2, eager"]


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "bench-broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"bench-broken\.json is no result"):
        page.read_results(tmp_path)


def test_a_page_that_lacks_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for goals"):
        page.render("# nothing", [])


@pytest.mark.parametrize("of", [of for of in PUBLISHED if of.many > 8], ids=lambda of: f"{of.network} {of.many}")
def test_published_scaling_between_nodes_lies_between_hidden_and_open_talk(of) -> None:
    assert our_efficiency(of, overlap=False) < of.efficiency < our_efficiency(of)


def test_within_a_node_the_simulation_is_too_hopeful_even_without_overlap() -> None:
    inside = [of for of in PUBLISHED if of.many <= of.gpus_per_node]
    assert inside
    assert all(of.efficiency < our_efficiency(of, overlap=False) for of in inside)


def test_our_side_of_published_scaling_is_a_tree_over_the_stated_network() -> None:
    vgg = next(of for of in PUBLISHED if of.network == "VGG-16" and of.many == 512)
    buckets, steps = math.ceil(138_357_544 / 5e6), 2 * math.log2(512)
    compute, talk = 64 / 154, 2 * 4 * 138_357_544 / (25e9 / 8) + buckets * steps * Network.latency
    assert our_efficiency(vgg, overlap=False) == pytest.approx(compute / (compute + talk), rel=0.01)
    assert our_efficiency(vgg) == pytest.approx(compute / (compute / 3 + talk), rel=0.01)
