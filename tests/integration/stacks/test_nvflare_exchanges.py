"""Tasks and replies that are lost, repeated, late or mixed up, without NVFlare."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from fedmezo import Coordinator, encode_genesis
from fedmezo_core.errors import ConfigError, ModelError
from fedmezo_core.records import Genesis
from fedmezo_nvflare import ScalarPrivacy
from fedmezo_nvflare.site import Site
from fedmezo_nvflare.site_exchanges import DOWN, GENESIS, LEFT, UP, SiteExchanges, worker_name
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.nvflare_sites import GENESIS as RUN_GENESIS
from tests.integration.support.nvflare_sites import ROUNDS, SITES, InProcess, new_site

Reply = dict[str, Any]


def run(
    disturb: Callable[[random.Random, dict[str, Site], list[Any]], None] = lambda *_: None,
    seed: int = 0,
    privacy: ScalarPrivacy | None = None,
) -> Coordinator:
    """A whole run; `disturb` may do what it likes to the sites and to what is under way."""
    numbers = random.Random(seed)
    coordinator = Coordinator(RUN_GENESIS)
    exchanges = SiteExchanges(coordinator, again_after_s=1, resend_after_s=5)
    sites = {name: new_site(name) for name in SITES}
    under_way: list[tuple[str, str, int, Reply]] = []  # task or reply, site, its task, content
    for now_s in range(2000):
        coordinator.tick(now_s * 1000)
        for name in SITES:
            task = exchanges.task(name, now_s)
            if task is not None:
                exchanges.sent(name, now_s, now_s)
                under_way.append(("task", name, now_s, task))
        disturb(numbers, sites, under_way)
        arrived, under_way = under_way, []
        for kind, name, number, content in arrived:
            if kind == "reply":
                exchanges.reply(name, number, content, now_s)
                continue
            reply = sites[name].reply(content)
            filtered = privacy.filtered(reply) if privacy else reply
            under_way.append(("reply", name, number, filtered))
        if coordinator.done and coordinator.digests:
            return coordinator
    raise AssertionError(f"the run is {coordinator.phase} at round {coordinator.round}")


def lose(numbers: random.Random, _sites: dict[str, Site], under_way: list[Any]) -> None:
    under_way[:] = [item for item in under_way if numbers.random() > 0.3]


def repeat(numbers: random.Random, _sites: dict[str, Site], under_way: list[Any]) -> None:
    under_way += [item for item in under_way if numbers.random() < 0.5]


def mix_up(numbers: random.Random, _sites: dict[str, Site], under_way: list[Any]) -> None:
    late.extend(item for item in under_way if numbers.random() < 0.3)
    numbers.shuffle(late)
    while len(late) > 3:
        under_way.append(late.pop())
    numbers.shuffle(under_way)


late: list[Any] = []


def restart(numbers: random.Random, sites: dict[str, Site], _under_way: list[Any]) -> None:
    if numbers.random() < 0.2:
        sites["site_2"] = new_site("site_2")


def everything(numbers: random.Random, sites: dict[str, Site], under_way: list[Any]) -> None:
    for disturb in (lose, repeat, mix_up, restart):
        disturb(numbers, sites, under_way)


@pytest.fixture(scope="module")
def undisturbed() -> Coordinator:
    return run()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("disturb", [lose, repeat, mix_up, restart, everything])
def test_disturbances_change_nothing(
    disturb: Callable[..., None], seed: int, undisturbed: Coordinator
) -> None:
    late.clear()
    coordinator = run(disturb, seed)
    assert coordinator.round == ROUNDS
    assert coordinator.head == undisturbed.head
    assert set(coordinator.digests.values()) <= set(undisturbed.digests.values())
    assert len(set(undisturbed.digests.values())) == 1


@pytest.mark.parametrize("disturb", [restart, everything])
def test_filtered_answers_are_valid_and_stay_the_same(
    disturb: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    late.clear()
    coordinator = run(disturb, privacy=ScalarPrivacy(clip=0.25, noise_multiplier=80.0))
    assert coordinator.round == ROUNDS
    assert len(set(coordinator.digests.values())) == 1
    assert "second, different answer" not in caplog.text


def exchanges_of(coordinator: Coordinator) -> SiteExchanges:
    """Exchanges in which no time passes."""
    return SiteExchanges(coordinator, again_after_s=0)


def task_of(exchanges: SiteExchanges, site: str = "site-1") -> dict[str, bytes]:
    """The site's task, which there must be."""
    task = exchanges.task(site, 0)
    assert task is not None
    return task


