"""The hand-off: weights and all that is needed to use them, in a folder that any tool can read.

- ``handoff/model.safetensors``: fp32 weights, by parameter name
- ``handoff/config.json``: architecture, input, classes, data, recipe, metrics, digests of the other files and of itself
- ``handoff/*.py``, ``handoff/preprocessor_config.json``: for transformers, which needs nothing else of this project
- ``handoff/README.md``: model card with the run's facts

The folder is laid out as a repository of the Hugging Face Hub. The code in it is never run here.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from data_pipeline.files import write_atomically
from models import LaViT, LaViTConfig
from pretrain.factory import Factory, FactoryConfig, load_state, require_trust
from pretrain.fields import explain
from pretrain.files import digest, digest_of_fields, digest_of_file, fsync, write_json
from pretrain.handoff import transformers_files
from pretrain.handoff.hub import fetch
from pretrain.outcome import ExitCode, UserError, storage_code

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
_OWN_DIGEST = "config_blake2"


Positive = Annotated[float, Field(gt=0)]


class HandoffInput(BaseModel):
    """What the network expects of its input. Independent of the loader's configuration, which may change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int | tuple[int, int]
    """Side of the square, or (height, width), in pixels."""
    mean: tuple[float, float, float]
    """Subtracted from each channel; red, green, blue in 0..1."""
    std: tuple[Positive, Positive, Positive]
    """Each channel is divided by it after the mean is subtracted."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"]
    """How images are resized, with antialiasing."""
    eval_crop_ratio: float = Field(gt=0, le=1)
    """The short side is resized to image size / this ratio, then the center is cropped."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


class HandoffConfig(BaseModel):
    """``config.json`` of a hand-off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: dict[str, Any]
    """``LaViTConfig`` as a dictionary; of a network with a "factory", ``FactoryConfig``."""
    num_classes: int
    class_names: list[str]
    """Readable names, in the order of the logits."""
    class_ids: list[str] | None = None
    """Unique ids, such as WordNet's, in the order of the logits. None in a hand-off written before they were kept, of
    which only the names are known."""
    class_levels: list[int] | None = None
    """Level of each class in the hierarchy that semantic softmax was trained on; scores compare within a level only."""
    input: HandoffInput
    weights: str
    """Which weights these are: "raw" are the last step's, "average" their exponential moving average."""
    weights_blake2: str
    """BLAKE2 digest (16 bytes) of ``model.safetensors``."""
    files_blake2: dict[Annotated[str, Field(pattern=r"^\w[\w.]*$")], str] = Field(default_factory=dict)
    """Digests of the files for transformers, by name. Hand-offs written before there were any have none."""
    dataset: dict[str, Any]
    """Name, fingerprint and size of the training split."""
    recipe: dict[str, Any]
    metrics: dict[str, float]
    """Of the last evaluation during training; percent, the loss in nats."""
    samples_seen: int
    initialized_from: dict[str, Any] | None = None
    """The hand-off of the initial weights: its digest, run, data, and what it was initialized from itself."""

    @field_validator("input", mode="before")
    @classmethod
    def _of_the_loader(cls, value: Any) -> Any:
        """Older hand-offs have the loader's whole configuration, which names the data's path."""
        if isinstance(value, dict) and "path" in value:
            return {name: value[name] for name in HandoffInput.model_fields if name in value}
        return value

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "HandoffConfig":
        outputs = self.architecture.get("num_classes")
        if outputs != self.num_classes:
            raise ValueError(f"architecture.num_classes is {outputs}, but num_classes is {self.num_classes}")
        for field in ("class_names", "class_ids", "class_levels"):
            value = getattr(self, field)
            if value is not None and len(value) != self.num_classes:
                raise ValueError(f"{field} has {len(value)} entries for {self.num_classes} classes")
        if self.class_ids is not None and len(set(self.class_ids)) < self.num_classes:
            raise ValueError("class_ids names a class twice")
        size = self.architecture.get("image_size")
        if isinstance(size, list) and tuple(size) != self.input.size:
            raise ValueError(f"architecture.image_size is {size}, but input.image_size is {list(self.input.size)}")
        return self


def is_handoff(folder: Path) -> bool:
    """Whether a folder is a hand-off itself, rather than a run that has one."""
    return (folder / CONFIG).exists() or (folder / WEIGHTS).exists()


