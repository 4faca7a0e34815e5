"""What each part of LaViT does: ordinary training runs that differ in one part, paired by seed.

``python -m benchmarks.ablation`` trains each variant with each seed on Fashion-MNIST, evaluates its hand-off once on
the test images, and compares. Stopped or killed, the same command continues; finished runs are kept in ``--runs``.
Results are written after every run. Needs the dataset (see the head of the recipe).
"""

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import scipy.stats
import torch
import yaml
from rich.console import Console

from benchmarks import timing
from benchmarks.model import cost
from data_pipeline.dataset import Dataset
from data_pipeline.loader import EvalLoader
from models import LaViT
from models.diagnostics import attention_diagnostics
from pretrain.engine.engine import build_model
from pretrain.handoff import load_handoff
from pretrain.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
NO_RESIDUAL, LOSS, NO_LOSS = (
    "model.overrides.attention_residual=false",
    "loss.diagonality_weight=0.01",
    "loss.diagonality_weight=0",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "vanilla": ("model.overrides.vanilla_blocks=DEPTHS", NO_RESIDUAL, NO_LOSS),
    "reuse": ("model.overrides.learned_maps=false", NO_RESIDUAL, NO_LOSS),
    "la": (NO_RESIDUAL, NO_LOSS),
    "la+residual": (NO_LOSS,),
    "la+loss": (NO_RESIDUAL, LOSS),
    "la+residual+printed": (LOSS, "loss.diagonality_form=as_printed"),
    "la+residual+loss": (LOSS,),
    "vit": ("model={factory: 'examples.networks:ViT', arguments: {width: 144, depth: 5, drop_path: 0.05}}", NO_LOSS),
    "cnn": (
        "model={factory: 'examples.networks:CNN', arguments: {widths: [16, 32, 64, 156], depths: [1, 1, 1, 3]}}",
        NO_LOSS,
    ),
}
"""What differs from the recipe. ``la+residual+loss`` is LaViT as the paper describes it. ``reuse`` repeats scores: Psi
and Theta are the identity. ``vit`` and ``cnn`` have as many parameters as LaViT."""
QUESTIONS = {
    "Less Attention in place of vanilla attention": ("la", "vanilla"),
    "Psi and Theta, over repeating scores": ("la", "reuse"),
    "attention residual": ("la+residual", "la"),
    "attention residual, with the loss": ("la+residual+loss", "la+loss"),
    "diagonality loss": ("la+residual+loss", "la+residual"),
    "diagonality loss, without residual": ("la+loss", "la"),
    "printed sign of the loss": ("la+residual+printed", "la+residual"),
    "intended over printed sign": ("la+residual+loss", "la+residual+printed"),
    "all of LaViT over its vanilla twin": ("la+residual+loss", "vanilla"),
    "all of LaViT over a ViT": ("la+residual+loss", "vit"),
    "all of LaViT over a CNN": ("la+residual+loss", "cnn"),
}
"""What is compared, as (with, without)."""
FEW_SEEDS = ("vit", "cnn")
"""Variants that are trained with three seeds."""
TITLES = {
    "saturation": "saturation: similarity with the block before",
    "diagonality": "diagonality: attention to the own place",
    "symmetry": "symmetry",
}
"""What is measured of a block's attention."""
IMAGES = 200
"""Test images whose attention is measured."""
building = threading.Lock()


def settings(variant: str, seed: int, options: argparse.Namespace) -> list[str]:
    """The recipe's assignments for one run."""
    depths = yaml.safe_load(options.recipe.read_text())["model"]["overrides"]["depths"]
    return [
        f"name={variant.replace('+', '-')}-{seed}", f"seed={seed}", f"data.path={options.data}",
        f"schedule.epochs={options.epochs}", f"schedule.warmup_epochs={options.epochs / 10}",
        f"evaluation.every_epochs={options.epochs}", "data.threads=1", "checkpoint.keep=1", "watch.attention_images=0",
        *(assignment.replace("DEPTHS", str(depths)) for assignment in VARIANTS[variant]),
    ]  # fmt: skip


