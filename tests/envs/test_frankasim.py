"""PandaPickCube: physics, reward, resets, pictures; the rules that all environments share are in tests/contracts."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlinf.core.errors import MissingDependency, ShapeError
from rlinf.envs.frankasim.config import FrankaSimConfig
from rlinf.envs.frankasim.control import reward_and_success

if importlib.util.find_spec("gym_hil") is None:
    pytest.skip("gym-hil is not installed", allow_module_level=True)

from rlinf.envs.frankasim import pictures, scene
from rlinf.envs.frankasim.control import TARGET_HIGH_M, TARGET_LOW_M, NumpyControl
from rlinf.envs.frankasim.expert import PickCubeExpert
from rlinf.envs.frankasim.kernel import CompiledControl
from rlinf.envs.frankasim.worlds import INSTRUCTION, PickCubeWorlds

mujoco = scene.import_mujoco()
pytestmark = pytest.mark.sim

ALL = np.ones(1, bool)


@pytest.fixture(scope="module")
def model():
    return scene.physics_model()


@pytest.fixture(scope="module")
def worlds():
    made = PickCubeWorlds(3)
    yield made
    made.close()


def placed(model, *, arm=scene.ARM_HOME_RAD, target=None, block=(0.4, 0.1)):
    """A world with the arm at these angles; without a target it is told to stay."""
    data, places = mujoco.MjData(model), scene.Places.of(model)
    data.qpos[:7] = arm
    data.qpos[places.block_qpos : places.block_qpos + 2] = block
    mujoco.mj_forward(model, data)
    data.mocap_pos[0] = data.site_xpos[places.tool] if target is None else target
    return data


def advance(worlds, *actions, active=None):
    n = worlds.num_envs
    active = torch.ones(n, dtype=torch.bool) if active is None else active
    for action in actions:
        outcome = worlds.advance(torch.tensor([action] * n, dtype=torch.float32), active)
    return outcome


def states(worlds):
    return worlds.observe()["state"].numpy()


# ---- controller


@pytest.mark.parametrize("seed", range(2))
def test_machine_code_moves_as_numpy_does(model, seed):
    one, other = placed(model), placed(model)
    slow, fast = NumpyControl(model, [one]), CompiledControl(model, [other])
    generator = np.random.default_rng(seed)
    for _ in range(40):
        action = generator.uniform(-1, 1, (1, 4)).astype(np.float32)
        slow.advance(action, ALL), fast.advance(action, ALL)
        assert np.abs(one.qpos - other.qpos).max() < 1e-9
    assert np.abs(one.qvel - other.qvel).max() < 1e-7


def test_torques_agree_in_any_pose_also_singular_ones(model):
    generator, dets = np.random.default_rng(0), []
    low, high = model.jnt_range[:7].T
    poses = [*generator.uniform(low, high, (60, 7)), np.array([0, 0, 0, -0.07, 0, 0, 0])]
    for pose in poses:
        data = placed(model, arm=pose, target=generator.uniform(TARGET_LOW_M, TARGET_HIGH_M))
        data.qvel[:7] = generator.normal(size=7)
        control = NumpyControl(model, [data])
        torque, found = control.torques(data), CompiledControl(model, [data]).torques(0)
        j, inverse = control._jacobian[:, :7], np.linalg.inv(control._inertia[:7, :7])
        dets.append(np.linalg.det(j @ inverse @ j.T))
        assert np.allclose(torque, found, rtol=1e-7, atol=1e-7)
    assert min(dets) < 1e-2 < max(dets)  # both forms of the inverse were taken


def test_the_sensors_that_are_left_out_do_not_move_anything(model):
    whole = mujoco.MjModel.from_xml_path(str(scene.scene_file()))
    assert whole.nsensor > model.nsensor
    one, other = placed(whole), placed(model)
    for _ in range(50):
        for m, data in ((whole, one), (model, other)):
            data.ctrl[1], data.ctrl[7] = 20, 100
            mujoco.mj_step(m, data)
    assert np.array_equal(one.qpos, other.qpos)


def test_arm_stays_when_it_is_not_told_to_move(worlds):
    worlds.begin(range(3), range(3))
    before = states(worlds)
    advance(worlds, *[(0, 0, 0, 0)] * 20)
    assert np.abs(states(worlds)[:, :3] - before[:, :3]).max() < 2e-3


def test_action_moves_the_target_a_tenth_and_within_its_box(worlds):
    worlds.begin(range(3), range(3))
    data = worlds._worlds[0]
    start = data.mocap_pos[0].copy()
    advance(worlds, (0.5, -0.25, -1, 0))
    assert np.allclose(data.mocap_pos[0], start + np.array([0.05, -0.025, -0.1]))
    advance(worlds, *[(7, 7, 7, 0)] * 2)  # clipped to 1
    assert np.allclose(data.mocap_pos[0], np.minimum(start + np.array([0.25, 0.175, 0.1]), TARGET_HIGH_M))
    advance(worlds, *[(-1, -1, -1, 0)] * 10)
    assert np.allclose(data.mocap_pos[0], TARGET_LOW_M)


def test_tool_follows_its_target(worlds):
    worlds.begin(range(3), range(3))
    advance(worlds, (1, 0, -1, 0), *[(0, 0, 0, 0)] * 40)
    assert np.abs(states(worlds)[0, :3] - worlds._worlds[0].mocap_pos[0]).max() < 5e-3


def test_gripper_adds_up_increments(worlds):
    worlds.begin(range(3), range(3))
    seen = []
    for increment in (0.25, 0.5, 1.0, -0.25):
        advance(worlds, (0, 0, 0, increment))
        seen.append(float(states(worlds)[0, 6]))
    assert seen == pytest.approx([0.25, 0.75, 1.0, 0.75])


def test_inactive_worlds_stand_still(worlds):
    worlds.begin(range(3), range(3))
    before = states(worlds)
    advance(worlds, (1, 1, -1, 1), active=torch.tensor([True, False, True]))
    moved = (states(worlds) != before).any(1)
    assert moved.tolist() == [True, False, True]


# ---- reward


def state(tool, block):
    return np.concatenate((tool, np.zeros(3), [0.0], block))[None]


@pytest.mark.parametrize(
    ("tool", "block", "reward", "success"),
    [
        ((0.4, 0, 0.02), (0.4, 0, 0.02), 0.3, False),
        ((0.4, 0, 0.12), (0.4, 0, 0.02), 0.3 * math.exp(-2), False),
        ((0.4, 0.03, 0.06), (0.4, 0, 0.02), 0.3 * math.exp(-1), False),
        ((0.4, 0, 0.07), (0.4, 0, 0.07), 0.3 + 0.7 * 0.25, False),
        ((0.4, 0, 0.1201), (0.4, 0, 0.1201), 0.3 + 0.7 * 0.5005, True),
        ((0.4, 0, 0.4), (0.4, 0, 0.4), 1.0, True),
        ((0.4, 0, 0.02), (0.4, 0, 0.01), 0.3 * math.exp(-0.2), False),
    ],
)
def test_reward_of_states_by_hand(tool, block, reward, success):
    found, solved = reward_and_success(state(tool, block), np.array([0.02]))
    assert found == pytest.approx(reward)
    assert bool(solved[0]) is success


def test_reward_is_that_of_the_state(worlds):
    worlds.begin(range(3), range(3))
    outcome = advance(worlds, (0.2, 0.1, -1, 0.3))
    expected, _ = reward_and_success(worlds._state(), np.full(3, 0.02))
    assert np.allclose(outcome.reward.numpy(), expected, atol=1e-6)


def test_expert_grasps_and_lifts_everywhere():
    worlds, expert, total = PickCubeWorlds(8), PickCubeExpert(), 0.0
    worlds.begin(range(8), range(8))
    for _ in range(100):
        outcome = worlds.advance(torch.from_numpy(expert.act(states(worlds))), torch.ones(8, dtype=torch.bool))
        total = total + outcome.reward
    assert outcome.success.all()
    assert not outcome.failure.any()
    assert total.mean() > 60 and total.min() > 55


def test_expert_refuses_other_states():
    with pytest.raises(ShapeError, match="10"):
        PickCubeExpert().act(np.zeros((1, 7), np.float32))


# ---- resets


def test_block_lies_in_its_rectangle_and_depends_on_the_seed(worlds):
    seen = []
    for seed in range(0, 60, 3):
        worlds.begin(range(3), range(seed, seed + 3))
        seen.append(states(worlds)[:, 7:])
    blocks = np.concatenate(seen)
    assert (blocks[:, :2] >= [0.25, -0.25]).all() and (blocks[:, :2] <= [0.55, 0.25]).all()
    assert len(np.unique(blocks[:, 0])) == 60
    assert (np.ptp(blocks[:, :2], axis=0) > [0.2, 0.35]).all()
    assert np.allclose(blocks[:, 2], 0.02)
    np.random.seed(1)  # the global generator means nothing
    worlds.begin(range(3), range(57, 60))
    assert np.array_equal(states(worlds)[:, 7:], seen[-1])


def test_episode_depends_on_its_seed_alone():
    generator = np.random.default_rng(0)
    actions = torch.from_numpy(generator.uniform(-1, 1, (30, 1, 4)).astype(np.float32))
    actions[:, :, 2] -= 0.3  # down, where contacts are

    def episode(worlds):
        worlds.begin([0], [5])
        active = torch.ones(1, dtype=torch.bool)
        return np.stack([worlds.advance(action, active).reward.numpy() for action in actions]), states(worlds)

    worlds = PickCubeWorlds(1)
    first = episode(worlds)
    worlds.begin([0], [6])
    expert = PickCubeExpert()
    for _ in range(45):  # a past with a grasp
        worlds.advance(torch.from_numpy(expert.act(states(worlds))), torch.ones(1, dtype=torch.bool))
    again, fresh = episode(worlds), episode(PickCubeWorlds(1))
    for other in (again, fresh):
        assert np.array_equal(first[0], other[0]) and np.array_equal(first[1], other[1])


def test_batch_is_single_worlds_step_for_step():
    generator = np.random.default_rng(1)
    batch, singles = PickCubeWorlds(3), [PickCubeWorlds(1) for _ in range(3)]
    batch.begin(range(3), range(3))
    for row, single in enumerate(singles):
        single.begin([0], [row])
    for _ in range(20):
        action = torch.from_numpy(generator.uniform(-1, 1, (3, 4)).astype(np.float32))
        together = batch.advance(action, torch.ones(3, dtype=torch.bool))
        alone = [
            single.advance(action[row : row + 1], torch.ones(1, dtype=torch.bool)) for row, single in enumerate(singles)
        ]
        assert torch.equal(together.reward, torch.cat([outcome.reward for outcome in alone]))
        assert np.array_equal(states(batch), np.concatenate([states(single) for single in singles]))


# ---- pictures


@pytest.fixture(scope="module")
def vision():
    made = PickCubeWorlds(2, obs_mode="rgb", image_size=64, rendering="cheap")
    yield made
    made.close()


def block_pixels(picture):
    """Number of pixels that have the block's colour: red and blue over green."""
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return int(((red > green + 30) & (blue > green + 30)).sum())


