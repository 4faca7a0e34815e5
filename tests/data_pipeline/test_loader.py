import hashlib
import inspect
import itertools
import shutil
import subprocess
import sys
import warnings
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn

from data_pipeline import graph
from data_pipeline.dataset import Dataset
from data_pipeline.engine import Lent
from data_pipeline.errors import DataError
from data_pipeline.loader import EvalLoader, TrainLoader
from data_pipeline.transforms import AffineConfig, AugmentConfig, InputConfig

CPU = torch.device("cpu")
AUGMENT = AugmentConfig(affine=AffineConfig(degrees=10, translate=0.1, scale=(0.9, 1.1)), horizontal_flip=0.5)


def config(dataset: Dataset, **changes) -> InputConfig:
    settings = {"image_size": 32, "eval_crop_ratio": 1.0, "augment": AUGMENT, "threads": 1}
    return InputConfig(path=dataset.path, **(settings | changes))


def digests(dataset, *, world=1, micro=16, start=0, steps=4, batch=64, device=CPU, **changes):
    """Per stream position: (sample id, epoch, label, digest of its pixels), as all ranks together see them."""
    seen = {}
    for rank in range(world):
        loader = TrainLoader(
            dataset, config(dataset, **changes), seed=3, global_batch=batch, micro_batch=micro, rank=rank,
            world_size=world, device=device, start_sample=start,
        )  # fmt: skip
        per_step = batch // world // micro
        for i, out in enumerate(itertools.islice(loader, steps * per_step)):
            for k in range(micro):
                position = start + i // per_step * batch + int(out.rows[k])
                pixels = hashlib.md5(out.images[k].cpu().numpy().tobytes()).hexdigest()
                assert position not in seen
                seen[position] = (int(out.sample_ids[k]), int(out.epochs[k]), int(out.labels[k]), pixels)
        loader.close()
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
    gpu = torch.device("cuda", 0)
    loaders = [
        TrainLoader(train, config(train), seed=1, global_batch=32, micro_batch=32, rank=0, world_size=1, device=gpu)
        for _ in range(2)
    ]
    quiet = [batch.images.cpu() for batch in itertools.islice(loaders[0], 20)]
    batches, kept = iter(loaders[1]), []
    for _ in quiet:
        torch.cuda._sleep(10**8)  # what is copied now waits for this, and DALI has long gone on
        kept.append(next(batches).images)
    assert all(torch.equal(now.cpu(), then) for now, then in zip(kept, quiet, strict=True))
    for loader in loaders:
        loader.close()


class Copying:
    """Stands for the event behind a copy."""

    def __init__(self) -> None:
        self.over = self.waited = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.waited = True


def test_a_batch_that_is_still_copied_is_held_and_no_longer() -> None:
    lent, events, batches = Lent(), [Copying() for _ in range(4)], [type("Batch", (), {})() for _ in range(4)]
    held = [weakref.ref(batch) for batch in batches]
    for event in events[:3]:
        lent.until(event, batches.pop(0))
    assert all(one() is not None for one in held)
    events[0].over = events[2].over = True  # a stream does one thing after the other: the third's waits for the second
    lent.until(events[3], batches.pop(0))
    assert [one() is not None for one in held] == [False, True, True, True]
    lent.settle()
    assert [event.waited for event in events] == [False, True, True, True]
    assert not any(one() is not None for one in held)


def decoded(settings, device_id):
    """The decoder's node in a pipeline that is not built: on a GPU that would need one."""
    with Pipeline(batch_size=1, num_threads=1, device_id=device_id):
        inputs = {name: fn.external_source(iter(()), ndim=1) for name in ("jpeg", "start", "shape")}
        return graph._decode(inputs, settings, device_id)


def test_a_gpu_decodes_with_one_decoder_unless_it_is_asked_for_two(train):
    for changes, load in (({}, "0.000000"), ({"hw_decoder_load": 0.5}, "0.500000")):
        images = decoded(config(train, **changes), device_id=0)
        assert images.device == "gpu"
        assert f"hw_decoder_load: {load}\n" in str(images.source.spec)


