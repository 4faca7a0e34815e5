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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import scipy.stats
import torch
import yaml
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from data_pipeline.dataset import Dataset
from data_pipeline.loader import EvalLoader
from models import LaViT
from models.diagnostics import attention_diagnostics
from pretrain.engine.engine import build_model
from pretrain.handoff import load_handoff
from pretrain.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
NO_RESIDUAL, NO_LOSS = "model.overrides.attention_residual=false", "loss.diagonality_weight=0"
VARIANTS: dict[str, tuple[str, ...]] = {
    "vanilla": ("model.overrides.vanilla_blocks=DEPTHS", NO_RESIDUAL, NO_LOSS),
    "reuse": ("model.overrides.learned_maps=false", NO_RESIDUAL, NO_LOSS),
    "la": (NO_RESIDUAL, NO_LOSS),
    "la+residual": (NO_LOSS,),
    "la+loss": (NO_RESIDUAL,),
    "la+residual+printed": ("loss.diagonality_form=as_printed",),
    "la+residual+loss": (),
    "vit": ("model={factory: 'examples.networks:ViT', arguments: {width: 144, depth: 5, drop_path: 0.05}}", NO_LOSS),
    "cnn": (
        "model={factory: 'examples.networks:CNN', arguments: {widths: [16, 32, 64, 156], depths: [1, 1, 1, 3]}}",
        NO_LOSS,
    ),
}
"""What differs from the recipe, which is the whole LaViT. ``reuse`` repeats scores: Psi and Theta are the identity.
``vit`` and ``cnn`` have as many parameters as LaViT."""
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
IMAGES = 200
"""Test images whose attention is measured."""
writing = threading.Lock()


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
    row_file, fresh = folder / "ablation.json", not folder.exists()
    if row_file.exists():
        return json.loads(row_file.read_text())
    sets = itertools.chain.from_iterable(("--set", assignment) for assignment in assignments)
    train = ("pretrain/main.py", "--recipe", str(options.recipe), "--runs", str(options.runs), *sets)
    used = _run(train, options.runs / f"{folder.name}.log")
    report = folder / "evaluation" / f"{Path(options.data).name}-test.json"
    evaluate = (
        "-m",
        "pretrain.evaluate",
        str(folder),
        "--data",
        str(options.data),
        "--split",
        "test",
        "--trust-factory",
    )
    _run(evaluate, options.runs / f"{folder.name}.log")
    summary, evaluation = (json.loads(path.read_text()) for path in (folder / "summary.json", report))
    row = {
        "variant": variant, "seed": seed, "top1": evaluation["top1"], "loss": evaluation["loss"],
        "val_top1": summary["top1"], "images": summary["train_images"], "seconds": summary["seconds"],
        "core_seconds": round(used, 1) if fresh else None,
    } | measure(load_recipe(options.recipe, assignments), folder, options)  # fmt: skip
    row_file.write_text(json.dumps(row) + "\n")
    return row


