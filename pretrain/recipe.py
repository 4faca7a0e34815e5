"""The recipe: one YAML file, validated once into one frozen object. Rooms are handed the part that they need."""

import difflib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from data_pipeline.mixing import MixingConfig
from data_pipeline.store import CacheConfig
from data_pipeline.transforms import InputConfig, as_location
from pretrain.outcome import UserError


class Section(BaseModel):
    """Base of the recipe's sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(Section):
    """Which network is trained."""

    name: str
    """Variant, as ``models.list_models()`` gives them."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the variant's configuration to change, by name."""
    activation_checkpointing: Literal["none", "all"] | tuple[bool, bool, bool, bool] = "none"
    """Recompute activations in the backward pass: in no stage, in all, or one choice for each of the four."""
    compile: bool = False
    """Compile the network with torch.compile, for training and evaluation; not at ZeRO stage 3."""


class InitializeSection(Section):
    """The weights to begin with, when a run starts for the first time: those of another run's hand-off."""

    handoff: str
    """Folder of the hand-off, or the Hugging Face Hub's id of one."""
    head_init_scale: float = Field(default=1.0, gt=0)
    """Factor on the classifier's fresh weights: those of classes that the hand-off does not know by their id."""


class LossSection(Section):
    """What is minimised."""

    diagonality_weight: float = Field(default=0.0, ge=0)
    """Weight of the diagonality-preserving loss of the LA blocks; 0 leaves it out."""
    diagonality_ramp_epochs: float = Field(default=0.0, ge=0)
    """The weight grows linearly from 0 within so many epochs."""
    classification: Literal["cross_entropy", "semantic_softmax"] = "cross_entropy"
    """Cross-entropy over all classes; or one softmax for each level of class_tree, for ImageNet-21k."""
    class_tree: Path | None = None
    """For semantic_softmax: a file of lines PARENT CHILD, ids of classes, such as ImageNet's wordnet.is_a.txt."""

    @model_validator(mode="after")
    def _tree_fits(self) -> "LossSection":
        if (self.classification == "semantic_softmax") != (self.class_tree is not None):
            raise ValueError("class_tree and classification semantic_softmax go together: give both, or neither")
        return self


class OptimizerSection(Section):
    """What steps the weights."""

    kind: Literal["adamw", "lamb", "sgd"] = "adamw"
    """AdamW; LAMB (ZeRO stage 0 only; NVIDIA's apex is used where it is installed); or SGD with momentum."""
    lr: float = Field(gt=0)
    """Peak learning rate; for the global batch as it is, unless lr_for_batch is given."""
    lr_for_batch: int | None = Field(default=None, ge=1)
    """Global batch that lr is meant for; it is scaled linearly to the one of the run, for LAMB by the square root."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay, decoupled but for SGD; norms, biases, scales and position embeddings are left out."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """For fine-tuning: every layer has so much of the learning rate of the layer above it; the head has all of it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moment estimates of AdamW and LAMB."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator by AdamW and LAMB."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD."""

    @model_validator(mode="after")
    def _fits_the_kind(self) -> "OptimizerSection":
        foreign = ("betas", "eps") if self.kind == "sgd" else ("momentum",)
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not read by {self.kind}: leave it out")
        if self.kind == "lamb" and self.weight_decay == 0:
            raise ValueError("without weight_decay LAMB is Adam: its trust ratio is for what decays; use kind adamw")
        return self


class EmaSection(Section):
    """Exponential moving average of the weights, in fp32; it is evaluated beside them and handed off in their place."""

    decay: float = Field(ge=0, lt=1)
    """Share that the average keeps per step; in the first steps less: at most (1 + step) / (10 + step)."""


class ScheduleSection(Section):
    """How long, and the learning rate on the way: linear warm-up, then cosine, both in samples seen."""

    epochs: float = Field(gt=0)
    """Passes over the training split; a fraction is allowed."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Length of the linear warm-up."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine."""


class EvaluationSection(Section):
    """Evaluation on the validation split during training; the end is always evaluated."""

    every_epochs: float = Field(default=1.0, gt=0)
    """Distance between evaluations."""
    batch_size: int = Field(default=64, ge=1)
    """Pictures per rank and step of evaluation."""


class ProbesSection(Section):
    """What the features of the last stage are worth by themselves, on a small labelled set with classes of its own."""

    path: Annotated[Path | str, BeforeValidator(as_location)]
    """The set's folder, as written by ``python -m data_pipeline.build``; or a URL. It is seen at the run's own image
    size; what is known of it, its training split, must fit on every device as features."""
    cache: CacheConfig | None = None
    """Needed for a URL: where its files are kept on local disk."""
    train_split: str = "train"
    """The split whose labels the probes learn from."""
    val_split: str = "val"
    """The split that they are measured on."""
    every_epochs: float = Field(gt=0)
    """Distance between probes, in passes over the run's own training split; the end is always probed."""
    knn_k: int = Field(default=20, ge=1)
    """Neighbours that vote."""
    knn_temperature: float = Field(default=0.07, gt=0)
    """A neighbour of cosine similarity s has ``exp(s / temperature)`` votes."""
    linear_iterations: int = Field(default=100, ge=1)
    """Steps of L-BFGS on the linear classifier, over the whole set each."""
    time_limit_minutes: float = Field(default=10.0, gt=0)
    """Probes that take longer are abandoned, which is told, until they are due again."""


