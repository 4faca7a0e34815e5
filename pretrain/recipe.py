"""The recipe: one YAML file, validated once into one frozen object. Packages are handed the section they need."""

import copy
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from data_pipeline.store import CacheConfig
from data_pipeline.transforms import InputConfig, MixingConfig, as_location
from pretrain.engine.deepspeed_keys import ALLOWED, check_keys
from pretrain.fields import describe, did_you_mean, dotted_names, explain, shown, similar
from pretrain.outcome import UserError, storage_code


class Section(BaseModel):
    """Base of the recipe's sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


DecayRate = Annotated[float, Field(ge=0, lt=1)]


class ModelSection(Section):
    """Which network is trained: a LaViT by its name, or what a callable of any package builds."""

    name: str | None = None
    """Variant of LaViT, as ``models.list_models()`` gives them."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the variant's configuration to change, by name."""
    factory: str | None = None
    """In place of name: ``package.module:callable``, found from the current folder or installed. It gives a
    torch.nn.Module that maps images (batch, 3, height, width) to logits (batch, classes)."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory. The number of classes and the image size are passed where it takes them."""
    activation_checkpointing: Literal["none", "all"] | tuple[bool, bool, bool, bool] = "none"
    """Recompute activations in the backward pass: in no stage, in all, or one choice for each of LaViT's four."""
    compile: bool = False
    """Compile the network with torch.compile, for training and evaluation; not at ZeRO stage 3."""

    @property
    def title(self) -> str:
        """The network's name or factory."""
        return self.name or self.factory or ""

    @model_validator(mode="after")
    def _one_of_both(self) -> "ModelSection":
        if self.factory is None:
            if self.name is None or self.arguments:
                raise ValueError("give the name of a LaViT, with overrides, or a factory, with arguments")
        elif self.name is not None or self.overrides:
            raise ValueError(
                "factory excludes name and overrides, which are LaViT's: leave them out; on the command line "
                f"--set 'model={{factory: {self.factory}}}' replaces the whole section"
            )
        elif re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", self.factory) is None:
            raise ValueError(f"factory must be package.module:callable, got {shown(self.factory)}")
        return self


class InitializeSection(Section):
    """Initial weights, read when a run starts for the first time: those of another run's hand-off."""

    handoff: str
    """Folder of the hand-off, or the Hugging Face Hub's id of one."""
    head_init_scale: float = Field(default=1.0, gt=0)
    """Factor on the classifier's fresh weights: those of classes whose ids the hand-off does not have."""


class LossSection(Section):
    """The loss that is minimized."""

    diagonality_weight: float = Field(default=0.0, ge=0)
    """Weight of the diagonality-preserving loss of the LA blocks; 0 leaves it out."""
    diagonality_ramp_epochs: float = Field(default=0.0, ge=0)
    """Epochs over which the weight grows linearly from 0."""
    diagonality_form: Literal["intended", "as_printed"] = "intended"
    """The loss that raises the diagonal; or, for comparison, the paper's printed sign, which lowers it."""
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
    """The optimizer."""

    kind: Literal["adamw", "lamb", "sgd"] = "adamw"
    """AdamW; LAMB (ZeRO stage 0 only; NVIDIA's apex is used where it is installed); or SGD with momentum."""
    lr: float = Field(gt=0)
    """Peak learning rate; used as it is unless lr_for_batch is given."""
    lr_for_batch: int | None = Field(default=None, ge=1)
    """Global batch that lr is meant for; it is scaled linearly to the one of the run, for LAMB by the square root."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay, decoupled but for SGD; norms, biases, scales and position embeddings are left out."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """For fine-tuning: ratio of a layer's learning rate to that of the layer above it; the head has the full rate."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """Decay rates of the two moment estimates of AdamW and LAMB."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator by AdamW and LAMB."""
    momentum: DecayRate = 0.9
    """Momentum of SGD."""

    @model_validator(mode="after")
    def _fits_the_kind(self) -> "OptimizerSection":
        foreign = ("betas", "eps") if self.kind == "sgd" else ("momentum",)
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not read by {self.kind}: leave it out")
        if self.kind == "lamb" and self.weight_decay == 0:
            raise ValueError(
                "without weight_decay LAMB is Adam (its trust ratio is for decayed weights): use kind adamw"
            )
        return self


