"""Every recipe that is shipped parses, builds and learns a little; every key of the schema is described and read."""

import ast
import re
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel

import rlinf
from rlinf.core.types import Trajectory
from rlinf.data.columns import gigabytes
from rlinf.data.demos import DemoMeta, write_demos
from rlinf.data.replay import ReplayBuffer
from rlinf.envs.maniskill.config import ManiSkillConfig
from rlinf.launch.algorithm_config import PpoConfig, SacConfig
from rlinf.launch.build import describe_replay
from rlinf.launch.config import Root, updates_per_step
from rlinf.launch.crew import build_crew, build_evaluator, spaces_of
from rlinf.launch.parse import key_paths, load_config, models_in
from rlinf.launch.prerequisites import record_missing_demos
from rlinf.models.embodiment.dsrl_policy import DsrlFlowConfig
from rlinf.models.embodiment.flow_decoder import FlowDecoder, FlowDecoderSpec, save_flow_decoder
from rlinf.models.embodiment.openpi.config import PI05
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.runners.crew import Crew
from rlinf.runtime.local import LocalRuntime
from rlinf.workers.learner_worker import LearnerWorker
from tests.launch.conftest import CONFIG_DIR
from tests.launch.test_co_training_openpi import write_real

RECIPES = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))
PACKAGE = Path(rlinf.__file__).parent


def load(name: str, *overrides: str) -> Root:
    return load_config(name, overrides, CONFIG_DIR, has_gpu=lambda: False)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid(name: str, profile: str) -> None:
    root = load(name, f"profile={profile}")
    assert root.profile == profile
    assert root.runner.logger.experiment_name == name
    assert Root.model_validate(root.model_dump(mode="json")) == root


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_in_its_first_line_what_it_is(name: str) -> None:
    first = (CONFIG_DIR / f"{name}.yaml").read_text().partition("\n")[0]
    assert re.fullmatch(r"# [A-Z].{20,110}\.", first)


def test_every_yaml_belongs_to_a_recipe() -> None:
    """A file in a group that no recipe reads would be neither parsed nor tested."""
    text = "".join((CONFIG_DIR / f"{name}.yaml").read_text() for name in RECIPES)
    for path in CONFIG_DIR.glob("*/**/*.yaml"):
        group = path.parent.relative_to(CONFIG_DIR).as_posix()
        option = path.stem if group in ("env", "model") else group
        assert re.search(rf"\b{re.escape(option)}\b", text), f"{path} is used by no recipe"


# Building LIBERO's scenes takes seconds, and a whole π0 has 3 billion weights. What starts with a recipe's name and
# `_async` has the same parts.
BUILT = [(n, p) for n in RECIPES for p in ("cpu", "gpu") if "openpi" not in n or (p == "cpu" and "async" not in n)]


@pytest.mark.usefixtures("fake_maniskill")
@pytest.mark.parametrize(("name", "profile"), BUILT)
def test_every_recipe_builds_and_updates(name: str, profile: str, tmp_path: Path) -> None:
    overrides = ["env.train.num_workers=0", "env.eval.num_workers=0", "actor.num_threads=1"]
    overrides += ["env.eval.video_cfg.save_video=False"]
    algorithm = load(name).algorithm
    off_policy = isinstance(algorithm, SacConfig)
    if off_policy:
        overrides += ["algorithm.replay_buffer.min_buffer_size=1", "algorithm.replay_buffer.capacity=5000"]
    if algorithm_steers(name):
        overrides.append(f"actor.model.decoder_path={decoder_for(name, tmp_path)}")
    if "libero" in name:
        overrides += ["env.train.specific_reset_id=0", "env.eval.specific_reset_id=0"]
        overrides += ["actor.global_batch_size=8", "actor.micro_batch_size=8"]
    if "co_training" in name:
        real = write_real(tmp_path / "real")
        overrides += [f"actor.sft_data_path={real}", "actor.model.model_path=null"]
        overrides += ["algorithm.critic_warmup_steps=0"]  # the first update is to be of the policy, too
    has_demos = isinstance(algorithm, SacConfig) and algorithm.demo_buffer is not None
    if "realworld" in name:
        overrides += [f"env.{use}.override_cfg.driver=twin" for use in ("train", "eval")]
        overrides += [f"algorithm.demo_buffer.load_path={tmp_path / 'demos'}"]
        overrides += ["algorithm.demo_buffer.scripted_episodes=1"]
        overrides += ["actor.global_batch_size=8", "actor.micro_batch_size=8"]
    elif has_demos:
        overrides.append(f"algorithm.demo_buffer.load_path={record(tmp_path)}")
    root = load(name, f"profile={profile}", *overrides)
    record_missing_demos(root)
    runtime, device = LocalRuntime(), torch.device("cpu")
    crew = build_crew(root, runtime, device=device)
    try:
        evaluator = build_evaluator(root, runtime, weights=crew.weights, stop=crew.stop, device=device)
        assert evaluator.close() == []
        metrics = learn(crew)
    finally:
        assert crew.close() == []
    if off_policy:
        assert metrics["replay_buffer/size"] == 2 * root.env.train.total_num_envs
    assert torch.isfinite(torch.tensor(metrics["sac/critic_loss" if off_policy else "critic/value_loss"]))
    assert ("demo_buffer/size" in metrics) == has_demos
    assert ("sft_loss" in metrics) == root.actor.use_real_data_co_training


