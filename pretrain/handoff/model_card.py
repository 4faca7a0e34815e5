"""The model card: README.md of a hand-off, with the front matter that the Hugging Face Hub reads."""

import re
from typing import Any

import yaml

from data_pipeline.errors import printable

_SHOWN = 10
"""Classes that the card names; ``config.json`` has all."""
_WEIGHTS = {"raw": "those of the last step", "average": "their exponential moving average (EMA)"}
_LAVIT = "LaViT (Less-Attention Vision Transformer, arXiv 2406.00427)"
_TRANSFORMERS = """\
With torch, transformers and Pillow; `trust_remote_code=True` runs the Python files of this folder. `pixels` come from \
`AutoImageProcessor.from_pretrained` where images are square, else they are made as `input` in `config.json` states.

```python
from transformers import AutoModelForImageClassification

source = "PATH/TO/THIS/FOLDER or ORGANIZATION/NAME"
model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=True)
logits, maps = model(pixels).logits, model.forward_features(pixels)  # four maps, (batch, C, H, W)
```

"""
_LEVELS = """\
- The classes form a hierarchy: scores compare within a level (`class_levels` in `config.json`). A softmax over all, \
as `pipeline` computes it, gives no probabilities.
"""


def model_card(
    content: dict[str, Any], *, samples: int, evaluated_at: int, steps: int, license_id: str = "unknown"
) -> str:
    """The card as Markdown, in which names are escaped.

    Args:
        content: fields of ``HandoffConfig``.
        samples: images that were evaluated.
        evaluated_at: images trained on at the time of that evaluation; before the end where the run continues.
        steps: steps that were trained.
        license_id: of the weights, as the Hub names licenses. It depends on the data.
    """
    dataset, metrics, recipe, data = content["dataset"], content["metrics"], content["recipe"], content["input"]
    network, name, split = map(
        _escaped, (content["architecture"]["name"], dataset["name"], recipe["data"]["val_split"])
    )
    size, own = data["image_size"], "factory" not in content["architecture"]
    about = ", not stated; `python -m pretrain.export RUN --license ID` states it" if license_id == "unknown" else ""
    return f"""---
{yaml.safe_dump(_front_matter(content, license_id), sort_keys=False, allow_unicode=True).strip()}
---
# {_escaped(recipe["name"])}: {network} on {name}

{_LAVIT if own else f"The network that {network} builds,"} for {content["num_classes"]} classes
({_classes(content["class_names"])}). The weights are {_WEIGHTS[content["weights"]]}, in fp32.

## Training

| | |
|---|---|
| data | {name}, {dataset["samples"]:,} images, fingerprint {_escaped(dataset["fingerprint"])} |
{_lineage(content.get("initialized_from"))}| images trained on | {content["samples_seen"]:,} \
({content["samples_seen"] / dataset["samples"]:.1f} epochs) in {steps:,} steps |
| input | {size} px, {data["interpolation"]}, mean {data["mean"]}, std {data["std"]} |

From the recipe, without what is off; `config.json` has all of it:

```yaml
{_settings(recipe)}
```

## Results

| | |
|---|---|
| top-1 on the {split} split ({samples:,} images) | {metrics["top1"]:.2f} % |
| top-5 | {metrics["top5"]:.2f} % |
| cross-entropy | {metrics["loss"]:.4f} |

Measured during training after {evaluated_at:,} images, in the precision of training.

## Limits

- Every image gets one of these classes, whatever it shows.
- Nothing else was measured for this card: no other data, no robustness, no differences between groups of people.
{_LEVELS if content.get("class_levels") is not None else ""}- License: {_escaped(license_id)}{about}.

## Use

{_TRANSFORMERS if own else ""}\
With the project that trained it, which checks the digests in `config.json` and runs no code of this folder\
{"" if own else f"; factory is the callable that builds the network, {network}"}:

```python
from pretrain.handoff import load_handoff

model, config = load_handoff("PATH/TO/THIS/FOLDER or ORGANIZATION/NAME"{"" if own else ", factory=CALLABLE"})
logits = model(images)  # (batch, 3, H, W) in 0..1, normalized by config.input.mean and std -> (batch, classes)
```
"""


def _classes(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more, in `config.json`" if len(names) > _SHOWN else ""
    return ", ".join(map(_escaped, names[:_SHOWN])) + more


def _settings(recipe: dict[str, Any]) -> str:
    """What the recipe states about training as YAML, each text in one line, without what is off or not read."""
    chosen = {name: recipe.get(name) for name in ("mixing", "loss", "optimizer", "ema", "schedule")}
    model = recipe.get("model", {})
    settings = model.get("overrides") or model.get("arguments")
    chosen = {"model": settings, "augment": recipe["data"].get("augment")} | chosen
    unread = {"betas", "eps"} if (chosen["optimizer"] or {}).get("kind") == "sgd" else {"momentum"}
    unread |= {"diagonality_weight", "diagonality_ramp_epochs", "diagonality_form"} if model.get("factory") else set()

    def on(value: Any) -> Any:
        if not isinstance(value, dict):
            return printable(value) if isinstance(value, str) else value
        kept = {name: on(each) for name, each in value.items() if name not in unread}
        return {name: each for name, each in kept.items() if each}

    return yaml.safe_dump(on(chosen), sort_keys=False, width=2**20, default_flow_style=None).strip()


def _escaped(text: str) -> str:
    """Text as it is, whatever Markdown and HTML would make of it, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$:@]|(?<=www)\.)", r"\\\1", printable(text))


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
    own = "factory" not in content["architecture"]
    of_lavit = ("custom_code", "lavit", content["architecture"]["name"], "arxiv:2406.00427") if own else ()
    return {
        "library_name": "transformers" if own else "lavit-pretrain",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", *of_lavit],
        "license": license_id,
        "datasets": [printable(content["dataset"]["name"])],
        "metrics": ["accuracy"],
    }
