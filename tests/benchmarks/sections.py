"""Sections as the benchmarks write them, with numbers that can be reckoned in the head."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.report import Section

CPU = {"device": "cpu", "name": "AMD EPYC", "gpus": [], "driver": None, "cores": 2}
H100 = {"device": "cuda", "name": "NVIDIA H100 80GB HBM3", "gpus": ["NVIDIA H100 80GB HBM3"], "driver": "570.1",
        "cores": 16}  # fmt: skip


def model_rows(**seconds: float) -> list[dict[str, Any]]:
    """One row a network and mode; a step of training takes so long, a forward pass a third of it."""
    return [
        {"model": name, "mode": mode, "parameters": 22_540_000, "macs": 3_260_000_000, "peak_gib": 0.25,
         "forward_s": [took / 3] * 3, "training_s": [took] * 3}
        for mode in ("eager", "compiled") for name, took in seconds.items()
    ]  # fmt: skip


def written(folder: Path, kind: str, conditions: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """The file of a day, written by the benchmarks' own writer."""
    options = argparse.Namespace(quick=False, note="", results=folder)
    Section(kind, options, ["--results", str(folder)]).write(conditions, rows)
    (file,) = folder.glob("bench-*.json")
    return file


def section(machine: dict[str, Any], conditions: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tables read."""
    return {"machine": machine, "conditions": conditions, "rows": rows}