class EmaSection(Section):
    """Exponential moving average of the weights, in fp32; it is evaluated, too, and handed off in their place."""

    decay: DecayRate
    """Share that the average keeps per step; less in the first steps: at most (1 + step) / (10 + step)."""


class ScheduleSection(Section):
    """Length of the run, and its learning rate: linear warm-up, then cosine, both in samples seen."""

    epochs: float = Field(gt=0)
    """Passes over the training split; a fraction is allowed."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Length of the linear warm-up; at most ``epochs``."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine; at most the peak."""


class EvaluationSection(Section):
    """Evaluation on the validation split during training; the end is always evaluated."""

    every_epochs: float = Field(default=1.0, gt=0)
    """Epochs between evaluations."""
    batch_size: int = Field(default=64, ge=1)
    """Images per rank and step of evaluation."""


class ProbesSection(Section):
    """k-NN and a linear classifier on the frozen features of the last stage, on a small labeled dataset of its own."""

    path: Annotated[Path | str, BeforeValidator(as_location)]
    """Folder of the dataset, as written by ``python -m data_pipeline.build``; or a URL. The images have the run's own
    size; the features of the training split must fit on every device."""
    cache: CacheConfig | None = None
    """Needed for a URL: where its files are kept on local disk."""
    train_split: str = "train"
    """Split whose labels the probes learn from."""
    val_split: str = "val"
    """Split that they are measured on."""
    every_epochs: float = Field(gt=0)
    """Epochs of the run's own training split between probes; the end is always probed."""
    knn_k: int = Field(default=20, ge=1)
    """Neighbors that vote."""
    knn_temperature: float = Field(default=0.07, gt=0)
    """A neighbor of cosine similarity s has ``exp(s / temperature)`` votes."""
    linear_iterations: int = Field(default=100, ge=1)
    """Steps of L-BFGS on the linear classifier, over the complete training split each."""
    time_limit_minutes: float = Field(default=10.0, gt=0)
    """Probes that take longer are abandoned with a warning, until they are due again."""


class WatchSection(Section):
    """What is shown of a run besides its metrics, and where."""

    attention_images: int = Field(default=4, ge=0, le=8)
    """Images of the validation split whose attention is measured and drawn after each evaluation."""
    sinks: tuple[Literal["wandb"], ...] = ()
    """Where measurements and images go besides metrics.jsonl and TensorBoard; the package must be installed."""

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "attention_pictures" in fields:
            return {name.replace("attention_pictures", "attention_images"): fields[name] for name in fields}
        return fields


class CheckpointSection(Section):
    """When the state is saved; a stop and the end are always saved."""

    every_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints: what a crash costs at most. Unless given, a tenth of the run, but at least
    10 and at most 1000 steps."""
    keep: int = Field(default=2, ge=1)
    """Number of the newest checkpoints that are kept. With 1 there is nothing to fall back to."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Also keep the first checkpoint at or after every multiple of this number of optimizer steps, for good."""
    keep_best: bool = False
    """Also keep the best checkpoint: one is written whenever an evaluation's top-1 is the highest yet."""


class BadNumbersSection(Section):
    """Non-finite gradients: such a step is skipped; after too many in a row the weights are rolled back."""

    skipped_steps: int = Field(default=20, ge=1)
    """Skipped steps in a row after which the weights are rolled back to the newest checkpoint before them; training
    continues after the images that caused it."""
    rollbacks: int = Field(default=2, ge=0)
    """Rollbacks of a run before it stops with the reason."""


class WatchdogSection(Section):
    """When a stalled rank counts as hanging: its stack traces are written and it exits, to be started again."""

    start_minutes: float = Field(default=30.0, gt=0)
    """Limit until the first step, and for a checkpoint: storage and compilers may be slow."""
    step_minutes: float = Field(default=10.0, gt=0)
    """Limit for a step, for waiting for its data, and for a batch of evaluation."""


def _as_folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise ValueError(
            f"must be at most 200 letters, digits, '.', '_' or '-', starting with a letter or digit, got {shown(name)}"
        )
    return name


