"""What the processor can do, as the system reports it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CPU_FLAGS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16"}
"""Flags that decide how fast networks run, and their names for people."""

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""With any of them, products of bfloat16 are faster than those of float32."""


@cache
def cpu_flags() -> frozenset[str]:
    """The flags of the first core; none where the system does not tell (it is no Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())
