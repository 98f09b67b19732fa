"""Starts, restarts and stops the replica's process, which cannot stop the protocol.

The daemon never imports torch. Everything that needs weights runs in a child process,
`fedmezo_coordinator.replica.replica`, so that the daemon survives if that runs out of memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import sys
from asyncio.subprocess import PIPE, Process
from typing import Any

from fedmezo.presets import measured_sentence, unmeasured_rate, with_measured
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.serving.status_report import ReplicaView
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ModelError
from fedmezo_core.journal.codec import config_to_pb
from fedmezo_core.program import LongStep
from fedmezo_core.records import Genesis
from fedmezo_core.wire.backoff import delay_s
from fedmezo_core.wire.grpc_status import BY_REASON

log = logging.getLogger("fedmezo.coordinator")

RETRY = 1
"""Exit status of a replica that a restart may help: it did not reach the daemon."""
USER_ERROR = 2
"""Exit status of a replica that a restart cannot help."""
ANSWER_BYTES_MAX = 1 << 24
"""Longest line of the child that describes a base: a run may train many modules by name."""
STOP_TIMEOUT_S = 2.0
"""Time that a replica gets to end before it is killed; less than `STOP_WITHIN_S` of the daemon."""
_MODULE = "fedmezo_coordinator.replica.replica"


def _orders(settings: CoordinatorSettings, **more: Any) -> bytes:
    """The line of JSON that the child reads from its standard input."""
    orders = {
        "model": settings.model,
        "adapter": None if settings.begins_from is None else str(settings.begins_from),
        "heldout": None if settings.heldout is None else str(settings.heldout),
        "evaluate_every_rounds": settings.evaluate_every_rounds,
        "evaluate_batch_size": settings.evaluate_batch_size,
        "threads": settings.replica_threads,
        "row_states_max": settings.replica_row_states_max,
        "snapshot_every_rounds": settings.snapshot_every_rounds,
        "snapshots": str(settings.snapshots_folder),
        **more,
    }
    return json.dumps(orders).encode() + b"\n"


async def describe_base(
    settings: CoordinatorSettings, config: RunConfig, step: LongStep | None = None
) -> Genesis:
    """The genesis of a new run, from a child process that loads the base model.

    `step` becomes whatever the child does, such as fitting the adapter.

    The child also fits the adapter if there are `adapter_rows`, checks the held-out rows, and
    measures the rate and eps that `settings.run` leaves open if there are `rate_rows`. Raises the
    `FedMezoError` that the child ended with, and `ConfigError` at once if a file is not there.
    """
    orders = _orders(
        settings,
        model=settings.base_model,
        config=config_to_pb(config).SerializeToString().hex(),
        rate_rows=[str(rows) for rows in settings.rate_rows],
        must_measure=settings.probe_rows is not None,
        adapter_rows=None if settings.adapter_rows is None else str(settings.adapter_rows),
    )
    settings.check_files_are_there()  # Before the child loads a model, which can take minutes.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", _MODULE, "describe"),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        limit=ANSWER_BYTES_MAX,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        # The child's input stays open, because the child ends when its input does.
        with contextlib.suppress(ConnectionError):
            process.stdin.write(orders)
            await process.stdin.drain()
        told, err = await asyncio.gather(_told(process.stdout, step), process.stderr.read())
        await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    if process.returncode != 0:
        raise _reported(err)
    answer = json.loads(told)
    for warning in answer["warnings"]:
        log.warning("%s", warning)
    found = answer["measured"]
    if found["values"]:
        before, config = config, with_measured(config, found["values"], settings.run)
        log.info("measured on %s: %s", found["rows"], measured_sentence(before, config))
    elif found["why_not"]:
        log.warning("%s", unmeasured_rate(config, found["why_not"]))
    if config.lora is not None:
        named = {"target_modules": tuple(answer["target_modules"])}
        config = config.model_copy(update={"lora": config.lora.model_copy(update=named)})
    return Genesis(
        config=config,
        manifest_digest=bytes.fromhex(answer["manifest_digest"]),
        base_digest=bytes.fromhex(answer["base_digest"]),
        tokenizer_digest=bytes.fromhex(answer["tokenizer_digest"]),
        trainable_elements=answer["trainable_elements"],
        trainable_bytes=answer["trainable_bytes"],
        tokenizer_parts=tuple(map(bytes.fromhex, answer["tokenizer_parts"])),
    )


async def _told(lines: asyncio.StreamReader, step: LongStep | None) -> bytes:
    """What a child that describes a base says last; what it says of its steps becomes `step`."""
    last = b""
    async for line in lines:
        if not line.startswith(b'{"step": '):
            last = line
        elif step is not None:
            step.become(**json.loads(line)["step"])
    return last


def _reported(err: bytes) -> Exception:
    """The error that the child ended with; its last line is `<class>: <sentence>`."""
    lines = err.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    kind, _, sentence = lines[-1].partition(": ")
    if kind in BY_REASON and sentence:
        return BY_REASON[kind](sentence)
    return ModelError(
        f"The process that loads the model failed ({lines[-1]}); it may have run out of memory."
    )


class ReplicaSupervisor:
    """Keeps one replica process running for a daemon."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        address: str,
        run_id: str,
        secret: bytes,
        view: ReplicaView,
    ) -> None:
        """The child connects to `address` and proves with `secret` that it was started here.

        `view` is kept true while it runs.
        """
        self._view = view
        self._has_heldout = settings.heldout is not None
        self._orders = _orders(settings, address=address, run_id=run_id, secret=secret.hex())

    async def keep(self) -> None:
        """Run until cancelled; start a replica that fails again, unless that cannot help."""
        attempt = 0
        self._view.evaluates = self._has_heldout
        while True:
            status, last_line = await self._run_once()
            if status == 0:
                self._view.evaluates = False
                return
            if status == USER_ERROR:
                self._view.evaluates = False
                self._view.complaint = f"the replica stopped: {last_line}"
                log.error("the replica stopped: %s", last_line)
                log.error("the run continues without the coordinator's digests and evaluations")
                return
            wait_s = delay_s(attempt, random.random(), base_s=2.0, cap_s=60.0)
            attempt += 1
            self._view.complaint = f"the replica ended ({last_line}) and is started again"
            log.error("the replica ended (%s); starting it again in %.0f s", last_line, wait_s)
            await asyncio.sleep(wait_s)

    async def _run_once(self) -> tuple[int, str]:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", _MODULE, "follow", stdin=PIPE, stderr=PIPE
            )
        except OSError as error:  # For example too little memory, or too many open files.
            return RETRY, f"its process could not be started: {error}"
        assert process.stdin is not None
        assert process.stderr is not None
        last_line = "it said nothing"
        try:
            with contextlib.suppress(ConnectionError):
                process.stdin.write(self._orders)
                await process.stdin.drain()
            while True:
                try:
                    line = await process.stderr.readline()
                except ValueError:
                    continue  # The line was too long for the reader, which dropped it.
                if not line:
                    break
                last_line = line.decode(errors="replace").rstrip()
                log.debug("replica: %s", last_line)
            return await process.wait(), last_line
        finally:
            await self._stop(process)

    async def _stop(self, process: Process) -> None:
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
