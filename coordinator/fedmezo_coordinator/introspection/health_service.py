"""`grpc.health.v1`: whether the process, a service or a run is served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from grpc_health.v1 import health_pb2

from fedmezo_core.errors import WrongRunError

WATCH_EVERY_S = 1.0
"""Period in which a watcher's service is looked at."""

SERVICE_FILE = health_pb2.DESCRIPTOR
"""The file that describes the service `Health`."""

_STATUSES = {
    True: health_pb2.HealthCheckResponse.SERVING,
    False: health_pb2.HealthCheckResponse.NOT_SERVING,
    None: health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
}


class Health:
    """Answers `grpc.health.v1.Health`."""

    def __init__(self, is_served: Callable[[str], bool | None]) -> None:
        """`is_served` says whether what a name means is served; None: nothing has that name.

        An empty name is the process.
        """
        self._is_served = is_served

    def check(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        """The status of what `request` names; raises `WrongRunError` if there is no such thing."""
        served = self._is_served(request.service)
        if served is None:
            raise WrongRunError(
                f"No service and no run here is named {request.service[:64]!r}; name none for the "
                "whole process, a service such as fedmezo.v1.CoordinatorService, or a run."
            )
        return health_pb2.HealthCheckResponse(status=_STATUSES[served])

    async def watch(
        self, request: health_pb2.HealthCheckRequest
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now, and each later one within `WATCH_EVERY_S` of its change."""
        last = None
        while True:
            status = _STATUSES[self._is_served(request.service)]
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
            last = status
            await asyncio.sleep(WATCH_EVERY_S)
