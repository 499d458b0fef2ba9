"""`python -m rlinf reward_classifier`: from recorded episodes to a cell's reward."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from rlinf.core.errors import ConfigError
from rlinf.launch.cli.collect import StatusLine
from rlinf.launch.machine import num_cores
from rlinf.launch.reward_classifier import ClassifierOptions, train_classifier

FILE = "reward_classifier.safetensors"
AT_LEAST = {"success_frames": 1, "gap": 0, "steps": 1, "batch_size": 2, "shift": 0}


def run(chosen: argparse.Namespace) -> int:
    """Train as `options.add_classifier_options` says. Returns 130 when it was interrupted. Raises RlinfError."""
    for name, least in AT_LEAST.items():
        value = getattr(chosen, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}")
    for name in ("threshold", "held_out"):
        if not 0 < getattr(chosen, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be between 0 and 1")
    output = Path(chosen.output or Path(chosen.folders[0]) / FILE)
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: the name must end in .safetensors")
    options = ClassifierOptions(
        folders=tuple(chosen.folders),
        failures=tuple(chosen.failures),
        output=str(output),
        success_frames=chosen.success_frames,
        gap=chosen.gap,
        held_out=chosen.held_out,
        steps=chosen.steps,
        batch_size=chosen.batch_size,
        shift=chosen.shift,
        threshold=chosen.threshold,
        seed=chosen.seed,
    )
    torch.set_num_threads(max(1, num_cores() // 2))  # as many again would spin against whatever else runs
    line, before = StatusLine(sys.stdout), _written(output)
    try:
        figures = train_classifier(options, line)
    except KeyboardInterrupt:
        kept = f"the best weights so far are in {output}" if _written(output) != before else "nothing was written"
        print(f"interrupted; {kept}", file=sys.stderr)
        return 130
    for text in figures.describe(options.threshold):
        line.note(text)
    line.note(
        f"{output}: to use it, of env.train.override_cfg: reward=classifier classifier_path={output} "
        f"classifier_threshold={options.threshold:g}"
    )
    return 0


def _written(path: Path) -> int:
    """When, as a number; 0 for a file that is not there."""
    return path.stat().st_mtime_ns if path.is_file() else 0