def write_handoff(folder: Path, weights: dict[str, torch.Tensor], content: dict[str, Any], card: str) -> None:
    """Write a hand-off; ``config.json`` comes last, so that a folder without it is unfinished.

    Args:
        folder: created if needed; an older hand-off in it is replaced.
        weights: by parameter name.
        content: fields of ``HandoffConfig`` except ``weights_blake2`` and ``files_blake2``.
        card: Markdown.

    Raises:
        UserError: it cannot be written.
    """
    try:
        config = HandoffConfig(**content, weights_blake2="")
    except ValidationError as error:
        why = explain(HandoffConfig, content, error)[0][1]
        raise UserError(
            f"no hand-off in {folder}: {why}: put recipe.yaml and environment.json of the run back"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        files = transformers_files.files(config)
        for name, data in ({CARD: card.encode()} | files).items():
            write_atomically(folder / name, data)
        draft = folder / f".{WEIGHTS}.unfinished"
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, draft, metadata={"format": "pt"})
        draft.chmod((folder / CARD).stat().st_mode)  # safetensors lets only its owner read a file
        fsync(draft)
        draft.replace(folder / WEIGHTS)
        fsync(folder)
        fields = config.model_dump(mode="json") | transformers_files.fields(config)
        fields["weights_blake2"] = digest_of_file(folder / WEIGHTS)
        fields["files_blake2"] = {name: digest(data) for name, data in files.items()}
        write_json(folder / CONFIG, fields | {_OWN_DIGEST: digest_of_fields(fields)})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the hand-off cannot be written to {folder} ({error}): make space or fix the storage, then "
            "`python -m pretrain.export RUN` writes it from the newest checkpoint",
            storage_code(error) if isinstance(error, OSError) else ExitCode.WILL_FAIL_AGAIN,
        ) from None


def load_handoff(
    source: Path | str, *, factory: Factory | None = None, trust_factory: bool = False
) -> tuple[Any, HandoffConfig]:
    """Build the model of a hand-off, in evaluation mode on the CPU: a ``LaViT``, or the network of a factory.

    Args:
        source: the folder; or a text ``ORGANIZATION/NAME[@REVISION]`` that is not a folder: a repository of the Hugging
            Face Hub, and its branch, tag or commit.
        factory: the callable that builds the network, where it is no LaViT; it gets the hand-off's arguments.
        trust_factory: import the callable that the hand-off names instead.

    Raises:
        UserError: no hand-off, unfinished, or its files do not belong together; or the network is that of a factory,
            and neither of both is given.
    """
    config, weights = read_handoff(source)
    try:
        if "factory" in config.architecture:
            require_trust(config.architecture, source, trusted=trust_factory or factory is not None)
            name, arguments = config.architecture["factory"], config.architecture["arguments"]
            model: Any = FactoryConfig(name, arguments, config.num_classes, config.input.size).build(factory)
            load_state(model, weights)
        else:
            model = LaViT(LaViTConfig.from_dict(config.architecture))
            model.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(f"{source}: {WEIGHTS} and {CONFIG} do not fit: {_one_line(error)}") from None
    return model.eval(), config


def read_handoff(source: Path | str) -> tuple[HandoffConfig, dict[str, torch.Tensor]]:
    """The config and the weights (by parameter name, on the CPU) of a hand-off, without a model built of them.

    Args:
        source: as for ``load_handoff``.

    Raises:
        UserError: as ``load_handoff``.
    """
    folder = Path(source)
    if isinstance(source, str) and not folder.exists():
        folder = fetch(source, [CONFIG, WEIGHTS, transformers_files.PREPROCESSOR, "*.py"]) or folder
    try:
        config = _config((folder / CONFIG).read_bytes(), folder / CONFIG)
        changed = [name for name, stated in config.files_blake2.items() if digest_of_file(folder / name) != stated]
        content = (folder / WEIGHTS).read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{source} is not a finished hand-off: {error.filename} is missing; "
            "`python -m pretrain.export RUN` writes one"
        ) from None
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error}", storage_code(error)) from None
    if changed:
        raise UserError(f"{folder / changed[0]} has other content than when it was handed off: copy it again")
    if digest(content) != config.weights_blake2:
        raise UserError(
            f"{folder / WEIGHTS} has other content than when it was handed off with this {CONFIG}: copy both again"
        )
    try:
        return config, load(content)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {_one_line(error)}") from None


def _config(text: bytes, path: Path) -> HandoffConfig:
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
        # A hand-off from before config.json had a digest has none; it is still checked field by field.
        stated = fields.pop(_OWN_DIGEST, None)
        if stated is not None and stated != digest_of_fields(fields):
            raise UserError(
                f"{path} has other content than when it was handed off: copy it again, or take {_OWN_DIGEST} out of it "
                "if it was changed on purpose"
            )
        for name in transformers_files.FIELDS:
            fields.pop(name, None)
        return HandoffConfig.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(HandoffConfig, fields, error)[0][1]}") from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