def test_a_gpu_takes_memory_ahead_as_dali_does_unless_it_is_asked_for_more(train):
    names = ("device_memory_padding", "preallocate_height_hint", "preallocate_width_hint")
    defaults = inspect.signature(fn.decoders.image_slice).parameters
    asked = {"device_memory_padding": 2**21, "preallocate_hint": (375, 500)}
    for changes, expected in (({}, [defaults[name].default for name in names]), (asked, [2**21, 375, 500])):
        spec = str(decoded(config(train, **changes), device_id=0).source.spec)
        for name, value in zip(names, expected, strict=True):
            assert f"{name}: {value}\n" in spec
        assert not [name for name in names if name in str(decoded(config(train, **changes), None).source.spec)]


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_the_graph_for_a_gpu_is_well_formed_with_every_augmentation(train):
    full = AugmentConfig(
        random_resized_crop={}, horizontal_flip=0.5, affine={"degrees": 3}, rand_augment={},
        color_jitter={"brightness": 0.1, "hue": 0.1}, random_erasing={},
    )  # fmt: skip
    settings = InputConfig(path="nowhere", augment=full, image_size=64)
    # All that Python can check is checked before DALI asks for the device.
    without = nullcontext() if torch.cuda.is_available() else pytest.raises(RuntimeError, match="CUDA is not available")
    with without:
        graph.pipeline(settings, lambda _: [], train=train, batch_size=2, threads=1, device_id=0)


@pytest.mark.parametrize(("world", "steps"), [(1, 7), (2, 21), (4, 23)])
def test_a_restart_in_the_middle_goes_on_with_the_same_pixels(train, reference, world, steps):
    after = digests(train, world=world, micro=16, start=steps * 64, steps=30 - steps)
    assert after == {position: value for position, value in reference.items() if position >= steps * 64}


def test_an_epoch_holds_every_sample_once_and_the_next_one_other_pixels(reference):
    first = {s: d for s, e, _, d in reference.values() if e == 0}
    second = {s: d for s, e, _, d in reference.values() if e == 1}
    assert sorted(first) == list(range(1437))
    assert second
    assert all(first[sample] != digest for sample, digest in second.items())


def test_labels_belong_to_the_pictures(train, val, reference):
    assert all(train.labels[sample] == label for sample, _, label, _ in reference.values())


