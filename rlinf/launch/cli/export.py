"""`python -m rlinf export`: what a run has learned, as a folder that other recipes load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from rlinf.core.errors import ConfigError
from rlinf.launch.export import export_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(path: Path, output: Path | None, overrides: Sequence[str], precision: Literal["fp32", "bf16"] | None) -> None:
    """Export, say on stderr what came of it, and print the folder. Raises RlinfError."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a run directory")
    made = export_run(path, output, overrides, dtype=None if precision is None else DTYPES[precision])
    for remark in made.remarks:
        print(remark, file=sys.stderr)
    print(made.folder)
