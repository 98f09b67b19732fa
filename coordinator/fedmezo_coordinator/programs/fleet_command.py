"""`fedmezo token`, `members`, `revoke`, `rotate` and `join`: who belongs to a fleet.

And `exclude` and `readmit`: who takes part in its run.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedmezo_coordinator.admission.fleet import TOKEN_LIFE_S, TOKENS_AT_ONCE_MAX, WIRE_ROLES
from fedmezo_coordinator.programs.connecting import (
    JOINED,
    Coordinator,
    Link,
    RunId,
    State,
    link_to,
    own_folders,
    user_path,
)
from fedmezo_coordinator.programs.plain_values import (
    AsJson,
    Format,
    chosen_format,
    json_line,
    say,
)
from fedmezo_core.errors import ConfigError
from fedmezo_core.folders import state_home
from fedmezo_core.layered_settings import OutputFormat
from fedmezo_core.trust.authorisation import MEMBER_ROLES, Role
from fedmezo_core.trust.identity import Identity, load_identity
from fedmezo_core.trust.join_string import parse_join_string
from fedmezo_core.wire.enrolment import ROLES, become_member
from fedmezo_proto.v1 import admin_pb2 as wire

token_app = typer.Typer(help="Let others join a fleet.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="the member's name")]
Worker = Annotated[str, typer.Argument(metavar="WORKER", help="the worker's name")]
Ttl = Annotated[str, typer.Option(help="how long the join string can be used: 90s, 30m, 1h, 7d")]

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DEFAULT_TTL = f"{TOKEN_LIFE_S // 3600}h"


def add_to(app: typer.Typer) -> None:
    """Add these commands to `fedmezo`."""
    app.add_typer(token_app, name="token")
    for command in (members, revoke, rotate, join, exclude, readmit):
        app.command()(command)


@token_app.command()
def create(
    name: Annotated[str, typer.Option(help="the member's name; none: it may choose one")] = "",
    uses: Annotated[int, typer.Option(min=1, help="members that may join with it")] = 1,
    ttl: Ttl = _DEFAULT_TTL,
    role: Annotated[str, typer.Option(help="worker, observer or operator")] = "worker",
    names: Annotated[
        Path | None,
        typer.Option(help="file with a name on each line: a join string for each of them"),
    ] = None,
    coordinator: Coordinator = None,
    state: State = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Print a join string. It is a secret: whoever reads it can join in place of the member."""
    if role not in MEMBER_ROLES:
        raise ConfigError(f"role = {role!r} is not allowed: use worker, observer or operator.")
    if name and names is not None:
        raise ConfigError("--name and --names exclude each other; leave one of them out.")
    wanted = [name] if name else _names_in(names)
    life_s = _seconds(ttl)
    link = _operators_link(coordinator, state)

    async def work() -> list[wire.JoinToken]:
        made: list[wire.JoinToken] = []
        async with link.client() as client:
            for begin in range(0, max(1, len(wanted)), TOKENS_AT_ONCE_MAX):
                request = wire.CreateTokensRequest(
                    names=wanted[begin : begin + TOKENS_AT_ONCE_MAX],
                    role=WIRE_ROLES[Role(role)],
                    uses=uses,
                    life_s=life_s,
                )
                made += (await client.create_tokens(request)).tokens
        return made

    for token in asyncio.run(work()):
        text = token.join_string if names is None else f"{token.name} {token.join_string}"
        say(format_, text, {"name": token.name, "join_string": token.join_string})


def members(
    coordinator: Coordinator = None,
    state: State = None,
    format_: Format = OutputFormat.TEXT,
    as_json: AsJson = False,
) -> None:
    """List the members of a fleet."""
    link = _operators_link(coordinator, state)

    async def work() -> list[wire.MemberStatus]:
        async with link.client() as client:
            return [member async for member in client.members()]

    found = asyncio.run(work())
    if chosen_format(format_, as_json) is OutputFormat.JSON:
        for member in found:
            print(json_line(_values(member)))
        return
    table = Table("name", "role", "key", "enrolled", "certificate until", "state")
    for member in found:
        values = _values(member)
        table.add_row(
            member.name,
            str(values["role"]),
            member.fingerprint.hex()[:16] or "-",
            _day(member.enrolled_s),
            _day(member.expires_s),
            str(values["state"]),
        )
    Console().print(table)


