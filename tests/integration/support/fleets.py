"""A coordinator that knows its members, in this process, and members of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmezo_coordinator.admission.fleet import WIRE_ROLES
from fedmezo_coordinator.admission.state_folder import make_state
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving.hosting import fronted
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Genesis
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.identity import Identity
from fedmezo_core.trust.join_string import parse_join_string
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.enrolment import identity_in, join_fleet
from fedmezo_proto.v1 import admin_pb2 as admin
from tests.integration.support.harness import ScriptedWorker


@dataclass
class ServedFleet:
    """A coordinator with members, on real ports."""

    folder: Path
    address: str
    daemon: Daemon
    genesis: Genesis

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def operator(self) -> Identity:
        return identity_in(self.state)

    def client(self, identity: Identity) -> CoordinatorClient:
        """A client that shows an identity."""
        return CoordinatorClient(self.address, identity=identity)

    async def join_string(
        self, name: str = "", role: Role = Role.WORKER, uses: int = 1, life_s: int = 600
    ) -> str:
        """A join string that the operator made."""
        request = admin.CreateTokensRequest(
            names=[name] if name else [], role=WIRE_ROLES[role], uses=uses, life_s=life_s
        )
        async with self.client(self.operator) as client:
            [token] = (await client.create_tokens(request)).tokens
        return token.join_string

    async def member(self, name: str, role: Role = Role.WORKER) -> Identity:
        """A member that has just joined."""
        return await self.joined(await self.join_string(name, role), name)

    async def joined(self, join: str, folder: str, name: str = "") -> Identity:
        """Join with a string, with the keys of a folder."""
        return await join_fleet(parse_join_string(join), self.folder / folder, name)

    @asynccontextmanager
    async def worker(self, identity: Identity, name: str = "") -> AsyncIterator[ScriptedWorker]:
        """A worker that the test scripts, which shows an identity."""
        async with self.client(identity) as client:
            description = await client.get_run()
            signer = AnswerSigner(identity.keys.signing_key, description.head)
            yield ScriptedWorker(
                client, self.genesis, name or identity.name, description.head, signer=signer
            )


@asynccontextmanager
async def served_fleet(
    folder: Path, genesis: Genesis, **changes: Any
) -> AsyncIterator[ServedFleet]:
    """Serve a run to members alone; its state folder is made in `folder` if it is not there."""
    make_state(folder / "state", [], None)
    values = {"listen": "127.0.0.1:0", "state": folder / "state"}
    settings = CoordinatorSettings.model_validate(values | changes)
    journal = Journal(SqliteStore(folder / "journal.db"))
    if journal.is_empty:
        journal.append(encode_records([genesis]))
    daemon = Daemon(journal)
    private = f"unix:{folder}/replica.sock"
    async with fronted(settings, "coordinator", private) as front:
        await daemon.load()
        front.servicer.begin(Runs.of(daemon))
        serving = asyncio.create_task(daemon.serve())
        try:
            yield ServedFleet(folder, f"127.0.0.1:{front.port}", daemon, genesis)
        finally:
            daemon.end_sessions()
            await front.server.stop(0.5)
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await daemon.close()
