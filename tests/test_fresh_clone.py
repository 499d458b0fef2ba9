"""The README's commands, one after the other, in a copy of what is in version control."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_house import shell_lines, tracked_files

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "profile=cpu",
    "runner.max_epochs=2",
    "runner.val_check_interval=2",
    "algorithm.update_epoch=1",
    "algorithm.replay_buffer.min_buffer_size=4",
    "actor.global_batch_size=4",
    "actor.micro_batch_size=4",
    "env.train.total_num_envs=2",
    "env.train.num_workers=0",
    "env.eval.total_num_envs=1",
    "env.eval.num_workers=0",
    "env.eval.video_cfg.save_video=False",
]

pytestmark = [pytest.mark.sim, pytest.mark.slow]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    pytest.importorskip("mani_skill")
    clone = tmp_path_factory.mktemp("clone")
    for path in tracked_files():
        copy = clone / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    # Installing again would take minutes: the environment of these tests serves the copy too.
    (clone / ".venv").symlink_to(Path(sys.executable).parents[1])
    return clone


def run(clone: Path, command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    words = command.split()
    done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def documented(pattern: str) -> list[str]:
    lines = shell_lines(ROOT / "README.md")
    return [line for line in dict.fromkeys(lines) if re.search(pattern, line)]


def the_run(clone: Path) -> str:
    [path] = {p.parent for p in clone.glob("logs/*/*/metrics.jsonl") if "maniskill_sac_flow_state" in p.parts[-3]}
    return str(path.relative_to(clone))


def documented_metrics() -> set[str]:
    """Tags of docs/metrics.md: every name in the first column of a table, under each prefix of its heading."""
    found, prefixes = set(), []
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("#"):
            prefixes = re.findall(r"`([\w/]+/)`", line)
        elif line.startswith("| `"):
            names = re.findall(r"`([\w/]+)`", line.split("|")[1])
            found |= {prefix + name for prefix in prefixes for name in names}
    return found


def test_readme_commands_work_in_order(clone):
    first, *_ = documented(r"run_embodiment\.sh maniskill_sac_flow_state$")
    run(clone, " ".join([first, *TINY]))
    run_dir = the_run(clone)
    for file in ("config.yaml", "provenance.json", "metrics.jsonl", "learning_curve.png", "checkpoints/latest"):
        assert (clone / run_dir / file).exists(), f"{file} is missing"
    rows = [json.loads(line) for line in (clone / run_dir / "metrics.jsonl").read_text().splitlines()]
    emitted = {tag for row in rows for tag in row if "/" in tag}
    assert "train/sac/critic_loss" in emitted
    assert emitted <= documented_metrics()

    [plot], [evaluate] = documented("rlinf plot"), documented("rlinf eval")
    run(clone, plot.replace("RUN", run_dir))
    assert "success_once" in run(clone, evaluate.replace("RUN", run_dir))

    [resume] = documented("resume_dir=RUN")
    resumed = run(clone, " ".join([resume.replace("RUN", run_dir), *TINY, "runner.max_epochs=3"]))
    assert "3" in resumed

    [configs], [doctor] = documented("rlinf configs"), documented("rlinf doctor")
    assert "maniskill_sac_flow_state" in run(clone, configs)
    run(clone, doctor)


def test_documented_overrides_are_accepted(clone):
    from rlinf.launch.parse import load_config

    examples = documented(r"run_embodiment\.sh \w+ .*=(?!RUN)")
    assert examples
    for line in examples:
        recipe, *overrides = line.split()[2:]
        load_config(recipe, overrides, clone / "examples/embodiment/config")
