"""The demo fixes the number of threads that it computes with, and records what else decides its numbers' last bits.

A sum of floats depends on the order of its terms, and threads and vector instructions decide that order. Training
carries a difference in a last bit on to other weights. At one seed the same processor and number of threads give the
same bits; another processor gives others.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

THREADS = 2


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with ``count`` threads, whatever the environment and the number of cores say."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def circumstances() -> dict[str, str | int]:
    """Return what the numbers of one seed depend on beside the versions: threads, device, processor."""
    return {
        "threads": torch.get_num_threads(),
        "device": str(torch.accelerator.current_accelerator() or "cpu"),
        "processor": processor(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
    }


def processor() -> str:
    """Return the processor's name as the kernel gives it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