class WatchSection(Section):
    """What is shown of a run beside its metrics, and where."""

    attention_pictures: int = Field(default=4, ge=0, le=8)
    """After each evaluation the attention of so many pictures of the validation split is measured and drawn."""
    sinks: tuple[Literal["wandb"], ...] = ()
    """Where measurements and images go besides metrics.jsonl and TensorBoard; the package must be installed."""


class CheckpointSection(Section):
    """When the state is saved; a stop and the end are always saved."""

    every_steps: int = Field(default=1000, ge=1)
    """Optimizer steps between checkpoints: what a crash can cost at most."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest are kept. With 1 there is nothing to fall back to."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Beside these, the first one at or behind every multiple of so many optimizer steps is kept for good."""
    keep_best: bool = False
    """Beside these, the best one is kept: with it, one is written whenever an evaluation's top-1 is the highest yet."""


class BadNumbersSection(Section):
    """What happens when gradients are not finite: the step is skipped; after too many in a row the weights go back."""

    skipped_steps: int = Field(default=20, ge=1)
    """So many skipped steps in a row send the weights back to the newest checkpoint before them; training goes on
    behind the images that did it."""
    rollbacks: int = Field(default=2, ge=0)
    """How often a run may go back before it stops with the reason."""


class WatchdogSection(Section):
    """When a rank that does not go on is taken for hanging: its stacks are written and it ends, to be started again."""

    start_minutes: float = Field(default=30.0, gt=0)
    """Limit until the first step, and for a checkpoint: storage and compilers may be slow."""
    step_minutes: float = Field(default=10.0, gt=0)
    """Limit for a step, for waiting for its data, and for a batch of evaluation."""


class Recipe(Section):
    """Everything that defines a run, but for what is DeepSpeed's own (see ``deepspeed``)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Name of the run: its folder is ``runs/NAME``."""
    seed: int = Field(default=0, ge=0)
    """Fixes initialisation, order, augmentation and drop path."""
    data: InputConfig
    """Which pictures, and how they become batches."""
    mixing: MixingConfig = MixingConfig()
    """Mixup, CutMix and label smoothing of the batch."""
    model: ModelSection
    initialize_from: InitializeSection | None = None
    """For fine-tuning. The image size, the classes and the drop path may be others than the hand-off's; the rest of the
    network may not."""
    loss: LossSection = LossSection()
    optimizer: OptimizerSection
    ema: EmaSection | None = None
    """Average of the weights; off when not given."""
    schedule: ScheduleSection
    evaluation: EvaluationSection = EvaluationSection()
    probes: ProbesSection | None = None
    """k-NN and a linear classifier on frozen features, during training; off when not given."""
    watch: WatchSection = WatchSection()
    checkpoint: CheckpointSection = CheckpointSection()
    bad_numbers: BadNumbersSection = BadNumbersSection()
    watchdog: WatchdogSection = WatchdogSection()
    deterministic: bool = False
    """Use only operations that give the same bits on every run with the same number of GPUs; slower on GPUs."""
    log_every_steps: int = Field(default=50, ge=1)
    """Optimizer steps between lines of metrics."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Keys of DeepSpeed's configuration that this run sets otherwise than the file given by ``--deepspeed_config``."""


