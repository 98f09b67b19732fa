"""Runs of the process as the page sees them: live, after a restart, failed, deleted, private."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmezo_coordinator.runs.hosted_run import HostedRun
from fedmezo_coordinator.web.page_access import PageAccess
from fedmezo_coordinator.web.run_json import CurvesSent, run_events, run_head, workers_page
from fedmezo_coordinator.web.run_json import WorkersQuery as Query
from fedmezo_coordinator.web.runs_in_view import RunInView, RunsInView, served_runs
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.wire.client import CoordinatorClient
from tests.integration.support.harness import (
    Served,
    config_of,
    genesis_of,
    scripted_workers,
    served,
)

RUN = {
    "rounds": 3, "local_steps": 1, "workers_min": 2, "quorum": 2, "report_losses": True,
    "digest_every_rounds": 100,
}  # fmt: skip
OBSERVER = Caller(Role.OBSERVER)


def seen(at: Served, caller: Caller = OBSERVER) -> RunInView:
    hosted = HostedRun("tiny-run", loop=at.daemon)
    [view] = RunsInView(served_runs(lambda: [hosted], caller, with_declines=True)).all()
    return view


async def commit_rounds(at: Served, count: int, genesis_readers: str = "everyone") -> None:
    """Two workers answer `count` rounds, with losses that fall."""
    genesis = genesis_of(config_of(**RUN, journal_readers=genesis_readers))
    async with scripted_workers(at.address, genesis, "w1", "w2") as workers:
        for worker in workers:
            await worker.open()
        for number in range(count):
            for worker in workers:
                assign = await worker.assigned()
                await worker.answer(assign, mean_loss=1.0 - 0.25 * number)
            for worker in workers:
                await worker.next("commit")


async def test_the_curves_are_the_same_live_and_after_a_restart(tmp_path: Path) -> None:
    genesis = genesis_of(config_of(**RUN))
    async with served(tmp_path / "j.db", genesis) as at:
        view = seen(at)
        await view.follow()
        await commit_rounds(at, 2)
        await view.follow()
        live = CurvesSent().news(view.series)
        assert [point[1] for point in live["losses"]["points"]] == [1.0, 0.75]
        assert view.answers_live == 4
        assert at.daemon.append_times.total_s > 0
        head = run_head(view)
        assert head["loss"] == 0.75
        assert head["weights_bytes"] == 4 * genesis.trainable_bytes
        assert workers_page(view, Query())["found"] == 2
    async with served(tmp_path / "j.db") as at:
        view = seen(at)
        assert not view.is_caught_up
        await view.follow()
        assert view.is_caught_up
        assert CurvesSent().news(view.series) == live
        assert (view.answers_live, view.series.answers_total) == (0, 4)


async def test_refused_answers_are_counted_by_reason(tmp_path: Path) -> None:
    genesis = genesis_of(config_of(**RUN))
    async with (
        served(tmp_path / "j.db", genesis) as at,
        scripted_workers(at.address, genesis, "w1", "w2") as workers,
    ):
        for worker in workers:
            await worker.open()
        assign = await workers[0].assigned()
        assign.ticket.epoch += 7
        await workers[0].answer(assign, mean_loss=1.0)
        await workers[0].next("refused")
        assert seen(at).run.refused_answers == {"StaleTicketError": 1}


async def test_whoever_has_no_identity_sees_no_worker_of_a_private_run(tmp_path: Path) -> None:
    """As in the status: neither workers nor losses nor what happened to whom."""
    genesis = genesis_of(config_of(**RUN, journal_readers="observers"))
    async with served(tmp_path / "j.db", genesis) as at:
        await commit_rounds(at, 2, "observers")
        async with CoordinatorClient(at.address) as client:
            await client.exclude_worker("w1", "w1 is a liar")
        open_view, view = seen(at), seen(at, Caller.ANYONE)
        await open_view.follow()
        await view.follow()
        assert view.series.round == 2
        assert [point.mean for point in view.series.answers.points] == [2, 2]
        assert not view.series.losses.points
        assert workers_page(view, Query())["total"] == 0
        shown = str([run_head(view), run_events(view), [one.sentence for one in view.alarms()]])
        assert "liar" not in shown
        assert "w1" not in shown
        assert open_view.series.losses.points
        assert "liar" in str(run_events(open_view))


def test_a_run_that_failed_before_it_was_loaded_says_why() -> None:
    hosted = HostedRun("r", failure="w1 has sent what cannot be")
    [failed] = served_runs(lambda: [hosted], Caller.ANYONE, with_declines=True)()
    assert failed.phase_reason == hosted.failure
    assert failed.status() is None
    assert run_head(RunInView(failed))["phase"] == "failed"


async def test_runs_come_and_go(tmp_path: Path) -> None:
    hosted = [HostedRun("one"), HostedRun("two")]
    runs = RunsInView(served_runs(lambda: hosted, OBSERVER, with_declines=True))
    one, two = runs.all()
    assert runs.all() == [one, two]
    assert runs.find("two") is two
    hosted[0] = HostedRun("one")  # Deleted, and created anew under its name.
    assert runs.find("one") is not one
    assert runs.find("two") is two
    del hosted[1]
    assert runs.find("two") is None


@pytest.mark.parametrize("role", [Role.OBSERVER, Role.OPERATOR])
def test_who_may_open_the_page_may_see_everyone(role: Role) -> None:
    caller = Caller(role, "olga", b"key")
    access = PageAccess(lambda _: caller)
    assert access.check(access.enter(access.new_link(caller))) == caller
