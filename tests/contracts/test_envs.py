"""What every VectorEnv keeps, whoever simulates it."""

import copy
import gc
import importlib.util
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch

from rlinf.core import tree
from rlinf.core.errors import NonFiniteError, ShapeError
from rlinf.core.protocols import VectorEnv
from rlinf.envs import reach
from rlinf.envs.frankasim.config import FrankaSimConfig
from rlinf.envs.libero.config import LiberoConfig
from rlinf.envs.maniskill import vulkan
from rlinf.envs.maniskill.config import CONTROL_MODES, TWIN_TASK, ManiSkillConfig
from rlinf.envs.realworld.config import RealWorldConfig

N, LIMIT = 3, 4
VISION = "PandaPickCubeVision-v0"

needs_maniskill = [
    pytest.mark.sim,
    pytest.mark.skipif(importlib.util.find_spec("mani_skill") is None, reason="ManiSkill is not installed"),
]

needs_pictures = [
    *needs_maniskill,
    pytest.mark.render,
    pytest.mark.skipif(vulkan.find_icd() is None, reason="no Vulkan driver"),
]

needs_frankasim = [
    pytest.mark.sim,
    pytest.mark.skipif(importlib.util.find_spec("gym_hil") is None, reason="gym-hil is not installed"),
]

needs_libero = [
    pytest.mark.sim,
    pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="LIBERO is not installed"),
]

LIBERO_RULES = {
    "use_standin_assets": True,
    "use_step_penalty": True,
    "specific_reset_id": 0,  # seeds still differ in where the fixtures stand
    "image_size": 32,
    "num_steps_wait": 1,
}


@dataclass(frozen=True)
class Kind:
    """How to make one kind of environment; `rules` are keys of EnvConfig."""

    name: str
    num_workers: int = 0
    stepping: str = "auto"
    task: str = ""

    def make(self, seed=0, num_envs=None, **rules) -> VectorEnv:
        num_envs = num_envs or self.num_envs
        keys = {"total_num_envs": num_envs, "max_episode_steps": LIMIT} | rules
        shared = {"num_envs": num_envs, "seed": seed, "num_workers": self.num_workers, "render": False}
        if self.name == "reach":
            return reach.make(reach.ReachConfig(**keys), control_mode=None, **shared)
        if self.name == "frankasim":
            from rlinf.envs.frankasim.env import make

            return make(FrankaSimConfig(gym_id=self.task, image_size=32, **keys), control_mode=None, **shared)
        if self.name == "libero":
            from rlinf.envs.libero.env import make

            return make(LiberoConfig(**(LIBERO_RULES | keys)), control_mode=None, **shared)
        if self.name == "realworld":
            from rlinf.envs.realworld.env import make

            cell = {"driver": self.task, "use_dense_reward": True} | CELLS[self.task]
            relative = self.task == "twin"
            return make(
                RealWorldConfig(override_cfg=cell, use_relative_frame=relative, **keys), control_mode=None, **shared
            )
        from rlinf.envs.maniskill.env import make

        config = ManiSkillConfig(stepping=self.stepping, init_params={"sim_backend": "cpu"} | self.twin(), **keys)
        return make(config, control_mode="pd_ee_delta_pos", **shared)

    @property
    def num_envs(self):
        return 1 if self.name == "realworld" else N

    def twin(self):
        if self.task != TWIN_TASK:
            return {}
        small = {"obs_mode": "rgb", "sensor_configs": {"width": 16, "height": 16}, "reward_mode": "dense"}
        return small | {"id": self.task, "control_mode": CONTROL_MODES["panda_wristcam"]}


CELLS = {
    "twin": {"cameras": {"wrist_1": {"driver": "twin", "size": [32, 32]}}},
    "fake": {"cameras": {}},  # its camera runs by the clock
}

KINDS = [
    pytest.param(Kind("reach"), id="reach"),
    pytest.param(Kind("maniskill", 0, "fast"), id="fast", marks=needs_maniskill),
    pytest.param(Kind("maniskill", 0, "maniskill"), id="general", marks=needs_maniskill),
    pytest.param(Kind("maniskill", task=TWIN_TASK), id="twin", marks=needs_pictures),
    pytest.param(Kind("frankasim", task="PandaPickCube-v0"), id="frankasim", marks=needs_frankasim),
    pytest.param(Kind("frankasim", task=VISION), id="vision", marks=needs_frankasim),
    pytest.param(Kind("libero"), id="libero", marks=needs_libero),
    pytest.param(Kind("realworld", task="fake"), id="cell"),
    pytest.param(Kind("realworld", task="twin"), id="cell-twin", marks=needs_frankasim),
    pytest.param(Kind("maniskill", 2, "fast"), id="processes", marks=needs_maniskill),
    pytest.param(Kind("frankasim", 2, task=VISION), id="vision-processes", marks=needs_frankasim),
]


