import hashlib
import itertools
import os
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from nvidia.dali import Pipeline

from data_pipeline import graph
from data_pipeline.dataset import Dataset
from data_pipeline.engine import InFlightBuffers
from data_pipeline.errors import DataError
from data_pipeline.reader import Reader
from data_pipeline.transforms import AffineConfig, AugmentConfig, InputConfig
from tests.data_pipeline.datasets import CPU, evaluation, settings, training

AUGMENT = AugmentConfig(affine=AffineConfig(degrees=10, translate=0.1, scale=(0.9, 1.1)), horizontal_flip=0.5)


def digests(dataset, *, world=1, micro=16, start=0, steps=4, device=CPU, augment=AUGMENT, **changes):
    """Per stream position: (sample id, epoch, label, digest of its pixels), as all ranks together see them."""
    seen, batch = {}, 64
    for rank in range(world):
        place = {"micro_batch": micro, "rank": rank, "world_size": world, "device": device, "start_sample": start}
        per_step = batch // world // micro
        with training(dataset, settings(dataset, augment=augment, **changes), seed=3, **place) as loader:
            for i, out in enumerate(itertools.islice(loader, steps * per_step)):
                for k in range(micro):
                    position = start + i // per_step * batch + int(out.rows[k])
                    pixels = hashlib.md5(out.images[k].cpu().numpy().tobytes()).hexdigest()
                    assert position not in seen
                    seen[position] = (int(out.sample_ids[k]), int(out.epochs[k]), int(out.labels[k]), pixels)
    assert sorted(seen) == list(range(start, start + steps * batch))
    return seen


@pytest.fixture(scope="module")
def reference(digits):
    # 30 steps of 64 are more than the 1437 samples: the epoch's boundary lies inside a batch.
    return digests(Dataset.open(digits, "train"), steps=30)


@pytest.mark.parametrize(
    "changes",
    [
        {"world": 2}, {"world": 4, "micro": 8}, {"micro": 64}, {"micro": 4}, {"threads": 3}, {"prefetch": 5},
        {"world": 2, "micro": 32, "threads": 2, "prefetch": 1},
    ],
    ids=str,
)  # fmt: skip
def test_every_pixel_is_the_same_on_any_number_of_ranks_batches_and_threads(train, reference, changes):
    assert digests(train, steps=30, **changes) == reference


@pytest.mark.gpu
def test_on_a_gpu_pixels_do_not_depend_on_the_place_in_the_batch_either(train):
    gpu = torch.device("cuda", 0)
    assert digests(train, micro=64, steps=30, device=gpu) == digests(train, world=2, micro=4, steps=30, device=gpu)


@pytest.mark.gpu
def test_a_batch_has_its_own_pixels_however_busy_the_gpu_is(train):
    place = {"global_batch": 32, "micro_batch": 32, "device": torch.device("cuda", 0)}
    config = settings(train, augment=AUGMENT)
    with training(train, config, **place) as first, training(train, config, **place) as second:
        quiet = [batch.images.cpu() for batch in itertools.islice(first, 20)]
        batches, kept = iter(second), []
        for _ in quiet:
            torch.cuda._sleep(10**8)  # what is copied now waits for this, while DALI runs ahead
            kept.append(next(batches).images)
        assert all(torch.equal(now.cpu(), then) for now, then in zip(kept, quiet, strict=True))


class Copying:
    """Stands for the event behind a copy."""

    def __init__(self) -> None:
        self.over = self.waited = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.waited = True


def test_a_batch_that_is_still_copied_is_held_and_no_longer() -> None:
    in_flight, events = InFlightBuffers(), [Copying() for _ in range(4)]
    batches = [type("Batch", (), {})() for _ in range(4)]
    held = [weakref.ref(batch) for batch in batches]
    for event in events[:3]:
        in_flight.hold(event, batches.pop(0))
    assert all(one() is not None for one in held)
    events[0].over = events[2].over = True  # a stream does one thing after the other: the third's waits for the second
    in_flight.hold(events[3], batches.pop(0))
    assert [one() is not None for one in held] == [False, True, True, True]
    in_flight.wait()
    assert [event.waited for event in events] == [False, True, True, True]
    assert not any(one() is not None for one in held)


