"""Precision, initialisation, compilation, memory."""

import copy
import gc
import math

import pytest
import torch

from models import LaViT, create_model
from models.block import Block
from tests.accuracy import assert_as_accurate
from tests.models.test_lavit import small


def shaken(**overrides) -> LaViT:
    """A small network whose Psi, Theta and LayerScale have left their initial values."""
    model = small(**overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("theta", "psi", "gamma")):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def test_bf16_and_autocast_outputs_agree_with_fp32_to_bf16s_precision():
    """Bound: bf16 keeps 8 bits, so each operation errs by up to 2^-9; over some dozens of them in a row, 2^-5."""
    model = shaken().eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact, exact_loss = model(images, with_diagonality=True)
        with torch.autocast("cpu", torch.bfloat16):
            autocast, autocast_loss = model(images, with_diagonality=True)
        model.bfloat16()
        bf16, bf16_loss = model(images.bfloat16(), with_diagonality=True)
    for logits, loss in ((autocast, autocast_loss), (bf16, bf16_loss)):
        assert logits.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        assert (logits.float() - exact).norm() / exact.norm() < 2**-5
        assert abs(loss - exact_loss) < 2**-5


def test_bf16_training_gradients_point_where_fp32s_do():
    model = shaken()
    images = torch.randn(4, 3, 32, 32)

    def gradients(model, images):
        model.zero_grad()
        logits, loss = model(images, with_diagonality=True)
        (torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3])) + loss).backward()
        return {name: p.grad.float().flatten().clone() for name, p in model.named_parameters()}

    exact = gradients(model, images)
    rough = gradients(model.bfloat16(), images.bfloat16())
    a, b = torch.cat(list(exact.values())), torch.cat(list(rough.values()))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999


def test_a_row_of_the_batch_does_not_depend_on_the_others():
    model = shaken(image_size=(32, 48)).eval()
    images = torch.randn(3, 3, 32, 48)
    exact = copy.deepcopy(model).double()(images[1:2].double())
    assert_as_accurate(model(images)[1:2], model(images[1:2]), exact)


def outputs_and_gradients(network, model, images, uniforms):
    model.zero_grad()
    logits, loss = network(images, drop_path_uniforms=uniforms, with_diagonality=True)
    (logits.square().sum() + loss).backward()
    return [logits.detach(), loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", ["none", "all"])
def test_captured_without_a_graph_break_it_gives_the_same_outputs_and_gradients(checkpointed):
    """What torch.compile captures, run operation by operation: exact in training and evaluation, at any size."""
    torch._dynamo.reset()
    model = shaken(drop_path=0.2)
    model.set_activation_checkpointing(checkpointed)
    images, uniforms = torch.randn(2, 3, 32, 32), torch.rand(model.num_drop_paths, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(model, model, images, uniforms)
    twin = copy.deepcopy(model).double()
    exact = outputs_and_gradients(twin, twin, images.double(), uniforms.double())
    for results in zip(outputs_and_gradients(compiled, model, images, uniforms), expected, exact, strict=True):
        assert_as_accurate(*results)
    model.eval()
    features = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        twin = copy.deepcopy(model).double()
        for inputs in (images, torch.randn(1, 3, 48, 64)):
            assert_as_accurate(compiled(inputs), model(inputs), twin(inputs.double()))
        pyramids = (features(images), model.forward_features(images), twin.forward_features(images.double()))
        for maps in zip(*pyramids, strict=True):
            assert_as_accurate(*maps)


@pytest.mark.slow
def test_a_stage_compiled_by_inductor_with_dropped_paths_and_checkpointing_gives_the_same():
    """One stage, with the residual and both kinds of block: a whole network takes minutes of a C++ compiler's time, and
    `benchmarks.model --compile` compares those."""
    torch._dynamo.reset()
    stage = shaken(drop_path=0.2).stages[1]
    stage.checkpointed = True
    image, scores, uniforms = torch.randn(2, 8, 16, 16), torch.randn(2, 1, 16, 256), torch.rand(4, 2)

    def run(network, stage, dtype=torch.float32):
        stage.zero_grad()
        before, drawn = (scores.to(dtype), (16, 16), (4, 4)), uniforms.to(dtype)
        out, (last, *_), (loss,) = network(image.to(dtype), before, drawn, True)
        (out.square().sum() + last.sum() + loss).backward()
        return [out.detach(), last.detach(), loss.detach(), *(p.grad.clone() for p in stage.parameters())]

    twin = copy.deepcopy(stage).double()
    exact = run(twin, twin, torch.float64)
    for results in zip(run(torch.compile(stage, fullgraph=True), stage), run(stage, stage), exact, strict=True):
        assert_as_accurate(*results)


@pytest.mark.parametrize("name", ["lavit_base", pytest.param("lavit_huge", marks=pytest.mark.slow)])
def test_activations_keep_their_scale_through_the_whole_network_in_fp32_and_in_bf16(name):
    """The root mean square of the tokens after every block, as published: huge is 976.89 M parameters, 4 GB in fp32."""
    torch.manual_seed(0)
    model = create_model(name).eval()
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
        logits[dtype] = out.float()
        assert len(sizes) == sum(model.config.depths)
        assert min(sizes) > 0.8
        assert max(sizes) < 2
        assert logits[dtype].abs().max() < 2
        assert diagonality.isfinite()
    error = logits[torch.bfloat16] - logits[torch.float32]
    assert error.norm() / logits[torch.float32].norm() < 2**-5  # as small networks do, see above


def test_initial_weights_are_a_normal_cut_at_two_deviations():
    torch.manual_seed(0)
    weight = small(widths=(8, 16, 16, 240)).stages[3].blocks[0].mlp.fc1.weight.detach().double()
    unit = weight / weight.std()
    assert weight.std().item() == pytest.approx(1 / math.sqrt(240), rel=0.01)
    assert weight.mean().abs() < 4 * weight.std() / math.sqrt(weight.numel())
    assert unit.abs().max().item() == pytest.approx(2 / 0.8796, rel=0.01)
    # Of a normal's mass within two deviations, 71.5 % lies within one; a uniform distribution would have half there.
    assert (unit.abs() < 1 / 0.8796).double().mean().item() == pytest.approx(0.6827 / 0.9545, abs=0.01)


def test_less_attention_starts_as_the_identity_and_biases_at_zero():
    for name, parameter in small().named_parameters():
        if name.endswith(("theta.weight", "psi.weight")):
            assert torch.equal(parameter, torch.eye(len(parameter)))
        if name.endswith("bias"):
            assert parameter.abs().max() == 0


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
