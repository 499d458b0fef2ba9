"""PhysX on a CUDA device."""

import pytest
import torch

pytest.importorskip("mani_skill")

from rlinf.envs.maniskill.config import ManiSkillConfig
from rlinf.envs.maniskill.env import make

pytestmark = [
    pytest.mark.sim,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_worlds_on_the_gpu_follow_the_same_rules():
    config = ManiSkillConfig(
        total_num_envs=4, max_episode_steps=3, ignore_terminations=True, init_params={"sim_backend": "gpu"}
    )
    env = make(config, num_envs=4, seed=0, control_mode="pd_ee_delta_pos", num_workers=2, render=False)
    first = env.reset(5)["state"]
    assert first.device.type == "cuda"
    assert first.shape == (4, 42)
    action = torch.full((4, 2, 4), 0.3, device="cuda")
    step = env.step(action)
    assert torch.equal(step.obs["state"], step.last_obs["state"])
    step = env.step(action)
    assert step.truncated.all()
    assert (step.reward[:, 1] == 0).all()
    assert step.info["episode/episode_len"].tolist() == [3] * 4
    assert not torch.equal(step.obs["state"], step.last_obs["state"])
    assert torch.allclose(env.reset(5)["state"], first, atol=1e-4)
    assert not hasattr(env, "state_dict")
    env.close()
