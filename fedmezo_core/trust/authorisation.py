"""Who may call what: the one table of rights.

Every RPC of every service has a row. A server looks a call up here before its handler sees it, and
the tests make a real call for each cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ForbiddenError


class Role(StrEnum):
    """What a caller is to the coordinator."""

    ANYONE = "anyone"
    """A caller without an identity: every caller of a coordinator without a state folder."""
    REPLICA = "replica"
    """The replica process that the coordinator started; it calls on a private socket."""
    WORKER = "worker"
    OBSERVER = "observer"
    """Reads the run: its status, its journal and its snapshots."""
    OPERATOR = "operator"
    """Reads what an observer reads, and decides who is a member."""


MEMBER_ROLES = frozenset({Role.WORKER, Role.OBSERVER, Role.OPERATOR})
"""Roles that a member can have."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call."""

    ANYONE: ClassVar[Caller]

    role: Role
    name: str = ""
    """The member's name; empty for anyone and for the replica."""
    fingerprint: bytes = b""
    """SHA-256 of the public key of the member's certificate; empty without one."""
    signing_key: bytes = b""
    """The member's Ed25519 public key, 32 bytes; empty if it has none."""

    def __str__(self) -> str:
        return f"{self.role} {self.name}" if self.name else f"{self.role}"


Caller.ANYONE = Caller(Role.ANYONE)

_READERS = frozenset({Role.ANYONE, Role.REPLICA, Role.WORKER, Role.OBSERVER, Role.OPERATOR})
_WORKERS = frozenset({Role.ANYONE, Role.WORKER})
_OPERATORS = frozenset({Role.OPERATOR})
_OBSERVERS = frozenset({Role.OBSERVER, Role.OPERATOR})
_SEE_EVERYONE = frozenset({Role.REPLICA, Role.OBSERVER, Role.OPERATOR})

RIGHTS: Mapping[str, frozenset[Role]] = MappingProxyType(
    {
        "/fedmezo.v1.CoordinatorService/GetRun": _READERS,
        "/fedmezo.v1.CoordinatorService/Session": _WORKERS,
        "/fedmezo.v1.CoordinatorService/PollSession": _WORKERS,
        "/fedmezo.v1.CoordinatorService/ReadJournal": _READERS,
        "/fedmezo.v1.CoordinatorService/GetStatus": _READERS,
        # Its own secret is checked besides.
        "/fedmezo.v1.CoordinatorService/ReportReplica": frozenset({Role.ANYONE, Role.REPLICA}),
        "/fedmezo.v1.CoordinatorService/ReadSnapshot": _READERS,
        # On a port of its own, where nobody has a certificate yet; the token is the right.
        "/fedmezo.v1.EnrollmentService/Enroll": frozenset({Role.ANYONE}),
        "/fedmezo.v1.MembershipService/Renew": MEMBER_ROLES,
        "/fedmezo.v1.AdminService/CreateTokens": _OPERATORS,
        "/fedmezo.v1.AdminService/ListMembers": _OPERATORS,
        "/fedmezo.v1.AdminService/RevokeMember": _OPERATORS,
        "/fedmezo.v1.AdminService/RotateMember": _OPERATORS,
        # Anyone only on the coordinator's own machine.
        "/fedmezo.v1.AdminService/ExcludeWorker": _OPERATORS | {Role.ANYONE},
        "/fedmezo.v1.AdminService/ReadmitWorker": _OPERATORS | {Role.ANYONE},
        "/fedmezo.v1.RunService/UploadFile": _OPERATORS | {Role.ANYONE},
        "/fedmezo.v1.RunService/CreateRun": _OPERATORS | {Role.ANYONE},
        "/fedmezo.v1.RunService/PauseRun": _OPERATORS | {Role.ANYONE},
        "/fedmezo.v1.RunService/ResumeRun": _OPERATORS | {Role.ANYONE},
        "/fedmezo.v1.RunService/StopRun": _OPERATORS | {Role.ANYONE},
        "/fedmezo.v1.RunService/DeleteRun": _OPERATORS | {Role.ANYONE},
        "/fedmezo.v1.RunService/ListRuns": _OBSERVERS | {Role.ANYONE},
        "/fedmezo.v1.RunService/OfferRuns": _WORKERS,
        "/fedmezo.v1.RunService/DeclineRun": _WORKERS,
        "/fedmezo.v1.RunService/ReadRunFile": _READERS,
        # Also on the ports where nobody has a certificate: that of enrolment, and that of probes.
        "/grpc.health.v1.Health/Check": _READERS,
        "/grpc.health.v1.Health/Watch": _READERS,
        # Only where it is asked for.
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _READERS,
        "/fedmezo.v1.RunService/OpenPage": _OBSERVERS | {Role.ANYONE},
    }
)
"""Path of an RPC -> the roles that may call it. An RPC without a row cannot be called."""


def sees_everyone(caller: Caller, config: RunConfig) -> bool:
    """Whether `caller` may read what a run's journal and status say of single workers.

    A worker may not in a run whose `journal_readers` are its observers; nor may anyone there whose
    identity is not known.
    """
    return config.journal_readers == "everyone" or caller.role in _SEE_EVERYONE


def check_allowed(method: str, caller: Caller) -> None:
    """Refuse a call of `method`, a path in `RIGHTS`, that `caller` has no right to make.

    Raises `ForbiddenError`, which names the roles that may.
    """
    allowed = RIGHTS.get(method, frozenset())
    if caller.role in allowed:
        return
    who = " or ".join(sorted(f"{role}" for role in allowed & MEMBER_ROLES)) or "the coordinator"
    raise ForbiddenError(
        f"{caller} may not call {method.rpartition('/')[2]}, which is for {who}; use an identity "
        "with that role."
    )