def run(variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate unless that was done; returns the row.

    Raises:
        RuntimeError: training or evaluation failed; names the log.
    """
    assignments = settings(variant, seed, options)
    folder = options.runs / assignments[0].removeprefix("name=")
    row_file, log, fresh = folder / "ablation.json", options.runs / f"{folder.name}.log", not folder.exists()
    if row_file.exists():
        return json.loads(row_file.read_text())
    sets = [word for assignment in assignments for word in ("--set", assignment)]
    used = _run(["pretrain/main.py", "--recipe", str(options.recipe), "--runs", str(options.runs), *sets], log)
    test = ["--data", str(options.data), "--split", "test", "--trust-factory"]
    _run(["-m", "pretrain.evaluate", str(folder), *test], log)
    report = folder / "evaluation" / f"{Path(options.data).name}-test.json"
    summary, evaluation = (json.loads(path.read_text()) for path in (folder / "summary.json", report))
    row = {
        "variant": variant, "seed": seed, "top1": evaluation["top1"], "loss": evaluation["loss"],
        "val_top1": summary["top1"], "images": summary["train_images"], "seconds": summary["seconds"],
        "core_seconds": round(used, 1) if fresh else None,
    } | measure(load_recipe(options.recipe, assignments), folder, options)  # fmt: skip
    row_file.write_text(json.dumps(row) + "\n")
    return row


def _run(command: list[str], log: Path) -> float:
    """Run one of the project's commands on one core; returns the seconds of cores that it used."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("a") as out:
        child = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=out, stderr=out)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {child.returncode}; see {log}")
    return used.ru_utime + used.ru_stime