# What may differ between the run that is resumed and the recipe that resumes it: it changes how the run is
# carried out, not what is computed. Everything else would make the curve a lie.
CHANGEABLE = (
    "evaluation",
    "probes",
    "checkpoint",
    "bad_numbers",
    "watchdog",
    "watch",
    "deterministic",
    "log_every_steps",
    "deepspeed",
    "initialize_from.handoff",  # compared by content
    "loss.class_tree",
    "data.path",
    "data.cache",
    "data.threads",
    "data.prefetch",
    "data.device_memory_padding",
    "data.preallocate_hint",
    "model.activation_checkpointing",
    "model.compile",
    "model.overrides.attention_kernel",
)


def load_recipe(path: Path, assignments: list[str] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: YAML file.
        assignments: ``key.sub=value`` changes, applied in order; values are read as YAML.

    Raises:
        UserError: no such file, not YAML, or a key or value that does not fit; one line for all that is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml"))
        raise UserError(f"{path}: no such recipe" + (f"; there are: {', '.join(near)}" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is {type(content).__name__}")
    for assignment in assignments or []:
        _assign(content, assignment)
    return validate_recipe(content, where=str(path))


def validate_recipe(content: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe given as nested dictionaries; ``where`` names it in errors."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from None


def recipe_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines ``key: old -> new`` for what differs and may not change on a resume."""
    lines = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        if name in CHANGEABLE or old.get(key) == new.get(key):
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += recipe_differences(a, b, f"{name}.")
        else:
            lines.append(f"{name}: {a} -> {b}")
    return lines


def fixed_fields(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What of a resolved recipe may never change, for its checkpoints: all but the name and what is changeable."""
    kept = {key: value for key, value in content.items() if f"{prefix}{key}" not in (*CHANGEABLE, "name")}
    return {
        key: fixed_fields(value, f"{prefix}{key}.") if isinstance(value, dict) else value for key, value in kept.items()
    }


def known_fields(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Those fields of ``new`` that ``old`` has, too."""
    return {
        key: known_fields(value, new[key])
        if value and isinstance(value, dict) and isinstance(new[key], dict)
        else new[key]
        for key, value in old.items()
        if key in new
    }


def describe_fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield one help line per field of the recipe: its name, default and meaning."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from describe_fields(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        yield f"  {prefix}{name} ({default}): {' '.join((field.description or '').split())}"


def _section_of(kind: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, also where it may be left out; a room's own sections count too."""
    union = get_origin(kind) is types.UnionType or "Union" in str(get_origin(kind))
    for member in get_args(kind) if union else (kind,):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def _assign(content: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {assignment}: write it as key=value, for example --set optimizer.lr=1e-3")
    *path, last = key.split(".")
    node = content
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {assignment}: {part} is a value, not a section")
    try:
        node[last] = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise UserError(f"--set {assignment}: the value is not valid YAML") from None


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _known_keys(location[:-1]), n=1)
        return f"unknown key {key}" + (f" (did you mean {'.'.join([*location[:-1], near[0]])}?)" if near else "")
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "value_error":  # a section's own check, which says what is wrong
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _known_keys(location: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        inner = _section_of(section.model_fields[part].annotation) if part in section.model_fields else None
        if inner is None:
            return []
        section = inner
    return list(section.model_fields)