IN_PROCESS = [kind for kind in KINDS if kind.values[0].num_workers == 0]
"""For tests of rules: processes keep the same ones, and are slow to start."""
PAID = [kind for kind in IN_PROCESS if kind.id != "libero"]
"""Those that pay something else than success and the step penalty."""

_open: dict[tuple, VectorEnv] = {}


@pytest.fixture(scope="module", autouse=True)
def close_all():
    yield
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gc, "collect", lambda: 0)  # once for all of them
        for env in _open.values():
            env.close()
    _open.clear()
    gc.collect()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def opened(kind, copy=0, **rules):
    """An environment, made now or by an earlier test under the same rules."""
    if rules:  # two rows show a rule as well as three
        rules = {"num_envs": min(2, kind.num_envs)} | rules
    rules = {"ignore_terminations": True} | rules
    key = (kind, copy, *sorted(rules.items()))
    if key not in _open:
        _open[key] = kind.make(**rules)
    return _open[key]


@pytest.fixture
def made(kind):
    """`opened` for this kind."""
    return partial(opened, kind)


def actions(env, horizon=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(env.num_envs, horizon, env.spaces.action_dim, generator=generator) - 1


def assert_same(a, b):
    for (path, x), (_, y) in zip(tree.leaves(a), tree.leaves(b), strict=True):
        assert x == y if isinstance(x, list) else torch.equal(x, y), path


def shape_and_type(leaf, n):
    assert len(leaf) == n
    if isinstance(leaf, list):
        return (), type(leaf[0]).__name__
    return tuple(leaf.shape[1:]), str(leaf.dtype).removeprefix("torch.")


def seen(obs):
    """All numbers of an observation, [N, ...]: in pictures an initial state shows, where proprioception has none."""
    return torch.cat([leaf.flatten(1).double() for _, leaf in tree.leaves(obs) if isinstance(leaf, torch.Tensor)], 1)


def play(env, steps, horizon=1):
    return [env.step(actions(env, horizon, seed=t)) for t in range(steps)]


def test_emits_what_its_spaces_say(made):
    env = made()
    assert isinstance(env, VectorEnv)
    obs = env.reset(0)
    step = env.step(actions(env, 2))
    assert env.spaces.max_episode_steps == LIMIT
    for record in (obs, step.obs, step.last_obs):
        found = {path: shape_and_type(leaf, env.num_envs) for path, leaf in tree.leaves(record)}
        expected = {path: (shape, env.spaces.obs_dtypes[path]) for path, shape in env.spaces.obs_shapes.items()}
        assert found == expected
    n = env.num_envs
    assert step.reward.shape == step.terminated.shape == step.intervened.shape == (n, 2)
    assert step.reward.dtype == torch.float32
    assert step.terminated.dtype == step.truncated.dtype == step.intervened.dtype == torch.bool
    assert step.truncated.shape == (n,)
    assert torch.equal(step.executed, actions(env, 2))
    assert not step.intervened.any()
    assert all(value.shape == (n,) for value in step.info.values())


def test_automatic_reset_keeps_the_last_observation(made):
    env = made()
    env.reset(0)
    before, final = play(env, LIMIT)[-2:]
    assert_same(before.obs, before.last_obs)
    assert final.done.all()
    assert not torch.equal(final.obs["state"], final.last_obs["state"])
    after = play(env, 1)[0]
    assert not after.done.any()


def test_time_limit_truncates_and_does_not_terminate(made):
    env = made()
    env.reset(0)
    steps = play(env, 2 * LIMIT)
    assert [bool(step.truncated.all()) for step in steps] == [t % LIMIT == LIMIT - 1 for t in range(2 * LIMIT)]
    assert not any(step.terminated.any() for step in steps)
    ended = steps[LIMIT - 1].info
    assert ended["episode/episode_len"].tolist() == [LIMIT] * env.num_envs
    returns = sum(step.reward[:, 0] for step in steps[:LIMIT])
    assert torch.allclose(ended["episode/return"], returns, atol=1e-5)
    assert torch.allclose(ended["episode/reward"], returns / LIMIT, atol=1e-5)


@pytest.mark.parametrize("kind", IN_PROCESS)
def test_time_limit_inside_a_chunk_ends_it_there(made):
    env = made(max_episode_steps=3)
    env.reset(0)
    _, step = play(env, 2, horizon=2)
    assert step.truncated.all()
    assert (step.reward[:, 0] != 0).all()
    assert (step.reward[:, 1] == 0).all()
    assert step.info["episode/episode_len"].tolist() == [3] * env.num_envs


def test_chunks_are_single_steps_in_a_row(made):
    env = made()
    env.reset(3)
    chunk = env.step(actions(env, 2))
    env.reset(3)
    singles = [env.step(actions(env, 2)[:, h : h + 1]) for h in range(2)]
    assert torch.equal(chunk.reward, torch.cat([single.reward for single in singles], 1))
    assert_same(chunk.obs, singles[-1].obs)


@pytest.mark.parametrize("kind", IN_PROCESS)
def test_without_automatic_reset_a_finished_environment_stands_still(made):
    env = made(auto_reset=False)
    env.reset(0)
    final = play(env, LIMIT)[-1]
    assert final.done.all()
    assert_same(final.obs, final.last_obs)
    later = play(env, 2)[-1]
    assert not later.done.any()
    assert (later.reward == 0).all()
    assert_same(later.obs, final.obs)
    assert not torch.equal(env.reset()["state"], final.obs["state"])


def test_a_seed_decides_everything_until_the_next_one(made):
    env = made()
    runs = []
    for _ in range(2):
        runs.append([env.reset(7), *(step.obs for step in play(env, 2 * LIMIT))])
        play(env, 3)  # another past
        env.reset()
    for first, second in zip(*runs, strict=True):
        assert_same(first, second)


def test_seeds_and_environments_differ(made):
    env = made()
    first, second = seen(env.reset(1)), seen(env.reset(2))
    assert not torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first}) == env.num_envs
    assert not torch.equal(seen(env.reset()), second)


