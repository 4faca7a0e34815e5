"""The model card: README.md of a hand-off, with the front matter that the Hugging Face Hub reads."""

import re
from typing import Any

import yaml

from data_pipeline.errors import printable


def model_card(content: dict[str, Any], *, samples: int, evaluated_at: int, license_id: str = "unknown") -> str:
    """The card as Markdown, in which names are escaped.

    Args:
        content: fields of ``HandoffConfig``.
        samples: images that were evaluated.
        evaluated_at: images trained on at the time of that evaluation; before the end where the run continues.
        license_id: of the weights, as the Hub names licenses. It depends on the data.
    """
    dataset, metrics, recipe, data = content["dataset"], content["metrics"], content["recipe"], content["input"]
    network, name, split = map(
        _escaped, (content["architecture"]["name"], dataset["name"], recipe["data"]["val_split"])
    )
    factory = content["architecture"].get("factory")
    what = (
        "LaViT (Less-Attention Vision Transformer, arXiv 2406.00427)"
        if factory is None
        else f"The network of {network}"
    )
    trusted = "" if factory is None else ", trust_factory=True"
    weights = {"raw": "the last step's weights", "average": "the moving average of the weights (EMA)"}
    return f"""---
{yaml.safe_dump(_front_matter(content, license_id), sort_keys=False, allow_unicode=True).strip()}
---
# {_escaped(recipe["name"])}: {network} on {name}

{what} for {content["num_classes"]} classes:
{weights[content["weights"]]}, in fp32.

| | |
|---|---|
| top-1 on the {split} split ({samples:,} images) | {metrics["top1"]:.2f} % |
| top-5 | {metrics["top5"]:.2f} % |
| cross-entropy | {metrics["loss"]:.4f} |
| images trained on | {content["samples_seen"]:,} ({content["samples_seen"] / dataset["samples"]:.1f} epochs) |
| input | {data["image_size"]} px, {data["interpolation"]}, mean {data["mean"]}, std {data["std"]} |
| training data | {name}, {dataset["samples"]:,} images, fingerprint {_escaped(dataset["fingerprint"])} |
{_lineage(content.get("initialized_from"))}| license | {_escaped(license_id)}{_about(license_id)} |

Measured during training after {evaluated_at:,} images, in the precision of training. `config.json` has the recipe and
the classes. To load the weights, from this folder or from the Hub:

```python
from pretrain.handoff import load_handoff
model, config = load_handoff("PATH/TO/THIS/FOLDER or ORGANIZATION/NAME"{trusted})
logits = model(images)  # (batch, 3, H, W) in 0..1, normalized by config.input.mean and std -> (batch, classes)
```

`config.json` holds the digests of `model.safetensors` and of itself; `load_handoff` refuses files that differ.
"""


def _about(license_id: str) -> str:
    return "" if license_id != "unknown" else ": not stated; `python -m pretrain.export RUN --license ID` states it"


def _escaped(text: str) -> str:
    """Text as it is, whatever Markdown and HTML would make of it, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", printable(text))


def _lineage(origin: dict[str, Any] | None) -> str:
    """A row for each hand-off that the initial weights came from, the nearest first."""
    if origin is None:
        return ""
    return (
        f"| initialized from | {_escaped(origin['weights'])} weights of {_escaped(origin['run'])}, "
        f"{origin['samples_seen']:,} images of {_escaped(origin['dataset']['name'])}, "
        f"digest {_escaped(origin['weights_blake2'])} |\n{_lineage(origin['initialized_from'])}"
    )


def _front_matter(content: dict[str, Any], license_id: str) -> dict[str, Any]:
    metrics, recipe, name = content["metrics"], content["recipe"], printable(content["dataset"]["name"])
    measured = [
        {"type": "accuracy", "name": "top-1 accuracy, percent", "value": round(metrics["top1"], 4)},
        {"type": "accuracy", "name": "top-5 accuracy, percent", "value": round(metrics["top5"], 4)},
        {"type": "loss", "name": "cross-entropy, nats", "value": round(metrics["loss"], 6)},
    ]
    own = "factory" not in content["architecture"]
    lavit = ["lavit", content["architecture"]["name"], "arxiv:2406.00427"] if own else []
    result = {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {"type": name, "name": name, "split": printable(recipe["data"]["val_split"])},
        "metrics": measured,
    }
    return {
        "library_name": "lavit-pretrain",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", *lavit],
        "license": license_id,
        "datasets": [name],
        "metrics": ["accuracy"],
        "model-index": [{"name": recipe["name"], "results": [result]}],
    }
