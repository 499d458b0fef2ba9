"""ManiSkill environments: what is built, what is refused, what is filmed."""

import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("mani_skill")

from rlinf.core.errors import ConfigError, MissingDependency, NonFiniteError, ShapeError
from rlinf.envs.maniskill import scene, vulkan
from rlinf.envs.maniskill.config import ManiSkillConfig
from rlinf.envs.maniskill.env import make, split_evenly
from rlinf.envs.maniskill.expert import PickCubeExpert, StackCubeExpert
from rlinf.envs.maniskill.novulkan import no_visuals

pytestmark = pytest.mark.sim

can_render = pytest.mark.skipif(vulkan.find_icd() is None, reason="no Vulkan driver")


def config(task="PickCube-v1", **keys):
    init_params = {"id": task, "sim_backend": "cpu"} | keys.pop("init_params", {})
    return ManiSkillConfig(**{"total_num_envs": 2, "init_params": init_params} | keys)


def made(*args, num_envs=2, control_mode="pd_ee_delta_pos", num_workers=0, render=False, **keys):
    return make(
        config(*args, **keys),
        num_envs=num_envs,
        seed=0,
        control_mode=control_mode,
        num_workers=num_workers,
        render=render,
    )


@pytest.mark.parametrize(
    ("task", "control_mode", "size", "action_dim"),
    [
        ("PickCube-v1", "pd_ee_delta_pos", 42, 4),
        ("PickCube-v1", "pd_joint_delta_pos", 42, 8),
        ("PushCube-v1", "pd_ee_delta_pos", 35, 4),
        ("StackCube-v1", "pd_ee_delta_pos", 48, 4),
        ("PegInsertionSide-v1", "pd_joint_delta_pos", 43, 8),
    ],
)
def test_tasks_with_assets_in_the_wheel_start(task, control_mode, size, action_dim):
    env = made(task, control_mode=control_mode, num_envs=1, total_num_envs=1, max_episode_steps=2)
    assert env.spaces.obs_shapes == {"state": (size,)}
    assert env.spaces.action_dim == action_dim
    first = env.reset(0)["state"]
    steps = [env.step(torch.full((1, 1, action_dim), 0.5)) for _ in range(2)]
    assert steps[-1].truncated.all()
    assert torch.equal(env.reset(0)["state"], first)
    env.close()


def test_an_explicit_controller_wins():
    env = made(init_params={"control_mode": "pd_joint_delta_pos"}, num_envs=1, control_mode="pd_ee_delta_pos")
    assert env.spaces.action_dim == 8
    env.close()


def test_expert_succeeds_and_success_terminates():
    env = made(num_envs=8)
    expert = PickCubeExpert(noise_std=0.05, generator=np.random.default_rng(0))
    state = env.reset(0)["state"]
    episodes = successes = 0
    while episodes < 40:
        step = env.step(torch.from_numpy(expert.act(state.numpy()))[:, None])
        state = step.obs["state"]
        assert torch.equal(step.terminated[:, 0], step.info["success"])
        episodes += int(step.done.sum())
        successes += int(step.info["episode/success_once"][step.done].sum())
    assert successes >= 0.95 * episodes
    env.close()


def test_stacking_expert_succeeds():
    env = made("StackCube-v1", num_envs=4)
    expert = StackCubeExpert()
    state = env.reset(0)["state"]
    episodes = successes = 0
    while episodes < 12:
        step = env.step(torch.from_numpy(expert.act(state.numpy()))[:, None])
        state = step.obs["state"]
        episodes += int(step.done.sum())
        successes += int(step.info["episode/success_once"][step.done].sum())
    assert successes >= 0.9 * episodes
    env.close()


@pytest.mark.parametrize("expert", [PickCubeExpert, StackCubeExpert])
def test_experts_refuse_the_states_of_other_tasks(expert):
    with pytest.raises(ShapeError, match=r"the expert takes states \[N, 4\d\] of \w+-v1, not \[2, 7\]"):
        expert().act(np.zeros((2, 7), np.float32))
    with pytest.raises(ValueError, match="needs a generator"):
        expert(0.1)


def test_success_does_not_end_an_episode_that_ignores_terminations():
    env = made(ignore_terminations=True, reward_mode="only_success")
    state = env.reset(0)["state"]
    total = torch.zeros(2)
    for _ in range(50):
        step = env.step(torch.from_numpy(PickCubeExpert().act(state.numpy()))[:, None])
        assert not step.terminated.any()
        assert torch.equal(step.reward[:, 0], step.info["success"].float())
        total += step.reward[:, 0]
        state = step.obs["state"]
    assert step.truncated.all()
    assert step.info["episode/success_once"].all()
    assert torch.equal(step.info["episode/return"], total)
    env.close()


