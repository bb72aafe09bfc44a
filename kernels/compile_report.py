"""Compile every Triton kernel for every supported GPU, without owning one, and read off what each kernel takes.

``python -m litropy.kernels.compile_report`` prints the table. It must run in a process of its own, without
``TRITON_INTERPRET``: the compiler and the interpreter do not share one.

Shared memory is what a program is launched with; spills are bytes of registers that went to memory.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from litropy.kernels.attention_entropy_triton_kernels import attention_gradient_kernel, attention_statistics_kernel
from litropy.kernels.linear_head_distillation_kernels import distillation_kernel
from litropy.kernels.linear_head_ranking_kernels import ranking_kernel
from litropy.kernels.linear_head_sparse_kernels import input_gradient_kernel, weight_gradient_kernel
from litropy.kernels.linear_head_triton_kernels import block_kernel, gradient_kernel, statistics_kernel
from litropy.kernels.plane_merge_kernels import merge_kernel
from litropy.kernels.plane_merge_triton import BLOCK as PLANE_BLOCK
from litropy.kernels.rans_stream import LANES
from litropy.kernels.rans_triton import SEGMENTS_PER_PROGRAM
from litropy.kernels.rans_triton_kernels import rans_decode_kernel
from litropy.kernels.tile_configs import attention_tile_config, tile_config

__all__ = ["SHARED_MEMORY_LIMIT", "TARGETS", "CompiledKernel", "compile_kernel", "compile_report", "table"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# targets whose kernels over tiles load them through tensor descriptors
TMA_TARGETS = ("sm_90", "sm_100")
# bytes that one program may use
SHARED_MEMORY_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# each kernel with its arguments that hold numbers in the inputs' dtype
KERNELS: dict[Any, tuple[str, ...]] = {
    statistics_kernel: ("input", "weight", "low_rank", "bias_ptr"),
    gradient_kernel: ("input", "weight", "low_rank", "bias_ptr", "dz_ptr"),
    block_kernel: ("logits_ptr",),
    ranking_kernel: (),
    distillation_kernel: ("logits_ptr", "teacher_logits_ptr"),
    input_gradient_kernel: ("dz_ptr", "weight_ptr"),
    weight_gradient_kernel: ("out_ptr", "bias_ptr", "dz_ptr", "input_ptr"),
    attention_statistics_kernel: ("q_ptr", "k_ptr", "bias_ptr"),
    attention_gradient_kernel: ("q_ptr", "k_ptr", "bias_ptr", "da_ptr"),
    rans_decode_kernel: (),
    merge_kernel: (),
}
_ATTENTION, _HEAD_WIDTH = (attention_statistics_kernel, attention_gradient_kernel), 128
# arguments that may be tensor descriptors, and which block size their rows have
_DESCRIBED = {"input": "BLOCK_N", "weight": "BLOCK_V", "low_rank": "BLOCK_V"}
_INTEGERS = {"target_ptr": "*i64", "argmax_ptr": "*i64", "rank_ptr": "*i64", "kept_ptr": "*u8"}
_INTEGERS |= dict.fromkeys(
    ("list_ptr", "count_ptr", "order_ptr", "bounds_ptr", "segments_ptr", "key_segments_ptr"), "*i32"
)
_INTEGERS |= {"rows_ptr": "*i64", "prefix_ptr": "*i64", "key_mask_ptr": "*u8", "mask_ptr": "*u8"}
_INTEGERS |= dict.fromkeys(
    ("divider_ptr", "first_ptr", "second_ptr", "table_ptr", "symbols_ptr", "words_of_ptr", "states_ptr"), "*i32"
)
_INTEGERS |= {"output_ptr": "*i64", "words_at_ptr": "*i64", "words_ptr": "*i16", "decoded_ptr": "*u8"}
_INTEGERS |= {"intact_ptr": "*u8", "planes_ptr": "*u8", "others_ptr": "*u32", "merged_ptr": "*u32"}
_NUMBERS = (
    "scale", "hiding_bias", "softcap", "inv_temperature", "label_smoothing", "z_loss", "top_p", "teacher_softcap",
    "teacher_inv_temperature", "beta", "log_beta", "log_rest",
)  # fmt: skip
# what is 1 in practice, which Triton specialises on at run time as well
_UNIT_STRIDES = ("stride_d", "stride_w", "stride_qd", "stride_kd", "stride_mask_k", "stride_bias_k")
# multiples of 16 in practice, beside pointers
_ALIGNED = (
    "D", "V", "first", "stride_dz", "stride_n", "stride_v", "stride_low_rank", "stride_out", "stride_logits",
    "stride_teacher", "Tk", "stride_da", "stride_qb", "stride_qh", "stride_qr", "stride_kb", "stride_kh", "stride_kt",
    "stride_mask_q", "stride_bias_q",
)  # fmt: skip
_MATRIX_INSTRUCTION = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma")


@dataclass(frozen=True)
class CompiledKernel:
    """What one kernel takes on one target."""

    target: str
    kernel: str
    dtype: str
    options: str  # "all" optional statistics and gradients, alphabets of any size, or "none"
    registers: int
    spills: int
    shared_memory: int
    matrix_instruction: str
    loads: str  # "TMA" or "pointers"


def _arguments(
    kernel: Any, dtype: torch.dtype, blocks: dict[str, int | bool], all_options: bool
) -> tuple[dict[str, str], dict[tuple[int], Any]]:
    """Types of a kernel's arguments, and the values of those that are compile-time constants."""
    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    number = DTYPES[dtype]
    for position, name in enumerate(kernel.arg_names):
        if name in _UNIT_STRIDES:
            types[name], constants[position,] = "constexpr", 1
        elif name in _DESCRIBED and blocks["TMA"]:
            types[name] = f"tensordesc<{number}[{blocks[_DESCRIBED[name]]}, {blocks['BLOCK_D']}]>"
        elif name in KERNELS[kernel]:
            types[name] = f"*{number}"
        elif name.endswith("_ptr"):
            types[name] = _INTEGERS.get(name, "*fp32")
        elif name.isupper() and len(name) > 1:
            needed = name in ("HAS_TARGET", "HAS_WEIGHT")
            types[name], constants[position,] = "constexpr", blocks.get(name, all_options or needed)
        else:
            types[name] = "fp32" if name in _NUMBERS else "i32"
    return types, constants


