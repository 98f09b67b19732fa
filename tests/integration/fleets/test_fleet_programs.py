"""From nothing to a run of two members over mutual TLS, with the programs a person starts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fedmezo_core.trust.identity import load_identity
from tests.integration.support.harness import Program, Programs, run_values

PROGRAM = "fedmezo_coordinator.programs.fedmezo_command"
RUN: dict[str, Any] = {"rounds": 3, "workers_min": 2, "quorum": 2}


async def said_by(program: Program) -> str:
    """What a program that ends well printed."""
    assert await program.wait() == 0, program.said
    return program.said.strip()


@pytest.mark.slow
async def test_three_commands_to_a_run_over_mutual_tls(
    programs: Programs,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    state = home / "fedmezo" / "coordinator"
    begun_s = time.monotonic()
    assert "holds the CA" in await said_by(programs.start("fedmezo_coordinator", "init"))
    await programs.coordinator(
        tmp_path / "journal.db", run_values(**RUN), "--state", state, "--model", model_folder
    )
    names = tmp_path / "names"
    names.write_text("gpu-1\ngpu-2\n")
    joins = dict(
        line.split()
        for line in (
            await said_by(programs.start(PROGRAM, "token", "create", "--names", names))
        ).splitlines()
    )
    assert list(joins) == ["gpu-1", "gpu-2"]

    def worker(name: str) -> Program:
        k = list(joins).index(name)
        return programs.start(
            "fedmezo_worker",
            *("--join", joins[name], "--data", data_files[k], "--model", model_folder),
            *("--threads", "1"),
        )

    both = [worker(name) for name in joins]
    for program in both:
        await program.says("joined at round 0")
    joined_s = time.monotonic() - begun_s
    # The key that a worker made is nowhere but in its own folder.
    kept = [load_identity(path) for path in sorted((home / "fedmezo" / "members").iterdir())]
    assert {one.name for one in kept if one is not None} == set(joins)
    both[0].end()
    again = worker("gpu-1")  # The same string, which was used up: the kept identity serves.
    assert [await again.wait(60), await both[1].wait(60)] == [0, 0], again.said + both[1].said
    listed = await said_by(programs.start(PROGRAM, "members", "--json"))
    assert [line.count('"worker"') for line in listed.splitlines()] == [1, 1, 0]
    shown = await said_by(programs.start(PROGRAM, "status"))
    assert "gpu-1" in shown
    observer = await said_by(
        programs.start(PROGRAM, "token", "create", "--role", "observer", "--name", "eve")
    )
    await said_by(programs.start(PROGRAM, "join", observer))
    eve = ("--state", home / "fedmezo" / "identity")
    # A worker's string takes the place of no identity, and the observer's is not used up twice.
    gpu_3 = await said_by(programs.start(PROGRAM, "token", "create", "--name", "gpu-3"))
    told = await said_by(programs.start(PROGRAM, "join", gpu_3))
    assert "worker gpu-3 of the fleet of" in told
    assert f"Start the worker with --state {home}/fedmezo/members/" in told
    assert "observer eve" in await said_by(programs.start(PROGRAM, "join", observer))
    verify = programs.start(PROGRAM, "journal", "verify", "--signatures", *eve)
    verified = await said_by(verify)
    assert "sound" in verified
    assert "signed and checked, 0 unsigned" in verified
    asked = programs.start(PROGRAM, "revoke", "gpu-1", *eve)
    assert await asked.wait() == 1
    assert "observer eve may not call RevokeMember, which is for operator" in asked.said
    said = await said_by(programs.start(PROGRAM, "revoke", "gpu-1"))
    assert "is revoked" in said
    assert "all join strings that were not used up have lost their use" in said
    refused = worker("gpu-1")
    assert await refused.wait() == 1
    assert "worker gpu-1 was revoked; ask the operator" in refused.said
    with capsys.disabled():
        print(f" {joined_s:.1f} s to two members ", end="")


async def test_what_goes_wrong_says_what_to_do(programs: Programs, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a", "label": "b"}\n')
    for arguments, status, words in (
        (("--join", "fedmezo1:AAAA"), 2, "is cut off or changed; copy the whole line"),
        (("--state", tmp_path / "nothing"), 1, "holds no identity; join first"),
    ):
        worker = programs.start("fedmezo_worker", *arguments, "--data", data)
        assert await worker.wait() == status
        assert words in worker.said
    state = tmp_path / "state"
    await said_by(programs.start("fedmezo_coordinator", "init", "--state", state))
    state.chmod(0o755)
    open_to_all = programs.start("fedmezo_coordinator", "--state", state)
    assert await open_to_all.wait() == 2
    assert f"chmod -R go= {state}" in open_to_all.said
    bare = programs.start("fedmezo_coordinator", "--listen", "0.0.0.0:0")
    assert await bare.wait() == 2
    assert "--insecure" in bare.said
