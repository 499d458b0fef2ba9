"""Processes that die, fail or hang, and memory that must not outlive them."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest
import torch

from rlinf.core.errors import CheckpointError, NonFiniteError, WorkerDied
from rlinf.envs.episodes import EpisodeRules, ReplayedEnv
from rlinf.envs.reach import ReachWorlds
from rlinf.envs.subproc import SubprocessEnv

RULES = EpisodeRules(max_episode_steps=4)


class TroubledWorlds(ReachWorlds):
    """Reach worlds that come to harm when the action of the first is 1."""

    def __init__(self, num_envs, trouble):
        super().__init__(num_envs)
        self.trouble = trouble

    def advance(self, action, active):
        if action[0, 0] == 1:
            if self.trouble == "raise":
                raise ZeroDivisionError("no such joint")
            if self.trouble == "hang":
                time.sleep(60)
            if self.trouble == "exit":
                print("the last words", flush=True)
                os._exit(3)
            self._point[0] = float("nan")
        return super().advance(action, active)


def part(num_envs, first_row, trouble=None):
    worlds = TroubledWorlds(num_envs, trouble) if trouble else ReachWorlds(num_envs)
    return ReplayedEnv(worlds, RULES, seed=3, first_row=first_row)


def started(trouble=None, **timeouts):
    makers = [partial(part, 2, 0), partial(part, 1, 2, trouble)]
    return SubprocessEnv(makers, label="reach", **timeouts)


@pytest.fixture(scope="module")
def healthy():
    env = started()
    yield env
    env.close()


def all_gone(pids):
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_rows_are_those_of_one_environment(healthy):
    whole = part(3, 0)
    for env_seed in (None, 8):
        assert torch.equal(healthy.reset(env_seed)["state"], whole.reset(env_seed)["state"])
    generator = torch.Generator().manual_seed(0)
    for horizon in (1, 2, 1, 3):
        action = 2 * torch.rand(3, horizon, 1, generator=generator) - 1
        mine, theirs = healthy.step(action), whole.step(action)
        for name in ("reward", "terminated", "truncated", "executed", "intervened"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert torch.equal(mine.obs["state"], theirs.obs["state"])
        assert torch.equal(mine.last_obs["state"], theirs.last_obs["state"])
        for name, value in theirs.info.items():
            assert torch.equal(mine.info[name], value), name


def test_state_moves_between_numbers_of_processes(healthy):
    whole = part(3, 0)
    healthy.reset(1)
    action = torch.full((3, 1, 1), 0.3)
    healthy.step(action)
    whole.load_state_dict(healthy.state_dict())
    assert torch.equal(whole.step(action).obs["state"], healthy.step(action).obs["state"])
    healthy.load_state_dict(whole.state_dict())
    assert torch.equal(whole.step(action).obs["state"], healthy.step(action).obs["state"])
    with pytest.raises(CheckpointError, match="of 2 environments; this configuration has 3"):
        healthy.load_state_dict(part(2, 0).state_dict())


def test_a_killed_process_is_named_and_the_rest_ended():
    env = started()
    env.reset(0)
    pids = env.pids
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"worker 1 of 2 \(reach\), environments 2 to 2, was killed by SIGKILL"):
        for _ in range(2):
            env.step(torch.zeros(3, 1, 1))
    assert all_gone(pids)
    with pytest.raises(RuntimeError, match="closed"):
        env.reset()
    env.close()


@pytest.mark.parametrize(
    ("trouble", "error", "words"),
    [
        ("raise", WorkerDied, r"(?s)environments 2 to 2, failed.*ZeroDivisionError: no such joint"),
        ("exit", WorkerDied, r"(?s)ended with exit code 3; its last words:.*the last words"),
        ("hang", WorkerDied, r"environments 2 to 2, gave no answer for 1 s"),
        ("nan", NonFiniteError, r"environment 2 is not finite, at step"),
    ],
)
def test_trouble_in_a_process_reaches_the_caller(trouble, error, words):
    env = started(trouble, answer_timeout_s=1.0 if trouble == "hang" else 60.0)
    env.reset(0)
    pids = env.pids
    with pytest.raises(error, match=words):
        env.step(torch.tensor([0.0, 0.0, 1.0])[:, None, None])
    assert all_gone(pids)


def test_processes_end_when_the_caller_is_killed():
    program = """
        import sys, time
        from tests.envs.test_subproc import started
        env = started()
        print(*env.pids, flush=True)
        time.sleep(60)
    """
    caller = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )
    pids = [int(pid) for pid in caller.stdout.readline().split()]
    assert len(pids) == 2
    caller.kill()
    caller.wait()
    caller.stdout.close()
    deadline = time.monotonic() + 10
    while not all(is_dead(pid) for pid in pids):
        assert time.monotonic() < deadline, "environment workers outlived their caller"
        time.sleep(0.05)


def is_dead(pid):
    """Gone, or a zombie that waits for whoever adopted it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
