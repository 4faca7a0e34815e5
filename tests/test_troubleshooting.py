"""docs/troubleshooting.md has an entry for everything that can be said, and for nothing that cannot."""

import re

from tests.messages import HOLE, ROOT, covers, messages, texts

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
ENTRIES = [row.split(" | ")[0] for row in PAGE.splitlines() if row.startswith("| ")]
FRAGMENTS = [fragment for entry in ENTRIES for fragment in re.findall(r"`([^`]+)`", entry)]


def test_every_message_has_an_entry() -> None:
    found = messages()
    assert len(found) > 300
    missing = [one for one in found if not any(covers(fragment, one) for fragment in FRAGMENTS)]
    assert not missing, "\n".join(f"{one.where}: {one.text.replace(HOLE, '...')}" for one in missing)


def test_no_entry_is_about_what_nobody_says_any_more() -> None:
    said = texts()
    assert not [fragment for fragment in FRAGMENTS if not any(covers(fragment, one) for one in said)]


def test_an_entry_is_about_a_few_messages_only() -> None:
    found = messages()
    wide = {fragment: sum(covers(fragment, one) for one in found) for fragment in FRAGMENTS}
    assert not {fragment: count for fragment, count in wide.items() if count > 12}


def test_every_state_of_a_run_on_a_cluster_is_explained() -> None:
    listed = re.search(r'    state: str\n    """(.*)\."""', (ROOT / "slurm/standing.py").read_text())
    assert listed
    rows = re.findall(r"^\| ([a-z, ]+) \|.*\|.*\|$", (ROOT / "docs/cluster.md").read_text(), re.MULTILINE)
    explained = {state for row in rows for state in row.split(", ")}
    assert {*re.split(r", | or ", listed[1])} <= explained
