"""The script that makes machines take part: what it refuses, and how soon."""

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/embodiment/ray_up.sh"


def run(*words: str, **env: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", str(SCRIPT), *words], capture_output=True, text=True, timeout=60, env=os.environ | env
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the first argument is head, worker or down"),
        (["hed"], "the first argument is head, worker or down"),
        (["worker"], "worker needs the address of the head, as its ray_up.sh printed it"),
        (["worker", "--name", "robot"], "worker needs the address of the head, as its ray_up.sh printed it"),
        (["head", "--name"], "--name needs a value"),
        (["head", "--nmae", "x"], "unknown option '--nmae'"),
        (["head", "--label", "robot"], "--label robot: write KEY=VALUE"),
        (["head", "--resource", "arm=some"], "--resource arm=some: write NAME=COUNT"),
        (["down", "robot"], "down ends Ray on this machine and takes nothing else, but was given 'robot'"),
    ],
)
def test_wrong_words_are_answered(words: list[str], said: str) -> None:
    code, stderr = run(*words)
    assert code == 2
    assert stderr.splitlines()[-1] == f"ray_up: {said}"


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["head", "--help"], ["worker", "--help"], ["down", "-h"]])
def test_help_is_given_wherever_it_is_asked_for(words: list[str]) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("bash examples/embodiment/ray_up.sh ") == 3


def test_a_worker_without_token_or_head_is_told_so_at_once(tmp_path: Path) -> None:
    if not (ROOT / ".venv/bin/ray").exists():
        pytest.skip("this checkout has no .venv with Ray")
    token = tmp_path / "token"
    code, stderr = run("worker", "127.0.0.1:9", RAY_AUTH_TOKEN_PATH=str(token))
    assert (code, stderr) == (2, f"ray_up: {token} is missing; copy it from the head\n")
    token.write_text("secret")
    began = time.monotonic()
    code, stderr = run("worker", "127.0.0.1:9", RAY_AUTH_TOKEN_PATH=str(token))
    assert code == 2 and "nobody answers at 127.0.0.1:9; start the head first" in stderr
    assert time.monotonic() - began < 15
