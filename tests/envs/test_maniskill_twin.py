"""The digital twin: what is solved, what is paid, what the expert can, what a shift shifts."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

pytest.importorskip("mani_skill")

from rlinf.core.errors import DataError, MissingDependency, ShapeError
from rlinf.envs.maniskill import twin_assets, twin_expert, twin_robot, twin_task, vulkan
from rlinf.envs.maniskill.config import (
    CONTROL_MODES,
    PUBLISHED_TWIN_TASK,
    TWIN_TASK,
    TWIN_TASKS,
    ManiSkillConfig,
    TwinWorld,
)
from rlinf.envs.maniskill.env import make
from rlinf.envs.maniskill.scene import ManiSkillScene, SceneSpec
from rlinf.envs.maniskill.twin_expert import PutOnTrayExpert
from rlinf.envs.maniskill.twin_fast import TwinScene
from rlinf.launch.record import with_full_state
from rlinf.launch.record_lerobot import TASK_TEXTS
from rlinf.launch.registry import EXPERTS, lookup

pytestmark = pytest.mark.sim

can_render = pytest.mark.skipif(vulkan.find_icd() is None, reason="no Vulkan driver")

CONFIGS = Path(__file__).parents[2] / "examples" / "embodiment" / "config" / "env"
SHIFTED = TwinWorld(
    **yaml.safe_load((CONFIGS / "maniskill_pick_and_place_shifted_twin.yaml").read_text())["init_params"]["twin"]
)
SPEC = SceneSpec(TWIN_TASK, CONTROL_MODES["panda_wristcam"], reward="sparse", sim_freq=100, control_freq=5)
SMALL = {"width": 24, "height": 24}
STILL = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


@pytest.fixture(scope="module")
def twin():
    return ManiSkillScene(SPEC)


@pytest.fixture(scope="module")
def shifted():
    return ManiSkillScene(replace(SPEC, twin=SHIFTED))


@pytest.fixture(scope="module", params=[None, SHIFTED], ids=["twin", "shifted"])
def fast(request):
    return TwinScene(replace(SPEC, twin=request.param))


@pytest.fixture(scope="module")
def seeing():
    return ManiSkillScene(replace(SPEC, obs_mode="rgb", sensor_configs=SMALL))


def put_at(scene, offset, height, steps=2):
    """Move the object to the tray's place plus `offset` with its underside at `height`, and play some steps."""
    import sapien

    world = scene._world
    kind = int(world._chosen[0])
    tray = world.tray.pose.p[0].numpy()
    place = tray + np.array([*offset, height + world.half_heights[kind]])
    world.objects[kind].set_pose(sapien.Pose(place))
    return [scene.advance(STILL) for _ in range(steps)][-1:]


def play(scene, expert, seed, steps=40):
    """Whether the expert succeeds in the end, and what it is paid."""
    scene.begin(seed)
    rewards, success = [], False
    for _ in range(steps):
        reward, success, _ = scene.advance(expert.act(scene.observe()[None])[0])
        rewards.append(reward)
    return success, rewards


# --- the task


def test_config_and_task_speak_of_the_same_world():
    config = yaml.safe_load((CONFIGS / "maniskill_pick_and_place_digital_twin.yaml").read_text())
    assert TwinWorld(**config["init_params"]["twin"]) == TwinWorld()
    assert ManiSkillConfig(**config).init_params.control_mode == CONTROL_MODES["panda_wristcam"]
    assert CONTROL_MODES["panda_wristcam"] == twin_robot.CONTROL_MODE
    assert all(
        getattr(SHIFTED, name) != getattr(TwinWorld(), name) for name in TwinWorld.model_fields if "yaw" not in name
    )
    assert (twin_expert.MOVE_M, twin_expert.TURN_RAD) == (twin_robot.MOVE_M, twin_robot.TURN_RAD)
    assert (twin_expert.STATE_DIM, twin_expert.ACTION_DIM) == (twin_task.STATE_DIM, twin_robot.ACTION_DIM)


def test_a_world_is_refused_where_it_means_nothing():
    with pytest.raises(ValidationError, match=r"twin describes the world of .*, not of PickCube-v1"):
        ManiSkillConfig(total_num_envs=1, init_params={"twin": {}})
    with pytest.raises(ValidationError, match=r"latency_s \(0.05\) must be less than a control period"):
        ManiSkillConfig(total_num_envs=1, init_params={"id": TWIN_TASK, "twin": {"latency_s": 0.05}})


