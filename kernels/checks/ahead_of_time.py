"""Compiles the Triton kernels for GPUs that need not be there, and counts what a profiler would complain
about.

    python kernels/checks/ahead_of_time.py                    # sm_80, sm_90, sm_100
    python kernels/checks/ahead_of_time.py 90 --dtype fp32

Prints registers, spills and 16-byte loads and stores of every kernel as JSON lines; exits with 1 where one
spills, or where a kernel that passes over the logits reads or writes them in less than 16 bytes a thread.
Needs triton's own tools, no driver.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import triton
from fuse_kernels import triton_kernels, triton_topk
from fuse_kernels.triton_loss import choose_launch, gather_warps, row_shape
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# All others are pointers to fp32.
_ARGUMENTS = {
    **dict.fromkeys(("LABELS", "IDS"), "*i64"),
    "COLUMNS": "*i32",
    **dict.fromkeys(("stride",), "i64"),
    **dict.fromkeys(("n", "columns", "width", "start", "k", "splits", "split_columns", "shards"), "i32"),
    "inv_t": "fp32",
}
# By 16, as the launcher finds them at run time for the usual vocabularies.
_DIVISIBLE = (
    "stride",
    "split_columns",
    "width",
)
# 16 bytes at a time.
_READING = (
    "off_ids_kernel",
    "whole_row_kernel",
    "gradient_kernel",
    "scale_kernel",
    "topk_kernel",
)
_SOFTCAP = 30.0  # of Gemma 2
_WRITING = ("whole_row_kernel", "gradient_kernel", "scale_kernel")


@dataclass(frozen=True)
class Compiled:
    """What one kernel became. loads, stores: instructions that move 16 bytes of global memory."""

    kernel: str
    capability: int
    constants: dict[str, object]
    registers: int
    spills: int  # bytes of stack and local memory, and instructions that use them
    loads: int
    stores: int


def up_to(most: int, numbers: Sequence[int]) -> list[int]:
    return [number for number in numbers if number <= most]


def variants(
    dtype: str, modes: Sequence[int], most_slots: int, caps: Sequence[float | None]
) -> Iterator[tuple[str, dict[str, object], int]]:
    """(kernel, constants, warps) of everything that a launch may choose, at the sizes of real runs.

    modes: the kernels' ways of taking the temperature (T_MODE). most_slots: the largest K. caps: the values
    of CAP. A constant None is an argument that is left out.
    """
    size = {"bf16": 2, "fp16": 2, "fp32": 4}[dtype]
    launch = choose_launch(8192, 128256, size, 132)
    for slots in up_to(most_slots, (16, 128)):
        for tail in ("bucket", "renormalize", "ignore"):
            yield "gather_kernel", {"TAIL": tail, "K": slots}, gather_warps(slots)
    yield "loss_kernel", {"B": 128}, 4
    yield "scale_kernel", {"BLOCK": launch.block, "ROUND": False}, launch.warps
    for cap in ({"CAP": value} for value in caps):
        for slots in up_to(most_slots, (16, 128)):
            yield "finish_kernel", {"K": slots, "STATISTICS": None, **cap}, 1
            yield "finish_kernel", {"K": slots, "RESULTS": None, "COEFFICIENTS": None, **cap}, 1
            for upstream in ({}, {"UPSTREAM": None}):
                yield "special_gradient_kernel", {"K": slots, "ROUND": False, **upstream, **cap}, 1
        for mode in modes:
            for name, constants, warps in passes(size, mode, most_slots):
                yield name, {**constants, **cap}, warps


def passes(size: int, mode: int, most_slots: int) -> Iterator[tuple[str, dict[str, object], int]]:
    """The part of `variants` that passes over the logits, whose elements have `size` bytes."""
    launch = choose_launch(8192, 128256, size, 132)
    yield "off_ids_kernel", {"R": launch.rows, "C": launch.lanes, "T_MODE": mode}, launch.warps
    for upstream in ({}, {"UPSTREAM": None}):
        yield (
            "gradient_kernel",
            {"BLOCK": launch.block, "T_MODE": mode, "ROUND": False, **upstream},
            launch.warps,
        )
    for width in (128256, 32064):
        whole = choose_launch(8192, width, size, 132)
        yield (
            "whole_row_kernel",
            {**row_shape(whole), "K": 16, "T_MODE": mode, "ROUND": False},
            whole.row_warps,
        )
    for slots in up_to(most_slots, (16, 64)):
        lanes, neighbours, tiles = triton_topk.tile_shape(128256, size, slots)
        yield "topk_kernel", {"K": slots, "C": lanes, "R": neighbours, "S": tiles, "T_MODE": mode}, 8


def compile_kernel(
    name: str, constants: dict[str, object], warps: int, capability: int, dtype: str
) -> Compiled:
    function = getattr(triton_topk if name == "topk_kernel" else triton_kernels, name)
    types = {**_ARGUMENTS, "LOGITS": f"*{dtype}", "GRADIENT": f"*{dtype}"}
    names = function.arg_names
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "*fp32") for arg in names}
    aligned = [arg for arg in names if signature[arg].startswith("*") or arg in _DIVISIBLE]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(arg),): value for arg, value in constants.items()},
        attrs={(names.index(arg),): [["tt.divisibility", 16]] for arg in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        code = _tool("nvdisasm", cubin)
    memory = sum(int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("STACK", "LOCAL"))
    return Compiled(
        kernel=name,
        capability=capability,
        constants=constants,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=memory + len(re.findall(r"\b(?:STL|LDL)\b", code)),
        loads=len(re.findall(r"LDG\.E[\w.]*\.128", code)),
        stores=len(re.findall(r"STG\.E[\w.]*\.128", code)),
    )


def _tool(name: str, *arguments: object) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def problems(compiled: Compiled) -> list[str]:
    found = [f"{compiled.spills} spills"] if compiled.spills else []
    if compiled.kernel in _READING and compiled.loads == 0:
        found.append("no 16-byte loads")
    if compiled.kernel in _WRITING and compiled.stores == 0:
        found.append("no 16-byte stores")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("capability", type=int, nargs="*", default=[80, 90, 100])
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument(
        "--modes", type=int, nargs="+", default=[0, 1, 2, 4], help="values of T_MODE, default all"
    )
    parser.add_argument("--most-slots", type=int, default=128, help="largest K, default 128")
    parser.add_argument("--without-cap", action="store_true", help="leave out the kernels with a cap")
    arguments = parser.parse_args()
    caps = [None] if arguments.without_cap else [None, _SOFTCAP]
    failed = False
    for capability in arguments.capability:
        for name, constants, warps in variants(arguments.dtype, arguments.modes, arguments.most_slots, caps):
            compiled = compile_kernel(name, constants, warps, capability, arguments.dtype)
            failed |= bool(problems(compiled))
            print(json.dumps({**asdict(compiled), "problems": problems(compiled)}), flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
