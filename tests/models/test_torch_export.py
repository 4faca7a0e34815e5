"""A LaViT goes through torch.export in either mode, with any batch, and comes apart into plain operations."""

from typing import Any

import pytest
import torch

from models import create_model
from tests.accuracy import assert_as_accurate

MASKED = {"depths": (1, 2, 2, 1), "vanilla_blocks": (1, 2, 1, 1)}
"""The second stage's first block is fused and has a mask, as in the published sizes."""


def exported(strict: bool, **overrides: Any) -> Any:
    torch.manual_seed(0)
    model = create_model("lavit_micro", num_classes=5, **(MASKED | overrides)).eval()
    images = torch.randn(2, 3, *model.config.image_size)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    return model, torch.export.export(model, (images,), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize(("strict", "overrides"), [(False, {"image_size": (64, 32)}), (True, {"pool": "mean"})])
def test_the_program_gives_the_same_bits_for_any_batch_from_a_file_and_comes_apart(
    strict: bool, overrides: Any, tmp_path
) -> None:
    model, program = exported(strict, **overrides)
    torch.export.save(program, tmp_path / "model.pt2")
    reloaded = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 3, 8):
        images = torch.randn(count, 3, *model.config.image_size)
        assert torch.equal(reloaded(images), model(images))
    if not strict:  # taken apart, as exporters do, it has no fused kernel any more
        plain = program.run_decompositions()
        assert not [node for node in plain.graph.nodes if "scaled_dot_product" in str(node.target)]
        decomposed, eager = plain.module()(images), model(images)
        assert_as_accurate(decomposed, eager, model.double()(images.double()))
