"""Compile every Triton kernel for every target, no GPU needed, and record what each takes.

python benchmarks/compile_kernels.py    # about 5 minutes on one core
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Compile and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "compile_kernels.json", help="JSON file to write")
    output = parser.parse_args().output
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: it interprets or compiles, never both
    import triton

    from litropy.kernels.compile_report import SHARED_MEMORY_LIMIT, compile_report

    rows = []
    for compiled in compile_report():
        print(f"{compiled.target} {compiled.kernel} {compiled.dtype}, options: {compiled.options}", flush=True)
        rows.append(asdict(compiled))
    record = {"benchmark": "compile_kernels", "triton": triton.__version__, "shared_memory_limit": SHARED_MEMORY_LIMIT}
    output.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
