"""Look at training images before training: `python -m data_pipeline.preview DATASET --recipe RECIPE`.

Writes a contact sheet, a PNG of the first batch as it is trained on: cropped, augmented and mixed, with its classes.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydantic import ValidationError

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError, StorageError
from data_pipeline.loader import TrainLoader
from data_pipeline.mixing import mix
from data_pipeline.transforms import InputConfig, MixingConfig

Pixels = NDArray[np.uint8]
"""(height, width, 3)."""
COLUMNS = 8
CELL = 112
"""Side of a drawn image in pixels, whatever its own."""
LINE = 16
"""Height of a line of text in pixels."""


def to_pixels(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Pixels]:
    """What the network is fed, (m, 3, H, W) normalized, as pixels again."""
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    plain = (images.float().cpu() * scale + shift).nan_to_num().clamp(0, 1)
    return list((255 * plain).round().byte().permute(0, 2, 3, 1).numpy())


def draw_grid(images: Sequence[Pixels], captions: Sequence[str]) -> Pixels:
    """Draw images in rows of 8, each with its caption below it; all captions have as many lines."""
    columns, height = min(COLUMNS, len(images)), CELL + LINE * len(captions[0].split("\n"))
    sheet = Image.new("RGB", (columns * CELL, math.ceil(len(images) / columns) * height), "white")
    for index, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = index % columns * CELL, index // columns * height
        sheet.paste(thumbnail(pixels), (x, y))
        for number, line in enumerate(caption.split("\n")):
            write_line(sheet, (x, y + CELL + number * LINE), line)
    return np.asarray(sheet)


def thumbnail(pixels: Pixels) -> Image.Image:
    """An image as a square of CELL pixels a side."""
    small = max(pixels.shape[:2]) < CELL
    return Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST if small else Image.Resampling.BOX)


def write_line(sheet: Image.Image, place: tuple[int, int], text: str) -> None:
    """Write a line of text, as much of it as a cell is wide, with its left upper corner at a place."""
    font, shown = ImageFont.load_default(11), text
    while shown and font.getlength(shown) > CELL - 4:
        shown = shown[:-2].rstrip("…") + "…" if len(shown) > 2 else ""
    ImageDraw.Draw(sheet).text((place[0] + 2, place[1] + 1), shown, fill="black", font=font)


def preview(dataset: Dataset, config: InputConfig, mixing: MixingConfig, *, seed: int, count: int) -> Pixels:
    """Draw the first images of a run, with their classes and, where images are mixed, their shares.

    Args:
        dataset: the training split.
        config: how images are read and augmented.
        mixing: how they are mixed.
        seed: of the run.
        count: of images, an even number.

    Raises:
        DataError: images are damaged.
    """
    place: dict[str, Any] = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}
    loader = TrainLoader(dataset, config, seed=seed, global_batch=count, micro_batch=count, **place)
    try:
        batch = next(iter(loader))
    finally:
        loader.close()
    images, targets = mix(
        batch.images,
        batch.labels,
        batch.rows,
        config=mixing.model_copy(update={"label_smoothing": 0.0}),
        num_classes=dataset.num_classes,
        seed=seed,
        step=0,
    )
    captions = []
    for row in targets:
        shares, classes = row.topk(min(2, dataset.num_classes))
        names = [dataset.class_names[label] for label in classes.tolist()]
        mixed = len(names) > 1 and bool(shares[1] > 0)
        captions.append(f"{shares[0]:.0%} {names[0]}, {names[1]}" if mixed else names[0])
    return draw_grid(to_pixels(images, config.mean, config.std), captions)


def _settings(recipe: Path, dataset: str) -> tuple[InputConfig, MixingConfig, int]:
    """The sections of a recipe that decide what its images look like, and its seed."""
    try:
        content = yaml.safe_load(recipe.read_text())
        data = {**content["data"], "path": dataset, "lanes": 1}
        mixing = MixingConfig.model_validate(content.get("mixing") or {})
        return InputConfig.model_validate(data), mixing, int(content.get("seed", 0))
    except OSError as error:
        raise DataError(f"{recipe} cannot be read ({error.strerror}); name a recipe") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{recipe}: {key}: {first['msg']}; python pretrain/main.py --help lists the fields") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise DataError(f"{recipe} is no recipe: it must be a YAML file with a data section") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when the sheet is written, 2 or 1 with one line when it cannot be."""
    parser = argparse.ArgumentParser(
        "python -m data_pipeline.preview", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", metavar="DATASET", help="the dataset's folder, or a URL for which data.cache is set")
    parser.add_argument("--recipe", type=Path, required=True, help="recipe whose data and mixing sections are used")
    parser.add_argument("--output", type=Path, default=Path("preview.png"), help="default: %(default)s")
    parser.add_argument("--count", type=int, default=32, help="number of images, even (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.count < 2 or args.count % 2:
        parser.error(f"argument --count: must be even and positive, not {args.count}")
    try:
        config, mixing, seed = _settings(args.recipe, args.dataset)
        dataset = Dataset.open(config.path, config.train_split, config.cache)
        sheet = preview(dataset, config, mixing, seed=seed, count=args.count)
        Image.fromarray(sheet).save(args.output, format="PNG")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1 if isinstance(error, StorageError) else 2
    except OSError as error:
        print(f"error: {args.output} cannot be written ({error.strerror})", file=sys.stderr)  # noqa: T201
        return 2
    print(f"{args.count} training images as {args.recipe} makes them: {args.output}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
