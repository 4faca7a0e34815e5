"""What limits a planned run, and which keys to change."""

from pretrain.planning.estimate import Estimate, Row


def limits(estimate: Estimate) -> tuple[str, list[str]]:
    """What limits: "memory", "input", "network", "compute" or "not known", and lines of what to change.

    Reading is compared with the speed that is believed, else with the bound: storage that feeds the bound feeds all.
    """
    lines: list[str] = []
    chosen = estimate.chosen
    if chosen is not None and not chosen.fits:
        return "memory", [*_smaller(estimate, chosen), *_reading(estimate)[1]]
    starved, told = _reading(estimate)
    lines += told
    if chosen is not None:
        lines += _larger(estimate, chosen)
    every, best = estimate.checkpoints.every_steps, estimate.checkpoints.best_steps
    if best is not None and not best / 2 <= every <= best * 2:
        most = min(best, max(1, estimate.steps // 10))
        lines.append(f"checkpoint.every_steps: {every} -> {most} (Young-Daly, at most a tenth of the run)")
    if starved:
        return "input", lines
    here = next((step for step in estimate.scaling if step.gpus == estimate.batch.world_size), None)
    if here is not None and here.exposed > here.compute / 4:
        cures = ["a larger train_batch_size or fewer GPUs need fewer"]
        if estimate.stage > 0 and here.exposed == here.talk:
            cures.insert(0, "zero_optimization.overlap_comm: true averages gradients during the backward pass")
        lines.append(f"collectives take {here.exposed / here.seconds:.0%} of a step on paper: {'; '.join(cures)}")
        return "network, on paper", lines
    return ("compute" if estimate.speed.believed else "not known: no speed was measured"), lines


def _smaller(estimate: Estimate, chosen: Row) -> list[str]:
    lines = []
    if chosen.largest:
        lines.append(
            f"train_micro_batch_size_per_gpu: {estimate.batch.micro_batch} -> {chosen.largest} or less, the global "
            "batch stays (ds_config.json, or deepspeed: in the recipe)"
        )
    fitting = [row for row in estimate.rows if row.fits]
    same = [row for row in fitting if row.stage == chosen.stage]
    if same:
        lines.append(f"model.activation_checkpointing: {_yaml(same[0].policy)} fits as it is")
    elif fitting:
        row = fitting[0]
        how = f"zero_optimization.stage: {row.stage} with model.activation_checkpointing: {_yaml(row.policy)}"
        lines.append(f"{how} fits as it is")
    return lines or ["nothing in the table fits: more GPUs at stage 3, offloading, or a smaller model"]


def _larger(estimate: Estimate, chosen: Row) -> list[str]:
    lines = []
    share = estimate.batch.global_batch // estimate.batch.world_size
    if estimate.batch.micro_batch < min(chosen.largest, share):
        lines.append(
            f"train_micro_batch_size_per_gpu: {estimate.batch.micro_batch} -> up to {chosen.largest} fits; fewer, "
            "larger micro-batches are faster"
        )
    cheaper = [row for row in estimate.rows if row.fits and row.stage == chosen.stage and row.policy == "none"]
    if cheaper and chosen.policy != "none":
        lines.append("model.activation_checkpointing: none fits too, and nothing need be recomputed")
    # The engine as it is, but with nothing sharded: weights in bfloat16 cannot be had there, and have no such row.
    whole = (0, chosen.precision, chosen.policy, True)
    if chosen.stage > 0 and any((row.stage, row.precision, row.policy, row.fits) == whole for row in estimate.rows):
        lines.append(
            f"zero_optimization.stage: {chosen.stage} -> 0 fits too, with less talk between GPUs: faster on CPUs "
            "(docs/training.md), not measured on GPUs"
        )
    return lines


def _reading(estimate: Estimate) -> tuple[bool, list[str]]:
    """Whether storage is too slow, and what to do."""
    if estimate.storage is None:
        return False, []
    rate = estimate.speed.believed or estimate.speed.bound
    needed = rate * estimate.batch.world_size * estimate.data.bytes_per_image
    if needed <= estimate.storage:
        return False, []
    cure = "data.cache on local NVMe and data.lanes, so that a node reads its own shards only; or smaller pictures"
    if estimate.speed.believed is None:
        return False, [f"storage would not feed the peak of compute; if it turns out to limit: {cure}"]
    return True, [f"storage gives {estimate.storage / needed:.0%} of what is needed: {cure}"]


def _yaml(policy: str) -> str:
    last = policy.rpartition("-")[2].removeprefix("stage ")
    return policy if policy in {"none", "all", "the recipe's"} else str([i < int(last) for i in range(4)]).lower()
