"""π0 as the frozen decoder of a run: the keys of the seed document, one copy of the model, what is stored and saved."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.errors import ConfigError, DataError
from rlinf.core.types import EnvSpaces, Obs
from rlinf.envs.episodes import Outcome, ReplayedEnv, episode_rules
from rlinf.envs.reach import ReachConfig
from rlinf.launch import decoders, registry
from rlinf.launch.build import build_algorithm, build_networks, describe_replay
from rlinf.launch.config import Root
from rlinf.launch.decoders import remark_on_decoder
from rlinf.launch.parameters import bytes_of, learning_bytes, told_memory
from rlinf.launch.parse import load_config
from rlinf.launch.run import evaluate_run, run_directory, train
from rlinf.metrics import report
from rlinf.models.embodiment.latent_policy import LatentPolicy
from rlinf.models.embodiment.openpi.checkpoint import save_pi0
from rlinf.models.embodiment.openpi.config import TINY
from rlinf.models.embodiment.openpi.decoder import OpenpiDecoder
from rlinf.models.embodiment.openpi.model import build_pi0, empty_pi0, stays_float32
from rlinf.models.embodiment.openpi.norm_stats import NormStats, write_norm_stats
from rlinf.models.embodiment.openpi.tokenizer import WordTokenizer
from rlinf.workers.state_files import load_weights
from tests.launch.conftest import CONFIG_DIR
from tests.launch.test_run import assert_equal_checkpoints, journal

IMAGE = 32
SPACES = EnvSpaces(
    {"state": (8,), "images/main": (IMAGE, IMAGE, 3), "images/wrist": (IMAGE, IMAGE, 3), "instruction": ()},
    {"state": "float32", "images/main": "uint8", "images/wrist": "uint8", "instruction": "str"},
    action_dim=7,
)


class TwoCameraWorlds:
    """What LIBERO emits and takes, without its simulator: the arm's state moves by the action."""

    device = torch.device("cpu")
    spaces = SPACES

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self._state = torch.zeros(num_envs, 8)

    def begin(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        for row, seed in zip(rows, seeds, strict=True):
            self._state[row] = torch.randn(8, generator=torch.Generator().manual_seed(seed))

    def advance(self, action: Tensor, active: Tensor) -> Outcome:
        moved = self._state.clone()
        moved[:, :7] += 0.1 * action.clamp(-1, 1)
        self._state = torch.where(active[:, None], moved, self._state)
        success = self._state[:, 0] > 1
        return Outcome(success.float(), success, torch.zeros_like(success))

    def observe(self) -> Obs:
        shade = (128 + 40 * self._state[:, 0]).clamp(0, 255).to(torch.uint8)
        picture = shade[:, None, None, None].expand(-1, IMAGE, IMAGE, 3).contiguous()
        text = ["pick up the bowl"] * self.num_envs
        return {"state": self._state.clone(), "images": {"main": picture, "wrist": picture}, "instruction": text}

    def render(self) -> np.ndarray | None:
        return None

    def close(self) -> None:
        pass


def make(
    config: ReachConfig, *, num_envs: int, seed: int, control_mode: str | None, num_workers: int, render: bool
) -> ReplayedEnv:
    return ReplayedEnv(TwoCameraWorlds(num_envs), episode_rules(config), seed=seed)


@pytest.fixture(autouse=True)
def two_cameras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ENVS, "reach", f"{__name__}:make")
    monkeypatch.setattr(report.LearningCurve, "_draw", lambda self: None)


# The keys that the seed document prints, with its values, and what makes a run of seconds of them.
RECIPE = """\
defaults:
  - _self_
runner:
  logger: {{log_path: {logs}, experiment_name: steered, logger_backends: []}}
  max_epochs: 4
  val_check_interval: 2
  save_interval: 2
algorithm:
  adv_type: embodied_sac
  loss_type: embodied_sac
  gamma: 0.999
  tau: 0.005
  update_epoch: 2
  train_actor_steps: 0
  agg_q: mean
  actor_agg_q: mean
  backup_entropy: False
  entropy_tuning:
    alpha_type: softplus
    initial_alpha: 1.0
    target_entropy: -16
    optim: {{lr: 3.0e-4}}
  replay_buffer: {{capacity: 100, min_buffer_size: 4}}
env:
  train: &env
    env_type: reach
    total_num_envs: 2
    use_step_penalty: True
    max_episode_steps: 20
    max_steps_per_rollout_epoch: 10
    num_workers: 0
  eval: {{<<: *env, max_steps_per_rollout_epoch: 20, use_fixed_reset_state_ids: True}}
actor:
  micro_batch_size: 4
  global_batch_size: 8
  num_threads: 1
  model:
    model_type: openpi
    num_action_chunks: 5
    num_steps: 2
    openpi:
      size: tiny
      config_name: pi0_libero_horizon10
      use_dsrl: True
      dsrl_state_dim: 8
      dsrl_action_noise_dim: 32
      dsrl_num_q_heads: 10
      dsrl_image_latent_dim: 64
      dsrl_state_latent_dim: 64
      dsrl_hidden_dims: [128, 128, 128]
"""


