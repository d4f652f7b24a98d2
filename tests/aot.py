"""Kernels compiled for GPUs that are not there: `compiled(cases)`, in a process of its own.

A kernel that builds for one chip only, spills registers or asks for more shared memory than a chip
has is found so on any machine with Triton. The process is another one because this one may have
imported the kernels for Triton's interpreter.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one program, at most
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class Case:
    kernel: str  # "bn_prior:_forward"
    arch: int  # 80, 90, 100
    types: dict[str, str]  # "*bf16", "*fp32", "i32", ... of each argument that is no constant
    constants: dict[str, object]
    warps: int = 4
    stages: int = 3
    aligned: tuple[str, ...] = field(default=())  # integers that are multiples of 16


@dataclass(frozen=True)
class Built:
    shared_bytes: int
    registers: int | None  # of a thread; None without cuobjdump
    stack_bytes: int | None  # spills show here
    wide_loads: int  # of 16 bytes


def compiled(cases: list[Case]) -> list[Built]:
    """Compile every case; raises with the compiler's message if one fails."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        input=json.dumps([asdict(c) for c in cases]), env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [Built(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _build(case: Case) -> Built:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = case.kernel.partition(":")
    kernel = getattr(importlib.import_module(f"fastrecycle_kernels.{module}"), name)
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in case.constants:
            signature[argument] = "constexpr"
            constants[(i,)] = _tuples(case.constants[argument])
            continue
        signature[argument] = case.types[argument]
        if case.types[argument].startswith("*") or argument in case.aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", case.arch, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    registers = stack = None
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if dump.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            out = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True)
        if found := re.search(r"REG:(\d+) STACK:(\d+)", out.stdout):
            registers, stack = int(found[1]), int(found[2])
    wide = len(
        re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64", built.asm["ptx"])
    )
    return Built(built.metadata.shared, registers, stack, wide)


if __name__ == "__main__":
    rows = [asdict(_build(Case(**case))) for case in json.load(sys.stdin)]
    print(json.dumps(rows))
