"""`grpc.reflection.v1alpha`: describes the services to tools such as grpcurl."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from grpc_reflection.v1alpha import reflection, reflection_pb2

SERVICE_FILE = reflection_pb2.DESCRIPTOR
"""The file that describes the service `ServerReflection`."""


class Reflection:
    """Answers `grpc.reflection.v1alpha.ServerReflection`."""

    def __init__(self, services: Sequence[str]) -> None:
        """`services` are the full names of what is served."""
        self._servicer = reflection.aio.ReflectionServicer(services)

    async def answers(self, serialized: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The answers to requests, in their order; raises `DecodeError` for other bytes."""

        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            async for one in serialized:
                yield reflection_pb2.ServerReflectionRequest.FromString(one)

        async for answer in self._servicer.ServerReflectionInfo(requests(), None):
            yield answer.SerializeToString()
