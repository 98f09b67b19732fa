"""The ServerApp: FedMeZO's coordinator in Flower's server, or beside it."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.config import unflatten_dict
from flwr.serverapp import Grid, ServerApp

import fedmezo
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, FedMezoError
from fedmezo_core.program import worker_packages
from fedmezo_flower.client_app import RECORD
from fedmezo_flower.grid_loop import NODES_EVERY_S, POLL_S, GridLoop

log = logging.getLogger("flwr")

BESIDE_TTL_S: Final = 30 * 24 * 3600.0
"""Longest time that a run beside Flower takes: until then a node may reply that it is over."""
LISTS: Final = frozenset({"train", "target_modules"})
"""Keys of a contract whose values are lists, which Flower's configuration cannot hold."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation over Flower's nodes, as the run's configuration says."""
    values: dict[str, Any] = unflatten_dict(dict(context.run_config))
    if values.get("coordinator"):
        gather(grid, values)
    else:
        federate(grid, values)


# ---------------------------------------------------------------- the run over Flower


def federate(grid: Grid, values: dict[str, Any]) -> None:
    """Drive the run of `values` to its end; an interrupted one goes on from its journal."""
    coordinator = open_coordinator(values)
    try:
        GridLoop(coordinator, grid).run()
        if coordinator.phase == "paused":
            raise FedMezoError(
                f"The run is paused after round {coordinator.round}: {coordinator.reason}; begin "
                "another run, under another journal and with other settings."
            )
        tell_result(coordinator)
    finally:
        coordinator.close()


def open_coordinator(values: dict[str, Any]) -> fedmezo.Coordinator:
    """The coordinator of the run in `values`, from its journal if that holds it already.

    Raises `ConfigError` for wrong values, and for a journal of another contract.
    """
    journal = str(values.get("journal") or "") or None
    contract = contract_of(values)
    try:
        coordinator = fedmezo.Coordinator(None, journal)
    except ConfigError:
        model = str(values.get("model") or contract.model)
        with worker_packages("begin a run"):
            genesis = fedmezo.begin_run(contract, model, threads=1)
        return fedmezo.Coordinator(genesis, journal)
    if coordinator.config != contract:
        coordinator.close()
        raise ConfigError(
            f"The journal {journal} holds run {coordinator.config.run_id} with another contract "
            "than [tool.flwr.app.config.run]; take the change back, or set another journal."
        )
    log.info("Run %s goes on after round %d", contract.run_id, coordinator.round)
    return coordinator


def contract_of(values: dict[str, Any]) -> RunConfig:
    """The contract under `run`; raises `ConfigError`, which names what is wrong."""
    run = values.get("run")
    if not isinstance(run, dict):
        raise ConfigError(
            "The app's configuration has no contract; write it below [tool.flwr.app.config.run] "
            "in pyproject.toml."
        )
    label = str(values.get("model") or "").rstrip("/").rpartition("/")[2]
    return fedmezo.parse_run({"model": label} | with_lists(run), "[tool.flwr.app.config.run]")


def with_lists(values: dict[str, Any]) -> dict[str, Any]:
    """The values with lists where a contract has lists; Flower writes one as words in a string."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found[key] = with_lists(value) if key != "verbalizers" else value
        else:
            found[key] = value.split() if key in LISTS and isinstance(value, str) else value
    return found


def tell_result(coordinator: fedmezo.Coordinator) -> None:
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


def gather(grid: Grid, values: dict[str, Any]) -> None:
    """Let every node's worker join the coordinator that `values` names; return when all are done.

    Nodes that come later join, too, as long as one of the others is at work.
    """
    record = ConfigRecord(
        {key: str(values.get(key) or "") for key in ("coordinator", "run_id", "checkpoint_key")}
    )
    waiting: dict[str, int] = {}
    told: set[int] = set()
    look_at_s = -NODES_EVERY_S
    complaints: list[str] = []
    while waiting or not told:
        if time.monotonic() >= look_at_s + NODES_EVERY_S:
            look_at_s = time.monotonic()
            new = sorted(set(grid.get_node_ids()) - told)
            told |= set(new)
            messages = [
                Message(
                    RecordDict({RECORD: record}),
                    dst_node_id=node_id,
                    message_type="train.fedmezo_beside",
                    ttl=BESIDE_TTL_S,
                )
                for node_id in new
            ]
            if messages:
                log.info("%d nodes join the coordinator at %s", len(new), record["coordinator"])
                waiting |= dict(zip(grid.push_messages(messages), new, strict=True))
        for reply in grid.pull_messages(list(waiting)) if waiting else ():
            node_id = waiting.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                complaints.append(f"Node {node_id}: {reply.error.reason}")
                log.warning("%s", complaints[-1])
            else:
                log.info("The worker of node %d is done", node_id)
        time.sleep(POLL_S)
    if len(complaints) == len(told):
        raise FedMezoError(f"No node's worker took part to the end. {complaints[0]}")