def test_both_cameras_see_the_block(vision):
    vision.begin([0, 1], [0, 1])
    obs = vision.observe()
    assert obs["state"].shape == (2, 7)
    assert obs["instruction"] == [INSTRUCTION] * 2
    for camera, fewest in (("front", 4), ("wrist", 20)):
        picture = obs["images"][camera].numpy()
        assert picture.shape == (2, 64, 64, 3) and picture.dtype == np.uint8
        assert 60 < picture.mean() < 190  # neither dark nor burnt out
        assert all(block_pixels(one) >= fewest for one in picture)


def test_pictures_are_drawn_when_asked_for_and_of_moved_worlds_only(vision, monkeypatch):
    drawn = []
    draw = vision._painter.draw

    def counted(worlds, camera, out):
        drawn.append(len(worlds))
        draw(worlds, camera, out)

    monkeypatch.setattr(vision._painter, "draw", counted)
    vision.begin([0, 1], [0, 1])
    before = vision.observe()["images"]["front"]
    advance(vision, (1, 0, 0, 0), (1, 0, 0, 0), (1, 0, 0, 0), active=torch.tensor([False, True]))
    assert drawn == [2, 2]
    after = vision.observe()["images"]["front"]
    vision.observe()
    assert drawn == [2, 2, 1, 1, 0, 0]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_pictures_depend_on_the_state_alone(vision):
    vision.begin([0, 1], [3, 3])
    images = vision.observe()["images"]
    assert all(torch.equal(image[0], image[1]) for image in images.values())


