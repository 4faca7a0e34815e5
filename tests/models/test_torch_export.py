"""A LaViT goes through torch.export in either mode, with any batch, and comes apart into plain operations."""

from typing import Any

import pytest
import torch

from models import create_model

MASKED = {"depths": (1, 2, 2, 1), "vanilla_blocks": (1, 2, 1, 1)}
"""The second stage's first block is fused and has a mask, as in the published sizes."""


def exported(strict: bool, **overrides: Any) -> Any:
    torch.manual_seed(0)
    model = create_model("lavit_micro", num_classes=5, **(MASKED | overrides)).eval()
    images = torch.randn(2, 3, *model.config.image_size)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    return model, torch.export.export(model, (images,), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize(("strict", "overrides"), [(False, {"image_size": (64, 32)}), (True, {"pool": "mean"})])
def test_the_program_gives_the_same_bits_for_any_batch_also_from_a_file(strict: bool, overrides: Any, tmp_path) -> None:
    model, program = exported(strict, **overrides)
    torch.export.save(program, tmp_path / "model.pt2")
    reloaded = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 3, 8):
        images = torch.randn(count, 3, *model.config.image_size)
        assert torch.equal(reloaded(images), model(images))


def test_the_program_comes_apart_into_plain_operations() -> None:
    model, program = exported(strict=False)
    plain = program.run_decompositions()
    assert not [node for node in plain.graph.nodes if "scaled_dot_product" in str(node.target)]
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(plain.module()(images), model(images), rtol=1e-5, atol=1e-5)
