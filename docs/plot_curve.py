"""Draw the curve of a run: ``python docs/plot_curve.py runs/demo docs/pictures/demo-curve.png``."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from pretrain.metrics import read_metrics


def main(run: Path, picture: Path) -> None:
    """Cross-entropy of training on the left axis, top-1 of evaluation on the right one, by images seen."""
    train, evaluations = (read_metrics(run / "metrics.jsonl", kind) for kind in ("train", "eval"))
    figure, loss_axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    loss_axis.plot([row["samples_seen"] for row in train], [row["cross_entropy"] for row in train], color="tab:blue")
    loss_axis.set_xlabel("images seen")
    loss_axis.set_ylabel("training cross-entropy", color="tab:blue")
    top1_axis = loss_axis.twinx()
    top1_axis.plot(
        [row["samples_seen"] for row in evaluations], [row["top1"] for row in evaluations], "o-", color="tab:orange"
    )
    top1_axis.set_ylabel("top-1 on held-out images, %", color="tab:orange")
    best = evaluations[-1]
    top1_axis.annotate(
        f"{best['top1']:.2f} %", (best["samples_seen"], best["top1"]), xytext=(-10, -18), textcoords="offset points",
        ha="right", color="tab:orange",
    )  # fmt: skip
    loss_axis.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