def test_seeds_decide_the_episode(twin):
    states = []
    for seed in (1, 2, 1):
        twin.begin(seed)
        states.append(twin.observe())
    assert np.array_equal(states[0], states[2])
    assert np.abs(states[0] - states[1])[[0, 8, 9, 11, 14, 15]].min() > 1e-4
    kinds = set()
    for seed in range(12):
        twin.begin(seed)
        state = twin.observe()
        kinds.add(int(twin._world._chosen[0]))
        thing, tray = state[8:11], state[14:17]
        assert (np.array(twin_task.OBJECT_LOW) <= thing[:2]).all()
        assert (thing[:2] <= np.array(twin_task.OBJECT_HIGH)).all()
        assert thing[2] == pytest.approx(state[13])
        assert np.abs(thing[:2] - tray[:2]).max() > twin_task.TRAY_HALF_M + 0.04
    assert kinds == {0, 1, 2}


def test_action_one_moves_and_turns_the_tool_as_far_as_it_says(twin):
    twin.begin(0)
    before = twin.observe()[:7]
    action = np.array([1, -1, 1, 0, 0, 1, 1], np.float32)
    twin.advance(action)
    for _ in range(4):
        twin.advance(STILL)
    moved = twin.observe()[:7] - before
    assert moved[:3] == pytest.approx([0.05, -0.05, 0.05], abs=0.006)
    assert moved[3:6] == pytest.approx([0, 0, 0.2], abs=0.02)
    assert twin.observe()[3] == pytest.approx(np.pi, abs=0.1)  # points down, and never at −π
    twin.advance(-STILL)
    twin.advance(-STILL)
    assert twin.observe()[6] < 0.01 < before[6]


@pytest.mark.parametrize(
    ("offset", "height", "solved"),
    [
        ((0.0, 0.0), 0.006, True),
        ((0.045, -0.045), 0.006, True),
        ((0.0, 0.13), 0.001, False),  # beside the tray
        ((0.105, 0.0), 0.001, False),  # touches it from outside
    ],
)
def test_solved_is_what_lies_in_the_tray(twin, offset, height, solved):
    twin.begin(3)
    assert not twin.advance(STILL)[1]
    [(_, success, _)] = put_at(twin, offset, height)
    assert success is solved


def test_what_hangs_over_the_tray_is_not_solved(twin):
    twin.begin(3)
    world = twin._world
    put_at(twin, (0.0, 0.0), 0.006)
    assert world.evaluate()["success"].item()
    put_at(twin, (0.0, 0.0), 0.06, steps=0)
    assert not world.evaluate()["success"].item()  # though it pressed upon the tray just now
    put_at(twin, (0.0, 0.0), 0.006)
    force = world.scene.get_pairwise_contact_forces
    try:
        world.scene.get_pairwise_contact_forces = lambda *_: torch.zeros(1, 3)
        assert not world.evaluate()["success"].item()  # inside, but nothing presses on the tray
    finally:
        world.scene.get_pairwise_contact_forces = force


