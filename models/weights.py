"""Loading weights, also from another image size."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from .attention import Psi, TokenMap
from .config import Grid
from .lavit import LaViT
from .resample import resample_map, resample_table


def load_weights(model: LaViT, state_dict: Mapping[str, Tensor], *, fresh: Sequence[str] = ()) -> list[str]:
    """Copy weights into `model`; Psi, Theta and position embeddings of another grid are resampled.

    Args:
        model: where to.
        state_dict: all of the weights of the same architecture, trained at any image size.
        fresh: prefixes of names to leave as they are in `model`, such as "head." when the classes are others.

    Returns:
        Names of the tensors that were resampled.

    Raises:
        ValueError: tensors that are missing, unknown, or of another shape for a reason other than the grid; the message
            names them. The model is unchanged then.
    """
    skipped = tuple(fresh)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(skipped)}
    given = {name: tensor for name, tensor in state_dict.items() if not name.startswith(skipped)}
    problems = [f"missing: {name}" for name in wanted.keys() - given.keys()]
    problems += [f"unknown: {name}" for name in given.keys() - wanted.keys()]
    resampled = {} if problems else resample_weights(model, given)
    for name in wanted.keys() & given.keys():
        tensor = resampled.get(name, given[name])
        if tensor.shape != wanted[name].shape:
            problems.append(f"shape: {name} is {tuple(given[name].shape)}, not {tuple(wanted[name].shape)}")
    if problems:
        raise ValueError("these weights do not fit the model:\n  " + "\n  ".join(sorted(problems)))
    model.load_state_dict(given | resampled, strict=False)
    return sorted(resampled)


def resample_weights(model: LaViT, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that depends on a token grid, for the model's grids; none where they are those of `given`.

    A position embedding is stored as (height, width, C), so it shows the grid that its stage was trained on; the square
    weights of Psi and Theta do not.
    """
    out: dict[str, Tensor] = {}
    for index, stage in enumerate(model.stages):
        table_name = f"stages.{index}.position.table"
        table = given[table_name]
        target = stage.position.grid
        if table.ndim != 3 or table.shape[:2] == target:
            continue
        source: Grid = (table.shape[0], table.shape[1])
        out[table_name] = resample_table(table.flatten(0, 1), source, target).unflatten(0, target)
        for name, module in stage.named_modules(prefix=f"stages.{index}"):
            if not isinstance(module, TokenMap):
                continue
            divisor = 1 if isinstance(module, Psi) else stage.ratio
            before = (source[0] // divisor, source[1] // divisor)
            weight = given[f"{name}.weight"]
            if weight.shape != (before[0] * before[1],) * 2:
                continue  # not a matter of the grid: the caller reports its shape
            out[f"{name}.weight"] = resample_map(weight, before, module.grid)
            if module.bias is not None:
                bias = given[f"{name}.bias"][:, None]
                out[f"{name}.bias"] = resample_table(bias, before, module.grid)[:, 0]
    return out
