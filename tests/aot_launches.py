"""What a piece of code launches, compiled for a GPU that is not there: `compiled_launches(...)`.

Where `aot` is told a kernel's arguments one by one, here the launchers themselves run, on CPU
tensors, in a process of its own: every kernel is compiled with the constants, alignments and
descriptors that a real launch gives it, and not run.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import aot


@dataclass(frozen=True)
class Launch:
    """One compiled kernel."""

    kernel: str
    arch: int
    shared_bytes: int
    registers: int | None  # of a thread; None without cuobjdump
    stack_bytes: int | None  # spills show here
    warpgroup_products: int  # wgmma instructions
    bulk_copies: int  # by the tensor copy engine


def compiled_launches(launch: str, arch: int) -> list[Launch]:
    """Everything that `launch`, "test_module:function", launches when called with `arch`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, launch, str(arch)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [Launch(**row) for row in json.loads(done.stdout.splitlines()[-1])]


class _Chip:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Launch]]:
    """Within: launches compile and run nothing; the list fills with them."""
    import triton
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run, seen = JITFunction.run, set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        built = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(built) not in seen:  # kept alive by the kernel's own cache
            seen.add(id(built))
            ptx = built.asm["ptx"]
            launches.append(
                Launch(
                    self.fn.__name__, arch, built.metadata.shared, *usage(built.asm["cubin"]),
                    ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor"),
                )
            )  # fmt: skip
        return built

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Chip(arch))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = before


def usage(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers of a thread and bytes of its stack."""
    import re

    import triton

    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not dump.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", out.stdout)
    return (int(found[1]), int(found[2])) if found else (None, None)


def assert_fit(launches: list[Launch]) -> None:
    """Every kernel's shared memory is there on the chip, and its body was not compiled away."""
    assert launches
    for launch in launches:
        assert launch.shared_bytes <= aot.SHARED_BYTES[launch.arch], launch
        assert launch.registers is None or launch.registers > 8, launch


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    with compiling_for(int(sys.argv[2])) as found:
        getattr(importlib.import_module(module), name)(int(sys.argv[2]))
    print(json.dumps([asdict(x) for x in found]))
