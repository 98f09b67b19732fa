"""Runs that go wrong pause, runs that get no better end, and a person lets them go on."""

from __future__ import annotations

import pytest

from fedmezo_core.config import TaskConfig
from fedmezo_core.errors import ConfigError, JournalCorruptError
from fedmezo_core.events import Assign, Finish, Ready, ReplicaEvaluated
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.machines.roster import Phase
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.records import Committed, Evaluated, Paused, Resumed, Stopped
from tests.core.machines.rounds_driver import RoundsDriver, kinds

OPTIONS = {"report_losses": True, "rounds": 20, "pause_rounds": 3, "pause_loss_factor": 2.0}


def _evaluated(run: RoundsDriver, loss: float) -> Ready:
    record = Evaluated(run.machine.round, loss, 0.5, 10, bytes(32))
    return run.step(ReplicaEvaluated(record))


def _diverging() -> RoundsDriver:
    run = RoundsDriver(**OPTIONS)
    run.ready("a")
    for loss in (1.0, 1.9, 2.5, 2.1, 1.5, 2.2, 3.0):
        run.answer("a", loss=loss)
        assert run.machine.phase is Phase.OPEN
    return run


def test_a_loss_that_stays_high_pauses_the_run() -> None:
    run = _diverging()
    ready = run.answer("a", loss=8.0)
    assert kinds(ready) == ["Answered", "Committed", "Paused", "Ack"]
    assert run.machine.phase is Phase.PAUSED
    assert run.machine.reason.startswith(
        "the training loss is 8 in round 8, above 2 times its first value 1 since round 6"
    )
    assert "resume with a smaller one" in run.machine.reason
    # Nothing is assigned any more, to nobody, restart or not.
    assert run.ready("b") == Ready()
    assert run.tick(10_000_000) == Ready()
    run.restart()
    assert run.machine.phase is Phase.PAUSED
    assert run.ready("a") == Ready()


def test_a_resumed_run_goes_on_with_smaller_rates() -> None:
    run = _diverging()
    run.answer("a", loss=8.0)
    run.restart()
    ready = run.keep(run.machine.resume(0.1))
    assert ready.records == (Resumed(0.1),)
    [assign] = [m for m in run.ready("a").messages if isinstance(m, Assign)]
    assert assign.work.learning_rate == pytest.approx(0.05)
    # What was high before counts no more: it takes three new rounds.
    for loss, phase in ((9.0, Phase.OPEN), (9.0, Phase.OPEN), (9.0, Phase.PAUSED)):
        run.answer("a", loss=loss)
        assert run.machine.phase is phase
    run.keep(run.machine.resume(0.1))
    assert run.machine.state.rate_factor == pytest.approx(0.01)


def test_only_a_paused_run_is_resumed() -> None:
    run = RoundsDriver(**OPTIONS)
    with pytest.raises(ConfigError, match="waiting, not paused"):
        run.machine.resume(1.0)
    run = _diverging()
    run.answer("a", loss=8.0)
    with pytest.raises(ConfigError, match="above 0"):
        run.machine.resume(0.0)


def test_no_resumptions_together_ruin_the_rates() -> None:
    run = _diverging()
    run.answer("a", loss=8.0)
    for factor in (1e300, 2e9, 1e-201):
        with pytest.raises(ConfigError, match=r"rates would be \S+ times the contract"):
            run.machine.resume(factor)
    run.keep(run.machine.resume(1e8))
    run.keep(run.machine.pause("again"))
    with pytest.raises(ConfigError, match=r"would be 1e\+16 times the contract's; give a factor"):
        run.machine.resume(1e8)
    run.keep(run.machine.resume(1e-8))
    assert run.machine.state.rate_factor == pytest.approx(1.0)


def test_zero_rounds_never_pause() -> None:
    run = RoundsDriver(**OPTIONS | {"pause_rounds": 0})
    run.ready("a")
    for _ in range(20):
        run.answer("a", loss=1.0 if run.machine.round == 0 else 1e9)
    assert run.machine.phase is Phase.FINISHED


def test_held_out_losses_pause_a_run_that_keeps_its_losses_private() -> None:
    run = RoundsDriver(rounds=20, pause_rounds=3)
    run.ready("a")
    _evaluated(run, 0.5)
    run.answer("a")
    assert _evaluated(run, 1.6).records[1:] == (), "one high loss may be chance"
    run.answer("a")
    run.answer("a")
    ready = _evaluated(run, 2.0)
    assert isinstance(ready.records[-1], Paused)
    assert "held-out loss is 2 in round 3" in run.machine.reason