FULL = AugmentConfig(
    random_resized_crop={}, horizontal_flip=0.5, affine={"degrees": 3}, rand_augment={},
    color_jitter={"brightness": 0.1, "hue": 0.1}, random_erasing={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("train", "augment", "at_most"),
    [
        (True, FULL, 460),
        (True, FULL.model_copy(update={"rand_augment": None, "trivial_augment": True}), 220),
        (True, FULL.model_copy(update={"rand_augment": None}), 20),
        (False, FULL, 10),
    ],
    ids=["RandAugment", "TrivialAugment", "no policy", "evaluation"],
)
def test_dali_has_every_operator_of_the_graph_for_a_gpu_and_images_never_leave_it(monkeypatch, train, augment, at_most):
    config = InputConfig(path="nowhere", augment=augment, image_size=64)
    # All but the device itself: DALI asks for it when the graph is complete.
    monkeypatch.setattr(Pipeline, "build", Pipeline._build_graph)
    pipe = graph.pipeline(config, dict, train=train, batch_size=2, threads=1, device_id=0)
    assert len(pipe._ops) <= at_most, "more operators a batch than before"
    assert [output.device for output in pipe._graph_outputs] == ["gpu"]
    for node in pipe._ops:
        schema, device = node._op.schema, node._op.device
        assert device in schema.GetSupportedBackends(), f"{schema.Name()} has no {device} backend"
        schema.CheckArgs(node.spec)
        inputs = [edge.device for edge in node.inputs]
        assert device != "cpu" or "gpu" not in inputs, f"{schema.Name()} takes images back to the host"
        assert device != "gpu" or not inputs or inputs[0] == "gpu", f"{schema.Name()} takes images from the host"
    (decoder,) = [node for node in pipe._ops if node._op.device == "mixed"]
    assert decoder._op.schema.Name() == "decoders__ImageSlice"
    assert "hw_decoder_load: 0.000000\n" in str(decoder.spec), "two decoders need not agree"


@pytest.mark.parametrize(("world", "steps"), [(1, 7), (2, 21), (4, 23)])
def test_a_restart_in_the_middle_goes_on_with_the_same_pixels(train, reference, world, steps):
    after = digests(train, world=world, micro=16, start=steps * 64, steps=30 - steps)
    assert after == {position: value for position, value in reference.items() if position >= steps * 64}


def test_an_epoch_holds_every_sample_once_with_its_label_and_the_next_one_other_pixels(train, reference):
    first, second = ({s: d for s, e, _, d in reference.values() if e == epoch} for epoch in (0, 1))
    assert sorted(first) == list(range(1437))
    assert second
    assert all(first[sample] != digest for sample, digest in second.items())
    assert all(train.labels[sample] == label for sample, _, label, _ in reference.values())


def test_a_kept_batch_does_not_change_while_others_are_loaded(train):
    with training(train, settings(train, augment=AUGMENT), global_batch=32, micro_batch=32) as loader:
        kept = [(batch.images, batch.images.clone()) for batch in itertools.islice(loader, 40)]
    assert all(torch.equal(now, then) for now, then in kept)


def test_each_batch_has_what_was_drawn_for_its_step_and_rows_in_another_thread(train):
    def draw(step, rows):
        return step, rows.tolist(), threading.current_thread()

    place = {"rank": 1, "world_size": 2, "micro_batch": 16, "start_sample": 3 * 64, "start_step": 7}
    with training(train, draw=draw, **place) as loader:
        # More steps than are planned at a time.
        for i, batch in enumerate(itertools.islice(loader, 2 * 130)):
            step, rows, thread = batch.drawn
            assert (step, rows) == (7 + i // 2, batch.rows.tolist())
            assert thread is not threading.main_thread()
            assert rows[0] == 32 + i % 2 * 16


def test_evaluation_can_be_repeated_and_left_early(val):
    with evaluation(val, batch_size=32) as loader:
        first = torch.cat([batch.images for batch in loader])
        next(iter(loader))
        for _ in itertools.islice(loader, 3):
            pass
        again = torch.cat([batch.images for batch in loader])
    assert torch.equal(first, again)


def test_pixels_are_normalized_with_mean_and_std(val):
    def one(**changes):
        with evaluation(val, settings(val, **changes), batch_size=16) as loader:
            return next(iter(loader)).images

    plain = one(mean=(0, 0, 0), std=(1, 1, 1))
    assert 0 <= plain.min() < 0.01
    assert 0.9 < plain.max() <= 1
    mean, std = torch.tensor((0.1, 0.2, 0.3)), torch.tensor((0.5, 0.6, 0.7))
    expected = (plain - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(one(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)), expected)


@pytest.mark.parametrize(("batch", "micro", "world"), [(64, 16, 3), (64, 24, 2), (60, 16, 2)])
def test_a_global_batch_that_cannot_be_divided_is_refused(train, batch, micro, world):
    with pytest.raises(DataError, match=f"global batch of {batch} cannot be divided among {world} ranks"):
        training(train, global_batch=batch, micro_batch=micro, world_size=world)


def test_exactly_the_bytes_of_the_next_samples_are_announced_to_storage(train, monkeypatch):
    asked = []
    samples = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:200].numpy()

    def note(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, offset, length))

    monkeypatch.setattr(os, "posix_fadvise", note)
    Reader(train).announce(samples)
    names = [train.shards[shard].tar.name for shard in train.shard[samples]]
    assert len(set(names)) > 1
    assert sorted(asked) == sorted(zip(names, train.offset[samples], train.length[samples], strict=True))


LEAVE_EARLY = """
import itertools, sys
from data_pipeline.dataset import Dataset
from tests.data_pipeline.datasets import evaluation, settings, training
data = Dataset.open(sys.argv[1], "train")
config = settings(data, image_size=224, threads=2, prefetch=3)
loaders = [training(data, config, global_batch=6, micro_batch=6).thing, evaluation(data, config, batch_size=2).thing]
for batches in map(iter, loaders):
    next(batches)
    next(batches)
print("some batches")
"""


def test_a_process_that_ends_with_batches_on_their_way_ends_and_prints_nothing(photos):
    command = [sys.executable, "-c", LEAVE_EARLY, str(photos.path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=250, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "some batches\n", "")


def test_dalis_remarks_on_its_own_augmentations_are_not_shown(train):
    with warnings.catch_warnings(record=True) as remarks:
        training(train, settings(train, augment=AugmentConfig(rand_augment={}))).thing.close()
    assert remarks == []


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{"rand_augment": {}}, {"trivial_augment": True}], ids=str)
def test_random_policies_are_the_same_on_any_number_of_ranks_and_threads(train, policy):
    augment = AugmentConfig(random_erasing={"probability": 0.5}, color_jitter={"hue": 0.1}, **policy)
    alone = digests(train, steps=3, micro=64, augment=augment)
    assert digests(train, world=2, steps=3, micro=8, threads=3, augment=augment) == alone
    plain = digests(train, steps=3, micro=64, augment=AugmentConfig())
    changed = sum(plain[position][3] != alone[position][3] for position in alone)
    assert changed > 0.6 * len(alone)
