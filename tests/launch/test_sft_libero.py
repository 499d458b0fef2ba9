"""pi0 on LIBERO's demonstrations: from a LeRobot data set to the model that DSRL steers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.core.types import EnvSpaces
from rlinf.data.lerobot.layout import Feature
from rlinf.data.lerobot.writer import LeRobotWriter
from rlinf.envs.libero.config import LiberoConfig
from rlinf.launch.build import build_networks
from rlinf.launch.parse import load_as, load_config
from rlinf.launch.record_lerobot import features_of
from rlinf.launch.sft import run_sft
from rlinf.launch.sft_config import SftConfig
from rlinf.metrics import report
from rlinf.models.embodiment.latent_policy import LatentPolicy
from tests.launch.conftest import CONFIG_DIR

RECIPES = CONFIG_DIR.parents[1] / "sft" / "config"
FULL, TINY = "libero_sft_openpi_pi0", "libero_sft_openpi_pi0_tiny"
SIDE = 64
SPACES = EnvSpaces(
    {"state": (8,), "images/main": (SIDE, SIDE, 3), "images/wrist": (SIDE, SIDE, 3), "instruction": ()},
    {"state": "float32", "images/main": "uint8", "images/wrist": "uint8", "instruction": "str"},
    action_dim=7,
)
TEXT = "pick up the black bowl next to the plate and place it on the plate"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.LearningCurve, "_draw", lambda self: None)


def write(root: Path, main: str, wrist: str, state: str, action: str) -> Path:
    """Two episodes of random numbers, with features of these names."""
    pictures = Feature("image", (SIDE, SIDE, 3))
    features = {main: pictures, wrist: pictures, state: Feature("float32", (8,)), action: Feature("float32", (7,))}
    draw = np.random.default_rng(0)
    with LeRobotWriter(root, fps=10, features=features) as writer:
        for _ in range(2):
            seen = draw.integers(0, 255, (2, 12, SIDE, SIDE, 3), dtype=np.uint8)
            numbers = draw.uniform(-1, 1, (12, 15)).astype(np.float32)
            writer.add_episode({main: seen[0], wrist: seen[1], state: numbers[:, :8], action: numbers[:, 8:]}, TEXT)
    return root


def sft(tmp_path: Path, data: Path, *overrides: str) -> SftConfig:
    values = [
        f"runner.logger.log_path={tmp_path}",
        "runner.logger.logger_backends=[]",
        f"runner.export_dir={tmp_path / 'pi0'}",
        "runner.max_steps=1",
        "runner.val_check_interval=0",
        f"data.datasets.demonstrations.path={data}",
        "data.datasets.demonstrations.record=null",
        "model.noises_per_example=1",
        "global_batch_size=4",
    ]
    return load_as(SftConfig, TINY, [*values, *overrides], RECIPES, has_gpu=lambda: False)


def test_what_is_cloned_from_a_published_layout_is_what_dsrl_steers(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "image", "wrist_image", "state", "actions")
    named = "data.datasets.demonstrations.columns={images/agentview: image}"
    assert run_sft(sft(tmp_path, data, named)) == 0
    overrides = ["profile=cpu", f"actor.model.model_path={tmp_path / 'pi0'}"]
    config = load_config("libero_spatial_dsrl_openpi", overrides, CONFIG_DIR, has_gpu=lambda: False)
    policy = build_networks(config, SPACES).actor
    assert isinstance(policy, LatentPolicy)
    picture = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    obs = {"state": torch.zeros(2, 8), "images": {"main": picture, "wrist": picture}, "instruction": [TEXT] * 2}
    out = policy.act(obs, "train", torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    assert out.action.shape == (2, 5, 7) and bool(out.action.isfinite().all())
    assert not torch.equal(out.action[0], out.action[1]), "another noise, another chunk"


def test_what_is_recorded_in_the_simulator_has_the_features_that_the_recipe_names(tmp_path: Path) -> None:
    recorded = set(features_of(SPACES, "image"))
    names = ["observation.images.main", "observation.images.wrist", "observation.state", "action"]
    assert recorded >= set(names)
    assert run_sft(sft(tmp_path, write(tmp_path / "data", *names))) == 0
    config = load_as(SftConfig, TINY, [], RECIPES, has_gpu=lambda: False)
    assert config.data.datasets is not None
    record = config.data.datasets["demonstrations"].record
    assert record is not None and isinstance(record.env, LiberoConfig) and isinstance(config.env, LiberoConfig)
    assert record.env.use_standin_assets and config.env.use_standin_assets
    assert record.env.image_size == config.env.image_size == config.model.robot().model.vision.image_size  # type: ignore


def test_the_full_recipe_has_the_sizes_of_the_model_that_is_steered() -> None:
    config = load_as(SftConfig, FULL, [], RECIPES, has_gpu=lambda: True)
    steered = load_config("libero_spatial_dsrl_openpi", ["profile=gpu"], CONFIG_DIR, has_gpu=lambda: False).actor.model
    assert config.runner.export_dir == steered.model_path == "checkpoints/pi0_libero"
    assert config.model.robot() == steered.robot()
    for key in ("num_steps", "num_action_chunks"):
        assert getattr(config.model, key) == getattr(steered, key)
    assert isinstance(config.env, LiberoConfig)
    assert config.env.total_num_envs * config.env.rollout_epoch == 500
