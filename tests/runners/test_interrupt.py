"""Real signals to a real process."""

import signal
import subprocess
import sys
import time

import pytest

from rlinf.runners.checkpoint import find, verify

TRAINING = """
import sys
import rlinf.runtime.local
rlinf.runtime.local.STOP_TIMEOUT_S = 1.5  # before others import it
from rlinf.runners.checkpoint import CheckpointStore
from rlinf.runners.schedule import Schedule
from rlinf.runners.synchronous import run_sync
from tests.fakes import CountingActor, CountingAlgorithm, CountingEnv, RecordingReporter, build_crew, slow

class Printer(RecordingReporter):
    def log(self, step, metrics):
        print("step", step, flush=True)
    def note(self, text):
        print(text, flush=True)

directory, kind = sys.argv[1:]

class Env(CountingEnv):
    def step(self, action):
        if kind == "env":
            slow(0.2)()
            print("busy", flush=True)
        if kind == "hang" and self.count[0] >= 100:
            print("busy", flush=True)
            slow(100.0)()
        return super().step(action)
    def close(self):
        super().close()
        print("closed", flush=True)

def before_update():
    if kind == "update":
        slow(0.2)()
        print("busy", flush=True)

crew = build_crew([[Env(2)]], [CountingActor()], CountingAlgorithm(before_update), timeout_s=60)
schedule = Schedule(num_steps=10_000, chunks=100, updates=100, overlap=kind == "update")
last = run_sync(crew, schedule, CheckpointStore(directory), Printer())
print("ended in step", last, flush=True)
"""


def start(tmp_path, kind):
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path), kind],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while (line := process.stdout.readline()) != "busy\n":
        assert line, process.stderr.read()
    time.sleep(0.3)
    return process


@pytest.mark.parametrize(("kind", "number"), [("env", signal.SIGINT), ("update", signal.SIGTERM)])
def test_a_signal_saves_and_tells_how_to_go_on(tmp_path, kind, number):
    process = start(tmp_path, kind)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 0, err
    path = find(tmp_path)
    name = signal.Signals(number).name
    assert f"stopped by {name} in step 1; nothing is lost. Go on with: runner.resume_dir={path}" in out
    assert out.endswith("closed\nended in step 1\n")
    assert f"{name}: stopping and saving a checkpoint" in err
    progress = verify(path).progress
    assert progress.env_steps > 0, "the part of the segment that was played is kept"
    assert (progress.updates > 0) == (kind == "update")


def test_a_second_signal_ends_at_once(tmp_path):
    process = start(tmp_path, "hang")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=3)
    assert process.returncode == 130
    assert "ended without saving; the last complete checkpoint is intact" in err


def test_a_hanging_env_does_not_stop_a_stop(tmp_path):
    process = start(tmp_path, "hang")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 1
    assert "env.interact: no answer within 1.5 s from env[0] (at " in err
    assert verify(find(tmp_path)).global_step == 2
    assert "Go on with: runner.resume_dir=" in out
