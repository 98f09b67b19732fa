"""The table of rights has a row for every RPC and for nothing else."""

from __future__ import annotations

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from fedmezo_core.errors import ForbiddenError
from fedmezo_core.trust.authorisation import MEMBER_ROLES, RIGHTS, Caller, Role, check_allowed
from fedmezo_proto.v1 import admin_pb2, coordinator_pb2, runs_pb2

FILES = [
    module.DESCRIPTOR
    for module in (coordinator_pb2, admin_pb2, runs_pb2, health_pb2, reflection_pb2)
]
UNSERVED = {"/grpc.health.v1.Health/List"}
"""In newer versions of the file; it would tell anyone which services there are."""


def test_every_rpc_has_a_row_and_every_row_an_rpc() -> None:
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in FILES
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert methods - UNSERVED == set(RIGHTS)


def test_a_method_without_a_row_may_be_called_by_nobody() -> None:
    for role in Role:
        with pytest.raises(ForbiddenError):
            check_allowed("/fedmezo.v1.CoordinatorService/New", Caller(role))


def test_only_operators_decide_who_is_a_member() -> None:
    """In a fleet; whoever can reach a coordinator without identities may exclude a worker."""
    for method, roles in RIGHTS.items():
        if "/fedmezo.v1.AdminService/" in method:
            is_about_a_run = method.endswith(("/ExcludeWorker", "/ReadmitWorker"))
            assert roles - ({Role.ANYONE} if is_about_a_run else set()) == {Role.OPERATOR}


def test_a_refusal_names_the_caller_and_who_may() -> None:
    with pytest.raises(ForbiddenError, match="observer o1 may not call Session, which is for work"):
        check_allowed("/fedmezo.v1.CoordinatorService/Session", Caller(Role.OBSERVER, "o1"))
    assert Role.ANYONE not in MEMBER_ROLES