def test_projected_gradients_that_are_all_zero_pause_the_run() -> None:
    run = RoundsDriver(rounds=20, workers_min=2, quorum=2)
    run.ready("a", "b")
    _evaluated(run, 0.9)
    for round_ in range(1, 6):
        run.answer("a", grads=(0.0, -0.0))
        run.answer("b", grads=(0.0, 1e-30 if round_ < 3 else 0.0))
        if round_ == 1:
            _evaluated(run, 0.7)
    assert run.machine.phase is Phase.PAUSED
    assert "every projected gradient since round 3 is exactly 0" in run.machine.reason
    assert "a learning rate that is too large has ruined the weights" in run.machine.reason
    assert "best evaluation is that of round 1, with loss 0.7" in run.machine.reason
    run.restart()
    run.keep(run.machine.resume(1.0))
    run.ready("a", "b")
    run.answer("a", grads=(0.0, 0.0))
    run.answer("b", grads=(0.0, 0.0))
    assert not run.machine.reason, "what was before the resumption counts no more"


def test_scores_that_count_may_be_equal_for_long() -> None:
    task = TaskConfig(verbalizers={"no": "no", "yes": "yes"}, objective="a:b")
    run = RoundsDriver(rounds=1000, task=task)
    run.ready("a")
    for _ in range(499):
        run.answer("a", grads=(0.0, 0.0))
        assert run.machine.phase is Phase.OPEN
    run.answer("a", grads=(0.0, 0.0))
    assert run.machine.phase is Phase.PAUSED
    assert "since round 1 has changed the objective's score" in run.machine.reason
    assert "begin again with a score of finer steps, a larger eps" in run.machine.reason


def _phase_after(losses: list[float], *, heldout: bool = False, every: int = 1) -> Phase:
    """The phase after rounds whose training losses, or the evaluations after them, are these."""
    run = RoundsDriver(rounds=1000, report_losses=not heldout, pause_loss_factor=100.0)
    run.ready("a")
    for loss in losses:
        for _ in range(every):
            if run.machine.phase is Phase.OPEN:
                run.answer("a", loss=None if heldout else loss)
        if heldout and run.machine.phase is Phase.OPEN:
            _evaluated(run, loss)
    return run.machine.phase


GUESS = 0.6932
"""No better than a guess between two classes."""


@pytest.mark.parametrize(
    ("losses", "phase"),
    [
        ([0.9, *[0.4] * 10, *[GUESS] * 10], Phase.PAUSED),
        ([0.9, *[0.4] * 10, *[1.2] * 10], Phase.PAUSED),
        ([0.9, *[0.4] * 10, *[GUESS] * 9], Phase.OPEN),
        ([0.9, *[0.4] * 10, *[0.8, 0.8, 0.8, 0.8, 0.6] * 20], Phase.OPEN),
        ([*[0.9, 0.4, 0.3] * 5, *[GUESS] * 100], Phase.OPEN),  # was never better for sure
        ([0.9] * 100, Phase.OPEN),
    ],
    ids=["guesses", "worse", "not long", "noisy", "never better", "not yet better"],
)
def test_a_training_loss_that_falls_back_to_chance_pauses_the_run(
    losses: list[float], phase: Phase
) -> None:
    assert _phase_after(losses) is phase


@pytest.mark.parametrize(
    ("losses", "phase"),
    [
        ([0.9, 0.5, GUESS, GUESS, GUESS], Phase.PAUSED),
        ([0.9, 0.5, GUESS, GUESS], Phase.OPEN),
        ([0.9, 0.6, GUESS, GUESS, GUESS, GUESS], Phase.OPEN),
        ([0.9, 0.5, 0.75, GUESS, 0.65, 0.72], Phase.OPEN),
    ],
    ids=["guesses", "not long", "never clearly better", "noisy"],
)
def test_evaluations_that_fall_back_to_chance_pause_the_run(
    losses: list[float], phase: Phase
) -> None:
    assert _phase_after(losses, heldout=True, every=5) is phase


@pytest.mark.parametrize(
    ("losses", "every", "phase"),
    [
        ([0.6, 0.4, 0.51, 0.52, 0.53], 5, Phase.PAUSED),
        ([0.6, 0.4, 0.49, 0.52, 0.53], 5, Phase.OPEN),
        ([0.6, 0.4, 0.52, 0.53, 0.52, 0.53, 0.52, 0.53], 5, Phase.OPEN),
        ([0.4, 0.41, 0.42, 0.43, 0.439], 5, Phase.OPEN),
        ([0.4, 0.45, 0.5, 0.55], 5, Phase.PAUSED),
        ([0.4, 0.45, 0.5, 0.55, 0.56, 0.57], 1, Phase.OPEN),
        ([0.4, *[0.45 + k / 100 for k in range(10)]], 1, Phase.PAUSED),
    ],
    ids=["worse", "not yet half", "noisy", "a little", "never better", "few rounds", "ten rounds"],
)
def test_evaluations_that_only_get_worse_pause_the_run(
    losses: list[float], every: int, phase: Phase
) -> None:
    assert _phase_after(losses, heldout=True, every=every) is phase


