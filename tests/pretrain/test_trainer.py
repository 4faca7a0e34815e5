"""What is due between steps, and what a stop leaves; ``Trainer``'s own methods on as much of a trainer as they need."""

from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from pretrain import trainer as module
from pretrain.engine.schedule import Schedule
from pretrain.evaluation.accuracy import Evaluation
from pretrain.evaluation.probes import Probed, ProbesEndedError
from pretrain.recipe import BadNumbersSection, CheckpointSection, EvaluationSection, ProbesSection
from pretrain.state import TrainState
from pretrain.trainer import Trainer


@pytest.fixture
def trainer() -> Any:
    """Of 99 steps of 100 images in epochs of 100, with an average of the weights."""
    recipe: Any = SimpleNamespace(
        probes=ProbesSection(path="x", every_epochs=1), ema=object(), schedule=SimpleNamespace(epochs=99),
        evaluation=EvaluationSection(every_epochs=1), checkpoint=CheckpointSection(every_steps=10), log_every_steps=4,
    )  # fmt: skip
    made: Any = object.__new__(Trainer)
    made.__dict__ |= {part: mock.Mock() for part in Trainer.__dataclass_fields__} | {
        "recipe": recipe, "schedule": Schedule(recipe, 100, 100), "batch": SimpleNamespace(global_batch=100),
        "state": TrainState(), "dtype": None,
        "optimizer_shards": mock.Mock(averaged_weights=nullcontext, buffers=mock.Mock(averaged=nullcontext)),
        "monitor": mock.Mock(excluded=nullcontext, attention=lambda: None),
    }  # fmt: skip
    made.probes.section = recipe.probes
    return made


def at(trainer: Any, step: int) -> None:
    trainer.state.step, trainer.state.samples_seen = step, 100 * step


def test_stopped_probes_are_due_again_and_abandoned_ones_are_reported_and_are_not(trainer: Any) -> None:
    result = Probed(50.0, 60.0, 10)
    trainer.probes.run.side_effect = [ProbesEndedError("stopped"), ProbesEndedError("too late"), result]
    assert not trainer.probes_due()
    at(trainer, 2)
    assert trainer.probes_due()
    trainer.probe()
    assert trainer.probes_due(), "a stop leaves them undone"
    trainer.log.say.assert_not_called()
    trainer.probe()
    assert not trainer.probes_due()
    trainer.log.say.assert_called_once_with("WARNING probes abandoned after 10 minutes (probes.time_limit_minutes)")
    trainer.log.result.assert_not_called()
    at(trainer, 3)
    assert trainer.probes_due()
    trainer.probe()
    assert trainer.log.result.call_args.args[:2] == ("probe", result)
    trainer.state.samples_seen, trainer.state.step = 350, 99
    assert trainer.probes_due(), "the end is always probed"


def test_a_stop_between_the_evaluations_of_weights_and_average_leaves_nothing_of_either(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, average = Evaluation(70.0, 90.0, 1.0, 10), Evaluation(60.0, 90.0, 1.0, 10)
    first, second = (mock.Mock(total=lambda result=result: result) for result in (weights, average))
    monkeypatch.setattr(module, "evaluate", mock.Mock(side_effect=[first, None, first, second]))
    at(trainer, 2)
    before = asdict(trainer.state)
    trainer.evaluate()
    assert asdict(trainer.state) | {"train_seconds": 0.0} == before
    assert trainer.evaluation_due()
    trainer.log.result.assert_not_called()
    trainer.evaluate()
    assert [call.args[:2] for call in trainer.log.result.call_args_list] == [
        ("eval", weights),
        ("eval_average", average),
    ]
    assert trainer.state.evaluation == asdict(average), "the average is what is handed off"
    assert (trainer.state.evaluated_at, trainer.state.best_at, trainer.state.best_top1) == (200, 200, 60.0)
    assert not trainer.evaluation_due()


def test_what_is_due_is_derived_from_the_state_and_asking_changes_nothing(trainer: Any) -> None:
    due: dict[str, list[int]] = {"evaluation_due": [], "probes_due": [], "checkpoint_due": [], "log_due": []}
    for step in range(1, 100):
        at(trainer, step)
        before = asdict(trainer.state)
        for name, steps in due.items():
            steps.extend([step] * (getattr(trainer, name)() and getattr(trainer, name)()))
        assert asdict(trainer.state) == before
        if step in due["checkpoint_due"]:
            trainer.state.saved_at = trainer.state.samples_seen
    assert due["evaluation_due"] == due["probes_due"] == [*range(1, 100)]
    assert due["checkpoint_due"] == [*range(10, 100, 10), 99]
    assert due["log_due"] == [1, *range(4, 100, 4), 99]
    trainer.nonfinite.skipped.assert_not_called()
    trainer.writer.assert_not_called()


def test_what_a_stop_interrupted_at_the_end_is_saved_when_it_is_done(trainer: Any) -> None:
    at(trainer, 99)
    trainer.state.reset_saves()  # resumed from the checkpoint that the stop wrote
    assert trainer.evaluation_due()
    assert not trainer.checkpoint_due()
    trainer.state.record_evaluation({"top1": 50.0})
    assert trainer.checkpoint_due(), "the hand-off is made from a checkpoint"
    trainer.handle_skipped_steps = trainer.finish_save = mock.Mock()
    trainer.monitor.excluded, trainer._clock = nullcontext, 0.0
    trainer.save()
    assert not trainer.checkpoint_due()


def test_skipped_steps_of_the_weights_before_a_rollback_are_counted_and_roll_back_no_further(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.recipe.bad_numbers = BadNumbersSection(skipped_steps=2, rollbacks=1)
    found = TrainState(loss_scale={"cur_scale": 8.0})
    monkeypatch.setattr(module, "load_newest", mock.Mock(return_value=(found, [])))
    trainer.finish_save = mock.Mock()
    trainer.nonfinite.skipped.side_effect = [[False, True, True, True, True], [True]]
    at(trainer, 8)
    trainer.handle_skipped_steps(skip_last=1)
    assert (trainer.state.rollbacks, trainer.state.skipped_in_a_row, trainer.state.skipped_steps) == (1, 0, 5)
    trainer.nonfinite.set_loss_scale.assert_called_once_with({"cur_scale": 8.0})
