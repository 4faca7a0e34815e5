"""DALI reads a batch's inputs in place, so the engine keeps them until their output is consumed.

DALI has references of its own, for less long than a GPU reads. They do not count here: what is watched is the tensors
that the engine gave to DALI.
"""

import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import graph
from data_pipeline.dataset import Dataset
from data_pipeline.loader import TrainLoader
from tests.data_pipeline.datasets import settings, spoil_scan, training
from tests.data_pipeline.test_loader import AUGMENT, Copying

MICRO = 32


class Watch:
    """Counts inputs that are released, and notes those that are before their output was consumed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given = self.released = self.shut_down = 0
        self.early: list[tuple[str, int]] = []
        self._real = {name: getattr(graph, name) for name in ("pipeline", "shut_down")}
        self._consumed: dict[int, float] = {}
        monkeypatch.setattr(graph, "pipeline", self._pipeline)
        monkeypatch.setattr(graph, "shut_down", self._shut_down)

    def _pipeline(self, config: Any, source: Any, **options: Any) -> Any:
        pipe: Any = None
        numbers = itertools.count()

        def watched() -> dict[str, Any]:
            batch, number = source(), next(numbers)
            for name, tensors in batch.items():
                self.given += 1
                weakref.finalize(tensors, self._release, pipe, name, number)
            return batch

        pipe = self._real["pipeline"](config, watched, **options)
        share, self._consumed[id(pipe)] = pipe.share_outputs, 0

        def share_outputs(*stream: Any) -> Any:
            outputs = share(*stream)
            self._consumed[id(pipe)] += 1
            return outputs

        pipe.share_outputs = share_outputs
        return pipe

    def _shut_down(self, pipe: Any) -> None:
        self._real["shut_down"](pipe)
        self.shut_down += 1
        self._consumed[id(pipe)] = float("inf")

    def _release(self, pipe: Any, name: str, number: int) -> None:
        self.released += 1
        if number >= self._consumed[id(pipe)]:
            self.early.append((name, number))


def pixels(loader: TrainLoader, batches: int) -> list[torch.Tensor]:
    return [batch.images for batch in itertools.islice(loader, batches)]


@pytest.fixture
def spoiled(copy: Path) -> Dataset:
    """Its epoch of 45 batches holds an image that only the decoder finds bad."""
    spoil_scan(copy)
    return Dataset.open(copy, "train")


@pytest.mark.parametrize("prefetch", [1, 3])
def test_inputs_live_until_they_are_consumed_through_recovery_stop_restart_and_close(
    spoiled: Dataset, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    config, place = settings(spoiled, augment=AUGMENT, prefetch=prefetch), {"micro_batch": MICRO}
    with training(spoiled, config, **place) as loader:
        expected = pixels(loader, 46)
    watch = Watch(monkeypatch)
    with training(spoiled, config, draw=lambda step, _: step, **place) as loader:
        batches = list(itertools.islice(loader, 46))
        seen = [batch.images for batch in batches]
        assert [batch.drawn for batch in batches] == [i // 2 for i in range(46)]
        del batches
        assert watch.shut_down == 1, "it recovered from the bad image"
        assert watch.given - watch.released <= (2 * prefetch + 1) * 4, "consumed batches are released"
        left = iter(loader)
        again = [next(left).images for _ in range(3)]
        anew = pixels(loader, 5)
        next(iter(loader))
    assert watch.early == []
    del left
    gc.collect()
    assert watch.given == watch.released > 46 * 4
    for batches in (seen, again, anew):
        assert all(torch.equal(now, then) for now, then in zip(batches, expected, strict=False))


def test_inputs_live_until_a_pipeline_is_shut_down_that_failed_on_a_batch_nobody_sees(
    spoiled: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, config = Watch(monkeypatch), settings(spoiled, prefetch=46)
    with training(spoiled, config, micro_batch=MICRO) as loader:
        next(iter(loader))
        gc.collect()  # ends the iteration, with all of the epoch on its way
        assert watch.shut_down == 1
    assert watch.early == []


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Copying]:
    """Of a stand-in for a GPU's stream, in the order in which they were recorded."""
    recorded: list[Copying] = []

    class Stream:
        def record_event(self) -> Copying:
            recorded.append(Copying())
            return recorded[-1]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    return recorded


def on_stand_in(loader: TrainLoader) -> Iterator[Any]:
    """Batches by the way that a GPU's take; decoded on the CPU."""
    engine: Any = loader._engine
    share = engine._pipe.share_outputs
    engine._pipe.share_outputs = lambda *_: share()
    engine._device = torch.device("cuda")
    return iter(loader)


def test_on_a_gpu_inputs_live_until_the_event_of_their_output_has_passed(
    train: Dataset, monkeypatch: pytest.MonkeyPatch, events: list[Copying]
) -> None:
    watch, config = Watch(monkeypatch), settings(train, prefetch=1)
    with training(train, config, micro_batch=MICRO) as loader:
        batches = on_stand_in(loader)
        for _ in range(4):
            next(batches)
        assert watch.released == 0
        events[0].over = events[1].over = True
        next(batches)
        assert watch.released == 2 * 4  # jpeg, start, shape and mirror of two batches
    assert [event.waited for event in events] == [False, False, True, True, True]
    assert watch.early == []
