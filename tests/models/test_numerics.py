"""Precision, initialisation, compilation, export, memory."""

import copy
import gc
import math

import pytest
import torch

from models import create_model
from models.block import Block
from tests.models.test_lavit import shaken, small, step
from tests.rounding import relative_error

BF16_ERROR = 2**-5
"""Relative, of a whole network. A rounding to bfloat16, of 8 bits, errs by up to 2^-8 and by 2^-8.8 in the root mean
square; 80 independent ones (ten operations in a row in each of eight blocks) by sqrt(80) times that, 2^-5.6.
"""


def test_bf16_and_autocast_agree_with_float64_to_bf16s_precision():
    model, images = shaken(), torch.randn(16, 3, 32, 32)
    exact, exact_loss, *exact_gradients = step(copy.deepcopy(model).double(), images.double())
    for autocast in (True, False):
        if not autocast:
            model, images = model.bfloat16(), images.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, loss, *gradients = step(model, images)
        assert logits.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        assert relative_error(logits, exact) < BF16_ERROR
        assert relative_error(loss, exact_loss) < BF16_ERROR
        assert relative_error(gradients, exact_gradients) < math.sqrt(2) * BF16_ERROR  # as many operations once more


@pytest.mark.slow
def test_captured_without_a_graph_break_it_gives_the_same_outputs_and_gradients():
    """What torch.compile captures, run operation by operation, in training and evaluation, at any size.

    `tests/system/test_compiled.py` trains with compiled kernels, and with all activations recomputed.
    """
    torch._dynamo.reset()
    model = shaken(drop_path=0.2, depths=(1, 2, 1, 1)).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    uniforms = torch.rand(model.num_drop_paths, 2)
    expected = step(model, images, uniforms)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, images, uniforms), expected)
    model.eval()
    features = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for one in (images, torch.randn(1, 3, 48, 64, dtype=torch.float64)):
            torch.testing.assert_close(compiled(one), model(one))
        torch.testing.assert_close(features(images), model.forward_features(images))


@pytest.mark.slow
def test_a_program_of_torch_export_gives_the_same_bits_for_any_batch_and_decomposes():
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


LARGE = {"widths": (128, 384, 768, 1152), "heads": (2, 6, 12, 18)}


@pytest.mark.parametrize(
    ("name", "narrower"), [("lavit_base", {}), pytest.param("lavit_huge", LARGE, marks=pytest.mark.slow)]
)
def test_activations_keep_their_scale_through_the_whole_network(name, narrower):
    """The root mean square of the tokens after every block, in fp32 and in bf16, and the logits of both.

    At all widths of `lavit_huge`, the deepest network, 4 GB of weights would be drawn.
    """
    torch.manual_seed(0)
    model = create_model(name, **narrower).eval()
    sizes = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda module, args, out: sizes.append(out[0].square().mean().sqrt().item()))
    images = torch.randn(1, 3, 224, 224)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        sizes.clear()
        with torch.no_grad():
            out, diagonality = model.to(dtype)(images.to(dtype), with_diagonality=True)  # in place: never two copies
        logits[dtype] = out.double()
        assert len(sizes) == sum(model.config.depths)
        assert min(sizes) > 0.8
        assert max(sizes) < 2
        assert logits[dtype].abs().max() < 2
        assert diagonality.isfinite()
    assert relative_error(logits[torch.bfloat16], logits[torch.float32]) < BF16_ERROR


def test_initial_weights_are_a_normal_cut_at_two_deviations_and_biases_zero():
    model = small(widths=(8, 16, 16, 240))
    assert not any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))
    weight = model.stages[3].blocks[0].mlp.fc1.weight.detach().double()
    unit = weight / weight.std()
    assert weight.std().item() == pytest.approx(1 / math.sqrt(240), rel=0.01)
    assert weight.mean().abs() < 4 * weight.std() / math.sqrt(weight.numel())
    assert unit.abs().max().item() == pytest.approx(2 / 0.8796, rel=0.01)
    # Of a normal's mass within two deviations, 71.5 % lies within one; a uniform distribution would have half there.
    assert (unit.abs() < 1 / 0.8796).double().mean().item() == pytest.approx(0.6827 / 0.9545, abs=0.01)


def live_score_tensors(shape):
    """Storages alive now that are as large as one stage's scores of `shape`."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.numel() == math.prod(shape) and thing.untyped_storage().nbytes():
            found[thing.untyped_storage().data_ptr()] = thing.shape
    return len(found)


def test_checkpointing_keeps_each_score_tensor_once_and_only_those_that_flow_between_blocks():
    """Stage 3 alone has scores of this size: one vanilla block and four less attention blocks, so four go between."""
    model = small(depths=(1, 1, 5, 1), widths=(8, 16, 20, 24), heads=(1, 1, 5, 1), attention_residual=False)
    images, shape = torch.randn(3, 3, 32, 32), (3, 5, 16, 16)
    before = live_score_tensors(shape)
    model.set_activation_checkpointing("all")
    out, loss = model(images, with_diagonality=True)
    assert live_score_tensors(shape) - before == 4
    del out, loss
    model.set_activation_checkpointing("none")
    kept = set()

    def pack(tensor):
        if tensor.numel() == math.prod(shape):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(images, with_diagonality=True)
    assert len(result) == 2
    assert len(kept) > 4  # what checkpointing spares
