"""Write the hand-off of a run from its newest checkpoint: ``python -m pretrain.export RUN``."""

import argparse
import sys
from pathlib import Path

from data_pipeline.errors import without_secrets
from pretrain.arguments import add_trust_argument
from pretrain.checkpoints.checkpoint import (
    CheckpointDamagedError,
    list_checkpoints,
    read_manifest,
    read_weights,
    step_of,
    verify,
)
from pretrain.factory import architecture, require_trust
from pretrain.handoff.folder import HandoffInput, load_handoff, write_handoff
from pretrain.handoff.model_card import model_card
from pretrain.outcome import ExitCode, UserError
from pretrain.recipe import validate_recipe
from pretrain.run_folder import RunFolder, checkpoint_facts


def export_run(
    folder: RunFolder, *, step: int | None = None, license_id: str = "unknown", trust_factory: bool = False
) -> Path:
    """Write ``RUN/handoff`` from the newest intact checkpoint. Needs no engine and no process group.

    URLs in the recipe lose what may be a secret: a hand-off is published.

    Args:
        folder: the run.
        step: the step whose checkpoint is handed off; None takes the newest.
        license_id: of the weights, for the model card.
        trust_factory: needed where the run's network is that of a factory.

    Returns:
        the hand-off's folder.

    Raises:
        UserError: not a run, one whose factory is not trusted, or it has no usable checkpoint.
    """
    content = folder.read_recipe()
    if content is None:
        raise UserError(f"{folder.path} is not a run: it has no recipe.yaml")
    recipe = validate_recipe(content, where=str(folder.path / "recipe.yaml"))
    dataset = folder.read_dataset()
    checkpoint = _newest_intact(folder.checkpoints, step)
    manifest, origin = read_manifest(checkpoint), folder.read_origin()
    folder.check_checkpoint(checkpoint, manifest, recipe)
    here = checkpoint_facts(recipe, {"train": dataset["fingerprint"]}, origin)
    there = here | manifest  # those of older versions lack some
    same_data = there["fingerprints"].get("train") in (None, dataset["fingerprint"])
    if not same_data or there["initialized_from"] != here["initialized_from"]:
        raise UserError(f"{folder.path / 'environment.json'} is not of the run that wrote {checkpoint}: put it back")
    progress = manifest["progress"]
    if not progress["evaluation"]:
        raise UserError(f"{folder.path} was not evaluated before {checkpoint.name}: train to its first evaluation")
    class_names, class_levels = dataset.pop("class_names", None), dataset.pop("class_levels", None)
    class_ids = dataset.pop("class_ids", None)  # a run that ended before they were kept has none
    facts = (class_names, dataset.get("name"), dataset.get("samples"))
    if [type(fact) for fact in facts] != [list, str, int]:
        raise UserError(f"{folder.path / 'environment.json'} does not describe a dataset: put it back")
    network = architecture(recipe, len(class_names)).to_dict()
    require_trust(network, folder.path, trusted=trust_factory)
    handoff = {
        "architecture": network,
        "num_classes": len(class_names),
        "class_names": class_names,
        "class_ids": class_ids,
        "class_levels": class_levels,
        "input": recipe.data.model_dump(mode="json", include={*HandoffInput.model_fields}),
        "weights": "average" if recipe.ema else "raw",
        "dataset": dataset,
        "recipe": without_secrets(recipe.model_dump(mode="json")),
        "metrics": {name: progress["evaluation"][name] for name in ("top1", "top5", "loss")},
        "samples_seen": progress["samples_seen"],
        "initialized_from": without_secrets(origin),
    }
    write_handoff(
        folder.handoff,
        read_weights(checkpoint, average=recipe.ema is not None),
        handoff,
        model_card(
            handoff,
            samples=progress["evaluation"]["samples"],
            evaluated_at=progress["evaluated_at"],
            steps=progress["step"],
            license_id=license_id,
        ),
    )
    return folder.handoff


def _newest_intact(checkpoints: Path, step: int | None) -> Path:
    """The newest checkpoint that is intact, or that of a step, which a run takes again where it is damaged."""
    found, problems = list_checkpoints(checkpoints), []
    wanted = [path for path in found if step in (None, step_of(path))]
    if step is not None and not wanted:
        there = ", ".join(str(step_of(path)) for path in found) or "none"
        raise UserError(f"{checkpoints} has no checkpoint of step {step} (there: {there})", ExitCode.RETRY)
    for path in wanted:
        try:
            verify(path)
        except CheckpointDamagedError as error:
            if error.code is ExitCode.RETRY:
                raise
            problems.append(str(error))
            print(f"WARNING skipping {path}: {error}", file=sys.stderr)  # noqa: T201
        else:
            return path
    code = ExitCode.WILL_FAIL_AGAIN if step is None else ExitCode.RETRY
    raise UserError("; ".join([f"no usable checkpoint in {checkpoints}", *problems]), code)


def main(arguments: list[str] | None = None) -> int:
    """Write the hand-off of a run from its newest checkpoint, or from that of a step."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.export", description=main.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="runs/NAME")
    parser.add_argument(
        "--license",
        default="unknown",
        metavar="ID",
        help="license of the weights for the model card, as the Hugging Face Hub names it, such as apache-2.0",
    )
    parser.add_argument("--step", type=int, help="hand off the checkpoint of this step (default: the newest)")
    add_trust_argument(parser)
    options = parser.parse_args(arguments)
    try:
        trust = options.trust_factory
        path = export_run(RunFolder(options.run), step=options.step, license_id=options.license, trust_factory=trust)
        load_handoff(path, trust_factory=trust)  # a factory may have changed since
        print(path)  # noqa: T201
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.code
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
