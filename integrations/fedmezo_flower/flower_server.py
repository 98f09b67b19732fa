"""The ServerApp: FedMeZO's coordinator in Flower's server, or beside it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from pydantic import AfterValidator, Field

from fedmezo import Coordinator, begin_run
from fedmezo.library_peers import PEER_LEASE_MS
from fedmezo.presets import parse_contract
from fedmezo.stack_settings import StackSettings, WholePath
from fedmezo_coordinator.coordinator_settings import check_same_run, model_label
from fedmezo_core.errors import ConfigError, FedMezoError
from fedmezo_core.layered_settings import CheckpointKey, check_address
from fedmezo_core.program import worker_packages
from fedmezo_flower.flower_client import RECORD
from fedmezo_flower.grid_loop import GridLoop, pushed, sentence_of

log = logging.getLogger("flwr")

LOOK_EVERY_S: Final = 1.0
"""Time between two looks for nodes and replies, beside Flower."""
BESIDE_TTL_S: Final = 30 * 24 * 3600.0
"""Longest time that a run beside Flower takes: until then a node may reply that it is over."""
APP: Final = "[tool.flwr.app.config]"
"""Where the app's settings stand."""
WHERE: Final = "[tool.flwr.app.config.run]"
"""Where a contract stands."""
LISTS: Final = frozenset({"train", "target_modules"})
"""Keys of a contract whose values are lists, which Flower's configuration cannot hold."""


class AppSettings(StackSettings):
    """The app's configuration."""

    model: str = ""
    adapter: str = ""
    rate_rows: WholePath = ""
    """Rows at the server, on which a contract without a rate is measured; empty: it is not."""
    coordinator: Annotated[str, AfterValidator(lambda given: given and check_address(given))] = ""
    """The coordinator that the nodes' workers connect to; empty: the run is over Flower."""
    checkpoint_key: CheckpointKey = ""
    run: dict[str, Any] = Field(default_factory=dict)
    """The contract."""

    @property
    def contract(self) -> dict[str, Any]:
        """The contract; raises `ConfigError` if there is none."""
        if not self.run:
            raise ConfigError(f"The app has no contract; write it below {WHERE} in pyproject.toml.")
        return self.run


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation over Flower's nodes, as the run's configuration says."""
    settings = AppSettings.of(nested(context.run_config), APP)
    if settings.coordinator:
        gather(grid, settings)
    else:
        federate(grid, settings)


# ---------------------------------------------------------------- the run over Flower


def federate(
    grid: Grid,
    settings: AppSettings,
    *,
    clock_s: Callable[[], float] = time.monotonic,
    sleep_s: Callable[[float], None] = time.sleep,
) -> None:
    """Drive the run of `settings` to its end; an interrupted one goes on from its journal.

    Tests give another clock. Raises `FedMezoError` if the run is paused or workers' weights differ.
    """
    coordinator = open_coordinator(settings)
    try:
        if settings.resume and coordinator.phase == "paused":
            coordinator.resume(settings.resume)
        GridLoop(coordinator, grid, clock_s=clock_s, sleep_s=sleep_s).run()
        if coordinator.phase == "paused":
            raise FedMezoError(
                f"The run is paused after round {coordinator.round}: {coordinator.reason}; to go "
                "on with it, run the app again with the same journal and resume = 0.5 or another "
                "factor on its learning rates."
            )
        tell_result(coordinator)
    finally:
        coordinator.close()


def open_coordinator(settings: AppSettings) -> Coordinator:
    """The coordinator of the run in `settings`, from its journal if that holds it already.

    Raises `ConfigError` for wrong values, and for a journal of another contract.
    """
    contract = with_lists(settings.contract)
    journal = settings.journal or None
    if journal is not None and Path(journal).exists():
        coordinator = Coordinator(None, journal, lease_ms=PEER_LEASE_MS)
        try:
            check_same_run(journal, coordinator.config, contract, WHERE)
        except ConfigError:
            coordinator.close()
            raise
        log.info("Run %s goes on after round %d", coordinator.config.run_id, coordinator.round)
        return coordinator
    contract = {"model": model_label(settings.model)} | contract
    parse_contract(contract, WHERE)  # Its sentences name the place; `begin_run` cannot.
    with worker_packages("begin a run"):
        genesis = begin_run(
            contract,
            settings.model,
            adapter=settings.adapter or None,
            rate_rows=settings.rate_rows or None,
        )
    return Coordinator(genesis, journal, lease_ms=PEER_LEASE_MS)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of tables, which Flower's configuration has as one table with dots in its keys."""
    found: dict[str, Any] = {}
    for path, value in flat.items():
        *tables, key = path.split(".")
        table = found
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    return found


def with_lists(values: dict[str, Any]) -> dict[str, Any]:
    """The values with lists where a contract has lists; Flower writes one as words in a string."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found[key] = with_lists(value) if key != "verbalizers" else value
        else:
            found[key] = value.split() if key in LISTS and isinstance(value, str) else value
    return found


def tell_result(coordinator: Coordinator) -> None:
    """Log how the run ended."""
    digests = coordinator.digests
    log.info(
        "Run %s is finished after round %d, head %s",
        coordinator.config.run_id,
        coordinator.round,
        coordinator.head.hex(),
    )
    for worker, digest in sorted(digests.items()):
        log.info("Worker %s has weights %s", worker, digest.hex())
    if len(set(digests.values())) > 1:
        raise FedMezoError("The workers' weights differ; restart those that differ from most.")


# ---------------------------------------------------------------- the run beside Flower


def gather(grid: Grid, settings: AppSettings) -> None:
    """Let every node's worker join the coordinator that is named; return when all are done.

    Nodes that come later join, too, as long as one of the others is at work. Raises `FedMezoError`
    if no worker took part to the end.
    """
    asked = {
        "coordinator": settings.coordinator,
        "run_id": str(settings.contract.get("run_id") or ""),
        "checkpoint_key": settings.checkpoint_key,
    }
    waiting: dict[str, int] = {}
    told: set[int] = set()
    complaints: dict[int, str] = {}
    while waiting or not told:
        new = sorted(set(grid.get_node_ids()) - told)
        if new:
            log.info("%d nodes join the coordinator at %s", len(new), asked["coordinator"])
            messages = [
                Message(
                    RecordDict({RECORD: ConfigRecord(dict(asked))}),
                    dst_node_id=node_id,
                    message_type="train.fedmezo_beside",
                    ttl=BESIDE_TTL_S,
                )
                for node_id in new
            ]
            ids = zip(pushed(grid, messages), new, strict=True)
            sent = {message_id: node_id for message_id, node_id in ids if message_id}
            told.update(sent.values())
            waiting.update(sent)
        for reply in grid.pull_messages(list(waiting)) if waiting else ():
            node_id = waiting.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                complaints[node_id] = sentence_of(reply.error)
                log.warning("Node %d: %s", node_id, complaints[node_id])
            else:
                log.info("The worker of node %d is done", node_id)
        time.sleep(LOOK_EVERY_S)
    if len(complaints) == len(told):
        raise FedMezoError(f"No worker took part to the end: {next(iter(complaints.values()))}")