def measure(recipe: Recipe, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Parameters, multiply-accumulates of an image, and the attention of each block before and after training."""
    with building:  # the seed of the weights is torch's global one
        fresh = build_model(recipe, 10).eval()
    trained, _ = load_handoff(folder / "handoff", trust_factory=True)
    test = Dataset.open(options.data, "test")
    loader = EvalLoader(test, recipe.data, batch_size=IMAGES, rank=0, world_size=1, device=torch.device("cpu"))
    images = next(iter(loader)).images
    loader.close()
    attention = {}
    for when, model in (("before", fresh), ("after", trained)):
        if isinstance(model, LaViT):
            attention[when] = {
                f"stage{block.stage + 1}_block{block.block + 1}_{block.kind}": {
                    quantity: getattr(block, quantity) for quantity in TITLES
                }
                for block in attention_diagnostics(model, images)
            }
    scales = {name: weight.tolist() for name, weight in trained.named_parameters() if name.endswith("residual.gamma")}
    return {**cost(fresh, images.shape[-1]), "attention": attention, "residual_scales": scales}


def interval(values: list[float]) -> dict[str, Any]:
    """Mean, and half the width of its 95 % interval (Student's t); None where there is one value."""
    count, half = len(values), None
    if count > 1:
        half = float(scipy.stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return {"seeds": count, "mean": statistics.fmean(values), "half_width": half}


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean top-1 of each variant, and the paired differences of each question, in points of top-1."""
    top1 = {(row["variant"], row["seed"]): row["top1"] for row in rows}
    variants = {
        variant: interval([value for (name, _), value in top1.items() if name == variant])
        for variant in dict.fromkeys(row["variant"] for row in rows)
    }
    differences = {}
    for question, (one, other) in QUESTIONS.items():
        seeds = [seed for name, seed in top1 if name == one and (other, seed) in top1]
        if seeds:
            found = interval([top1[one, seed] - top1[other, seed] for seed in seeds])
            shown = found["half_width"] is not None and abs(found["mean"]) > found["half_width"]
            differences[question] = {"with": one, "without": other, **found, "differs": shown}
    return {"variants": variants, "differences": differences}


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Write the rows and their comparison, sorted; returns the file and its content."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path: Path = options.results / f"ablation-{today}{'-quick' * options.quick}.json"
    order = list(VARIANTS)
    rows = sorted(rows, key=lambda row: (order.index(row["variant"]), row["seed"]))
    content = {
        "command": options.command, "recipe": options.recipe.name, "epochs": options.epochs,
        **timing.environment(), **compare(rows), "rows": rows,
    }  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path, content


def show(content: dict[str, Any]) -> Iterator[str]:
    """Lines for the terminal and the documentation: a table of variants, and one of differences."""

    def points(found: dict[str, Any], sign: str = "") -> str:
        half = "" if found["half_width"] is None else f" ± {found['half_width']:.2f}"
        return f"{found['mean']:{sign}.2f}{half}"

    yield "| variant | parameters | MMACs | core-minutes | top-1, % | on val, % | seeds |"
    yield "|---|---|---|---|---|---|---|"
    for variant, found in content["variants"].items():
        rows = [row for row in content["rows"] if row["variant"] == variant]
        times = [row["core_seconds"] / 60 for row in rows if row["core_seconds"] is not None]
        costs = f"{rows[0]['parameters'] / 1e6:.2f} M | {rows[0]['macs'] / 1e6:.1f}"
        time = f"{statistics.median(times):.1f}" if times else ""
        val = points(interval([row["val_top1"] for row in rows]))
        yield f"| {variant} | {costs} | {time} | {points(found)} | {val} | {found['seeds']} |"
    yield "\n| question | difference in top-1, points | |\n|---|---|---|"
    for question, found in content["differences"].items():
        verdict = "differs" if found["differs"] else "one seed" if found["seeds"] == 1 else "no difference found"
        yield f"| {question} ({found['with']} - {found['without']}) | {points(found, '+')} | {verdict} |"


def draw(content: dict[str, Any], path: Path) -> None:
    """Top-1 with intervals, and what each block's attention is like before and after training."""
    import matplotlib as mpl  # noqa: PLC0415  (an optional package)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    accuracy, names = axes[0, 0], list(content["variants"])
    for place, name in enumerate(names):
        found = content["variants"][name]
        points = [row["top1"] for row in content["rows"] if row["variant"] == name]
        accuracy.plot(points, [place] * len(points), ".", color="0.6")
        accuracy.errorbar(found["mean"], place, xerr=found["half_width"] or 0.0, fmt="o", capsize=3, color="C0")
    accuracy.set_yticks(range(len(names)), names)
    accuracy.invert_yaxis()
    accuracy.set_xlabel("top-1 on the test images, %: mean, 95 % interval, runs")
    for axis, (quantity, title) in zip(axes.flat[1:], TITLES.items(), strict=True):
        for color, name in enumerate(name for name in names if name not in FEW_SEEDS):  # which have no such attention
            rows = [row["attention"] for row in content["rows"] if row["variant"] == name]
            blocks = [block for block, values in rows[0]["after"].items() if values[quantity] is not None]
            places = [block.rpartition("_")[0].replace("stage", "").replace("_block", ".") for block in blocks]
            for when, line, label in (("before", ":", None), ("after", "o-", name)):
                means = [statistics.fmean(row[when][block][quantity] for row in rows) for block in blocks]
                axis.plot(places, means, line, color=f"C{color}", label=label, markersize=4)
        axis.set_title(f"{title} (dotted: before training)", fontsize=10)
        axis.set_xlabel("stage.block")
        axis.set_ylim(0, 1.03)
    axes[0, 1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate, compare; 1 if a run failed."""
    defaults = {
        "data": "data/fashion-mnist", "recipe": "recipes/fashion_mnist_lavit.yaml", "runs": "runs/ablation",
        "variants": list(VARIANTS), "seeds": 5, "epochs": 2.0, "jobs": 1, "figure": "",
    }  # fmt: skip
    quick = {"variants": ["vanilla", "la+residual+loss"], "seeds": 2, "epochs": 1.0}
    options = timing.parse("ablation", __doc__ or "", arguments, defaults=defaults, quick=quick)
    for name in ("data", "recipe", "runs"):
        setattr(options, name, Path(getattr(options, name)).resolve())
    options.runs.mkdir(parents=True, exist_ok=True)
    pairs = itertools.product(range(options.seeds), options.variants)
    wanted = [(variant, seed) for seed, variant in pairs if variant not in FEW_SEEDS or seed < 3]
    rows: list[dict[str, Any]] = []
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {pool.submit(run, *pair, options): f"{pair[0]}, seed {pair[1]}" for pair in wanted}
        for done in as_completed(runs):
            if error := done.exception():
                console.print(f"error: {runs[done]}: {error}")
                continue
            rows.append(done.result())
            write(rows, options)
            console.print(f"{runs[done]}: top-1 {rows[-1]['top1']:.2f} %, {rows[-1]['seconds']:.0f} s")
    if rows:
        path, content = write(rows, options)
        console.print(*show(content), f"\n{path}", sep="\n")
        if options.figure:
            draw(content, Path(options.figure))
    return int(len(rows) < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
