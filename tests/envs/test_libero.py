"""LIBERO with stand-in assets: motion, goals, resets, pictures; the rules of all environments are in contracts."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlinf.core.errors import ShapeError
from rlinf.core.types import ActionOut
from rlinf.envs.libero.config import LiberoConfig

if importlib.util.find_spec("libero") is None:
    pytest.skip("LIBERO is not installed", allow_module_level=True)

from rlinf.envs.episodes import EpisodeRules, EpisodicEnv, split_state
from rlinf.envs.libero import env as env_module
from rlinf.envs.libero import worlds as worlds_module
from rlinf.envs.libero.env import make
from rlinf.envs.libero.expert import BowlExpert
from rlinf.envs.libero.package import import_problems, open_suite
from rlinf.envs.libero.pictures import CAMERAS, Painter
from rlinf.envs.libero.reset_ids import TrialStarts
from rlinf.envs.libero.scene import FULL_STATE_DIM, OBJECT, PLACE, REST, Scene, axis_angle
from rlinf.envs.libero.worlds import LiberoWorlds
from rlinf.runtime.local import Weights
from tests.fakes import RecordingReporter, build_evaluator

import_problems()  # LIBERO and robosuite are imported by it, before anybody else does
mujoco = pytest.importorskip("mujoco")
robosuite_rotations = pytest.importorskip("robosuite.utils.transform_utils")

pytestmark = pytest.mark.sim

SPATIAL = open_suite(LiberoConfig(total_num_envs=1, use_standin_assets=True))
_scenes: dict[int, Scene] = {}


def scene_of(task):
    """The scene of a task of libero_spatial, built once for all tests."""
    if task not in _scenes:
        _scenes[task] = Scene(SPATIAL, task)
    return _scenes[task]


@pytest.fixture(autouse=True)
def scenes_are_kept(monkeypatch):
    """Environments in this process take the scenes that other tests built."""
    monkeypatch.setattr(worlds_module, "Scene", lambda suite, task: scene_of(task))


def suite(name):
    return open_suite(LiberoConfig(total_num_envs=1, task_suite_name=name, use_standin_assets=True))


def place(scene, world, name, pos):
    """Put a free object upright somewhere, at rest."""
    joint = scene.model.joint(f"{name}_joint0")
    world.physics.qpos[joint.qposadr[0] :][:7] = [*pos, 1, 0, 0, 0]
    world.physics.qvel[joint.dofadr[0] :][:6] = 0


def put_on_plate(scene, world, name, height=0.04):
    x, y, z = world.physics.body("plate_1_main").xpos
    place(scene, world, name, [x, y, z + height])


def settled(scene, world, steps=4):
    for _ in range(steps):
        solved = scene.advance(world, REST)
    return solved


# ---- tasks and goals


@pytest.mark.parametrize("task", range(10))
def test_every_spatial_task_begins_in_its_stored_state_and_can_be_solved(task):
    scene = scene_of(task)
    stored = scene.task.states[7]
    begun = scene.begin(7, seed=3, steps=0)
    nq = scene.model.nq
    assert np.array_equal(begun.physics.qpos, stored[1 : 1 + nq])
    assert np.array_equal(begun.physics.qvel, stored[1 + nq :])

    world = scene.begin(7, seed=3, steps=10)
    assert np.abs(world.physics.qvel).max() < 0.1, "everything lies"
    bowl = world.physics.body("akita_black_bowl_1_main").xpos
    joint = scene.model.joint("akita_black_bowl_1_joint0").qposadr[0]
    assert np.linalg.norm(bowl[:2] - stored[1 + joint : 3 + joint]) < 0.08
    assert not scene.is_solved(world)
    assert not scene.advance(world, np.array([0.5, 0, 0, 0, 0, 0, -1]))

    put_on_plate(scene, world, "akita_black_bowl_1")
    assert settled(scene, world)
    place(scene, world, "akita_black_bowl_1", [0.0, 0.3, 1.2])
    assert not settled(scene, world, 1)


def test_the_other_bowl_does_not_solve_the_task():
    scene = scene_of(0)
    world = scene.begin(0, seed=0, steps=10)
    put_on_plate(scene, world, "akita_black_bowl_2")
    assert not settled(scene, world)


@pytest.mark.parametrize("name", ["libero_object", "libero_goal", "libero_10", "libero_90"])
def test_other_suites_begin_and_step(name):
    other = suite(name)
    assert len(other.tasks) == (90 if name == "libero_90" else 10)
    assert set(other.trials.counts) == {50}
    task = len(other.tasks) - 1
    scene = Scene(other, task)
    world = scene.begin(11, seed=0, steps=10)
    assert not scene.advance(world, np.zeros(7))
    assert np.isfinite(scene.state(world)).all()


def test_every_object_of_every_suite_has_a_stand_in():
    from libero.libero.envs.bddl_utils import robosuite_parse_problem
    from libero.libero.envs.objects import get_object_fn

    kinds = set()
    for name in ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"):
        for task in suite(name).tasks:
            problem = robosuite_parse_problem(str(task.problem_file))
            kinds |= {*problem["objects"], *problem["fixtures"]}
    tables = {"table", "kitchen_table", "living_room_table", "study_table", "floor"}
    assert len(kinds - tables) == 33
    for kind in kinds - tables:
        assert get_object_fn(kind)(name=f"{kind}_1").object_properties is not None


def test_a_stove_is_turned_on_by_its_knob_and_glows():
    goal = suite("libero_goal")
    task = next(k for k, task in enumerate(goal.tasks) if task.name == "turn_on_the_stove")
    scene = Scene(goal, task)
    world = scene.begin(0, seed=0, steps=5)
    assert not scene.is_solved(world)
    painter = Painter(128, 128, "cheap")
    reds = []
    for angle in (0.0, 1.5, 0.0):
        world.physics.qpos[scene.model.joint("flat_stove_1_button").qposadr[0]] = angle
        mujoco.mj_forward(scene.model, world.physics)
        assert scene.is_solved(world) == (angle > 1)
        picture = np.empty((128, 128, 3), np.uint8)
        painter.draw(scene, world, "agentview", picture)
        red, green, blue = picture.astype(int).transpose(2, 0, 1)
        reds.append(int(((red > 2 * green) & (red > 2 * blue) & (red > 90)).sum()))
    painter.close()
    assert reds[1] > reds[0] + 20
    assert reds[2] == reds[0]


# ---- motion


def test_the_arm_moves_as_robosuite_moves_it():
    from libero.libero.envs.env_wrapper import ControlEnv

    scene = scene_of(0)
    # LIBERO's own environment, as its evaluations use it: reset, stored state, steps of rest, actions.
    theirs = ControlEnv(str(scene.task.problem_file), has_offscreen_renderer=False, use_camera_obs=False)
    theirs.seed(5)
    theirs.reset()
    theirs.set_init_state(scene.task.states[2])
    world = scene.begin(2, seed=5, steps=0)
    world.fixture_pos[:] = [theirs.sim.model.body_pos[i] for i in scene._fixtures]
    world.fixture_quat[:] = [theirs.sim.model.body_quat[i] for i in scene._fixtures]
    generator = np.random.default_rng(0)
    for step in range(30):
        action = REST if step < 5 else np.clip(generator.normal(size=7), -1.2, 1.2)
        if 12 <= step < 18:
            action[3:6] = 0  # the last orientation stays the aim
        _, _, done, _ = theirs.step(action.tolist())
        assert scene.advance(world, action) == done
        assert np.abs(world.physics.qpos[:9] - theirs.sim.data.qpos[:9]).max() < 1e-9, f"step {step}"
        assert np.abs(world.physics.qpos - theirs.sim.data.qpos).max() < 0.02
    theirs.close()


def test_actions_move_the_tool_and_close_the_gripper():
    scene = scene_of(0)
    world = scene.begin(0, seed=0, steps=10)
    before = scene.state(world)
    assert before.shape == (8,) and before.dtype == np.float32
    assert before[6] == pytest.approx(0.039, abs=0.002) and before[7] == pytest.approx(-before[6], abs=1e-3)
    for _ in range(10):
        scene.advance(world, np.array([0, 0.5, 0, 0, 0, 0, 1]))
    after = scene.state(world)
    assert 0.04 < after[1] - before[1] < 10 * 0.5 * 0.05, "towards each target, but never quite there"
    assert np.abs(after[[0, 2]] - before[[0, 2]]).max() < 0.03
    assert abs(after[6]) < 0.01 and abs(after[7]) < 0.01


@pytest.mark.parametrize("wxyz", [(1, 0, 0, 0), (0, 1, 0, 0), (0.5, 0.5, -0.5, 0.5), (-0.6, 0, 0.8, 0), (-1, 0, 0, 0)])
def test_axis_times_angle_is_that_of_the_data_sets(wxyz):
    quat = np.array(wxyz, float)
    assert np.allclose(axis_angle(quat), robosuite_rotations.quat2axisangle(np.roll(quat, -1)))


def test_half_a_turn_about_x_by_hand():
    assert axis_angle(np.array([0.0, 1, 0, 0])) == pytest.approx([np.pi, 0, 0])
    assert axis_angle(np.array([-np.sqrt(0.5), 0, np.sqrt(0.5), 0])) == pytest.approx([0, 1.5 * np.pi, 0])


# ---- the scripted expert


@pytest.mark.parametrize("task", [0, 7])
def test_the_expert_solves_tasks_with_what_the_full_state_shows(task):
    scene, expert = scene_of(task), BowlExpert(0.1, np.random.default_rng(0))
    world = scene.begin(0, seed=0, steps=10)
    full = scene.full_state(world)
    assert np.array_equal(full[:8], scene.state(world)) and full.shape == (FULL_STATE_DIM,)
    assert np.allclose(full[OBJECT], world.physics.body("akita_black_bowl_1_main").xpos)
    assert np.allclose(full[PLACE], world.physics.body("plate_1_main").xpos)
    for _ in range(180):
        if scene.advance(world, expert.act(scene.full_state(world)[None])[0]):
            return
    pytest.fail("not solved within 180 steps; demonstrations take up to 193")


def test_the_expert_opens_over_the_plate_and_knows_its_states():
    state = np.zeros((1, FULL_STATE_DIM), np.float32)
    state[:, OBJECT], state[:, PLACE] = (0.1, 0.1, 0.93), (0.1, 0.1, 0.91)
    assert BowlExpert().act(state)[0] == pytest.approx([0, 0, 0.6, 0, 0, 0, -1])
    with pytest.raises(ShapeError, match=r"\[N, 14\]"):
        BowlExpert().act(state[:, :8])
    with pytest.raises(ValueError, match="generator"):
        BowlExpert(0.1)


# ---- resets


def test_a_seed_decides_where_fixtures_stand_and_leaves_numpys_generator_alone():
    scene = scene_of(0)
    np.random.seed(1)
    first = scene.begin(0, seed=4, steps=2)
    drawn = np.random.rand()
    second, third = scene.begin(0, seed=4, steps=2), scene.begin(0, seed=5, steps=2)
    np.random.seed(1)
    assert np.random.rand() == drawn
    assert np.array_equal(first.physics.qpos, second.physics.qpos)
    assert np.array_equal(first.fixture_pos, second.fixture_pos)
    moved = np.abs(first.fixture_pos - third.fixture_pos).max()
    assert 0 < moved < 0.1


def test_worlds_of_one_scene_do_not_disturb_each_other():
    scene = scene_of(1)
    action = np.array([0.3, -0.2, -0.4, 0.1, 0, 0.2, 1])
    alone = scene.begin(0, seed=1, steps=3)
    for _ in range(5):
        scene.advance(alone, action)
    one, other = scene.begin(0, seed=1, steps=3), scene.begin(9, seed=2, steps=3)
    for _ in range(5):
        scene.advance(one, action)
        scene.advance(other, -action)
    assert np.array_equal(one.physics.qpos, alone.physics.qpos)
    assert np.array_equal(scene.state(one), scene.state(alone))


def test_a_task_is_built_once_and_the_oldest_idle_scenes_are_given_up(monkeypatch):
    built = []

    monkeypatch.setattr(worlds_module, "Scene", lambda suite, task: built.append(task) or scene_of(task))
    worlds = LiberoWorlds(SPATIAL, 2, image_size=16, num_steps_wait=0, max_scenes=1)

    def begin(row, task, trial):
        worlds.begin([row], [SPATIAL.trials.reset_id(task, trial)])

    begin(0, 0, 0), begin(1, 0, 7), begin(0, 0, 3)
    assert built == [0]
    worlds.observe()
    begin(0, 1, 0), begin(0, 0, 1)
    assert built == [0, 1], "task 1 is idle, task 0 never was"
    begin(0, 1, 1)
    assert built == [0, 1]
    begin(0, 2, 0), begin(0, 3, 0)  # 1 was idle, then 2
    worlds.observe()
    begin(0, 1, 0)
    assert built == [0, 1, 2, 3, 1]
    obs = worlds.observe()
    assert obs["instruction"] == [SPATIAL.tasks[task].language for task in (1, 0)]
    worlds.close()


# ---- pictures


def test_full_pictures_are_mujocos_turned_by_180_degrees():
    worlds = LiberoWorlds(
        SPATIAL, 1, image_size=48, num_steps_wait=2, rendering="full", num_filmed=1, film_size=(48, 48)
    )
    worlds.begin([0], [3])
    images, film = worlds.observe()["images"], worlds.render()
    scene, world = worlds.world(0)
    visible = mujoco.MjvOption()
    visible.geomgroup[0] = 0
    with mujoco.Renderer(scene.model, 48, 48) as renderer:
        for name, camera in CAMERAS.items():
            renderer.update_scene(world.physics, camera, visible)
            upright = renderer.render()
            assert np.abs(images[name][0].numpy().astype(int) - upright[:, ::-1]).mean() < 0.1, name
            if name == "main":
                assert np.abs(film[0].astype(int) - upright).mean() < 0.1
    worlds.close()


def test_cheap_pictures_show_what_full_ones_show():
    scene = scene_of(0)
    world = scene.begin(0, seed=0, steps=10)
    pictures = {}
    for rendering in ("cheap", "full"):
        painter = Painter(64, 64, rendering)
        pictures[rendering] = np.empty((2, 64, 64, 3), np.uint8)
        for camera, picture in zip(CAMERAS.values(), pictures[rendering], strict=True):
            painter.draw(scene, world, camera, picture)
        painter.close()
    difference = np.abs(pictures["cheap"].astype(int) - pictures["full"])
    assert 0 < difference.mean() < 12
    assert np.median(difference) < 5


def test_pictures_are_drawn_once_for_a_chunk(monkeypatch):
    env = make_env(1, max_episode_steps=50)
    drawn = []
    draw = Painter.draw
    monkeypatch.setattr(Painter, "draw", lambda self, *args: drawn.append(args[2]) or draw(self, *args))
    env.reset(0)
    assert sorted(drawn) == sorted(CAMERAS.values())
    env.step(torch.zeros(1, 5, 7))
    assert len(drawn) == 4
    env.close()


# ---- rewards and episodes


def make_env(num_envs, num_workers=0, **keys):
    rules = {"use_standin_assets": True, "image_size": 32, "num_steps_wait": 8, "specific_reset_id": 0}
    config = LiberoConfig(total_num_envs=num_envs, **(rules | keys))
    return make(config, num_envs=num_envs, seed=0, control_mode=None, num_workers=num_workers, render=False)


def assert_alike(one, other):
    assert torch.equal(one["state"], other["state"])
    assert all(torch.equal(one["images"][name], other["images"][name]) for name in CAMERAS)
    assert one["instruction"] == other["instruction"]


def rows_of(obs, rows):
    images = {name: pictures[rows] for name, pictures in obs["images"].items()}
    return {"state": obs["state"][rows], "images": images, "instruction": obs["instruction"][rows]}


def test_the_shares_of_processes_are_rows_of_the_whole_and_what_is_saved_goes_on(monkeypatch):
    rules = {"specific_reset_id": None, "use_ordered_reset_state_ids": True, "max_episode_steps": 4}
    rules |= {"image_size": 16, "num_steps_wait": 1}
    monkeypatch.setattr(env_module, "SubprocessEnv", lambda makers, label: [made() for made in makers])
    whole, shares = make_env(3, **rules), make_env(3, num_workers=2, **rules)
    assert [share.num_envs for share in shares] == [2, 1]
    parts = list(zip(shares, (slice(0, 2), slice(2, 3)), strict=True))
    begun = whole.reset(3)
    for share, rows in parts:
        assert_alike(share.reset(3), rows_of(begun, rows))
    chunks = torch.rand(4, 3, 2, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tasks = set()
    for chunk in chunks[:3]:
        step = whole.step(chunk)
        tasks |= set(step.info["task"].tolist())
        for share, rows in parts:
            own = share.step(chunk[rows])
            assert_alike(own.obs, rows_of(step.obs, rows)), assert_alike(own.last_obs, rows_of(step.last_obs, rows))
            assert all(torch.equal(own.info[name], step.info[name][rows]) for name in own.info)
    assert len(tasks) > 3, "rows are in different tasks, and change them"

    states = split_state(whole.state_dict(), [2, 1])
    step = whole.step(chunks[3])
    for (share, rows), state in zip(parts, states, strict=True):
        share.step(chunks[0][rows])  # is elsewhere now
        share.load_state_dict(state)
        assert_alike(share.step(chunks[3][rows]).obs, rows_of(step.obs, rows))
    for env in (whole, *shares):
        env.close()


@pytest.mark.parametrize(
    ("keys", "usual", "last"),
    [({}, 0, 1), ({"use_step_penalty": True}, -1, 0), ({"reward_coef": 3.0, "use_step_penalty": True}, -1, 2)],
)
def test_success_ends_an_episode_and_is_paid(keys, usual, last):
    env = make_env(2, auto_reset=False, **keys)
    env.reset(0)
    env.step(torch.tensor([0, 0, 0, 0, 0, 0, -1.0]).expand(2, 1, 7))
    scene, world = env._simulator.world(1)
    put_on_plate(scene, world, "akita_black_bowl_1", 0.035)
    reward = []
    for _ in range(6):
        step = env.step(torch.tensor([0, 0, 0, 0, 0, 0, -1.0]).expand(2, 1, 7))
        reward.append(step.reward[1, 0].item())
        assert step.reward[0, 0] == usual and not step.done[0]
        if step.done[1]:
            break
    assert step.terminated[1].all() and not step.truncated[1]
    assert reward == [usual] * (len(reward) - 1) + [last]
    assert step.info["episode/success_once"].tolist() == [False, True]
    assert step.info["episode/episode_len"][1] == 1 + len(reward), "steps of rest do not count"
    env.close()


class RestingActor(torch.nn.Module):
    """Does nothing, two actions at a time."""

    noise_shape = (1,)

    def act(self, obs, mode, noise=None):
        assert len(obs["instruction"]) == len(obs["state"]) == len(obs["images"]["wrist"])
        action = torch.zeros(len(obs["state"]), 2, 7)
        return ActionOut(action, action.flatten(1))


@pytest.mark.parametrize("rows", [(4,), (2, 1)], ids=["one worker", "two workers"])
def test_an_evaluation_counts_every_trial_of_every_task_once(rows):
    # Two trials of each of three tasks, on a number of environments that does not divide them.
    few = replace(SPATIAL, tasks=tuple(replace(task, states=task.states[:2]) for task in SPATIAL.tasks[:3]))
    starts = TrialStarts(few.trials, sum(rows), exhaustive=True)
    begun = []

    def build(num_envs, first_row):
        worlds = LiberoWorlds(few, num_envs, image_size=16, num_steps_wait=0)
        begin = worlds.begin
        worlds.begin = lambda rows, seeds: (begun.extend(seed % 6 for seed in seeds), begin(rows, seeds))
        rules = EpisodeRules(max_episode_steps=2)
        return EpisodicEnv(worlds, rules, seed=0, first_row=first_row, starts=starts)

    envs = [[build(num_envs, sum(rows[:rank]))] for rank, num_envs in enumerate(rows)]
    evaluator = build_evaluator(envs, RestingActor(), Weights(), episodes_per_env=1, chunks=1, seed=3)
    metrics = evaluator.run(RecordingReporter(), 0)
    evaluator.close()
    assert sorted(begun) == list(range(6))
    assert metrics["eval/num_episodes"] == 6
    assert [metrics[f"eval/task_{task:02d}/num_episodes"] for task in range(3)] == [2, 2, 2]
    assert metrics["eval/success_once"] == 0
