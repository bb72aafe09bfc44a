"""Compile every Triton kernel for every supported GPU, without owning one, and read off what each kernel takes.

``python -m litropy.kernels.compile_report`` prints the table. It must run in a process of its own, without
``TRITON_INTERPRET``: the compiler and the interpreter do not share one.

Shared memory is what a program is launched with; spills are bytes of registers that went to memory.
"""

import re
import subprocess
import tempfile
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from litropy.kernels.linear_head_triton_kernels import gradient_kernel, statistics_kernel
from litropy.kernels.tile_configs import tile_config

__all__ = ["SHARED_MEMORY_LIMIT", "TARGETS", "CompiledKernel", "compile_kernel", "compile_report"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes that one program may use
SHARED_MEMORY_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
KERNELS = (statistics_kernel, gradient_kernel)
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# arguments of pointer type that are not in the inputs' dtype
_OTHER_POINTERS = {"target_ptr": "*i64", "argmax_ptr": "*i64"}
_INPUT_POINTERS = ("input_ptr", "weight_ptr", "bias_ptr", "dz_ptr")
_MATRIX_INSTRUCTION = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma")


@dataclass(frozen=True)
class CompiledKernel:
    """What one kernel takes on one target, all options on."""

    target: str
    kernel: str
    dtype: str
    registers: int
    spills: int
    shared_memory: int
    matrix_instruction: str


def _arguments(kernel: Any, dtype: torch.dtype, blocks: dict[str, int]) -> tuple[dict[str, str], dict[tuple[int], Any]]:
    """Types of a kernel's arguments, and the values of those that are compile-time constants (every option on)."""
    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in ("stride_d", "stride_w"):  # contiguous rows, which Triton specialises on at run time as well
            types[name], constants[position,] = "constexpr", 1
        elif name.endswith("_ptr"):
            types[name] = DTYPES[dtype] if name in _INPUT_POINTERS else _OTHER_POINTERS.get(name, "*fp32")
        elif name.isupper() and len(name) > 1:
            types[name], constants[position,] = "constexpr", blocks.get(name, True)
        else:
            types[name] = "fp32" if name in ("softcap", "inv_temperature") else "i32"
    return types, constants


def compile_kernel(kernel: Any, dtype: torch.dtype, target: str) -> CompiledKernel:
    """Compile one kernel with the tile that would be chosen at run time."""
    gpu = TARGETS[target]
    tile = tile_config(dtype, gpu.backend)
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d, "UPCAST": False}
    types, constants = _arguments(kernel, dtype, blocks)
    # pointers and row strides are multiples of 16 in practice; N and the number of tiles are anything
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name in ("D", "V", "first", "stride_dz", "stride_n", "stride_v")
    }
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs=constants, attrs=aligned),
        target=gpu,
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True},
    )
    read = _amd_resources if gpu.backend == "hip" else _nvidia_resources
    registers, spills = read(compiled.asm)
    assembly = compiled.asm["amdgcn" if gpu.backend == "hip" else "ptx"]
    found = _MATRIX_INSTRUCTION.search(assembly)
    name = str(dtype).removeprefix("torch.")
    shared = compiled.metadata.shared
    return CompiledKernel(target, kernel.__name__, name, registers, spills, shared, found.group() if found else "fma")


def _nvidia_resources(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers a thread, and bytes of its local memory, which is where spills go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    assert registers is not None
    assert stack is not None
    return int(registers.group(1)), int(stack.group(1))


def _amd_resources(asm: dict[str, Any]) -> tuple[int, int]:
    """Vector registers of a thread, and how many of them were spilled."""
    text = asm["amdgcn"]
    registers, spills = re.search(r"\.vgpr_count:\s+(\d+)", text), re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    assert registers is not None
    assert spills is not None
    return int(registers.group(1)), int(spills.group(1))


def compile_report() -> list[CompiledKernel]:
    """Compile all kernels for all dtypes and targets."""
    return [compile_kernel(kernel, dtype, target) for target in TARGETS for kernel in KERNELS for dtype in DTYPES]


def _table(rows: list[CompiledKernel]) -> str:
    names = [field.name.replace("_", " ") for field in fields(CompiledKernel)]
    lines = [names, ["---"] * len(names), *([str(value) for value in astuple(row)] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(_table(compile_report()))  # noqa: T201
