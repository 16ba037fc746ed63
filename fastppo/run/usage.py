"""What a training process uses of the machine: processor time and memory. For the panel, so it must cost almost nothing."""

import math
import time
from dataclasses import dataclass

from fastppo.system.cpus import available_cores
from fastppo.system.platforms import cpu_seconds, memory_bytes

CPU_SECONDS = 1.0  # that a share of the processors is measured over


@dataclass(frozen=True)
class Usage:
    """What is used now."""

    cpu: float  # share of the cores that the process may use, its children included; nan where nothing is measured yet
    memory: float  # bytes of the process in main memory; nan where the system does not say
    gpu_memory: float = 0.0  # bytes that it holds of the GPU's memory

    @property
    def memory_text(self) -> str:
        """ "312M", "12.3G GPU 45.6G"."""
        return size(self.memory) + (f" GPU {size(self.gpu_memory)}" if self.gpu_memory else "")


class UsageMeter:
    """Measures the usage, from when it is made."""

    def __init__(self) -> None:
        self._cores = available_cores()
        self._mark = (time.monotonic(), cpu_seconds())
        self._cpu = math.nan

    def read(self) -> Usage:
        """The usage now, the processors' over the last full CPU_SECONDS."""
        elapsed = time.monotonic() - self._mark[0]
        if elapsed >= CPU_SECONDS:
            used = cpu_seconds()
            self._cpu = max(used - self._mark[1], 0.0) / elapsed / self._cores  # less where a child has ended
            self._mark = (time.monotonic(), used)
        return Usage(self._cpu, memory_bytes(), gpu_memory_bytes())


def gpu_memory_bytes() -> float:
    """Memory that PyTorch holds on the GPU, in bytes; 0 where no GPU is used."""
    import torch  # here: verbs that need no torch import this module

    return torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0.0


def size(count: float) -> str:
    """Bytes as '312M' or '1.2G'."""
    if not math.isfinite(count):
        return "-"
    return f"{count / 2**20:.0f}M" if count < 1000 * 2**20 else f"{count / 2**30:.1f}G"
