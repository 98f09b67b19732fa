"""`fedmezo audit`: a worker's rows give its answers again, and nothing else does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmezo import Coordinator, Engine, Session, TorchEngine
from fedmezo.auditing import Repeated, audit_of, rounds_in
from fedmezo_core.errors import ConfigError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.journal.journal import Journal, MemoryStore
from fedmezo_core.records import Answered, Committed, Genesis, Scalars
from tests.integration.support.harness import environment

SMALL = {"rounds": 4, "local_steps": 2, "workers_min": 2, "quorum": 2, "learning_rate": 0.01}


class Liar:
    """An engine whose answers are its worker's with another sign, from round 3 on."""

    def __init__(self, honest: TorchEngine, round_: int = 3) -> None:
        self._honest = honest
        self._round = round_

    def apply(self, commits: Sequence[Committed]) -> None:
        self._honest.apply(commits)

    def measure(self, order: Measure) -> Measured:
        measured = self._honest.measure(order)
        if order.ticket.round < self._round:
            return measured
        lies = tuple(-value for value in measured.scalars.projected_grads)
        return Measured(measured.ticket, measured.scalars._replace(projected_grads=lies))

    def digest(self) -> bytes:
        return self._honest.digest()


@pytest.fixture
def engine_of(model_folder: Path, data_files: list[Path]) -> Callable[[Genesis, str], TorchEngine]:
    def engine(genesis: Genesis, name: str) -> TorchEngine:
        rows = data_files[0 if name == "a" else 1]
        return TorchEngine(genesis, name, model_folder, rows, threads=1, device="cpu")

    return engine


def run(store: MemoryStore | str, genesis: Genesis, engines: dict[str, Engine]) -> None:
    """A whole run of these engines by exchanges."""
    coordinator = Coordinator(genesis, store)
    sessions = {name: Session(genesis, name, engine) for name, engine in engines.items()}
    downs = dict.fromkeys(sessions, b"")
    while not coordinator.done:
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
    coordinator.close()


CONTRACTS: list[dict[str, Any]] = [
    {"report_losses": True, "personal_rate": "last_loss", "weighting": "rows"},
    {"seed_policy": "shared", "schedule": "linear", "eps_follows_rate": True},
    {"seed_policy": "pool", "pool_size": 64, "pool_sampling": "weighted", "rebase_every_rounds": 2},
    {"buffer_answers": 1, "quorum": 1, "estimator": "one_sided", "probes": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", CONTRACTS)
def test_an_honest_workers_answers_are_repeated_bit_for_bit(
    changes: dict[str, Any],
    tiny_genesis: Callable[..., Genesis],
    engine_of: Callable[[Genesis, str], TorchEngine],
) -> None:
    genesis = tiny_genesis(**{**SMALL, **changes})
    store = MemoryStore()
    run(store, genesis, {name: engine_of(genesis, name) for name in ("a", "b")})
    audit = audit_of(Journal(store), "a", None)
    repeated = list(audit.repeat(engine_of(genesis, "a")))
    assert [one.verdict(0.0) for one in repeated] == ["equal"] * len(repeated)
    assert {one.answer.round for one in repeated} >= {1, 3}
    by_other_rows = audit.repeat(engine_of(genesis, "b"))
    assert {one.verdict(0.1) for one in by_other_rows} == {"differs"}


@pytest.mark.slow
def test_the_command_names_the_rounds_in_which_a_worker_lied(
    tiny_genesis: Callable[..., Genesis],
    engine_of: Callable[[Genesis, str], TorchEngine],
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
) -> None:
    genesis = tiny_genesis(**SMALL)
    journal = tmp_path / "journal.db"
    engines: dict[str, Engine] = {
        "a": Liar(engine_of(genesis, "a")),
        "b": engine_of(genesis, "b"),
    }
    run(str(journal), genesis, engines)

    def audit(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(
                    sys.executable,
                    "-c",
                    "from fedmezo_coordinator.__main__ import fedmezo; fedmezo()",
                ),
                *("audit", "--journal", str(journal)),
                *("--model", str(model_folder), "--threads", "1", *arguments),
            ],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    said = audit("--worker", "a", "--data", str(data_files[0]), "--rounds", "2-3")
    assert said.returncode != 0
    second, third, total = said.stdout.splitlines()
    assert second.startswith("round 2, slot ")
    assert second.endswith("2 projected gradients, equal, bit for bit")
    assert "projected gradients, differs, 2 of their norm away" in third
    assert total == "a: 2 answers repeated: 1 differs, 1 equal"
    assert "Worker a sent other numbers than these rows give" in said.stderr
    assert "a worker with a privacy budget are noisy and always differ" in said.stderr
    said = audit("--worker", "b", "--data", str(data_files[1]), "--rounds", "1,3,700-702,800")
    assert said.stdout.splitlines()[-1] == "b: 2 answers repeated: 2 equal"
    assert "in these rounds of --rounds: 700-702, 800; leave them out" in said.stderr
    assert said.returncode == 2
    said = audit("--worker", "b", "--data", str(data_files[0]), "--rounds", "1,3")
    assert said.stdout.splitlines()[-1] == "b: 2 answers repeated: 2 differ"


def repeated(ours: tuple[float, ...], theirs: tuple[float, ...], **changes: Any) -> Repeated:
    answer = Answered(3, 1, Scalars(theirs, None, None, 10))
    return replace(Repeated(answer, ours, 10, None), **changes)


def test_verdicts() -> None:
    assert repeated((1.0, 2.0), (1.0, 2.0)).verdict(0.0) == "equal"
    assert repeated((3.0, 4.0), (3.0, 4.4)).verdict(0.1) == "close"
    assert repeated((3.0, 4.0), (3.0, 4.4)).verdict(0.05) == "differs"
    assert repeated((0.0,), (1e-9,)).verdict(0.1) == "differs"
    assert repeated((0.0,), (0.0,)).verdict(0.0) == "equal"
    more = repeated((1.0,), (1.0,), rows=9)
    assert more.verdict(0.1) == "differs"
    assert "it claims 10 rows, the data has 9" in more.line(0.1)
    elsewhere = repeated((1.0,), (1.0,), weights_digest64=7)
    assert elsewhere.verdict(0.1) == "differs"
    assert "on other weights than the run's" in elsewhere.line(0.1)


def test_what_cannot_be_audited_is_refused(tiny_genesis: Callable[..., Genesis]) -> None:
    journal = Journal(MemoryStore())
    with pytest.raises(ConfigError, match="holds no answers"):
        audit_of(journal, "a", None)
    assert rounds_in("") is None
    assert rounds_in("3, 7,11-13") == frozenset({3, 7, 11, 12, 13})
    for text in ("0", "x", "3-1", "1,,2", "-3", "1-9999999"):
        with pytest.raises(ConfigError, match="write rounds as in 3,7,11-13"):
            rounds_in(text)