def test_a_kept_batch_does_not_change_while_others_are_loaded(train):
    loader = TrainLoader(
        train, config(train), seed=1, global_batch=32, micro_batch=32, rank=0, world_size=1, device=CPU
    )
    kept = [(batch.images, batch.images.clone()) for batch in itertools.islice(loader, 40)]
    loader.close()
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize(("world", "size"), [(1, 50), (2, 64), (7, 10), (1, 400), (360, 1), (500, 2)])
def test_evaluation_sees_every_sample_once_on_any_number_of_ranks(val, world, size):
    seen, lengths = [], set()
    for rank in range(world) if world < 10 else (0, 1, world // 2, world - 2, world - 1):
        loader = EvalLoader(val, config(val), batch_size=size, rank=rank, world_size=world, device=CPU)
        batches = list(loader)
        lengths.add(len(batches))
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch.images.shape == (size, 3, 32, 32)
            seen += batch.sample_ids[batch.valid].tolist()
        loader.close()
    assert len(lengths) == 1
    if world < 10:
        assert sorted(seen) == list(range(360))
    else:
        assert len(seen) == len(set(seen))


def test_evaluation_can_be_repeated_and_left_early(val):
    loader = EvalLoader(val, config(val), batch_size=32, rank=0, world_size=1, device=CPU)
    first = torch.cat([batch.images for batch in loader])
    next(iter(loader))
    for _ in itertools.islice(loader, 3):
        pass
    again = torch.cat([batch.images for batch in loader])
    loader.close()
    assert torch.equal(first, again)


def test_pixels_are_normalised_with_mean_and_std(val):
    def one(**changes):
        loader = EvalLoader(val, config(val, **changes), batch_size=16, rank=0, world_size=1, device=CPU)
        batch = next(iter(loader))
        loader.close()
        return batch.images

    plain = one(mean=(0, 0, 0), std=(1, 1, 1))
    assert 0 <= plain.min() < 0.01
    assert 0.9 < plain.max() <= 1
    mean, std = torch.tensor((0.1, 0.2, 0.3)), torch.tensor((0.5, 0.6, 0.7))
    expected = (plain - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(one(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)), expected)


@pytest.mark.parametrize(("batch", "micro", "world"), [(64, 16, 3), (64, 24, 2), (60, 16, 2)])
def test_a_global_batch_that_cannot_be_divided_is_refused(train, batch, micro, world):
    with pytest.raises(DataError, match=f"global batch of {batch} cannot be divided among {world} ranks"):
        TrainLoader(
            train, config(train), seed=0, global_batch=batch, micro_batch=micro, rank=0, world_size=world, device=CPU
        )


def damage(dataset, samples):
    for sample in samples:
        with dataset.shard_path(int(dataset.shard[sample])).open("r+b") as shard:
            shard.seek(int(dataset.offset[sample]) + 300)
            shard.write(b"\xff\xd9bad!")


@pytest.fixture
def damaged(digits, tmp_path):
    dataset = Dataset.open(shutil.copytree(digits, tmp_path / "digits"), "train")
    damage(dataset, [5, 6, 900])
    return dataset


def test_a_bad_sample_is_replaced_by_the_next_and_reported_by_name(damaged):
    reports = []
    loader = TrainLoader(
        damaged, config(damaged, max_bad_fraction=0.01), seed=3, global_batch=64, micro_batch=64, rank=0, world_size=1,
        device=CPU, on_bad_sample=reports.append,
    )  # fmt: skip
    ids = []
    for batch in itertools.islice(loader, 30):
        assert (damaged.labels[batch.sample_ids] == batch.labels.numpy()).all()
        ids += batch.sample_ids.tolist()
    loader.close()
    first = {report.id: report for report in reports}
    assert {i: r.replaced_by for i, r in first.items()} == {5: 7, 6: 7, 900: 901}
    assert not {5, 6, 900} & set(ids)
    assert first[5].name.startswith("00000005-scan")
    assert first[5].shard == "digits-train-000000.tar"
    assert "checksum" in first[5].reason


def test_more_bad_samples_than_allowed_stop_with_a_line_that_says_so(damaged):
    loader = TrainLoader(
        damaged, config(damaged, max_bad_fraction=0.001), seed=3, global_batch=64, micro_batch=64, rank=0, world_size=1,
        device=CPU,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"3 samples .* damaged, more than max_bad_fraction \(0.001\) allows"):
        for _ in itertools.islice(loader, 30):
            pass
    loader.close()


def test_a_bad_sample_is_left_out_of_evaluation_and_reported(damaged):
    reports = []
    loader = EvalLoader(
        damaged, config(damaged, max_bad_fraction=0.01), batch_size=100, rank=0, world_size=1, device=CPU,
        on_bad_sample=reports.append,
    )  # fmt: skip
    valid = np.concatenate([batch.sample_ids[batch.valid] for batch in loader])
    loader.close()
    assert sorted(set(range(1437)) - set(valid.tolist())) == [5, 6, 900]
    assert len(valid) == 1434
    assert sorted(report.id for report in reports) == [5, 6, 900]


@pytest.mark.parametrize(("bad", "rank"), [(1436, 3), (359, 0), (0, 0)])
def test_a_bad_sample_that_pads_is_reported_once_by_the_rank_whose_share_it_is_in(digits, tmp_path, bad, rank):
    dataset = Dataset.open(shutil.copytree(digits, tmp_path / "digits"), "train")
    damage(dataset, [bad])
    reports = []
    for own in range(4):  # shares of 360, the last of 357, each padded to 400
        loader = EvalLoader(
            dataset, config(dataset), batch_size=100, rank=own, world_size=4, device=CPU,
            on_bad_sample=lambda report, own=own: reports.append((report.id, own)),
        )  # fmt: skip
        list(loader)
        loader.close()
    assert reports == [(bad, rank)]


def test_a_program_that_ends_in_the_middle_of_an_epoch_says_nothing(digits):
    script = (
        "import sys, torch; from data_pipeline.dataset import Dataset; from data_pipeline.loader import EvalLoader;"
        "from data_pipeline.transforms import InputConfig; data = Dataset.open(sys.argv[1], 'val');"
        "config = InputConfig(path=sys.argv[1], image_size=32, threads=1);"
        "loader = EvalLoader(data, config, batch_size=8, rank=0, world_size=1, device=torch.device('cpu'));"
        "batches = iter(loader); next(batches); next(batches)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(digits)], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_dalis_remarks_on_its_own_augmentations_are_kept_from_every_rank(train):
    with warnings.catch_warnings(record=True) as remarks:
        TrainLoader(
            train, config(train, augment=AugmentConfig(trivial_augment=True)), seed=1, global_batch=8, micro_batch=8,
            rank=0, world_size=1, device=CPU,
        ).close()  # fmt: skip
    assert remarks == []


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{"rand_augment": {}}, {"trivial_augment": True}], ids=str)
def test_random_policies_are_the_same_on_any_number_of_ranks_and_threads(train, policy):
    augment = AugmentConfig(random_erasing={"probability": 0.5}, color_jitter={"hue": 0.1}, **policy)
    whole = digests(train, steps=3, micro=64, augment=augment)
    assert digests(train, world=4, steps=3, micro=8, threads=3, augment=augment) == whole
    plain = digests(train, steps=3, micro=64, augment=AugmentConfig())
    changed = sum(plain[position][3] != whole[position][3] for position in whole)
    assert changed > 0.6 * len(whole)