def load(tmp_path: Path, *overrides: str) -> Root:
    folder = tmp_path / "config"
    folder.mkdir(exist_ok=True)
    (folder / "steered.yaml").write_text(RECIPE.format(logs=tmp_path / "logs"))
    return load_config("steered", overrides, folder, has_gpu=lambda: False)


def save_tiny(folder: Path, seed: int = 0, statistics: bool = True) -> Path:
    save_pi0(build_pi0(TINY, generator=torch.Generator().manual_seed(seed)), folder)
    if statistics:
        one = {size: torch.ones(size, dtype=torch.float64) for size in (7, 8)}
        stats = {"state": NormStats(0 * one[8], one[8]), "actions": NormStats(0 * one[7], one[7])}
        write_norm_stats(stats, folder / "physical-intelligence" / "libero")
    return folder


@pytest.mark.parametrize("aliasing", [False, True])
def test_a_run_learns_evaluates_and_resumes_exactly(
    tmp_path: Path, aliasing: bool, capsys: pytest.CaptureFixture
) -> None:
    overrides = [f"algorithm.noise_aliasing={aliasing}"]
    straight = load(tmp_path, *overrides)
    assert train(straight) == 0
    told = capsys.readouterr().out
    half = load(tmp_path, *overrides, "runner.max_epochs=2", f"runner.logger.log_path={tmp_path / 'half'}")
    assert train(half) == 0
    rest = load(
        tmp_path, *overrides, f"runner.resume_dir={run_directory(half)}", f"runner.logger.log_path={tmp_path / 'rest'}"
    )
    assert train(rest) == 0
    assert_equal_checkpoints(run_directory(straight), run_directory(rest))
    assert journal(run_directory(straight))[-1]["time/updates"] > 0
    assert ("noise_critic" in told) == aliasing
    assert evaluate_run(run_directory(straight))["eval/num_episodes"] == 2
    checkpoint = run_directory(straight) / "checkpoints" / "latest"
    assert all(name.startswith("head.") for name in load_weights(checkpoint / "model.safetensors")[1])


def test_what_is_trained_is_the_seeds_half_million_and_small_encoders(tmp_path: Path) -> None:
    networks = build_networks(load(tmp_path), SPACES, acts=False)
    assert isinstance(networks.actor, LatentPolicy) and networks.critic is not None
    heads = sum(p.numel() for name, p in networks.critic.named_parameters() if name.startswith("q."))
    assert heads == 545_290, "ten heads of 3 x 128 on 64 + 64 + 32 numbers"
    total = sum(p.numel() for part in (networks.actor, networks.critic) for p in part.parameters())
    assert heads < total < 750_000
    assert networks.actor.noise_shape == (32,), "one noise for the whole chunk"


def test_a_full_size_run_holds_one_pi0_and_learns_in_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's own networks; of pi0 only shapes and types, as a GPU has them."""

    def without_memory(robot, path, tokenizer, *, num_steps, dtype):
        model = empty_pi0(robot.model)
        for name, p in model.named_parameters():
            p.data = p.data.to(torch.float32 if stays_float32(name) else dtype)
        one = torch.ones(7, dtype=torch.float64)
        pipeline = robot.pipeline({"actions": NormStats(0 * one, one, -one, one)}, WordTokenizer())
        return OpenpiDecoder(model, pipeline, num_steps=num_steps)

    monkeypatch.setattr(decoders, "load_openpi_decoder", without_memory)
    monkeypatch.setattr(decoders, "tokenizer_of", lambda model, path: None)
    monkeypatch.setattr(decoders, "weights_mark", lambda path: 7)
    config = load_config("libero_spatial_dsrl_openpi", ["profile=gpu"], CONFIG_DIR, has_gpu=lambda: False)
    policies = [build_networks(config, SPACES).actor for _ in range(2)]
    assert all(isinstance(policy, LatentPolicy) for policy in policies)
    assert policies[0]._decoder[0] is policies[1]._decoder[0], "those of training and of evaluation"
    acting = bytes_of(policies[0].held())
    weights = list(policies[0]._decoder[0].model.parameters())
    assert sum(p.numel() for p in weights) == 3_238_048_528
    assert acting["decoder"] == sum(p.numel() * p.element_size() for p in weights)

    learner = build_algorithm(config, build_networks(config, SPACES, acts=False), torch.device("cpu"))
    learning, trained = learning_bytes(learner), 728_459
    actor, critic = 58_560 + 62_304, 545_290 + 62_304
    assert 0 < learning["actor"] - 4 * actor < 16, "besides: whether learning has begun, and the decoder's mark"
    assert (learning["critic"], learning["target_critic"]) == (4 * critic, 4 * critic)
    assert learning["gradients and two moments"] == 12 * trained
    told = told_memory(learning, acting)
    assert told == (
        "memory: learning takes 14 MB (actor 0.48 MB, critic 2.4 MB, target_critic 2.4 MB, gradients and two moments "
        "8.7 MB); acting, in each process that does, 6.49 GB (policy 0.48 MB, decoder 6.48 GB)"
    )
    kept = tensors_of(learner.held(), learner.state_dict(), learner.acting_weights()[1])
    assert sum(x.numel() for x in kept) < 6 * trained and not any(x.is_meta for x in kept), "nothing of pi0"