def compile_kernel(kernel: Any, dtype: torch.dtype, target: str, all_options: bool = True) -> CompiledKernel:
    """Compile one kernel with the tile that would be chosen at run time."""
    gpu = TARGETS[target]
    tma = target in TMA_TARGETS
    tiled = kernel in (statistics_kernel, gradient_kernel, *_ATTENTION)
    tile = tile_config(dtype, gpu.backend, tma, heavy=tiled and all_options)
    if kernel in _ATTENTION:
        tile = attention_tile_config(dtype, _HEAD_WIDTH)
    row_blocks = {block_kernel: 4096, ranking_kernel: 2048, distillation_kernel: 2048}
    blocks: dict[str, int | bool] = {"BLOCK_N": tile.block_n, "BLOCK_V": row_blocks.get(kernel, tile.block_v)}
    blocks |= {"BLOCK_D": tile.block_d, "BLOCK_W": 64, "BLOCK_K": 16, "UPCAST": False, "TMA": tma}
    blocks |= {"BLOCK_R": tile.block_n, "BLOCK_T": tile.block_v, "WIDTH": _HEAD_WIDTH}
    blocks |= {"PERSISTENT": tile.persistent}
    blocks |= {"ROWS": SEGMENTS_PER_PROGRAM, "BUCKETS": 256 if all_options else 32}
    blocks |= {"PLANES": 4, "KIND": 2, "BLOCK": PLANE_BLOCK, "DIVERGENCE": 2 if all_options else 0}
    types, constants = _arguments(kernel, dtype, blocks, all_options)
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or (name in _ALIGNED and types[name] == "i32")
    }
    warps, stages = (tile.num_warps, tile.num_stages) if tiled else (8 if kernel in row_blocks else 4, 3)
    if kernel is rans_decode_kernel:
        warps = SEGMENTS_PER_PROGRAM * LANES // gpu.warp_size
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs=constants, attrs=aligned),
        target=gpu,
        options={"num_warps": warps, "num_stages": min(stages, 2) if gpu.backend == "hip" else stages}
        | {"enable_fp_fusion": True},
    )
    read = _amd_resources if gpu.backend == "hip" else _nvidia_resources
    registers, spills = read(compiled.asm)
    assembly = compiled.asm["amdgcn" if gpu.backend == "hip" else "ptx"]
    found = _MATRIX_INSTRUCTION.search(assembly)
    return CompiledKernel(
        target,
        kernel.__name__,
        str(dtype).removeprefix("torch."),
        "all" if all_options else "none",
        registers,
        spills,
        compiled.metadata.shared,
        found.group() if found else "fma",
        "TMA" if "cp.async.bulk.tensor" in assembly else "pointers",
    )


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


def compile_report(
    dtypes: Sequence[torch.dtype] = tuple(DTYPES), options: Sequence[bool] = (False, True)
) -> Iterator[CompiledKernel]:
    """Compile all kernels for all targets, one after the other."""
    for target, kernel, dtype, all_options in itertools.product(TARGETS, KERNELS, dtypes, options):
        yield compile_kernel(kernel, dtype, target, all_options)


def table(rows: Iterable[CompiledKernel]) -> str:
    """The rows as a Markdown table."""
    names = [field.name.replace("_", " ") for field in fields(CompiledKernel)]
    lines = [names, ["---"] * len(names), *([str(value) for value in astuple(row)] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table(compile_report()))  # noqa: T201