def _run(command: tuple[str, ...], log: Path) -> float:
    """Run one of the project's commands on one core; returns the seconds of cores that it used."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("a") as output:
        child = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {child.returncode}; see {log}")
    return used.ru_utime + used.ru_stime


def measure(recipe: Recipe, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Parameters, multiply-accumulates of an image, and the attention of each block before and after training."""
    with writing:  # the seed of the weights is torch's global one
        fresh = build_model(recipe, 10).eval()
    trained, _ = load_handoff(folder / "handoff", trust_factory=True)
    test = Dataset.open(options.data, "test")
    loader = EvalLoader(test, recipe.data, batch_size=IMAGES, rank=0, world_size=1, device=torch.device("cpu"))
    images = next(iter(loader)).images
    loader.close()
    # Fused attention is not counted on a CPU; the kernel made of products is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fresh(images[:1])
    attention = {}
    for when, model in (("before", fresh), ("after", trained)):
        if isinstance(model, LaViT):
            attention[when] = {
                f"stage{block.stage + 1}_block{block.block + 1}_{block.kind}": {
                    "diagonality": block.diagonality, "symmetry": block.symmetry, "saturation": block.saturation
                }
                for block in attention_diagnostics(model, images)
            }  # fmt: skip
    parameters = sum(parameter.numel() for parameter in fresh.parameters())
    return {"parameters": parameters, "macs": counter.get_total_flops() // 2, "attention": attention}


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean, and half the width of its 95 % interval (Student's t); None where there is one value."""
    count = len(values)
    half = None
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
            half = found["half_width"]
            shown = half is not None and found["mean"] is not None and abs(found["mean"]) > half
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
    by_variant = {row["variant"]: row for row in content["rows"]}
    yield "| variant | parameters | MMACs | top-1, % | seeds |\n|---|---|---|---|---|"
    for variant, found in content["variants"].items():
        row = by_variant[variant]
        half = "" if found["half_width"] is None else f" ± {found['half_width']:.2f}"
        costs = f"{row['parameters'] / 1e6:.2f} M | {row['macs'] / 1e6:.1f}"
        yield f"| {variant} | {costs} | {found['mean']:.2f}{half} | {found['seeds']} |"
    yield "\n| question | difference in top-1, points | |\n|---|---|---|"
    for question, found in content["differences"].items():
        half = "" if found["half_width"] is None else f" ± {found['half_width']:.2f}"
        verdict = "differs" if found["differs"] else "no difference found" if half else "one seed"
        yield f"| {question} ({found['with']} - {found['without']}) | {found['mean']:+.2f}{half} | {verdict} |"


def draw(content: dict[str, Any], path: Path) -> None:
    """Top-1 with intervals, and the saturation of each block before and after training."""
    import matplotlib as mpl  # noqa: PLC0415  (an optional package)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    names = list(content["variants"])
    for place, name in enumerate(names):
        found = content["variants"][name]
        points = [row["top1"] for row in content["rows"] if row["variant"] == name]
        left.plot(points, [place] * len(points), ".", color="0.6")
        left.errorbar(found["mean"], place, xerr=found["half_width"] or 0.0, fmt="o", capsize=3, color="C0")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("top-1 on the test images, % (mean, 95 % interval, runs)")
    for color, name in enumerate(name for name in names if name in ("vanilla", "reuse", "la", "la+residual+loss")):
        rows = [row["attention"] for row in content["rows"] if row["variant"] == name]
        blocks = [b for b, values in rows[0]["after"].items() if values["saturation"] is not None]
        for when, line in (("before", ":"), ("after", "-")):
            means = [statistics.fmean(row[when][block]["saturation"] for row in rows) for block in blocks]
            places = [block.rpartition("_")[0].replace("_block", " block ") for block in blocks]
            right.plot(places, means, f"o{line}", color=f"C{color}", label=f"{name}, {when} training", markersize=4)
    right.set_ylabel("saturation: similarity with the block before")
    right.tick_params(axis="x", rotation=30)
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
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
    wanted = [
        (variant, seed)
        for seed in range(options.seeds)
        for variant in options.variants
        if variant not in FEW_SEEDS or seed < 3
    ]
    rows: list[dict[str, Any]] = []
    console, failed = Console(highlight=False, markup=False, soft_wrap=True), 0

    def one(variant: str, seed: int) -> None:
        nonlocal failed
        try:
            row = run(variant, seed, options)
        except RuntimeError as error:
            failed += 1
            console.print(f"error: {variant}, seed {seed}: {error}")
            return
        with writing:
            rows.append(row)
            write(rows, options)
        console.print(f"{variant}, seed {seed}: top-1 {row['top1']:.2f} %, {row['seconds']:.0f} s")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, *zip(*wanted, strict=True)))
    if rows:
        path, content = write(rows, options)
        console.print(*show(content), f"\n{path}", sep="\n")
        if options.figure:
            draw(content, Path(options.figure))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
