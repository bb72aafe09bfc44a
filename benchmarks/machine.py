"""What a measurement has to say about where and when it was made."""

import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "cut-cross-entropy", "liger-kernel", "quack-kernels", "verl")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def version_of(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit that is checked out, and whether the package differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git(
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            "../kernels",
            "../losses",
            "../callbacks",
            "../recipes",
        )
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(device: str) -> dict[str, Any]:
    """Hardware, versions, commit and date."""
    cores = len(os.sched_getaffinity(0))
    return {
        "device": device,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{_cpu_model()}, {cores} cores",
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: version for package in PACKAGES if (version := version_of(package))},
        "cuda": torch.version.cuda if device == "cuda" else None,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def keep_memory() -> bool:
    """Let the process keep what it frees, or page faults, whose time varies, would count; whether the system can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4  # of GNU's C library
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


def slug(hardware: str) -> str:
    """File-name form of a machine's name."""
    return re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