@pytest.mark.parametrize("kind", IN_PROCESS)
def test_fixed_resets_return_to_the_same_states(made):
    env = made(use_fixed_reset_state_ids=True, seed=5)
    first = env.reset()
    play(env, LIMIT + 1)
    assert_same(env.reset(), first)


@pytest.mark.parametrize("kind", [kind for kind in IN_PROCESS if kind.values[0].num_envs > 1])
def test_groups_begin_in_the_same_state(made):
    env = made(num_envs=4, total_num_envs=4, group_size=2)
    state = seen(env.reset(0))
    assert torch.equal(state[0], state[1])
    assert torch.equal(state[2], state[3])
    assert not torch.equal(state[0], state[2])


@pytest.mark.parametrize("kind", PAID)
def test_relative_reward_telescopes_and_scale_is_applied_last(made):
    plain, relative = made(), made(num_envs=made().num_envs, use_rel_reward=True, reward_scale=2.0)
    plain.reset(0), relative.reset(0)
    rewards = torch.cat([step.reward for step in play(plain, LIMIT)], 1)
    steps = play(relative, LIMIT)
    changes = torch.cat([step.reward for step in steps], 1)
    assert torch.allclose(changes.cumsum(1), 2 * rewards, atol=1e-5)
    assert torch.allclose(steps[-1].info["episode/return"], rewards[:, -1], atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 1), (1, 1, 0), (0, 1, 1), (0, 0, 0)])
def test_wrong_action_shape_is_an_error(made, shape):
    env = made()
    env.reset(0)
    wrong = (env.num_envs + shape[0], shape[1], *(env.spaces.action_dim + extra for extra in shape[2:]))
    with pytest.raises(ShapeError, match=r"\[N, H, A\]"):
        env.step(torch.zeros(wrong))
    env.step(actions(env))  # and does no harm


def test_an_action_that_is_not_a_number_is_an_error(made):
    env = made()
    env.reset(0)
    bad = actions(env)
    last = env.num_envs - 1
    bad[last, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=f"action of environment {last}"):
        env.step(bad)


def test_saved_state_continues_to_the_bit(made, kind):
    env = made()
    env.reset(11)
    play(env, LIMIT + 2)
    state = env.state_dict()
    expected = play(env, LIMIT)
    # Another environment of its kind goes on, in this process, and so does the same one, wherever its rows are.
    for other in (opened(replace(kind, num_workers=0), copy=1), env):
        other.load_state_dict(state)
        for mine, theirs in zip(expected, play(other, LIMIT), strict=True):
            assert_same(mine.obs, theirs.obs)
            assert torch.equal(mine.reward, theirs.reward)
            assert torch.equal(mine.info["episode/return"], theirs.info["episode/return"])


def test_records_do_not_change_afterwards(made):
    env = made()
    obs = env.reset(0)
    copies = copy.deepcopy(obs)
    play(env, 2)
    assert_same(obs, copies)


def test_without_a_picture_render_is_none(made):
    env = made()
    env.reset(0)
    assert env.render() is None


@pytest.mark.sim
@pytest.mark.skipif(importlib.util.find_spec("mani_skill") is None, reason="ManiSkill is not installed")
def test_neither_processes_nor_stepping_change_what_happens():
    kinds = [Kind("maniskill", 0, "fast"), Kind("maniskill", 2, "fast"), Kind("maniskill", 0, "maniskill")]
    seen = []
    for kind in kinds:
        env = opened(kind)
        obs = [env.reset(4), *(step.obs for step in play(env, LIMIT + 1))]
        seen.append(np.stack([o["state"].numpy() for o in obs]))
    assert np.array_equal(seen[0], seen[1])
    assert np.allclose(seen[0], seen[2], atol=1e-6)


def test_closing_twice_is_allowed_and_stepping_then_is_not(made):
    env = made()
    [key] = [key for key, other in _open.items() if other is env]
    del _open[key]
    env.reset(0)
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.step(torch.zeros(env.num_envs, 1, env.spaces.action_dim))