@pytest.mark.usefixtures("fake_maniskill")
@pytest.mark.parametrize("name", ["maniskill_sac_flow_state", "frankasim_sac_cnn_async", "maniskill_dsrl_flow"])
def test_the_memory_told_at_the_start_is_what_a_row_takes(name: str, tmp_path: Path) -> None:
    overrides = [f"actor.model.decoder_path={decoder_for(name, tmp_path)}"] if algorithm_steers(name) else []
    overrides += [
        "profile=cpu",
        "env.train.num_workers=0",
        "actor.num_threads=1",
        "algorithm.replay_buffer.capacity=3000",
    ]
    root = load(name, *overrides)
    crew = build_crew(root, LocalRuntime())
    try:
        told = describe_replay(root, spaces_of(crew.env))
        crew.publish()
        crew.collect(chunks=2, segments=1).wait()
        crew.ingest()
        [buffer] = crew.learner.run(lambda worker: worker.algorithm.buffers()["replay_buffer"]).wait()
    finally:
        assert crew.close() == []
    assert isinstance(buffer, ReplayBuffer)
    row = sum(array[0].nbytes for array in buffer._arrays.values())
    assert told == f"replay buffer: up to 3,000 rows of {row:,} bytes, {gigabytes(3000 * row)} in memory"


def algorithm_steers(name: str) -> bool:
    return isinstance(load(name).actor.model, DsrlFlowConfig)


def decoder_for(name: str, folder: Path) -> Path:
    """A decoder with random weights that fits the recipe's environment, or the stand-in for it."""
    model = load(name).actor.model
    maniskill = isinstance(load(name).env.train, ManiSkillConfig)
    obs_dim, action_dim, controller = (42, 4, "pd_ee_delta_pos") if maniskill else (2, 1, "")
    spec = FlowDecoderSpec(obs_dim, action_dim, model.num_action_chunks, (8,), 2, control_mode=controller)
    save_flow_decoder(FlowDecoder(spec), folder / "decoder")
    return folder / "decoder"


def learn(crew: Crew) -> dict[str, float]:
    crew.publish()
    crew.collect(chunks=2, segments=1).wait()
    crew.ingest()
    return crew.learner.run(LearnerWorker.update, 1).wait()[0]


def record(folder: Path) -> Path:
    """Demonstrations of two environments and three steps."""
    t, n = 3, 2
    flags = torch.zeros(t, n, 1, dtype=torch.bool)
    trajectory = Trajectory(
        obs={"state": torch.randn(t + 1, n, 42)},
        last_obs={"state": torch.zeros(0, 42)},
        last_index=torch.zeros(0, 2, dtype=torch.int64),
        decision=torch.zeros(t, n, 4),
        action=torch.zeros(t, n, 1, 4),
        reward=torch.zeros(t, n, 1),
        terminated=flags,
        truncated=flags[..., 0],
        intervened=flags,
        valid=~flags[..., 0],
    )
    meta = DemoMeta("PickCube-v1", "pd_ee_delta_pos", 4, {"state": (42,)}, {"state": "float32"}, "a test")
    write_demos(str(folder / "demos"), [trajectory], meta)
    return folder / "demos"


# ---- the seed document's own keys


def test_the_gpu_profile_keeps_the_published_sizes() -> None:
    root = load("maniskill_sac_flow_state", "profile=gpu")
    algorithm, actor = root.algorithm, root.actor
    assert (algorithm.gamma, algorithm.tau, algorithm.update_epoch, algorithm.critic_actor_ratio) == (0.8, 0.005, 32, 3)
    assert (algorithm.bootstrap_type, algorithm.critic_subsample_size) == ("always", 2)
    assert algorithm.entropy_tuning.initial_alpha == 0.2
    assert algorithm.entropy_tuning.target_entropy == -4
    assert (root.env.train.total_num_envs, root.env.train.max_steps_per_rollout_epoch) == (32, 2)
    assert root.env.eval is not None and root.env.eval.total_num_envs == 16
    assert (actor.global_batch_size, actor.optim.lr, actor.optim.clip_grad) == (512, 3e-4, 1.0)
    model = actor.model
    assert model.model_type == "flow_policy"
    assert (model.d_model, model.n_head, model.n_layers, model.denoising_steps) == (96, 4, 2, 4)
    assert (model.flow_actor_type, model.noise_std_head) == ("JaxFlowTActor", True)


