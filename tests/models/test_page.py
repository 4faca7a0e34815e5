"""docs/model.md says what was measured and what the code has."""

import re
from pathlib import Path

from models import model_config
from models.cost import count_macs, count_parameters

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/model.md").read_text()


def test_the_geometries_on_the_page_stand_in_one_result_file():
    rows = re.findall(r"^\| (?:tiny|small|base) \| [a-z].*\|$", PAGE, re.MULTILINE)
    assert len(rows) == 3 * 6
    files = (ROOT / "benchmarks/results").glob("geometry-*.md")
    assert any(set(rows) <= set(file.read_text().splitlines()) for file in files)


def test_the_family_on_the_page_is_the_one_that_is_built():
    sizes = re.findall(r"^\| `(lavit_\w+)` \| (.*) \| (.*) \| (.*) \| (.*) M \| (.*) G \| .* \|$", PAGE, re.MULTILINE)
    assert [name for name, *_ in sizes] == [f"lavit_{size}" for size in ("tiny", "small", "base", "large", "huge")]
    for name, widths, depths, vanilla, parameters, macs in sizes:
        config = model_config(name)
        for numbers, field in ((widths, config.widths), (depths, config.depths), (vanilla, config.vanilla_blocks)):
            assert tuple(map(int, numbers.split(", "))) == field
        assert parameters == f"{count_parameters(config) / 1e6:.2f}"
        assert macs == f"{count_macs(config) / 1e9:.3f}"