def test_film_of_the_state_environment():
    worlds = PickCubeWorlds(2, num_filmed=1, film_size=(48, 32), rendering="cheap")
    assert set(worlds.observe()) == {"state"}
    assert worlds.render().shape == (1, 32, 48, 3)
    assert block_pixels(worlds.render()[0]) > 0
    worlds.close()
    worlds.close()


def test_welding_joins_what_is_close_and_drops_what_is_no_triangle():
    vertices = np.array([[0, 0, 0], [0.001, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1.001, 0]])
    faces = np.array([[0, 1, 2], [0, 2, 3], [1, 2, 4]])
    welded, left = pictures.weld(vertices, faces, 0.1)
    assert sorted(welded.tolist()) == [[0, pytest.approx(1.0005), 0], [pytest.approx(0.0005), 0, 0], [1, 0, 0]]
    assert len(left) == 1
    assert sorted(left[0].tolist()) == [0, 1, 2]


def run(code, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


def test_egl_is_chosen_unless_the_user_chose():
    code = "import os; from rlinf.envs.frankasim.scene import import_mujoco as i; i(); print(os.environ['MUJOCO_GL'])"
    assert run(code).stdout.strip() == "egl"
    assert run(code, MUJOCO_GL="disable").stdout.strip() == "disable"


def test_without_opengl_the_error_names_the_packages(model, monkeypatch):
    def fail(width, height):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(mujoco, "GLContext", fail)
    with pytest.raises(MissingDependency, match=r"apt-get install .*libegl1") as caught:
        PickCubeWorlds(1, obs_mode="rgb")
    assert "\n" not in str(caught.value)


def test_without_the_scene_the_error_names_the_installer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="--env frankasim"):
        scene.scene_file()


