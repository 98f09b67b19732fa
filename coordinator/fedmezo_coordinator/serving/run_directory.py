"""What the services ask of whoever hosts the runs of a process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.message import Message

from fedmezo_coordinator.serving.loop import ServingLoop
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_core.trust.authorisation import Caller


@dataclass(frozen=True, slots=True)
class Call:
    """Who makes a call, and from where."""

    caller: Caller
    peer: str
    """Address of the call's other side, as gRPC writes it."""


class RunDirectory(Protocol):
    """The runs that a process hosts: one, or any number of them."""

    @property
    def session_limit(self) -> SessionLimit:
        """Limit on the sessions of all runs together."""

    def loop(self, run_id: str) -> ServingLoop[Any]:
        """The loop that serves a run; an empty id means the only run that is not over.

        Raises `WrongRunError` if there is no such run, `StartingError` if it is being created or
        loaded, and `UnavailableError` if it has failed.
        """

    def loops(self) -> Iterable[ServingLoop[Any]]:
        """The loops of all runs that are served now."""

    async def answer(self, method: str, request: Any, call: Call) -> Message | bytes:
        """The response of `RunService` to a call of `method`; raises a `FedMezoError`."""

    def read_file(self, request: Any) -> AsyncGenerator[Message, None]:
        """The pieces of a file that a run offers; raises a `FedMezoError`."""

    async def serve(self) -> None:
        """Serve the runs until cancelled; raises the error that ends the process."""

    def begin_stop(self) -> None:
        """Tell all workers that the coordinator is going away, and let the replicas end."""

    async def close(self) -> None:
        """Close all journals; nothing is served afterwards."""