class Recipe(Section):
    """Everything that defines a run, except DeepSpeed's own settings (see ``deepspeed``)."""

    name: Annotated[str, AfterValidator(_as_folder_name)]
    """Name of the run: its folder is ``runs/NAME``."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Fixes initialization, order, augmentation and drop path."""
    data: InputConfig
    """The images, and how they become batches."""
    mixing: MixingConfig = MixingConfig()
    """Mixup, CutMix and label smoothing of the batch."""
    model: ModelSection
    initialize_from: InitializeSection | None = None
    """For fine-tuning. Image size, classes and drop path may differ from the hand-off's; the rest of
    the network may not."""
    loss: LossSection = LossSection()
    optimizer: OptimizerSection
    ema: EmaSection | None = None
    """Moving average of the weights."""
    schedule: ScheduleSection
    evaluation: EvaluationSection = EvaluationSection()
    probes: ProbesSection | None = None
    """k-NN and a linear classifier on frozen features, during training."""
    watch: WatchSection = WatchSection()
    checkpoint: CheckpointSection = CheckpointSection()
    bad_numbers: BadNumbersSection = BadNumbersSection()
    watchdog: WatchdogSection = WatchdogSection()
    deterministic: bool = False
    """Use only operations that give the same bits on every run with the same number of GPUs; slower on GPUs."""
    log_every_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between lines of metrics. Unless given, a hundredth of the run, but at most 50 steps."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Keys of DeepSpeed's configuration that differ in this run from the file given by ``--deepspeed_config``."""


ELSEWHERE = {
    "batch_size global_batch global_batch_size train_batch_size": "the global batch is deepspeed.train_batch_size",
    "micro_batch micro_batch_size": "the micro-batch is deepspeed.train_micro_batch_size_per_gpu",
    "clip_grad grad_clip max_grad_norm": "the largest norm of the gradients is deepspeed.gradient_clipping",
    "num_classes classes": "the number of classes is the dataset's: leave it out",
    "learning_rate": "the learning rate is optimizer.lr",
    "optimizer.name optimizer.type": "the optimizer is optimizer.kind",
    "max_epochs num_epochs": "the length of the run is schedule.epochs",
    "img_size": "the image size is data.image_size",
    "num_workers workers": "the number of threads that decode is data.threads",
    "gpus nodes world_size": "the number of processes is the launcher's: leave it out",
    "output output_dir": "the folder of the run folders is given by --runs",
    "resume": "a run resumes from its newest checkpoint when it is started again: leave it out",
}
"""Keys that users of other programs expect, in full or without their section, and where the setting is."""


# Fields that may differ when a run is resumed: they change how it is carried out, not what is computed.
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