def test_reward_modes_agree_on_their_scale():
    rewards = {}
    for mode in ("raw", "normalized_dense", "dense"):
        env = made(reward_mode=mode)
        env.reset(0)
        rewards[mode] = env.step(torch.zeros(2, 1, 4)).reward
        env.close()
    assert torch.equal(rewards["raw"], rewards["normalized_dense"])
    assert torch.allclose(rewards["dense"], 5 * rewards["raw"])


def test_a_state_that_is_not_a_number_names_the_environment(monkeypatch):
    env = made()
    env.reset(0)
    worlds = env._simulator
    broken = worlds._scenes[1].observe().copy()
    broken[3] = np.nan
    monkeypatch.setattr(worlds._scenes[1], "observe", lambda: broken)
    with pytest.raises(NonFiniteError, match="observation 'state' of environment 1 is not finite, at step 1"):
        env.step(torch.zeros(2, 1, 4))
    env.close()


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"task": "PickCub-v1"}, ConfigError, "ManiSkill has no task PickCub-v1; did you mean PickCube-v1?"),
        ({"task": "PickSingleYCB-v1"}, MissingDependency, "download_asset PickSingleYCB-v1"),
        ({"init_params": {"control_mode": "pd_nothing"}}, ConfigError, "control_mode pd_nothing"),
        ({"task": "StackCube-v1", "stepping": "fast"}, ConfigError, "env.*.stepping: fast is impossible here"),
        ({"task": "PlugCharger-v1", "reward_mode": "dense"}, ConfigError, "reward_mode dense"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(keys, error, words):
    keys = dict(keys)
    with pytest.raises(error) as caught:
        made(*([keys.pop("task")] if "task" in keys else []), **keys)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_simulator_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "mani_skill", None)
    monkeypatch.setitem(sys.modules, "mani_skill.envs", None)
    with pytest.raises(MissingDependency, match=r"run `bash requirements/install.sh embodied --env maniskill`"):
        made()


def test_a_missing_driver_is_noticed_before_anything_is_built(monkeypatch):
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nowhere.json")
    with pytest.raises(MissingDependency, match="no Vulkan driver"):
        made(render=True)
    with pytest.raises(MissingDependency, match="no Vulkan driver"):
        made(render=True, num_workers=1)


def test_a_gpu_is_not_pretended(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sim_backend is gpu, but torch sees no CUDA device"):
        made(init_params={"sim_backend": "gpu"})


def test_shares_differ_by_one_at_most():
    assert split_evenly(7, 3) == [3, 2, 2]
    assert split_evenly(4, 4) == [1, 1, 1, 1]


def test_leaving_out_visuals_leaves_no_trace():
    import sapien.render
    from sapien.wrapper.actor_builder import ActorBuilder

    material, visual = sapien.render.RenderMaterial, ActorBuilder.add_box_visual
    with pytest.raises(ZeroDivisionError), no_visuals():
        assert sapien.render.RenderMaterial is not material
        raise ZeroDivisionError
    assert sapien.render.RenderMaterial is material
    assert ActorBuilder.add_box_visual is visual


def test_starts_on_a_machine_without_vulkan():
    program = (
        "from rlinf.envs.maniskill.fast import FastScene; from rlinf.envs.maniskill.scene import SceneSpec;"
        "print(FastScene(SceneSpec('PickCube-v1', 'pd_ee_delta_pos')).state_dim)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"VK_ICD_FILENAMES": "/nowhere.json", "PATH": "/usr/bin:/bin", "HOME": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=scene.__file__.rpartition("/rlinf/")[0],
    )
    assert run.stdout.strip() == "42", run.stderr


@pytest.mark.render
@can_render
def test_films_the_first_environments_without_changing_what_happens():
    rules = {"ignore_terminations": True, "max_episode_steps": 3, "total_num_envs": 3}
    film = {"save_video": True, "max_envs": 2, "width": 96, "height": 64}
    env = made(num_envs=3, num_workers=2, render=True, video_cfg=film, **rules)
    plain = made(num_envs=3, **rules)
    assert torch.equal(env.reset(0)["state"], plain.reset(0)["state"])
    first = env.render()
    assert first.shape == (2, 64, 96, 3)
    assert first.dtype == np.uint8
    assert first.std() > 10
    assert not np.array_equal(first[0], first[1])
    for _ in range(4):  # past an automatic reset
        action = torch.full((3, 1, 4), -0.7)
        assert torch.equal(env.step(action).obs["state"], plain.step(action).obs["state"])
    assert np.abs(env.render().astype(int) - first).max() > 50
    env.close()
    plain.close()