# ---- configuration and machine code


def test_task_decides_what_is_observed():
    assert FrankaSimConfig(total_num_envs=1, gym_id="PandaPickCubeVision-v0", obs_mode="rgb").max_episode_steps == 100
    with pytest.raises(ValidationError, match="is observed by rgb"):
        FrankaSimConfig(total_num_envs=1, gym_id="PandaPickCubeVision-v0", obs_mode="state")
    with pytest.raises(ValidationError, match="PandaPickCube-v0"):
        FrankaSimConfig(total_num_envs=1, gym_id="PandaPickCube-v9")


def test_machine_code_is_made_where_nothing_can_be_kept(tmp_path):
    # Neither the package's folder nor a cache folder: as in a container with a read-only image and no home.
    source = Path(scene.__file__).parent
    code = (
        "import numba.core.caching as c\n"
        "for locator in ('_InTreeCacheLocator', '_UserWideCacheLocator', '_IPythonCacheLocator'):\n"
        "    if hasattr(c, locator): getattr(c, locator).from_function = classmethod(lambda *a: None)\n"
        "c.CacheImpl._locator_classes = []\n"
        f"import sys; sys.path.insert(0, {str(source.parents[2])!r})\n"
        "from rlinf.envs.frankasim import kernel\n"
        "import numpy as np\n"
        "m, inverse = np.diag([2.0, 4.0]), np.empty((2, 2))\n"
        "assert abs(kernel._invert(m, inverse) - 8) < 1e-12 and inverse[1, 1] == 0.25\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