def load_recipe(path: Path, assignments: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: YAML file.
        assignments: ``key.sub=value`` changes, applied in order; values are read as YAML.

    Raises:
        UserError: no such file, not YAML, or a key or value that does not fit; one line for all that is wrong, which
            names the file or the assignment that is to blame.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml"))
        raise UserError(f"{path}: no such recipe" + (f"; there are: {', '.join(near)}" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        code = storage_code(error) if isinstance(error, OSError) else None
        raise UserError(f"{path}: cannot be read: {error}", code) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is {type(content).__name__}")
    changed = copy.deepcopy(content)
    for assignment in assignments:
        _assign(changed, assignment)
    recipe, wrong = _validate(changed)
    if recipe is not None:
        wrong = [*_impossible(recipe)]
    if recipe is None or wrong:
        lines = [f"{to_blame}: {'; '.join(texts)}" for to_blame, texts in _blame(wrong, content, path, assignments)]
        raise UserError("; ".join(lines))
    return recipe


def validate_recipe(content: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe given as nested dictionaries; ``where`` names it in errors."""
    recipe, wrong = _validate(content)
    if recipe is None:
        raise UserError(f"{where}: " + "; ".join(text for _, text in wrong))
    return recipe


def recipe_differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = "", *, known_only: bool = False
) -> list[str]:
    """Lines ``key: old -> new`` for what differs and may not change on a resume; ``known_only``: of what old has."""
    lines = []
    for key in sorted(old if known_only else {*old, *new}):
        name = f"{prefix}{key}"
        if name in CHANGEABLE or old.get(key) == new.get(key):
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += recipe_differences(a, b, f"{name}.", known_only=known_only and bool(a))
        else:
            lines.append(f"{name}: {a} -> {b}")
    return lines


def fixed_fields(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What of a resolved recipe may never change, for its checkpoints: all but the name and what is changeable."""
    kept = {key: value for key, value in content.items() if f"{prefix}{key}" not in (*CHANGEABLE, "name")}
    return {
        key: fixed_fields(value, f"{prefix}{key}.") if isinstance(value, dict) else value for key, value in kept.items()
    }


def _validate(content: dict[str, Any]) -> tuple[Recipe | None, list[tuple[str, str]]]:
    """The recipe, or all that is wrong, as dotted keys and texts."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        return None, explain(Recipe, content, error, _hint)
    wrong = [*_misread(content, recipe)]
    return (None, wrong) if wrong else (recipe, [])


def _misread(content: dict[str, Any], section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Fields whose value pydantic would take for something else (true for 1), and numbers that are not finite."""
    for name, given in content.items():
        field, value = type(section).model_fields.get(name), getattr(section, name, None)
        if isinstance(value, BaseModel) and isinstance(given, dict):
            yield from _misread(given, value, f"{prefix}{name}.")
        elif field is not None and not isinstance(given, dict):
            pairs = zip(*(each if isinstance(each, list | tuple) else [each] for each in (given, value)), strict=False)
            if any(
                (isinstance(raw, bool | None) and raw is not read)
                or (isinstance(read, float) and not math.isfinite(read))
                for raw, read in pairs
            ):
                kind = describe(field.annotation, field.metadata)
                yield f"{prefix}{name}", f"{prefix}{name}: must be {kind}, got {shown(given)}"


def _impossible(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What no run should be started with, though older ones may have been."""
    schedule = recipe.schedule
    if schedule.warmup_epochs > schedule.epochs:
        lengths = f"schedule.warmup_epochs is {schedule.warmup_epochs:g}, schedule.epochs {schedule.epochs:g}"
        yield "schedule", f"the warm-up is longer than the run: {lengths}"
    if recipe.model.factory is not None and recipe.initialize_from is not None:
        yield "initialize_from", "initialize_from is for a LaViT: let the factory load what it begins with"
    try:
        check_keys(recipe.deepspeed, "deepspeed", complete=False)
    except UserError as error:
        yield "deepspeed", str(error)


def _blame(
    wrong: list[tuple[str, str]], content: dict[str, Any], path: Path, assignments: Sequence[str]
) -> Iterable[tuple[str, list[str]]]:
    """The file, where it is wrong by itself, and the assignments that brought the rest about, each with its texts."""
    found: dict[str, list[str]] = {}
    recipe, own = _validate(content)
    own += [] if recipe is None else _impossible(recipe)
    for key, text in wrong:
        to_blame = []
        if (key, text) not in own:
            names = {f"{assignment.partition('=')[0]}.": f"--set {assignment}" for assignment in assignments}
            related = [name for name in names if name.startswith(f"{key}.") or f"{key}.".startswith(name)]
            to_blame = [names[name] for name in related or names]
        found.setdefault(" ".join(to_blame) or str(path), []).append(text)
    return found.items()


def _assign(content: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {assignment}: write it as key=value, for example --set optimizer.lr=1e-3")
    *path, last = key.split(".")
    node = content
    for part in path:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"--set {assignment}: {part} is a value, not a section")
    try:
        node[last] = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise UserError(f"--set {assignment}: the value is not valid YAML") from None


def _hint(key: str) -> str:
    """What follows an unknown key: where the setting is, or the key that was probably meant."""
    last = key.rsplit(".", maxsplit=1)[-1]
    for words, hint in ELSEWHERE.items():
        if {key, last} & {*words.split()}:
            return f": {hint}"
    if near := similar(Recipe, key, cutoff=0.75):
        return did_you_mean(*near)
    from models import LaViTConfig  # noqa: PLC0415 - only for this hint, and slow to import

    by_last: dict[str, list[str]] = {}
    for name in dotted_names(Recipe):
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    for name in sorted(ALLOWED):
        by_last.setdefault(name, [f"deepspeed.{name}"])
    for field in dataclasses.fields(LaViTConfig):
        by_last.setdefault(field.name, [f"model.overrides.{field.name}"])
    if last in by_last:
        return did_you_mean(*by_last[last])
    return did_you_mean(*(similar(Recipe, key) or by_last.get(next(iter(get_close_matches(last, by_last)), ""), [])))