def test_a_script_that_was_started_again_is_told_the_run() -> None:
    coordinator = Coordinator(RUN_GENESIS)
    exchanges, site = exchanges_of(coordinator), new_site("site-1")
    assert set(task_of(exchanges)) == {GENESIS, DOWN}
    exchanges.reply("site-1", None, site.reply(task_of(exchanges)), 0)
    assert exchanges.task("site-1", 0) is None
    reply = new_site("site-1").reply({DOWN: coordinator.down_for("site-1")})
    assert reply == {UP: b""}
    exchanges.reply("site-1", None, reply, 0)
    assert set(task_of(exchanges)) == {GENESIS, DOWN}


@pytest.mark.parametrize("reply", [{}, {UP: "text"}, {UP: b"\xff"}, {UP: 7}])
def test_replies_of_no_use_do_no_harm(reply: Reply) -> None:
    coordinator = Coordinator(RUN_GENESIS)
    exchanges, site = exchanges_of(coordinator), new_site("site-1")
    exchanges.reply("site-1", None, site.reply(task_of(exchanges)), 0)
    exchanges.reply("site-1", None, reply, 0)
    exchanges.reply("site-1", None, site.reply(task_of(exchanges)), 0)
    assert coordinator.workers == {"site-1"}


def test_a_site_that_is_ahead_of_the_journal_is_refused_alone() -> None:
    exchanges = exchanges_of(Coordinator(RUN_GENESIS))
    up = new_site("site-1").reply(task_of(exchanges))[UP]
    request = wire.PollSessionRequest.FromString(up)
    request.messages[0].hello.round = 99
    exchanges.reply("site-1", None, {UP: request.SerializeToString()}, 0)
    (ended,) = wire.PollSessionResponse.FromString(task_of(exchanges)[DOWN]).messages
    assert ended.ended.reason == "JournalBehindError"


def test_a_site_cannot_speak_for_another() -> None:
    coordinator = Coordinator(RUN_GENESIS)
    exchanges = exchanges_of(coordinator)
    stranger = Site(lambda genesis: InProcess(genesis, "site-1"))
    exchanges.reply("site_2", None, stranger.reply(task_of(exchanges, "site_2")), 0)
    assert coordinator.workers == set()


def test_a_site_with_another_base_leaves() -> None:
    other = Genesis(RUN_GENESIS.config, b"m" * 32, b"x" * 32, b"t" * 32, 8, 32)
    exchanges = exchanges_of(Coordinator(RUN_GENESIS))
    site = Site(lambda _: InProcess(encode_genesis(other), "site-1"))
    exchanges.reply("site-1", None, site.reply(task_of(exchanges)), 0)
    reply = site.reply(task_of(exchanges))
    assert reply == {LEFT: True}
    assert ScalarPrivacy(1.0).filtered(reply) == reply


def test_an_error_at_a_site_is_told_in_its_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: bytes) -> InProcess:
        raise ModelError("the model cannot be read.")

    task = task_of(exchanges_of(Coordinator(RUN_GENESIS)))
    assert Site(fail).reply(task) == {LEFT: True}
    assert "this site leaves the job: the model cannot be read." in caplog.text


def test_two_sites_of_one_name_are_refused() -> None:
    exchanges = exchanges_of(Coordinator(RUN_GENESIS))
    exchanges.see(["site-1"])
    with pytest.raises(ConfigError, match="sites site-1 and site_1 are both called site-1"):
        exchanges.see(["site-1", "site_1"])


@pytest.mark.parametrize(
    ("site", "worker"),
    [
        ("site-1", "site-1"),
        ("Hospital_A", "hospital-a"),
        ("_x", "x"),
        ("___", "site"),
        ("x" * 90, "x" * 64),
    ],
)
def test_names_of_sites(site: str, worker: str) -> None:
    assert worker_name(site) == worker


def test_what_goes_up_holds_nothing_else() -> None:
    exchanges, site = exchanges_of(Coordinator(RUN_GENESIS)), new_site("site-1")
    up = site.reply(task_of(exchanges))[UP]
    (hello,) = wire.PollSessionRequest.FromString(up).messages
    assert hello.WhichOneof("kind") == "hello"
