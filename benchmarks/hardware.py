"""What devices can do: by their data sheets, and as a matrix product measures it here."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import timed_once


@dataclass(frozen=True)
class Device:
    """Peaks of a data sheet, and which share of them is assumed to be reached.

    Args:
        bfloat16: dense, tensor cores, FLOP/s.
        float32: strict, outside tensor cores, FLOP/s.
        tf32: dense, tensor cores, FLOP/s.
        bytes_per_second: of memory.
        reach: of the tensor cores' peaks, by a model's products.
        reach_float32: of strict float32's peak.
    """

    bfloat16: float
    float32: float
    tf32: float
    bytes_per_second: float
    reach: float = 0.45
    reach_float32: float = 0.75

    def rate(self, precision: str) -> float:
        """FLOP/s that are assumed to be reached in ``bfloat16``, ``float32`` or ``tf32``."""
        return float(getattr(self, precision)) * (self.reach_float32 if precision == "float32" else self.reach)


# NVIDIA's data sheets; dense products, without sparsity.
DEVICES: Mapping[str, Device] = {
    "H100 SXM": Device(bfloat16=989e12, float32=67e12, tf32=494e12, bytes_per_second=3.35e12),
    "H200": Device(bfloat16=989e12, float32=67e12, tf32=494e12, bytes_per_second=4.8e12),
    "A100 80 GB SXM": Device(bfloat16=312e12, float32=19.5e12, tf32=156e12, bytes_per_second=2.04e12),
}


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 3) -> float:
    """FLOP/s of the best of some products of square matrices."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    timed_once(lambda: a @ b, device)
    return max(2 * size**3 / timed_once(lambda: a @ b, device) for _ in range(repeats))


def machine(device: str) -> str:
    """One line: processor or GPU, cores, threads, versions."""
    kind = torch.cuda.get_device_name() if device == "cuda" else processor()
    return (
        f"{kind}, {os.cpu_count()} cores, PyTorch threads: {torch.get_num_threads()}; "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    )


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
