"""Every kernel compiles for every target, ahead of time and without a GPU, fits its shared memory, and uses the GPU."""

import json
import os
import subprocess
import sys

import pytest

from litropy.kernels.compile_report import KERNELS, SHARED_MEMORY_LIMIT, TARGETS

# all kernels with all options, and what is launched most without any, so that it takes half a minute and not five
SCRIPT = """
import json, sys
from dataclasses import asdict
import torch
from litropy.kernels.compile_report import KERNELS, compile_kernel
from litropy.kernels.linear_head_triton_kernels import gradient_kernel, statistics_kernel
from litropy.kernels.rans_triton_kernels import rans_decode_kernel
tiled = (statistics_kernel, gradient_kernel)
wanted = [(kernel, torch.bfloat16, True) for kernel in KERNELS] + [(kernel, torch.bfloat16, False) for kernel in tiled]
wanted += [(kernel, torch.float32, True) for kernel in tiled] + [(rans_decode_kernel, torch.bfloat16, False)]
for target in sys.argv[1:]:
    for kernel, dtype, all_options in wanted:
        print(json.dumps(asdict(compile_kernel(kernel, dtype, target, all_options))), flush=True)
"""
# of registers that are kept in memory instead; more would show in the time of a tile
MOST_SPILLED_BYTES = 256


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What each kernel takes: a list of ``CompiledKernel`` as dictionaries."""
    # the compiler and the interpreter do not share a process, and the cache must not hide a failure
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    parts = [list(TARGETS)[::2], list(TARGETS)[1::2]]
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, *targets], env=environment, stdout=-1, stderr=-1, text=True)
        for targets in parts
    ]
    rows = []
    for process in processes:
        output, error = process.communicate()
        assert process.returncode == 0, error[-3000:]
        rows += [json.loads(line) for line in output.splitlines()]
    return rows


def of(report, **wanted):
    found = [row for row in report if all(row[key] == value for key, value in wanted.items())]
    assert found, f"nothing was compiled with {wanted}"
    return found


def test_all_kernels_compile_for_all_targets(report):
    compiled = {(row["target"], row["kernel"]) for row in of(report, options="all")}
    assert compiled == {(target, kernel.__name__) for target in TARGETS for kernel in KERNELS}


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_suffices(report, target):
    for row in of(report, target=target):
        assert row["shared_memory"] <= SHARED_MEMORY_LIMIT[target], row


def test_limits_are_those_of_the_smallest_gpu_of_a_kind():
    """An RTX card of compute capability 12.0 has 99 KiB a program, its data-centre sisters 227."""
    assert SHARED_MEMORY_LIMIT["sm_120"] == 101376
    assert SHARED_MEMORY_LIMIT["sm_90"] == SHARED_MEMORY_LIMIT["sm_100"] == 227 * 1024


@pytest.mark.parametrize("target", TARGETS)
def test_registers_suffice(report, target):
    for row in of(report, target=target):
        assert row["spills"] <= (MOST_SPILLED_BYTES if row["options"] == "all" else 0), row


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("sm_80", "mma.sync"),
        ("sm_90", "wgmma.mma_async"),
        ("sm_100", "tcgen05.mma"),
        ("sm_120", "mma.sync"),
        ("gfx942", "v_mfma"),
    ],
)
def test_half_precision_uses_the_matrix_units(report, target, instruction):
    # they multiply no matrices
    row_by_row = ("block_kernel", "ranking_kernel", "distillation_kernel", "rans_decode_kernel", "merge_kernel")
    for row in of(report, target=target, dtype="bfloat16"):
        assert row["matrix_instruction"] == ("fma" if row["kernel"] in row_by_row else instruction), row


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_are_loaded_through_descriptors_where_there_are_any(report, target):
    for kernel in ("statistics_kernel", "gradient_kernel"):
        for row in of(report, target=target, kernel=kernel, dtype="bfloat16"):
            assert row["loads"] == ("TMA" if target in ("sm_90", "sm_100") else "pointers"), row
