"""Every kernel compiles for every target, ahead of time and without a GPU, and fits its shared memory."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
from litropy.kernels.compile_report import SHARED_MEMORY_LIMIT, compile_report
for row in compile_report():
    assert row.shared_memory <= SHARED_MEMORY_LIMIT[row.target], row
    assert row.spills <= 256, row
    print(row.target, row.kernel, row.dtype, row.matrix_instruction)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    # the compiler and the interpreter do not share a process, and the cache must not hide a failure
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()]


def test_all_targets_compile(report):
    assert len(report) == 5 * 2 * 3
    assert {row[0] for row in report} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma")],
)
def test_half_precision_uses_the_matrix_units(report, target, instruction):
    chosen = {row[3] for row in report if row[0] == target and row[2] in ("bfloat16", "float16")}
    assert chosen == {instruction}