def tensors_of(*states: object) -> list[Tensor]:
    return [leaf for _, leaf in tree.leaves_of_state(list(states)) if isinstance(leaf, Tensor)]


def test_a_row_of_replay_is_a_small_picture_and_no_large_one(tmp_path: Path) -> None:
    large = EnvSpaces(
        SPACES.obs_shapes | {"images/main": (256, 256, 3), "images/wrist": (256, 256, 3)},
        SPACES.obs_dtypes,
        action_dim=7,
    )
    row = 64 * 64 * 3 + 4 * 8 + 4 * 32 + 17
    assert f"rows of {row:,} bytes" in str(describe_replay(load(tmp_path), large))


def test_policies_of_one_process_share_the_model_unless_they_are_offloaded(tmp_path: Path) -> None:
    def decoders(config: Root) -> list[int]:
        policies = [build_networks(config, SPACES).actor for _ in range(2)]
        assert all(isinstance(policy, LatentPolicy) for policy in policies)
        return [id(policy._decoder[0]) for policy in policies]

    assert len(set(decoders(load(tmp_path)))) == 1
    assert len(set(decoders(load(tmp_path, "rollout.enable_offload=True")))) == 2


def test_weights_come_from_their_folder(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "weights")
    config = load(tmp_path, f"actor.model.model_path={folder}")
    assert train(config) == 0
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(Exception, match="learned to steer another decoder"):
        evaluate_run(run_directory(config), [f"actor.model.model_path={other}"])


# ---- what is refused


def test_a_model_without_its_statistics_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "weights", statistics=False)
    with pytest.raises(DataError, match=r"no statistics at .*physical-intelligence/libero/norm_stats.json"):
        train(load(tmp_path, f"actor.model.model_path={folder}"))
    assert not (run_directory(load(tmp_path)) / "metrics.jsonl").exists(), "the mended command may use the directory"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["actor.model.openpi.size=full"], "model_path must name the folder with the weights of pi0"),
        (["actor.model.openpi.use_dsrl=False"], "use_dsrl: SAC can steer pi0 by its noise and not train it"),
        (["actor.model.openpi.config_name=pi0_libro"], "did you mean 'pi0_libero'"),
        (["actor.model.openpi.dsrl_num_heads=3"], "did you mean actor.model.openpi.dsrl_num_q_heads"),
        (["algorithm.critic_subsample_size=11"], r"more than actor.model.openpi.dsrl_num_q_heads \(10\)"),
        (["actor.model.openpi.dsrl_state_dim=9"], "dsrl_state_dim is 9, but the environment's state has 8"),
        (["actor.model.openpi.dsrl_action_noise_dim=7"], "dsrl_action_noise_dim is 7, but the decoder's noise has 32"),
        (["actor.model.openpi.dsrl_camera=front"], "dsrl_camera is front, but the environment has main, wrist"),
        (["actor.model.num_action_chunks=20", "env.train.max_steps_per_rollout_epoch=20"], "decoder makes 10 actions"),
        (["actor.precision=bf16"], "networks that steer a decoder are small and learn in float32"),
    ],
)  # fmt: skip
def test_what_cannot_be(tmp_path: Path, overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        train(load(tmp_path, *overrides))


def test_an_environment_of_another_robot_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    spaces = EnvSpaces({"state": (8,), "images/top": (IMAGE, IMAGE, 3)}, {"state": "float32"}, action_dim=4)
    with pytest.raises(ConfigError) as caught:
        build_networks(load(tmp_path), spaces)
    text = str(caught.value)
    assert text.startswith("actor.model.openpi.config_name pi0_libero_horizon10 does not fit: it looks for a camera")
    for part in ("the environment has top", "gives none", "have 7 numbers, the environment's 4"):
        assert part in text


def test_random_weights_are_told_at_the_start(tmp_path):
    assert remark_on_decoder(load(tmp_path)) == (
        "the frozen π0 (tiny) has random weights, to see that it runs, and solves nothing; actor.model.model_path "
        "takes the folder of real ones"
    )
    assert remark_on_decoder(load(tmp_path, f"actor.model.model_path={save_tiny(tmp_path / 'pi0')}")) is None