def revoke(
    name: Name,
    coordinator: Coordinator = None,
    state: State = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Take a member's rights away, at once; its open sessions end.

    With an operator's rights, all join strings that are not used up lose their use.
    """
    link = _operators_link(coordinator, state)

    async def work() -> None:
        async with link.client() as client:
            await client.revoke_member(name)

    asyncio.run(work())
    say(
        format_,
        f"{name} is revoked; `fedmezo rotate {name}` lets it join again, with a new key.\n"
        "If it was an operator, all join strings that were not used up have lost their use, and "
        "`fedmezo members` shows whom it may have let in.",
        {"name": name, "state": "revoked"},
    )


def rotate(
    name: Name,
    ttl: Ttl = _DEFAULT_TTL,
    coordinator: Coordinator = None,
    state: State = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Take a member's key away, at once, and print a join string for a new one.

    With an operator's key, all join strings that are not used up lose their use.
    """
    link, life_s = _operators_link(coordinator, state), _seconds(ttl)

    async def work() -> wire.RotateMemberResponse:
        async with link.client() as client:
            return await client.rotate_member(name, life_s)

    join_string = asyncio.run(work()).token.join_string
    say(format_, join_string, {"name": name, "join_string": join_string})


def join(
    join_string: Annotated[
        str,
        typer.Argument(
            metavar="STRING", envvar="FEDMEZO_JOIN", help="what fedmezo token create printed"
        ),
    ],
    name: Annotated[str, typer.Option(help="the name to take; none: the string's")] = "",
    state: Annotated[
        Path | None,
        typer.Option(
            callback=user_path,
            help=f"folder to keep the identity in, {JOINED!r} in the "
            "user's state folder by default",
        ),
    ] = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Become an observer or an operator; other commands find the identity, or take --state.

    A worker joins by itself when it starts with its join string.
    """
    identity = _joined(join_string, name, state)
    text = f"{identity.folder}: {identity.role} {identity.name} of the fleet of {identity.address}"
    if identity.role is Role.WORKER:
        text += f"\nStart the worker with --state {shlex.quote(str(identity.folder))}."
    say(
        format_,
        text,
        {
            "state": str(identity.folder),
            "role": str(identity.role),
            "name": identity.name,
            "address": identity.address,
        },
    )


def _joined(join_string: str, name: str, state: Path | None) -> Identity:
    """The identity that comes of a join string, in `state` or where commands look for it.

    That of a worker is none that commands look for, and takes the place of no other.
    """
    found_by_commands = state_home() / JOINED
    folder = state
    if folder is None:
        kept = load_identity(found_by_commands)
        if kept is not None and kept.token_id == parse_join_string(join_string).token_id.hex():
            kept.check_time()
            return kept
    identity = asyncio.run(
        become_member(join_string, folder, name, MEMBER_ROLES, give_up_after_s=0)
    )
    if state is not None or identity.role is Role.WORKER:
        return identity
    shutil.rmtree(found_by_commands, ignore_errors=True)
    return replace(identity, folder=identity.folder.rename(found_by_commands))


def exclude(
    worker: Worker,
    reason: Annotated[
        str, typer.Option(help="why, for the worker and the journal; 1 to 512 characters")
    ],
    coordinator: Coordinator = None,
    state: State = None,
    run_id: RunId = "",
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Take a worker out of the run, at once and on the record, until `fedmezo readmit`."""
    link = link_to(coordinator, None, False, state, run_id)

    async def work() -> bool:
        async with link.client() as client:
            await client.exclude_worker(worker, reason, run_id)
            status = await client.get_status(run_id)
            return any(known.worker == worker for known in status.workers)

    has_joined = asyncio.run(work())
    if has_joined:
        text = f"{worker} is excluded; `fedmezo readmit {worker}` lets it take part again."
    else:
        text = (
            f"{worker} is excluded, but no worker of that name has joined this run since the "
            "coordinator's start; `fedmezo status` lists them."
        )
    say(format_, text, {"worker": worker, "excluded": True, "has_joined": has_joined})


def readmit(
    worker: Worker,
    coordinator: Coordinator = None,
    state: State = None,
    run_id: RunId = "",
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Let an excluded worker take part in the run again, once it joins."""
    link = link_to(coordinator, None, False, state, run_id)

    async def work() -> None:
        async with link.client() as client:
            await client.readmit_worker(worker, run_id)

    asyncio.run(work())
    say(
        format_,
        f"{worker} may join the run again; start it if it has ended.",
        {"worker": worker, "excluded": False},
    )


def _operators_link(coordinator: str | None, state: Path | None) -> Link:
    """The link of an operator: by default that of this machine's coordinator, or of who joined."""
    if state is None:
        here = own_folders()
        state = next((folder for folder in here if folder.exists()), here[0])
    return link_to(coordinator, None, False, state)


def _names_in(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        names = path.expanduser().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The file of names {path} cannot be read ({error}).") from None
    if not names:
        raise ConfigError(f"The file of names {path} holds no name; write one on each line.")
    return names


def _seconds(ttl: str) -> int:
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", ttl)
    if found is None:
        raise ConfigError(f"ttl = {ttl!r} is not allowed: write 90s, 30m, 1h or 7d.")
    return int(found[1]) * _UNITS_S[found[2]]


def _values(member: wire.MemberStatus) -> dict[str, str | int]:
    state = "revoked" if member.revoked else "connected" if member.connected else ""
    return {
        "name": member.name,
        "role": str(ROLES[member.role]),
        "fingerprint": member.fingerprint.hex(),
        "enrolled_s": member.enrolled_s,
        "expires_s": member.expires_s,
        "state": state or ("away" if member.fingerprint else "has to join again"),
    }


def _day(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) if seconds else "-"