def test_no_rounds_switch_every_pause_off() -> None:
    run = RoundsDriver(rounds=100, pause_rounds=0)
    run.ready("a")
    _evaluated(run, 0.3)
    for _ in range(30):
        run.answer("a", grads=(0.0, 0.0))
        _evaluated(run, 1.0 + run.machine.round)
    assert run.machine.phase is Phase.OPEN


def test_a_run_in_which_nobody_can_measure_pauses() -> None:
    run = RoundsDriver(workers_min=2, quorum=2, deadline_ms=1000)
    run.ready("a", "b")
    for now_ms in (1000, 2000):
        run.unable("a", reason="the loss is nan")
        run.unable("b", reason="the loss is nan")
        assert run.machine.phase is Phase.OPEN
        run.tick(now_ms)
    assert run.machine.phase is Phase.PAUSED
    assert "no worker could measure round 1 in 2 attempts; b says: the loss is nan" in (
        run.machine.reason
    )
    run.restart()
    run.keep(run.machine.resume(1.0))
    assert len([m for m in run.ready("a").messages if isinstance(m, Assign)]) == 1


def test_a_worker_that_misses_the_deadline_is_named_and_the_round_goes_on() -> None:
    run = RoundsDriver(workers_min=2, quorum=1, deadline_ms=1000)
    run.ready("a", "b")
    run.answer("a")
    ready = run.tick(1000)
    assert any(isinstance(record, Committed) for record in ready.records)
    assert run.machine.roster.workers["b"].complaint == "did not answer round 1 within 1000 ms"
    assert run.machine.roster.workers["a"].complaint == ""


def test_a_run_that_gets_no_better_ends() -> None:
    run = RoundsDriver(rounds=20, early_stop_evaluations=2)
    run.ready("a")
    for loss in (0.9, 0.7, 0.8):
        assert not any(isinstance(r, Stopped) for r in _evaluated(run, loss).records)
        run.answer("a")
    ready = _evaluated(run, 0.7)
    assert isinstance(ready.records[-1], Stopped)
    assert ready.messages == (Finish("a", 3),)
    assert run.machine.phase is Phase.FINISHED
    assert "no held-out loss of the last 2 evaluations was below 0.7, that of round 1" in (
        run.machine.reason
    )
    run.restart()
    assert run.machine.phase is Phase.FINISHED
    assert run.ready("late").messages == (Finish("late", 3),)


def test_an_old_evaluation_that_comes_late_says_nothing_new() -> None:
    run = RoundsDriver(rounds=20, early_stop_evaluations=1)
    run.ready("a")
    run.answer("a")
    _evaluated(run, 0.5)
    record = Evaluated(0, 0.9, 0.5, 10, bytes(32))
    assert run.step(ReplicaEvaluated(record)).records == (record,)
    assert run.machine.state.health.best == run.machine.state.evaluations[0]
    record = Evaluated(0, 0.4, 0.5, 10, bytes(32))
    run.step(ReplicaEvaluated(record))
    assert run.machine.state.health.best == record, "but it may be the best"


@pytest.mark.parametrize("record", [Paused(1, "x"), Resumed(1.0), Stopped(3, "x")], ids=str)
def test_a_misplaced_record_is_corruption(record: Paused | Resumed | Stopped) -> None:
    run = RoundsDriver()
    state: RunState = run.folded()
    with pytest.raises(JournalCorruptError):
        state.apply(record)
    assert decode_record(encode_record(record)) == record


def test_answers_are_weighted_by_rows() -> None:
    run = RoundsDriver(workers_min=2, weighting="rows")
    run.ready("a", "b")
    run.answer("a", grads=(1.0, 1.0), rows=30)
    ready = run.answer("b", grads=(1.0, 1.0), rows=10)
    [commit] = [record for record in ready.records if isinstance(record, Committed)]
    assert [r.coefficients[0] for r in commit.seed_ranges] == [-0.375, -0.125]


@pytest.mark.parametrize(
    ("weighting", "rows", "reason"),
    [("rows", None, "ProtocolError"), ("uniform", 5, "ProtocolError"), ("rows", 0, "ScalarError")],
)
def test_a_count_of_rows_that_does_not_fit_is_refused(
    weighting: str, rows: int | None, reason: str
) -> None:
    run = RoundsDriver(weighting=weighting)
    run.ready("a")
    [refused] = run.answer("a", rows=rows).messages
    assert refused.reason == reason  # type: ignore[union-attr]
