"""What the CUDA kernels become: registers, spills and instructions, without a GPU.

python benchmarks/engine/cuda_code.py [--arch 90]          a table of the kernels
python benchmarks/engine/cuda_code.py --json --kernels 3   the first three, for test_cuda_code.py

Triton compiles for a GPU that isn't there, and brings the assembler and disassembler along.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedmezo_core.zo.noise import Distribution
from fedmezo_core.zo.noise import triton_kernels as kernels

TOOLS: Final = Path(triton.__file__).parent / "backends/nvidia/bin"
# (kernel, distribution, dtype, stochastic rounding): the most different ones first.
CASES: Final = [
    ("apply", Distribution.RADEMACHER, torch.float32, False),
    ("fan", Distribution.GAUSSIAN, torch.bfloat16, True),
    ("apply", Distribution.LOW_RANK_4, torch.float16, True),
    ("look_up", Distribution.RADEMACHER, torch.bfloat16, True),
    ("fans", Distribution.RADEMACHER, torch.bfloat16, True),
    ("signs", Distribution.LOW_RANK_4, torch.bfloat16, False),
    *(
        (kernel, distribution, dtype, stochastic)
        for kernel in ("apply", "fan", "fans", "look_up")
        for distribution in Distribution
        for dtype, stochastic in (
            (torch.float32, False),
            (torch.bfloat16, True),
            (torch.float16, True),
            (torch.float16, False),
        )
    ),
]
_POINTERS: Final = {
    "table": "*i32", "bad": "*i64", "looked_up": "*i64", "seeds": "*i64", "tensors": "*i64",
    "owners": "*i32",
}  # fmt: skip


def compiled(
    kernel: str,
    distribution: Distribution,
    dtype: torch.dtype,
    stochastic: bool,
    arch: int,
) -> tuple[Any, dict[str, Any]]:
    """(Triton's result, the constants that it was compiled for)."""
    function = getattr(kernels, kernel)
    stored = "*fp32" if dtype == torch.float32 else "*i16"
    if kernel == "signs":
        chosen: dict[str, Any] = {"DOMAIN": 5, "RANK": distribution.rank}
        stored = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    else:
        chosen = kernels.constants(kernel, distribution, dtype, stochastic)
        if kernel in ("fan", "fans"):
            chosen |= {"SHARED_BITS": True}
    pointers = {"out": stored, "base": stored, **_POINTERS}
    signature = {
        name: "constexpr" if name in chosen else pointers.get(name, "i64")
        for name in function.arg_names
    }
    constants = {(function.arg_names.index(name),): value for name, value in chosen.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(
        source, target=target, options=kernels.options(kernel, distribution)
    ), chosen


def measured(
    kernel: str,
    distribution: Distribution,
    dtype: torch.dtype,
    stochastic: bool,
    arch: int,
) -> dict[str, Any]:
    """One kernel's registers, stack bytes, and inner loop's instructions per value and pair."""
    result, chosen = compiled(kernel, distribution, dtype, stochastic, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(result.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", file.name)
        loops = _loops(_tool("nvdisasm", "-c", file.name))
    registers = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    assert registers is not None
    a_lane_has = 4 * chosen.get("A", 1) * chosen.get("B", 8)
    return {
        "kernel": kernel,
        "distribution": str(distribution),
        "dtype": str(dtype).removeprefix("torch."),
        "rounding": "stochastic" if stochastic else "nearest",
        "arch": arch,
        "registers": int(registers[1]),
        "stack_bytes": int(registers[2]),
        "values_a_lane": a_lane_has,
        "inner_loop": min(loops) / a_lane_has if loops else None,
        "carried": [_carried(result.asm["ttir"]), _carried(result.asm["ttgir"])],
        "ptx": result.asm["ptx"],
    }


def _carried(code: str) -> int:
    """Values that loops carry from turn to turn, in Triton's intermediate code."""
    return sum(
        carried.count("=") for carried in re.findall(r"scf\.for .* iter_args\((.*?)\) ->", code)
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / name, *arguments], check=True, capture_output=True, text=True
    ).stdout


def _loops(sass: str) -> list[int]:
    """Instructions of each loop: from a label to a branch back to it."""
    places: dict[str, int] = {}
    loops: list[int] = []
    count = 0
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            places[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s", line):
            count += 1
            back = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)
            # The jump to itself after the end of a program is no loop.
            if back and back[1] in places and count - places[back[1]] > 10:
                loops.append(count - places[back[1]])
    return loops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="80: A100, 90: H100 and H200")
    parser.add_argument("--kernels", type=int, default=len(CASES), help="how many of them")
    parser.add_argument("--json", action="store_true", help="for programs, PTX included")
    arguments = parser.parse_args()
    rows = []
    for case in CASES[: arguments.kernels]:
        row = measured(*case, arguments.arch)
        rows.append(row)
        if not arguments.json:
            loop = "" if row["inner_loop"] is None else f"{row['inner_loop']:.1f}"
            print(
                f"{row['kernel']:7} {row['distribution']:11} {row['dtype']:9} {row['rounding']:11}"
                f"{row['registers']:4} registers {row['stack_bytes']:4} bytes of stack  {loop:>5}",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
