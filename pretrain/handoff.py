"""The hand-off: weights and all that is needed to use them, in a folder that any tool can read.

- ``handoff/model.safetensors``: fp32 weights, by parameter name
- ``handoff/config.json``: architecture, input, classes, data, recipe, metrics, digest of the weights
- ``handoff/README.md``: model card with the run's facts
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from data_pipeline.files import write_atomically
from data_pipeline.transforms import InputConfig
from models import LaViT, LaViTConfig
from pretrain.files import digest, digest_of_file, fsync, write_json
from pretrain.outcome import UserError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class HandoffConfig(BaseModel):
    """``config.json`` of a hand-off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: dict[str, Any]
    """``LaViTConfig`` as a dictionary."""
    num_classes: int
    class_names: list[str]
    """As a person reads them, in the order of the logits."""
    class_ids: list[str] | None = None
    """What a class is called everywhere, such as its WordNet id, in the order of the logits. None in a hand-off written
    before they were kept: only the names are known then."""
    class_levels: list[int] | None = None
    """Level of each class in the hierarchy that semantic softmax was trained on; scores compare within a level only."""
    input: InputConfig
    """Size, mean, standard deviation, interpolation and crop that evaluation uses."""
    weights: str
    """Which weights these are: "raw" are the last step's, "average" their exponential moving average."""
    weights_blake2: str
    """BLAKE2 digest (16 bytes) of ``model.safetensors``."""
    dataset: dict[str, Any]
    """Name, fingerprint and size of the training split."""
    recipe: dict[str, Any]
    metrics: dict[str, float]
    """Of the last evaluation during training; percent."""
    samples_seen: int
    initialized_from: dict[str, Any] | None = None
    """The hand-off that training began with: its digest, run, data, and what it was initialized from itself."""


def is_handoff(folder: Path) -> bool:
    """Whether a folder is a hand-off itself, rather than a run that has one."""
    return (folder / CONFIG).exists() or (folder / WEIGHTS).exists()


def write_handoff(folder: Path, weights: dict[str, torch.Tensor], content: dict[str, Any], card: str) -> None:
    """Write a hand-off; ``config.json`` comes last, so that a folder without it is unfinished.

    Args:
        folder: made where needed; an older hand-off in it is replaced.
        weights: by parameter name.
        content: fields of ``HandoffConfig`` but for ``weights_blake2``.
        card: Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    draft = folder / f".{WEIGHTS}.unfinished"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, draft, metadata={"format": "pt"})
    fsync(draft)
    draft.replace(folder / WEIGHTS)
    write_atomically(folder / "README.md", card.encode())
    config = HandoffConfig(**content, weights_blake2=digest_of_file(folder / WEIGHTS))
    write_json(folder / CONFIG, config.model_dump(mode="json"))


def load_handoff(folder: Path) -> tuple[LaViT, HandoffConfig]:
    """Build the model of a hand-off, in evaluation mode on the CPU.

    Raises:
        UserError: no hand-off, unfinished, or its files do not belong together.
    """
    try:
        config = HandoffConfig.model_validate(json.loads((folder / CONFIG).read_text()))
        content = (folder / WEIGHTS).read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is not a finished hand-off: {error.filename} is missing; "
            "`python -m pretrain.export RUN` writes one"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{folder / CONFIG}: {where}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from None
    if digest(content) != config.weights_blake2:
        raise UserError(f"{folder / WEIGHTS} has other content than when it was handed off: copy it again")
    try:
        model = LaViT(LaViTConfig.from_dict(config.architecture))
        model.load_state_dict(load(content))
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: weights and {CONFIG} do not fit: {' '.join(str(error).split())[:300]}") from None
    return model.eval(), config


def model_card(content: dict[str, Any], samples: int) -> str:
    """The card as Markdown. ``samples`` is the size of the evaluated split."""
    dataset, metrics, recipe = content["dataset"], content["metrics"], content["recipe"]
    return f"""# {content["recipe"]["name"]}: {content["architecture"]["name"]} on {dataset["name"]}

LaViT (Less-Attention Vision Transformer, arXiv 2406.00427) for {content["num_classes"]} classes, {content["weights"]}
weights in fp32.

| | |
|---|---|
| top-1 on the {recipe["data"]["val_split"]} split ({samples} pictures) | {metrics["top1"]:.2f} % |
| top-5 | {metrics["top5"]:.2f} % |
| pictures trained on | {content["samples_seen"]:,} ({content["samples_seen"] / dataset["samples"]:.1f} epochs) |
| input | {recipe["data"]["image_size"]} px, mean {recipe["data"]["mean"]}, std {recipe["data"]["std"]} |
| training data | {dataset["name"]}, {dataset["samples"]:,} pictures, fingerprint {dataset["fingerprint"]} |
{_lineage(content.get("initialized_from"))}
The whole recipe stands in `config.json`. To load it:

```python
from pathlib import Path
from pretrain.handoff import load_handoff
model, config = load_handoff(Path("PATH/TO/THIS/FOLDER"))
```
"""


def _lineage(origin: dict[str, Any] | None) -> str:
    """A row for each hand-off that training began with, the nearest first."""
    if origin is None:
        return ""
    return (
        f"| began with | {origin['weights']} weights of {origin['run']}, {origin['samples_seen']:,} pictures of "
        f"{origin['dataset']['name']}, digest {origin['weights_blake2']} |\n{_lineage(origin['initialized_from'])}"
    )
