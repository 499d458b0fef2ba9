"""A run of a robot cell that is asked to end while the cell waits: in this process, and over Ray."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest

from rlinf.envs.realworld.arms.fake import FakeArm
from rlinf.launch.crew import Layout, build_crew
from rlinf.launch.parse import load_config
from rlinf.launch.run import schedule_of, train
from rlinf.runners.asynchronous import run_async
from rlinf.runners.checkpoint import CheckpointStore, find, verify
from rlinf.runtime.local import CHANNEL_TIMEOUT_S, LocalRuntime
from tests.envs.realworld.cell import SerlClient, served
from tests.fakes import RecordingReporter

SOON_S = 60
"""Also on a busy machine, and sooner than anybody's patience ends. A call that is silent for ten seconds after the stop
would fail the run."""


@pytest.fixture
def recipe(reach_configs):
    """A learner of three numbers behind a server with a fake arm; `words(url)` are its overrides."""
    (reach_configs / "env/cell.yaml").write_text(
        "env_type: realworld\nmax_episode_steps: 4\nmax_steps_per_rollout_epoch: 8\n"
        "override_cfg: {driver: serl_http, cameras: {}, target_ee_pose: [0.5, 0, 0.1, 3.14159265, 0, 0], "
        "step_frequency: 50, lift_m: 0, reset_s: 0.1, robot_wait_s: 100, stop_wait_s: 100}\n"
    )

    def config(url, **more):
        words = {
            "env@env.train": "cell",
            "env.train.total_num_envs": 1,
            "env.train.override_cfg.robot_url": url,
            "runner.asynchronous": True,
            "runner.max_epochs": 100000,
            "runner.val_check_interval": -1,
            "algorithm.replay_buffer.samples_per_insert": 16,
            **more,
        }
        given = [f"{key}={value}" for key, value in words.items()]
        return load_config("reach", given, reach_configs, has_gpu=lambda: False)

    return config


def test_a_policy_waits_as_long_as_its_cell_waits_for_a_person_and_no_shorter(recipe):
    """Or else the run would end after ten minutes with the policy's complaint, the person still being waited for."""
    crew = build_crew(
        recipe("null", **{"env.train.override_cfg.driver": "fake", "env.train.override_cfg.stop_wait_s": 7200}),
        LocalRuntime(),
    )
    [patience_s] = crew.rollout.run(lambda worker: worker.timeout_s).wait()
    assert crew.close() == []
    assert patience_s == CHANNEL_TIMEOUT_S + 7200 + 100


class Cable:
    """The network between an environment and its server: whoever connects to `url` talks to the server, until `cut`."""

    def __init__(self, url):
        host, port = url.removeprefix("http://").split(":")
        self._server, self._up, self._ends = (host, int(port)), True, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        """Nothing arrives any more, and nobody is told."""
        self._up = False

    def close(self):
        for end in [self._listener, *self._ends]:
            end.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, far = self._listener.accept()[0], socket.create_connection(self._server)
                self._ends += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=[source, target], daemon=True).start()

    def _carry(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._up:
                    target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def until(what, seconds=100):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def interrupt(learned, trouble, asked):
    """Make trouble once something is learned, and ask for the end while it is waited for."""
    until(learned)
    trouble()
    time.sleep(1.5)
    asked.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def cell():
    """A served fake arm, the server's address, and a cable to it."""
    arm = FakeArm(home=(0.5, 0, 0.2, 1, 0, 0, 0))
    with served(arm) as (_, url):
        cable = Cable(url)
        try:
            yield arm, url, cable
        finally:
            cable.close()


def test_a_run_ends_well_while_its_robot_is_waited_for(tmp_path, recipe, capfd):
    run_dir, asked = tmp_path / "logs/reach", []
    journal = run_dir / "metrics.jsonl"
    with cell() as (arm, _, cable):
        arguments = [lambda: journal.is_file() and "\n" in journal.read_text(), cable.cut, asked]
        threading.Thread(target=interrupt, args=arguments, daemon=True).start()
        assert train(recipe(cable.url)) == 128 + signal.SIGTERM
        assert time.monotonic() - asked[0] < SOON_S
        assert abs(arm.state().velocity).max() < 1e-3  # held, by the server's watchdog
    told = "".join(capfd.readouterr())
    assert "nothing is lost. Go on with: runner.resume_dir=" in told and "no answer within" not in told
    assert verify(find(run_dir)).progress.env_steps >= 8


def test_the_end_of_a_run_is_heard_in_the_process_of_an_environment_that_waits_for_a_person(
    tmp_path, recipe, ray_machine
):
    from rlinf.runtime.ray_backend import RayRuntime, Seat

    reporter, asked, store = RecordingReporter(), [], CheckpointStore(tmp_path / "checkpoints")
    with cell() as (arm, url, _):
        config = recipe(url)
        runtime = RayRuntime([Seat("cell", ray_machine.node_id, "127.0.0.1")])
        crew = build_crew(config, runtime, Layout())
        arguments = [lambda: reporter.logged, lambda: SerlClient(url).post("stop", {"reason": "look"}), asked]
        threading.Thread(target=interrupt, args=arguments, daemon=True).start()
        run_async(crew, schedule_of(config), store, reporter)
        assert time.monotonic() - asked[0] < SOON_S
        runtime.close()
        assert abs(arm.state().velocity).max() < 1e-3
    assert crew.stop.reason == "SIGTERM"
    assert any("nothing is lost" in note for note in reporter.notes), reporter.notes
    assert verify(find(tmp_path)).progress.env_steps >= 8
