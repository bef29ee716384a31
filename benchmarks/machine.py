"""Where something is measured: the processor, the versions, the commit, the device."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "triton", "transformers")


def environment(device: torch.device, package: str | None = None) -> dict[str, Any]:
    """Return the columns of `tables.ENVIRONMENT` that a worker knows, all but the commit; `package`
    is a peer that is measured."""
    if device.type == "cpu":
        processor = f"{_processor()}, {len(os.sched_getaffinity(0))} CPUs, {_matrix_unit()}"
    else:
        processor = torch.get_device_module(device).get_device_name(device)
    packages = _PACKAGES if package is None else (*_PACKAGES, package)
    versions = [f"{name}={metadata.version(name)}" for name in packages]
    return {
        "device": device.type,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "versions": " ".join([f"python={platform.python_version()}", *versions]),
    }


def not_installed(package: str) -> str | None:
    """Say so, if it is not."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"
    return None


def _processor() -> str:
    name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return name[1] if name else platform.processor() or platform.machine()


def _matrix_unit() -> str:
    """Say whether the processor multiplies matrices of bfloat16 by itself."""
    flags = re.search(r"^flags\s*:(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return "AMX" if flags and "amx_bf16" in flags[1].split() else "no AMX"


def commit(repo: Path = ROOT) -> str:
    """Return the commit that is measured; say so where the tree differs from it (results aside)."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=repo, capture_output=True, text=True)
        except FileNotFoundError:  # no git here
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"uncommitted tree after {head}" if changed else head


def device_named(name: str) -> torch.device:
    """Return the device; `auto` is an accelerator where there is one, else the CPU.

    Raises:
        ValueError: the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used on this machine: {reason}") from None
    return device
