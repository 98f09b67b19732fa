"""The CUDA kernels, compiled without a GPU: nothing fuses, flushes, approximates or spills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def code(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The most different kernels, compiled in a process of its own: here, Triton interprets."""
    pytest.importorskip("triton", reason="Triton is not installed: nothing compiles the kernels")
    script = "benchmarks/engine/cuda_code.py"
    done = subprocess.run(
        [sys.executable, script, "--json", "--arch", str(request.param), "--kernels", "6"],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")]),
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = json.loads(done.stdout)
    assert {kernel["arch"] for kernel in kernels} == {request.param}
    return kernels


def test_every_float_operation_is_rounded_by_itself(code: list[dict[str, Any]]) -> None:
    for kernel in code:
        for operation in ("fma", "mad.rn", "mad.f32", ".ftz", ".approx", "div.full", ".sat"):
            assert operation not in re.sub(r"//.*", "", kernel["ptx"]), (
                kernel["kernel"],
                operation,
            )
        # Without .rn, the assembler may fuse.
        floats = re.findall(r"\b((?:mul|add|sub|sqrt)\.[a-z0-9.]*f(?:16|32|64)\S*)", kernel["ptx"])
        assert all(".rn." in operation for operation in floats), set(floats)
    gaussian = next(kernel for kernel in code if kernel["distribution"] == "gaussian")
    assert "sqrt.rn.f32" in gaussian["ptx"]


def test_addresses_are_64_bit(code: list[dict[str, Any]]) -> None:
    for kernel in code:
        assert ".address_size 64" in kernel["ptx"]
        assert re.search(r"ld\.global\S* .*\[ ?%rd", kernel["ptx"])
        # The program's number, and the numbers of blocks and elements made of it, in 64 bits.
        assert re.search(r"(cvt\.u64\.u32|cvt\.s64\.s32|mul\.wide\.[su]32|mov\.b64)", kernel["ptx"])
        assert re.search(r"add\.s64", kernel["ptx"])


def test_nothing_spills(code: list[dict[str, Any]]) -> None:
    for kernel in code:
        assert kernel["stack_bytes"] == 0, kernel["kernel"]


def test_no_loop_forgets_what_it_carries(code: list[dict[str, Any]]) -> None:
    """Triton 3.6 and 3.7 forget that an outer loop changes a bound of an inner one."""
    for kernel in code:
        before, after = kernel["carried"]
        assert before == after, kernel["kernel"]


def test_signs_cost_a_few_instructions(code: list[dict[str, Any]]) -> None:
    """A shift, a logical operation and an addition, and a Philox block for 128 values."""
    rademacher = next(kernel for kernel in code if kernel["distribution"] == "rademacher")
    assert rademacher["inner_loop"] < 4
