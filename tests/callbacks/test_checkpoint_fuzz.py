"""A fuzzer that sees which lines it reaches finds no file that does harm. Needs ``pip install -e '.[fuzz]'``."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_fuzzer_finds_nothing(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed; it has no wheels for every Python and system")
    script = Path(__file__).with_name("fuzz_checkpoint.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "fuzz"), "60"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Done " in done.stderr
