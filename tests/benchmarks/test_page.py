"""docs/performance.md is what the newest results say, and nothing in its tables was typed."""

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
