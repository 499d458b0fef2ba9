"""The benchmark of LeRobot data sets prints its tables, with or without its peer."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_both_tables_are_printed_and_a_missing_peer_is_told(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/lerobot_datasets.py"), "--quick"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert ("peer: lerobot" in done.stdout) != ("(lerobot left out:" in done.stdout)
    assert {"written: 3 episodes of 12 frames", "read: random batches of 64 with chunks of 8 actions"} <= set(lines)
    rows = [line.split("  ")[0] for line in lines if line.startswith(("images rlinf", "video  rlinf", "H.264", "AV1"))]
    assert len(rows) >= 6
    assert (
        max(len(line) for line in lines if "frames/s" in line or line.startswith(("images", "video", "H.264"))) <= 100
    )
    assert list(tmp_path.iterdir()) == []  # what was written for the measurement is gone
