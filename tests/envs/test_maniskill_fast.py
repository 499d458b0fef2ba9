"""The fast step against ManiSkill's own, in the same scene."""

import numpy as np
import pytest

pytest.importorskip("mani_skill")

from rlinf.envs.maniskill.expert import PickCubeExpert
from rlinf.envs.maniskill.fast import FastScene, why_not_fast
from rlinf.envs.maniskill.scene import ManiSkillScene, SceneSpec

pytestmark = pytest.mark.sim

GRASPED, ARM_AND_GRIP = 18, 8


def expert_move(scene, step, generator):
    return PickCubeExpert().act(scene.observe()[None])[0]


def random_move(scene, step, generator):
    return generator.uniform(-1.2, 1.2, scene.action_dim).astype(np.float32)


def close_by_joints(scene, step, generator):
    """Lower the hand through the joints and close it, so that contacts happen without inverse kinematics."""
    action = generator.uniform(-0.3, 0.3, ARM_AND_GRIP)
    action[1] += 0.4 if step < 12 else 0.0
    action[-1] = 1.0 if step < 12 else -1.0
    return action.astype(np.float32)


def push(scene, step, generator):
    state = scene.observe()
    tool, cube = state[18:21], state[28:31]
    behind = cube + np.array([-0.08, 0, 0])
    target = cube + np.array([0.2, 0, 0]) if abs(tool[1] - cube[1]) < 0.01 and tool[2] < 0.03 else behind
    return np.append(np.clip((target - tool) / 0.1, -1, 1), -1).astype(np.float32)


def differences(spec, choose, seeds, steps=50):
    """(largest |Δobs|, largest |Δreward|, steps at which the fast scene grasped, disagreements on success)."""
    slow, fast = ManiSkillScene(spec), FastScene(spec)
    obs = reward = 0.0
    grasps = disagreements = 0
    for seed in seeds:
        slow.begin(seed), fast.begin(seed)
        generator = np.random.default_rng(seed)
        obs = max(obs, float(np.abs(slow.observe() - fast.observe()).max()))
        for step in range(steps):
            action = choose(slow, step, generator)
            slow_reward, slow_success, _ = slow.advance(action)
            fast_reward, fast_success, _ = fast.advance(action)
            obs = max(obs, float(np.abs(slow.observe() - fast.observe()).max()))
            reward = max(reward, abs(slow_reward - fast_reward))
            grasps += int(fast.observe()[GRASPED] > 0.5)
            disagreements += slow_success != fast_success
    return obs, reward, grasps, disagreements


CASES = [
    ("PickCube-v1", "pd_ee_delta_pos", expert_move, "normalized_dense"),
    ("PickCube-v1", "pd_ee_delta_pos", random_move, "dense"),
    ("PickCube-v1", "pd_joint_delta_pos", close_by_joints, "normalized_dense"),
    ("PickCube-v1", "pd_joint_delta_pos", random_move, "sparse"),
    ("PushCube-v1", "pd_ee_delta_pos", push, "normalized_dense"),
    ("PushCube-v1", "pd_joint_delta_pos", random_move, "dense"),
]


@pytest.mark.parametrize(("task", "control_mode", "choose", "reward"), CASES)
def test_fast_step_equals_maniskills(task, control_mode, choose, reward):
    spec = SceneSpec(task, control_mode, reward=reward)
    obs, rewards, grasps, disagreements = differences(spec, choose, seeds=range(3), steps=30)
    # To the bit: a contact turns a difference of 1e-7 into one of 1e-2 within a step.
    assert obs == 0
    assert rewards < 1e-6
    assert disagreements == 0
    if choose is expert_move:
        assert grasps >= 20


@pytest.mark.parametrize("task", ["PickCube-v1", "PushCube-v1"])
def test_episodes_begin_as_maniskills(task):
    spec = SceneSpec(task, "pd_joint_delta_pos")
    slow, fast = ManiSkillScene(spec), FastScene(spec)
    for seed in np.random.default_rng(0).integers(2**31, size=150).tolist():
        slow.begin(seed), fast.begin(seed)
        assert slow.observe().tobytes() == fast.observe().tobytes()


def test_says_why_a_scene_cannot_be_stepped_fast():
    assert why_not_fast(SceneSpec("PickCube-v1", "pd_ee_delta_pos")) is None
    assert "not for StackCube-v1" in why_not_fast(SceneSpec("StackCube-v1", "pd_ee_delta_pos"))
    assert "not pd_ee_delta_pose" in why_not_fast(SceneSpec("PickCube-v1", "pd_ee_delta_pose"))
    assert "not xarm6_robotiq" in why_not_fast(SceneSpec("PickCube-v1", "pd_ee_delta_pos", robot="xarm6_robotiq"))


def test_an_episode_forgets_the_one_before():
    """PhysX keeps contact caches between episodes; a grasp in one must not show in the next."""

    def episode(scene, seed):
        scene.begin(seed)
        states = [scene.observe()]
        for step in range(30):
            scene.advance(expert_move(scene, step, None))
            states.append(scene.observe())
        return np.stack(states)

    spec = SceneSpec("PickCube-v1", "pd_ee_delta_pos")
    fresh, used = FastScene(spec), FastScene(spec)
    episode(used, 5), episode(used, 7)
    expected = episode(fresh, 5)
    assert (expected[:, GRASPED] > 0.5).sum() > 3
    assert np.array_equal(episode(used, 5), expected)
