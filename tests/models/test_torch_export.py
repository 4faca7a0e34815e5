"""A LaViT goes through torch.export, with any batch size, and decomposes into plain operations."""

import pytest
import torch

from tests.models.test_lavit import shaken


@pytest.mark.slow
def test_the_program_gives_the_same_bits_for_any_batch_and_decomposes():
    """Traced strictly; `pretrain.convert`, which does not, has tests of its own. Stage 2 begins with a fused block that
    has a mask, as in the published sizes."""
    model = shaken(depths=(1, 2, 2, 1), vanilla_blocks=(1, 2, 1, 1), image_size=(64, 32)).double().eval()
    example = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=True)
    plain = program.run_decompositions()
    assert not [node for node in plain.graph.nodes if "scaled_dot_product" in str(node.target)]
    for count in (1, 3, 8):
        images = torch.randn(count, 3, 64, 32, dtype=torch.float64)
        assert torch.equal(program.module()(images), model(images))
        torch.testing.assert_close(plain.module()(images), model(images))
