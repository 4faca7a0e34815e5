"""The model card: README.md of a hand-off, with the front matter that the Hugging Face Hub reads."""

from typing import Any

import yaml


def model_card(content: dict[str, Any], *, samples: int, evaluated_at: int, license_id: str = "unknown") -> str:
    """The card as Markdown.

    Args:
        content: fields of ``HandoffConfig``.
        samples: pictures that were evaluated.
        evaluated_at: pictures trained on at the time of that evaluation; before the end in a run that goes on.
        license_id: of the weights, as the Hub names licenses. It is not ours to choose: it depends on the data.
    """
    dataset, metrics, recipe = content["dataset"], content["metrics"], content["recipe"]
    network, data = content["architecture"]["name"], recipe["data"]
    weights = {"raw": "the last step's weights", "average": "the moving average of the weights (EMA)"}
    return f"""---
{yaml.safe_dump(_front_matter(content, license_id), sort_keys=False, allow_unicode=True).strip()}
---
# {recipe["name"]}: {network} on {dataset["name"]}

LaViT (Less-Attention Vision Transformer, arXiv 2406.00427) for {content["num_classes"]} classes:
{weights[content["weights"]]}, in fp32.

| | |
|---|---|
| top-1 on the {data["val_split"]} split ({samples:,} pictures) | {metrics["top1"]:.2f} % |
| top-5 | {metrics["top5"]:.2f} % |
| cross-entropy | {metrics["loss"]:.4f} |
| pictures trained on | {content["samples_seen"]:,} ({content["samples_seen"] / dataset["samples"]:.1f} epochs) |
| input | {data["image_size"]} px, {data.get("interpolation", "")}, mean {data["mean"]}, std {data["std"]} |
| training data | {dataset["name"]}, {dataset["samples"]:,} pictures, fingerprint {dataset["fingerprint"]} |
{_lineage(content.get("initialized_from"))}| license | {license_id}{_about(license_id)} |

Measured by the training itself after {evaluated_at:,} pictures, in the precision that it computes in. The whole recipe
stands in `config.json`, the classes too. To load it, from this folder or from the Hub:

```python
from pretrain.handoff import load_handoff
model, config = load_handoff("PATH/TO/THIS/FOLDER or ORGANIZATION/NAME")
logits = model(images)  # (batch, 3, H, W) in 0..1, normalised by config.input.mean and std -> (batch, classes)
```

`config.json` knows the digest of `model.safetensors` and of itself; `load_handoff` refuses files that differ.
"""


def _about(license_id: str) -> str:
    return "" if license_id != "unknown" else ": nobody said; `python -m pretrain.export RUN --license ID` does"


def _lineage(origin: dict[str, Any] | None) -> str:
    """A row for each hand-off that training began with, the nearest first."""
    if origin is None:
        return ""
    return (
        f"| began with | {origin['weights']} weights of {origin['run']}, {origin['samples_seen']:,} pictures of "
        f"{origin['dataset']['name']}, digest {origin['weights_blake2']} |\n{_lineage(origin['initialized_from'])}"
    )


def _front_matter(content: dict[str, Any], license_id: str) -> dict[str, Any]:
    dataset, metrics, recipe = content["dataset"], content["metrics"], content["recipe"]
    measured = [
        {"type": "accuracy", "name": "top-1 accuracy, percent", "value": round(metrics["top1"], 4)},
        {"type": "accuracy", "name": "top-5 accuracy, percent", "value": round(metrics["top5"], 4)},
        {"type": "loss", "name": "cross-entropy, nats", "value": round(metrics["loss"], 6)},
    ]
    result = {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {"type": dataset["name"], "name": dataset["name"], "split": recipe["data"]["val_split"]},
        "metrics": measured,
    }
    return {
        "library_name": "lavit-pretrain",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "lavit", content["architecture"]["name"], "arxiv:2406.00427"],
        "license": license_id,
        "datasets": [dataset["name"]],
        "metrics": ["accuracy"],
        "model-index": [{"name": recipe["name"], "results": [result]}],
    }