def test_co_training_keeps_the_published_sizes() -> None:
    root = load("maniskill_ppo_co_training_openpi_pi05", "profile=gpu")
    algorithm, actor, model, train = root.algorithm, root.actor, root.actor.model, root.env.train
    assert isinstance(algorithm, PpoConfig) and isinstance(model, OpenpiConfig)
    assert (train.total_num_envs, train.rollout_epoch, train.max_steps_per_rollout_epoch) == (64, 2, 80)
    assert (algorithm.update_epoch, algorithm.clip_ratio_high, algorithm.value_clip) == (2, 0.2, 0.2)
    assert (algorithm.gamma**model.num_action_chunks, algorithm.gae_lambda) == (pytest.approx(0.99, abs=1e-4), 0.95)
    assert (actor.micro_batch_size, actor.global_batch_size, actor.sft_batch_size) == (40, 2560, 16)
    assert (actor.use_real_data_co_training, actor.sft_loss_weight) == (True, 0.2)
    assert (actor.optim.lr, actor.critic_optim.lr, actor.optim.clip_grad) == (4e-6, 2e-4, 1.0)
    assert (model.num_action_chunks, model.num_steps, model.robot().model.action_horizon) == (4, 4, 8)
    assert model.robot().model == replace(PI05, action_horizon=8)
    walk = model.walk()
    assert (walk.method, walk.joint, walk.terms, walk.std_range) == ("flow_noise", True, 5, (0.08, 0.16))
    assert updates_per_step(root) == 2


def test_co_training_takes_what_its_seed_document_prints() -> None:
    printed = ["rollout.model.model_path=/stage1", "actor.model.model_path=/stage1"]
    printed += ["actor.model.openpi.config_name=pi05_maniskill_sim_real_co_training"]
    printed += ["actor.use_real_data_co_training=True", "actor.sft_loss_weight=0.2"]
    root = load("maniskill_ppo_co_training_openpi_pi05", *printed, "profile=gpu")
    assert root.actor.model.model_path == "/stage1"
    assert root.actor.use_real_data_co_training
    assert not load("maniskill_ppo_co_training_openpi_pi05", "profile=cpu").actor.use_real_data_co_training
    real = load("maniskill_ppo_co_training_openpi_pi05_tiny", "env@env.eval=maniskill_pick_and_place_shifted_twin")
    assert real.actor.use_real_data_co_training
    assert real.env.eval.init_params.twin.latency_s == 0.06 and real.env.train.init_params.twin.latency_s == 0
    assert real.env.eval.init_params.sensor_configs == {"width": 64, "height": 64}


def test_the_settings_printed_in_the_seed_document_are_accepted() -> None:
    printed = """
        actor.model: {input_type: state, denoising_steps: 4, d_model: 256, n_head: 4, n_layers: 2,
          use_batch_norm: False, batch_norm_momentum: 0.99, flow_actor_type: JaxFlowTActor, noise_std_head: False,
          log_std_min_train: -5, log_std_max_train: 2, log_std_min_rollout: -20, log_std_max_rollout: 0,
          noise_std_train: 0.3, noise_std_rollout: 0.02}
        algorithm: {gamma: 0.96, tau: 0.005, critic_actor_ratio: 4, update_epoch: 30,
          entropy_tuning: {alpha_type: softplus, initial_alpha: 0.01, target_entropy: -4,
            optim: {lr: 3.0e-4, lr_scheduler: torch_constant, clip_grad: 10.0}}}
    """
    overrides = [f"{path}={value}" for path, value in flatten(yaml.safe_load(printed))]
    root = load("maniskill_sac_flow_state", *overrides)
    assert root.actor.model.model_type == "flow_policy"
    assert (root.actor.model.d_model, root.algorithm.gamma, root.algorithm.update_epoch) == (256, 0.96, 30)


def flatten(tree: dict[str, typing.Any], prefix: str = "") -> Iterator[tuple[str, typing.Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# ---- the schema


def schema() -> set[type[BaseModel]]:
    found: set[type[BaseModel]] = set()
    waiting: list[type[BaseModel]] = [Root]
    while waiting:
        model = waiting.pop()
        if model not in found:
            found.add(model)
            waiting += [child for field in model.model_fields.values() for child in models_in(field.annotation)]
    return found


@pytest.mark.parametrize("model", sorted(schema(), key=lambda model: model.__name__), ids=lambda model: model.__name__)
def test_every_key_is_described_and_unknown_keys_are_refused(model: type[BaseModel]) -> None:
    assert model.model_config.get("extra") == "forbid"
    assert model.model_config.get("frozen")
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no description"
        assert len(field.description) >= 8 and field.description.endswith((".", ")")), f"{model.__name__}.{name}"


def test_every_key_is_read_somewhere() -> None:
    """No dead keys: each name is an attribute that code outside of the declarations takes, or a choice of one."""
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                read.add(node.value)
    dead = {
        f"{model.__name__}.{name}"
        for model in schema()
        for name, field in model.model_fields.items()
        if name not in read and not has_one_value(field.annotation)
    }
    assert not dead


def has_one_value(annotation: typing.Any) -> bool:
    """A key that can only be written in one way says what a recipe is; nobody needs to read it."""
    return typing.get_origin(annotation) is typing.Literal and len(typing.get_args(annotation)) == 1


def test_key_paths_name_nested_keys_once_per_section() -> None:
    paths = list(key_paths(Root))
    assert "algorithm.entropy_tuning.optim.clip_grad" in paths
    assert "env.eval.video_cfg.save_video" in paths
