"""A person's hands on a simulator, with a script for the person."""

import numpy as np
import pytest
import torch

from rlinf.core.errors import ConfigError
from rlinf.envs.reach import ReachConfig, ReachExpert
from rlinf.envs.reach import make as make_reach
from rlinf.envs.realworld.teleop.operator import Command, ScriptedOperator
from rlinf.envs.teleoperated import OperatorStopped, Rule, TeleoperatedEnv, action_from, hand_from


def reach(num_envs: int = 1, **keys):
    config = ReachConfig(total_num_envs=num_envs, max_episode_steps=12, auto_reset=False, **keys)
    return make_reach(config, num_envs=num_envs, seed=0, control_mode=None, num_workers=0, render=False)


class Time:
    """A clock that moves by being waited for, and by a tenth of a second at every look of the operator."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def env_with(script, **keys) -> TeleoperatedEnv:
    """`script`: commands one after the other; the last one for ever."""
    left = list(script)

    def wish() -> Command:
        return left.pop(0) if len(left) > 1 else left[0]

    env = TeleoperatedEnv(reach(tolerance=1e-6), ScriptedOperator(wish), **{"rate_hz": 10, **keys})
    env.reset(seed=3)
    return env


def moves(x: float, mark: str = "") -> Command:
    return Command(np.array([x, 0, 0, 0, 0, 0.0]), mark=mark)


REST, POLICY = moves(0.0), torch.full((1, 1, 1), 0.25)


def test_the_hand_acts_while_it_moves_and_a_while_after_and_that_is_told():
    time = Time()
    script = [REST, REST, moves(0.5), *[REST] * 20]  # the first one is asked by reset
    env = env_with(script, clock=time, sleep=time.sleep)
    steps = [env.step(POLICY) for _ in range(10)]
    executed = [round(float(step.executed[0, 0, 0]), 3) for step in steps]
    # Half a second of nothing after the motion; then the policy has the arm again.
    assert executed == [0.25, 0.5, 0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25]
    assert [bool(step.intervened[0, 0]) for step in steps] == [False, *[True] * 5, *[False] * 4]
    before = float(steps[0].obs["state"][0, 0])
    assert float(steps[1].obs["state"][0, 0]) == pytest.approx(np.clip(before + 0.2 * 0.5, -1, 1), abs=1e-6)
    assert time.waits == pytest.approx([0.1] * 9)  # ten a second


def test_marks_end_the_episode():
    env = env_with([REST, moves(0.1), moves(0.0, "success")])
    env.step(POLICY)
    step = env.step(POLICY)
    assert step.terminated.tolist() == [[True]] and step.truncated.tolist() == [False]
    assert float(step.reward[0, 0]) == 1.0
    assert bool(step.info["success"]) and bool(step.info["episode/success_once"])
    env = env_with([REST, moves(0.0, "failure")])
    step = env.step(POLICY)
    assert bool(step.truncated[0]) and not bool(step.terminated.any()) and not bool(step.info["episode/success_once"])
    with pytest.raises(OperatorStopped):
        env_with([REST, moves(0.0, "stop")]).step(POLICY)


def test_a_mark_of_the_episode_before_does_not_count():
    env = env_with([moves(0.0, "failure"), REST])
    assert not bool(env.step(POLICY).done.any())
    with pytest.raises(OperatorStopped):  # but a stop always does
        env_with([moves(0.0, "stop"), REST])


def test_a_hand_moves_one_robot():
    with pytest.raises(ConfigError, match=r"one robot at a time, not 2: set env\.train\.total_num_envs=1"):
        TeleoperatedEnv(reach(2), ScriptedOperator(lambda: REST))


@pytest.mark.parametrize(
    ("size", "closing", "action"),
    [
        (7, -1, [1, 2, 3, 4, 5, 6, -1]),
        (6, -1, [1, 2, 3, 4, 5, 6]),
        (4, -1, [1, 2, 3, -1]),
        (4, 1, [1, 2, 3, 1]),
        (2, -1, [1, 2]),
    ],
)
def test_a_hand_as_an_action_and_back(size, closing, action):
    hand = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, -1.0])  # closes
    made = action_from(hand, size, closing)
    expected = [value / 10 if abs(value) > 1 or place < 3 else value for place, value in enumerate(action)]
    np.testing.assert_allclose(made, expected, rtol=1e-6)
    command = hand_from(made, closing)
    np.testing.assert_allclose(action_from(np.append(command.motion, command.gripper), size, closing), made, rtol=1e-6)


def test_larger_actions_are_no_hands():
    with pytest.raises(ConfigError, match="here are 8"):
        action_from(np.zeros(7), 8)


def test_a_script_solves_the_task_by_what_it_sees():
    rule = Rule(ReachExpert())
    env = TeleoperatedEnv(reach(), rule.operator())
    obs = env.reset(seed=1)
    for _ in range(12):
        rule.see(obs)
        step = env.step(torch.zeros(1, 1, 1))
        obs = step.obs
        if bool(step.done.any()):
            break
    assert bool(step.terminated.any()) and bool(step.info["episode/success_once"])
    env.close()
