from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlinf.core.types import EnvSpaces, Obs
from rlinf.envs.episodes import Outcome, ReplayedEnv, episode_rules
from rlinf.envs.maniskill.config import ManiSkillConfig
from rlinf.launch import registry

CONFIG_DIR = Path(__file__).parents[2] / "examples" / "embodiment" / "config"


class NoiseWorlds:
    """As many numbers as PickCube's state, that follow from seed and actions."""

    device = torch.device("cpu")

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.spaces = EnvSpaces({"state": (42,)}, {"state": "float32"}, action_dim=4)
        self._state = torch.zeros(num_envs, 42)

    def begin(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        for row, seed in zip(rows, seeds, strict=True):
            self._state[row] = torch.randn(42, generator=torch.Generator().manual_seed(seed))

    def advance(self, action: Tensor, active: Tensor) -> Outcome:
        moved = self._state.clone()
        moved[:, : action.shape[1]] += action
        self._state = torch.where(active[:, None], moved, self._state)
        return Outcome(-self._state.norm(dim=1), torch.zeros_like(active), torch.zeros_like(active))

    def observe(self) -> Obs:
        return {"state": self._state.clone()}

    def render(self) -> np.ndarray | None:
        return None

    def close(self) -> None:
        pass


class PictureWorlds(NoiseWorlds):
    """What the digital twin shows and takes."""

    def __init__(self, num_envs: int, side: int) -> None:
        super().__init__(num_envs)
        self._side = side
        shapes = {"state": (7,), "images/front": (side, side, 3), "instruction": ()}
        self.spaces = EnvSpaces(shapes, {"state": "float32", "images/front": "uint8", "instruction": "str"}, 7)

    def observe(self) -> Obs:
        shade = (128 + 40 * self._state[:, :3]).clamp(0, 255).to(torch.uint8)
        picture = shade[:, None, None].expand(-1, self._side, self._side, 3).contiguous()
        return {
            "state": self._state[:, :7].clone(),
            "images": {"front": picture},
            "instruction": ["go"] * self.num_envs,
        }


def make(
    config: ManiSkillConfig, *, num_envs: int, seed: int, control_mode: str | None, num_workers: int, render: bool
) -> ReplayedEnv:
    assert control_mode is not None
    worlds = NoiseWorlds(num_envs)
    if config.init_params.obs_mode == "rgb":
        worlds = PictureWorlds(num_envs, config.init_params.sensor_configs["width"])
    return ReplayedEnv(worlds, episode_rules(config), seed=seed)


@pytest.fixture(autouse=True)
def without_curves(fewer_pictures: None) -> None:
    """Of the runs here; one whose name has `picture` draws them."""


@pytest.fixture
def fake_maniskill(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes' environment without its simulator."""
    monkeypatch.setitem(registry.ENVS, "maniskill", f"{__name__}:make")


@pytest.fixture
def reach_configs(tmp_path: Path) -> Path:
    """A folder with one recipe, `reach`, that trains in seconds."""
    folder = tmp_path / "config"
    files = {
        "reach.yaml": f"""\
defaults:
  - env@env.train: reach
  - env@env.eval: reach
  - model@actor.model: mlp_policy
  - _self_
runner:
  logger: {{log_path: {tmp_path}/logs, experiment_name: reach, logger_backends: []}}
  max_epochs: 6
  save_interval: 3
  val_check_interval: 3
algorithm:
  update_epoch: 3
  gamma: 0.9
  replay_buffer: {{capacity: 150, min_buffer_size: 8}}
env:
  train: {{total_num_envs: 4, max_steps_per_rollout_epoch: 6}}
  eval: {{total_num_envs: 2, use_fixed_reset_state_ids: True}}
actor: {{micro_batch_size: 8, global_batch_size: 16, num_threads: 1}}
""",
        "env/reach.yaml": "env_type: reach\nmax_episode_steps: 8\nmax_steps_per_rollout_epoch: 8\n",
        "model/mlp_policy.yaml": "model_type: mlp_policy\nhidden_dims: [16]\nq_hidden_dims: [16]\n",
        "model/flow_policy.yaml": "model_type: flow_policy\nd_model: 8\nn_layers: 1\nq_hidden_dims: [16]\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