def test_sparse_rewards_are_paid_once_each(twin):
    world = twin._world
    twin.begin(0)
    events = [(0, 0), (1, 0), (0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (0, 1), (0, 0)]
    paid = []
    for grasped, success in events:
        info = {"is_grasped": torch.tensor([bool(grasped)]), "success": torch.tensor([bool(success)])}
        paid.append(world.compute_sparse_reward(None, None, info).item())
    assert paid == pytest.approx([0, 0.2, 0, 0, 1.0, 0, -0.4, 0, 0])
    twin.begin(0)
    info = {"is_grasped": torch.tensor([True]), "success": torch.tensor([False])}
    assert world.compute_sparse_reward(None, None, info).item() == pytest.approx(0.2)


def test_dense_reward_by_hand(twin):
    info = {
        "reach": torch.tensor([0.1]),
        "left": torch.tensor([0.2]),
        "is_grasped": torch.tensor([True]),
        "success": torch.tensor([False]),
    }
    pay = twin._world.compute_normalized_dense_reward
    assert pay(None, None, info).item() == pytest.approx((1 - np.tanh(1) + 1 + 1 - np.tanh(2)) / 5)
    assert pay(None, None, info | {"is_grasped": torch.tensor([False])}).item() == pytest.approx((1 - np.tanh(1)) / 5)
    assert pay(None, None, info | {"success": torch.tensor([True])}).item() == 1.0


# --- the expert


def test_a_noisy_expert_solves_both_worlds(fast):
    expert = PutOnTrayExpert(0.1, np.random.default_rng(0))
    results = [play(fast, expert, seed) for seed in range(12)]
    assert sum(success for success, _ in results) >= 11
    best = [rewards for success, rewards in results if success]
    assert all(sum(rewards) >= 0.79 for rewards in best)


def test_the_expert_knows_its_states():
    with pytest.raises(ShapeError, match=r"\[N, 17\]"):
        PutOnTrayExpert().act(np.zeros((1, 42), np.float32))
    with pytest.raises(ValueError, match="needs a generator"):
        PutOnTrayExpert(0.1)


@pytest.mark.parametrize("task", TWIN_TASKS)
def test_recording_finds_the_expert_his_words_and_his_eyes(task):
    assert lookup("scripted expert", task, EXPERTS) is PutOnTrayExpert
    assert TASK_TEXTS[task] == twin_task.INSTRUCTION
    rates = {"sim_freq": 100, "control_freq": 5}
    keys = {"id": task, "obs_mode": "rgb", "twin": SHIFTED, "sim_config": rates}
    seen = ManiSkillConfig(total_num_envs=1, init_params=keys)
    full = with_full_state(seen)
    assert full.init_params == seen.init_params.model_copy(update={"obs_mode": "state"})
    assert with_full_state(full) is None


# --- the shift


def test_a_shifted_arm_is_late_and_soft(twin, shifted):
    ways = []
    for scene in (twin, shifted):
        scene.begin(5)
        before = scene.observe()[:3]
        scene.advance(np.array([0, 0, 1, 0, 0, 0, 1], np.float32))
        ways.append(float(scene.observe()[2] - before[2]))
    assert ways[1] < 0.85 * ways[0]


def test_nothing_of_an_episode_reaches_the_next_by_way_of_the_delay(shifted):
    shifted.begin(5)
    clean = [shifted.advance(STILL) and shifted.observe() for _ in range(3)]
    shifted.begin(6)
    for _ in range(3):
        shifted.advance(np.ones(7, np.float32))
    shifted.begin(5)
    again = [shifted.advance(STILL) and shifted.observe() for _ in range(3)]
    assert np.array_equal(clean, again)


class Joints:
    """Of ManiSkill's controllers what a reset touches: targets where the scene's mask says so."""

    def __init__(self, scene):
        self.scene, self.drives = scene, torch.zeros(3, 2)
        self.qpos, self.target = torch.zeros(3, 2), torch.zeros(3, 2)

    def reset(self):
        self.target[self.scene._reset_mask] = self.qpos[self.scene._reset_mask]

    def set_drive_targets(self, targets):
        self.drives = targets.clone()

    def before_simulation_step(self):
        pass


class LateJoints(twin_robot._Late, Joints):
    latency_steps = 2


def test_an_episode_that_begins_leaves_the_other_worlds_of_a_batch_alone():
    """Three worlds in one scene, as on a GPU: the second begins anew while targets of all are due."""
    scene = SimpleNamespace(_reset_mask=torch.ones(3, dtype=torch.bool))
    joints = LateJoints(scene)
    joints.reset()
    joints.target += 5.0
    joints.set_drive_targets(torch.full((3, 2), 1.0))
    for _ in range(3):
        assert joints.drives.eq(0).all()
        joints.before_simulation_step()
    assert joints.drives.eq(1).all(), "two steps late"
    joints.set_drive_targets(torch.full((3, 2), 2.0))
    joints.before_simulation_step()

    joints.qpos = torch.full((3, 2), 0.5)
    joints.begin_in(torch.tensor([False, True, False]))
    joints.reset()
    assert scene._reset_mask.all()
    assert joints.target[:, 0].tolist() == [5.0, 0.5, 5.0]
    assert joints.drives[:, 0].tolist() == [1.0, 0.5, 1.0]
    for _ in range(2):
        joints.before_simulation_step()
    assert joints.drives[:, 0].tolist() == [2.0, 0.5, 2.0], "what was due arrives where no episode began"
    joints.reset()
    assert joints.drives.eq(0.5).all() and joints.target.eq(0.5).all(), "without being told: everywhere"


def test_the_robot_tells_its_controllers_where_an_episode_begins(twin):
    twin.begin(0)
    agent, told = twin._world.agent, []
    for controller in agent.controller.controllers.values():
        assert isinstance(controller, twin_robot._Late) and controller._begins is None
        controller.begin_in = told.append
    try:
        agent.reset()
    finally:
        for controller in agent.controller.controllers.values():
            del controller.begin_in
    assert [mask.tolist() for mask in told] == [[True], [True]]


# --- fast stepping


@pytest.mark.parametrize(("twin", "reward"), [(None, "dense"), (SHIFTED, "sparse")])
def test_fast_stepping_is_the_same_task(twin, reward):
    spec = replace(SPEC, twin=twin, reward=reward)
    slow, fast = ManiSkillScene(spec), TwinScene(spec)
    expert = PutOnTrayExpert(0.1, np.random.default_rng(0))
    for seed in (2, 3):
        slow.begin(seed)
        fast.begin(seed)
        paid, touched = np.zeros(2), False
        for _ in range(28):
            state = slow.observe()
            # Contacts amplify the last bit in which both differ.
            touched = touched or state[7] > 0
            assert np.allclose(fast.observe(), state, atol=2e-2 if touched else 1e-4)
            action = expert.act(state[None])[0]
            theirs, ours = slow.advance(action), fast.advance(action)
            assert theirs[0] == pytest.approx(ours[0], abs=1e-6 if reward == "sparse" else 2e-2)
            paid += theirs[0], ours[0]
        assert theirs[1:] == ours[1:] == (True, False)
        assert paid[0] == pytest.approx(paid[1], rel=1e-2)


# --- pictures


@pytest.mark.render
@can_render
def test_pictures_show_the_episode_and_the_shift(seeing):
    assert seeing.cameras == {"front": (24, 24, 3)}
    assert seeing.instruction == twin_task.INSTRUCTION
    assert seeing.state_dim == twin_task.TOOL_DIM
    pictures = []
    for seed in (1, 2, 1):
        seeing.begin(seed)
        pictures.append(seeing.see()["front"].astype(int))
    assert np.array_equal(pictures[0], pictures[2])
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.2
    other = ManiSkillScene(replace(SPEC, obs_mode="rgb", sensor_configs=SMALL, twin=SHIFTED))
    other.begin(1)
    assert np.abs(other.see()["front"].astype(int) - pictures[0]).mean() > 10


@pytest.mark.render
@can_render
def test_seen_and_unseen_worlds_are_in_step(twin, seeing):
    twin.begin(4)
    seeing.begin(4)
    expert = PutOnTrayExpert()
    for _ in range(12):
        action = expert.act(twin.observe()[None])[0]
        assert twin.advance(action) == seeing.advance(action)
        assert np.array_equal(twin.observe()[:7], seeing.observe())


def test_another_process_has_the_same_world():
    # Its state only: drawing in a new process compiles shaders for seven seconds, and pictures travel as
    # tests/contracts has it for Franka-Sim.
    keys = {"id": TWIN_TASK, "sim_backend": "cpu", "twin": SHIFTED, "sim_config": {"sim_freq": 100, "control_freq": 5}}
    config = ManiSkillConfig(total_num_envs=2, max_episode_steps=2, reward_mode="dense", init_params=keys)
    records = []
    for num_workers in (0, 1):
        env = make(
            config, num_envs=2, seed=0, control_mode=twin_robot.CONTROL_MODE, num_workers=num_workers, render=False
        )
        states = [env.reset(7)["state"]]
        for _ in range(2):
            step = env.step(torch.full((2, 1, 7), 0.3))
            states += [step.last_obs["state"], step.obs["state"], step.reward]
        env.close()
        records.append(states)
    assert all(torch.equal(one, other) for one, other in zip(*records, strict=True))


# --- the published objects


def test_missing_objects_name_the_variable_and_the_folders(monkeypatch, tmp_path):
    spec = replace(SPEC, task=PUBLISHED_TWIN_TASK)
    monkeypatch.delenv(twin_assets.VARIABLE, raising=False)
    with pytest.raises(MissingDependency, match="set MANISKILL_ASSET_DIR to the folder with more_carrot, more_plate"):
        ManiSkillScene(spec)
    monkeypatch.setenv(twin_assets.VARIABLE, str(tmp_path))
    (tmp_path / "carrot" / "more_carrot").mkdir(parents=True)
    (tmp_path / "carrot" / "more_carrot" / "model_db.json").write_text("{}")
    with pytest.raises(MissingDependency) as caught:
        ManiSkillScene(spec)
    assert f"{tmp_path} holds no more_plate/model_db.json, no bridge_table_long.glb" in str(caught.value)


def test_published_sizes_are_read(monkeypatch, tmp_path):
    for folder in ("more_carrot", "more_plate"):
        (tmp_path / folder).mkdir()
        entry = {"bbox": {"min": [-1, -2, -3], "max": [1, 2, 3]}, "scale": [0.01]}
        (tmp_path / folder / "model_db.json").write_text(json.dumps({"thing": entry}))
    (tmp_path / "bridge_table_long.glb").touch()
    monkeypatch.setenv(twin_assets.VARIABLE, str(tmp_path))
    assets = twin_assets.find_assets()
    assert assets.plate.half_size == pytest.approx((0.01, 0.02, 0.03))
    assert assets.objects[0].density == 1000
    assert assets.objects[0].folder == tmp_path / "more_carrot" / "thing"
    (tmp_path / "more_plate" / "model_db.json").write_text('{"thing": {"bbox": 3}}')
    with pytest.raises(DataError, match=r"more_plate/model_db.json is not a table of models"):
        twin_assets.find_assets()
