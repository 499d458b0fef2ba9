"""PPO on π0.5 with demonstrations beside it, from the configuration to the checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from rlinf.core.errors import CheckpointError, ConfigError
from rlinf.core.tree import leaves_of_state
from rlinf.core.types import EnvSpaces, Obs
from rlinf.data.lerobot.layout import Feature
from rlinf.data.lerobot.writer import LeRobotWriter
from rlinf.envs.episodes import Outcome, ReplayedEnv, episode_rules
from rlinf.envs.reach import ReachConfig
from rlinf.launch import registry
from rlinf.launch.algorithm_config import PpoConfig
from rlinf.launch.build import build_algorithm, build_networks
from rlinf.launch.config import Root
from rlinf.launch.crew import build_crew, build_evaluator
from rlinf.launch.decoders import remark_on_decoder
from rlinf.launch.demonstrations import describe_batches
from rlinf.launch.parse import load_config
from rlinf.launch.run import evaluate_run, run_directory, train
from rlinf.metrics import report
from rlinf.models.embodiment.openpi import actor_critic
from rlinf.models.embodiment.openpi.actor_critic import Pi0ActorCritic
from rlinf.models.embodiment.openpi.checkpoint import save_pi0
from rlinf.models.embodiment.openpi.config import TINY_PI05
from rlinf.models.embodiment.openpi.model import Pi0, build_pi0
from rlinf.models.embodiment.openpi.norm_stats import NormStats, write_norm_stats
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.models.embodiment.openpi.tokenizer import ByteTokenizer
from rlinf.runtime.local import LocalRuntime
from rlinf.workers.learner_worker import LearnerWorker
from rlinf.workers.rollout_worker import RolloutWorker
from rlinf.workers.state_files import load_state, load_weights
from tests.launch.conftest import CONFIG_DIR
from tests.launch.test_run import journal

IMAGE, STATE = 32, 7
TEXT = "put it into the tray"
SPACES = EnvSpaces(
    {"state": (STATE,), "images/front": (IMAGE, IMAGE, 3), "instruction": ()},
    {"state": "float32", "images/front": "uint8", "instruction": "str"},
    action_dim=7,
)


class OneCameraWorlds:
    """What the digital twin emits and takes, without its simulator: the arm's state moves by the action."""

    device = torch.device("cpu")
    spaces = SPACES

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self._state = torch.zeros(num_envs, STATE)

    def begin(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        for row, seed in zip(rows, seeds, strict=True):
            self._state[row] = torch.randn(STATE, generator=torch.Generator().manual_seed(seed))

    def advance(self, action: Tensor, active: Tensor) -> Outcome:
        self._state = torch.where(active[:, None], self._state + 0.1 * action.clamp(-1, 1), self._state)
        success = self._state[:, 0] > 1
        return Outcome(success.float(), success, torch.zeros_like(success))

    def observe(self) -> Obs:
        shade = (128 + 40 * self._state[:, 0]).clamp(0, 255).to(torch.uint8)
        picture = shade[:, None, None, None].expand(-1, IMAGE, IMAGE, 3).contiguous()
        return {"state": self._state.clone(), "images": {"front": picture}, "instruction": [TEXT] * self.num_envs}

    def render(self) -> np.ndarray | None:
        return None

    def close(self) -> None:
        pass


def make(
    config: ReachConfig, *, num_envs: int, seed: int, control_mode: str | None, num_workers: int, render: bool
) -> ReplayedEnv:
    return ReplayedEnv(OneCameraWorlds(num_envs), episode_rules(config), seed=seed)


@pytest.fixture(autouse=True)
def one_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ENVS, "reach", f"{__name__}:make")
    monkeypatch.setattr(report.LearningCurve, "_draw", lambda self: None)
    monkeypatch.delenv("HF_LEROBOT_HOME", raising=False)


# The keys that the seed document prints, and what makes a run of seconds of them.
RECIPE = """\
defaults:
  - _self_
runner:
  logger: {{log_path: {root}/logs, experiment_name: co_trained, logger_backends: []}}
  max_epochs: 4
  val_check_interval: 2
  save_interval: 2
  overlap: False
algorithm:
  loss_type: actor_critic
  adv_type: gae
  update_epoch: 1
  value_clip: 0.2
  entropy_bonus: 0.005
  logprob_type: chunk_level
env:
  train: &env
    env_type: reach
    total_num_envs: 2
    max_episode_steps: 8
    max_steps_per_rollout_epoch: 8
    num_workers: 0
  eval: {{<<: *env, use_fixed_reset_state_ids: True}}
rollout:
  model:
    model_path: null
actor:
  micro_batch_size: 2
  global_batch_size: 4
  num_threads: 1
  optim: {{lr: 1.0e-3, value_lr: 2.0e-3}}
  use_real_data_co_training: True
  sft_loss_weight: 0.2
  sft_batch_size: 3
  sft_data_path: {root}/real
  model:
    model_type: openpi
    model_path: null
    num_action_chunks: 4
    num_steps: 2
    openpi:
      size: tiny
      config_name: pi05_maniskill_sim_real_co_training
      joint_logprob: True
      noise_method: flow_noise
      value_after_vlm: True
      value_hidden_dims: [16]
"""


def load(root: Path, *overrides: str) -> Root:
    folder = root / "config"
    folder.mkdir(exist_ok=True)
    (folder / "co_trained.yaml").write_text(RECIPE.format(root=root))
    return load_config("co_trained", overrides, folder, has_gpu=lambda: False)


def write_real(root: Path, *, camera: str = "observation.images.front", action: int = 7, lengths=(6, 5)) -> Path:
    """Demonstrations as `rlinf record` writes them."""
    features = {
        camera: Feature("image", (IMAGE, IMAGE, 3)),
        "observation.state": Feature("float32", (STATE,)),
        "action": Feature("float32", (action,)),
    }
    draw = np.random.default_rng(0)
    with LeRobotWriter(root, fps=5, features=features) as writer:
        for length in lengths:
            writer.add_episode(
                {
                    camera: draw.integers(0, 255, (length, IMAGE, IMAGE, 3), np.uint8),
                    "observation.state": draw.normal(size=(length, STATE)).astype(np.float32),
                    "action": draw.uniform(-1, 1, (length, action)).astype(np.float32),
                },
                TEXT,
            )
    return root


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """What stage I leaves behind."""
    model = build_pi0(TINY_PI05, generator=torch.Generator().manual_seed(seed))
    save_pi0(model, folder)
    one = torch.ones(32, dtype=torch.float64)
    stats = {name: NormStats(0 * one, one, -one, one) for name in ("state", "actions")}
    write_norm_stats(stats, folder / "physical-intelligence" / "pick_and_place_real")
    return folder


# ---- runs


def test_a_run_learns_from_both_evaluates_and_resumes_exactly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_real(tmp_path / "real")
    straight = load(tmp_path)
    assert train(straight) == 0
    told = capsys.readouterr().out
    assert "π0.5 (tiny) has random weights" in told
    assert "true batch size of global_batch_size x sft_batch_size / (micro_batch_size x learners) = 4 x 3" in told
    half = load(tmp_path, "runner.max_epochs=2", f"runner.logger.log_path={tmp_path / 'half'}")
    assert train(half) == 0
    rest = load(tmp_path, f"runner.resume_dir={run_directory(half)}", f"runner.logger.log_path={tmp_path / 'rest'}")
    assert train(rest) == 0
    assert learned(straight) == learned(rest)
    for row in journal(run_directory(straight)):
        total = row["train/ppo_loss"] + 0.2 * row["train/sft_loss"]
        assert row["actor/total_loss"] == pytest.approx(total, rel=1e-5)
        ratio = 0.2 * abs(row["train/sft_loss"]) / abs(row["train/ppo_loss"])
        assert row["train/loss_ratio"] == pytest.approx(ratio, rel=1e-4)
        # One update for each collection: what acted and what learns are the same policy.
        assert row["train/actor/ratio"] == pytest.approx(1, abs=1e-5)
        assert row["train/actor/approx_kl"] == pytest.approx(0, abs=1e-6)
    first, second = (evaluate_run(run_directory(straight)) for _ in range(2))
    assert first["eval/num_episodes"] == 2 and first == second


def learned(config: Root) -> dict[str, list]:
    """All that a run has learned and counted, by path."""
    state = load_state(run_directory(config) / "checkpoints" / "latest" / "learner.pt")
    found = dict(leaves_of_state(state))
    assert any(path.startswith("algorithm/policy_optim") for path in found)
    assert found["algorithm/demonstrations/batches"] == 8 and found["algorithm/collections"] == 4
    return {path: leaf.tolist() if isinstance(leaf, Tensor) else leaf for path, leaf in found.items()}


@pytest.mark.parametrize("method", ["flow_sde", "flow_cps", "flow_noise"])
@pytest.mark.parametrize("joint", [True, False])
def test_what_acts_and_what_learns_give_the_same_density(tmp_path: Path, method: str, joint: bool) -> None:
    keys = [f"actor.model.openpi.noise_method={method}", f"actor.model.openpi.joint_logprob={joint}"]
    for precision, recompute in (("fp32", False), ("bf16", True)):
        rounding = [f"actor.model.precision={precision}", f"rollout.recompute_logprobs={recompute}"]
        overrides = ["actor.use_real_data_co_training=False", "actor.global_batch_size=4", *keys, *rounding]
        metrics = collect_and_update(load(tmp_path, *overrides))
        assert metrics["actor/ratio"] == pytest.approx(1, abs=1e-5)
        assert metrics["actor/clip_fraction"] == 0


def collect_and_update(config: Root, updates: int = 1) -> dict[str, float]:
    crew = build_crew(config, LocalRuntime())
    try:
        crew.publish()
        crew.collect(chunks=2, segments=1).wait()
        crew.ingest()
        return crew.learner.run(LearnerWorker.update, updates).wait()[0]
    finally:
        assert crew.close() == []


def test_without_demonstrations_it_is_ppo_exactly(tmp_path: Path) -> None:
    plain = load(tmp_path, "actor.use_real_data_co_training=False", "algorithm.update_epoch=3")  # no data set needed
    assert "co-training: off, L_RL alone" in (describe_batches(plain, 1) or "")
    write_real(tmp_path / "real")
    both = load(tmp_path, "algorithm.update_epoch=3")

    def without(config: Root) -> tuple[list[dict], dict[str, Tensor]]:
        crew = build_crew(config, LocalRuntime())
        try:
            [algorithm] = crew.learner.run(lambda worker: worker.algorithm).wait()
            found, algorithm.demonstrations = algorithm.demonstrations, None
            assert (found is None) == (config is plain)
            crew.publish()
            crew.collect(chunks=2, segments=1).wait()
            crew.ingest()
            history = [crew.learner.run(LearnerWorker.update, 1).wait()[0] for _ in range(3)]
            return history, algorithm.acting_weights()[1]
        finally:
            assert crew.close() == []

    expected, weights = without(both)
    found, ours = without(plain)
    assert found == expected and "sft_loss" not in found[0]
    assert all(torch.equal(weights[name], ours[name]) for name in weights)


def test_pictures_and_prompts_are_prepared_once_for_a_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(tmp_path, "actor.use_real_data_co_training=False", "algorithm.update_epoch=5")
    sizes: list[int] = []
    compose = actor_critic.compose

    def counting(transforms):
        run = compose(transforms)
        return lambda sample: (sizes.append(len(sample["state"])), run(sample))[1]

    monkeypatch.setattr(actor_critic, "compose", counting)
    collect_and_update(config, updates=5)
    acting, learning = [2, 2], [2, 2, 4]  # values after each environment's segment and episode, then the collection
    assert sizes == acting + learning


@pytest.mark.parametrize("noisy", [True, False])
def test_every_evaluation_begins_from_the_same_noise_or_from_none(tmp_path: Path, noisy: bool) -> None:
    evaluator = build_evaluator(load(tmp_path, f"actor.model.openpi.eval_noise={noisy}"), LocalRuntime())
    seen: list[Tensor | None] = []

    def watch(worker: RolloutWorker) -> None:
        act = worker.actor.act
        worker.actor.act = lambda obs, mode, noise: (seen.append(noise), act(obs, mode, noise))[1]

    evaluator.rollout.run(watch).wait()
    try:
        for step in range(2):
            evaluator.start(step, film=False).finish(None)
    finally:
        assert evaluator.close() == []
    assert len(seen) == 4  # two evaluations of two chunks
    if not noisy:
        assert seen == [None] * 4
        return
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


# ---- weights


def test_frozen_weights_are_neither_published_nor_saved(tmp_path: Path) -> None:
    folder, other = save_tiny(tmp_path / "stage1"), save_tiny(tmp_path / "other", seed=1)
    config = load(tmp_path, f"rollout.model.model_path={folder}", "actor.use_real_data_co_training=False")
    assert config.actor.model.model_path == str(folder) and remark_on_decoder(config) is None
    assert train(config) == 0
    checkpoint = run_directory(config) / "checkpoints" / "latest"
    saved = load_weights(checkpoint / "model.safetensors")[1]
    assert not [name for name in saved if name.startswith(("model.vision.", "model.vlm.", "model.projector."))]
    assert [name for name in saved if name.startswith("model.expert.")]
    with pytest.raises(CheckpointError, match="trained beside another frozen model"):
        evaluate_run(run_directory(config), [f"actor.model.model_path={other}"])


def test_it_begins_with_the_weights_of_stage_one(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "stage1", seed=3)
    networks = build_networks(load(tmp_path, f"actor.model.model_path={folder}"), SPACES, acts=False)
    theirs = build_pi0(TINY_PI05, generator=torch.Generator().manual_seed(3)).state_dict()
    assert isinstance(networks.actor, Pi0ActorCritic)
    for name, parameter in networks.actor.model.named_parameters():
        assert torch.equal(parameter, theirs[name])


def test_what_stage_one_made_is_evaluated_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs something to evaluate"):
        load(tmp_path, "runner.only_eval=True")
    folder = save_tiny(tmp_path / "stage1", seed=3)
    config = load(tmp_path, "runner.only_eval=True", f"actor.model.model_path={folder}")
    assert train(config) == 0
    [row] = journal(run_directory(config))
    assert row["eval/num_episodes"] == 2
    assert not (run_directory(config) / "checkpoints").exists()


def test_on_a_gpu_only_what_learns_is_float32(tmp_path: Path) -> None:
    config = load(tmp_path, "profile=gpu", "actor.use_real_data_co_training=False")
    learner = build_networks(config, SPACES, acts=False).actor
    kinds = {(p.requires_grad, p.dtype) for name, p in learner.named_parameters() if ".mlp." in name}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    acting = build_networks(config, SPACES).actor
    assert {p.dtype for name, p in acting.named_parameters() if ".mlp." in name} == {torch.bfloat16}
    shared = load(tmp_path, "profile=gpu", "actor.use_real_data_co_training=False", "actor.fsdp_config.strategy=fsdp2")
    assert {p.dtype for p in build_networks(shared, SPACES, acts=False).actor.parameters()} == {torch.float32}


def test_the_published_sizes_fit_together() -> None:
    """Without memory: shapes of a micro-batch at full size, and how much is trained."""
    config = load_config("maniskill_ppo_co_training_openpi_pi05", ["profile=gpu"], CONFIG_DIR)
    model = config.actor.model
    assert isinstance(model, OpenpiConfig)
    robot, one, batch = model.robot(), torch.ones(32), config.actor.micro_batch_size
    statistics = {name: NormStats(0 * one, one, -one, one) for name in ("state", "actions")}
    pipeline = robot.pipeline(statistics, ByteTokenizer())
    seen = {"front": torch.zeros(batch, 480, 640, 3, dtype=torch.uint8)}
    obs = {"state": torch.zeros(batch, 7), "images": seen, "instruction": [TEXT] * batch}
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = Pi0ActorCritic(Pi0(robot.model), pipeline, model.walk(), value_after_vlm=True)
        trained = sum(p.numel() for p in (*policy.policy_parameters(), *policy.value_parameters()))
        assert trained == 430_098_464 + 141_536 + 1_213_441
        assert policy.noise_shape == (5, 8, 32)
        log_prob, entropy, value = policy.evaluate(obs, torch.empty(batch, *policy.noise_shape))
    assert log_prob.shape == entropy.shape == (batch, 4, 7) and value.shape == (batch,)


def test_the_noise_is_annealed_after_every_collection(tmp_path: Path) -> None:
    keys = ["noise_method=flow_sde", "noise_anneal=True", "noise_params=[0.8,0.4,4]"]
    config = load(
        tmp_path,
        "actor.use_real_data_co_training=False",
        "runner.max_epochs=2",
        *(f"actor.model.openpi.{key}" for key in keys),
    )
    assert build_networks(config, SPACES).actor.noise_level.item() == pytest.approx(0.8)
    assert train(config) == 0
    assert all(row["train/actor/ratio"] == pytest.approx(1, abs=1e-5) for row in journal(run_directory(config)))
    saved = load_weights(run_directory(config) / "checkpoints" / "latest" / "model.safetensors")[1]
    assert saved["noise_level"].item() == pytest.approx(0.6)
    scheduled = build_networks(config, SPACES).actor
    scheduled.load_state_dict(saved)
    assert scheduled.noise_level.item() == pytest.approx(0.6)
    fixed = ["actor.model.openpi.noise_method=flow_sde", "actor.model.openpi.noise_level=0.3"]
    written = build_networks(load(tmp_path, "actor.use_real_data_co_training=False", *fixed), SPACES).actor
    written.load_state_dict(saved)
    assert written.noise_level.item() == pytest.approx(0.3), "what is written holds"


def test_missing_weights_are_refused_before_there_is_a_run(tmp_path: Path) -> None:
    config = load(tmp_path, f"actor.model.model_path={tmp_path / 'nowhere'}", "actor.use_real_data_co_training=False")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        train(config)
    assert not run_directory(config).exists()


# ---- keys


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["actor.model.openpi.size=full"], "model_path must name the folder with the weights of pi0"),
        (
            ["actor.model.num_action_chunks=16", "env.train.max_episode_steps=16"],
            "num_action_chunks is 16, but pi05_maniskill_sim_real_co_training gives chunks of 8 actions; lower it or "
            "write openpi.action_horizon",
        ),
        (["actor.model.num_steps=1", "actor.model.openpi.noise_method=flow_cps"], "no step of flow_cps would draw"),
        (["actor.model.openpi.noise_logvar_range=[0.2,0.1]"], "[0.2, 0.1] instead of two growing positive numbers"),
        (
            ["actor.model.openpi.noise_anneal=True"],
            "openpi.noise_anneal: the noise of flow_noise is learned, within openpi.noise_logvar_range; write False",
        ),
        (
            ["actor.model.openpi.noise_anneal=True", "actor.model.openpi.noise_method=flow_sde", "runner.overlap=True"],
            "runner.overlap: with actor.model.openpi.noise_anneal a policy that is one step older",
        ),
        (
            ["rollout.recompute_logprobs=True", "runner.overlap=True"],
            "runner.overlap: algorithm.recompute_logprobs would compare with weights that did not act",
        ),
        (["actor.model.openpi.use_dsrl=True"], "PPO trains pi0 itself; write False, or loss_type: embodied_sac"),
        (["actor.model.normalize_obs=True"], "pi0 normalises by the statistics beside its weights; write False"),
        (["actor.compile_model=True"], "actor.compile_model: the losses of pi0 are not compiled; write False"),
        (["actor.model.openpi.add_value_head=True"], "the heads follow from algorithm.loss_type; remove the key"),
        (["actor.sft_loss_weight=0"], "actor.sft_loss_weight = 0: should be greater than 0"),
        (
            ["cluster.component_placement={actor: '0-1', env: 0, rollout: 0}", "actor.micro_batch_size=1"],
            "actor.sft_batch_size (3) cannot be shared evenly by the 2 processes of actor; write 2 or 4",
        ),
    ],
)
def test_what_cannot_be(tmp_path: Path, overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides)
    assert text in str(caught.value)


def test_demonstrations_need_a_policy_that_learns_from_them(tmp_path: Path) -> None:
    text = RECIPE.format(root=tmp_path).partition("  model:\n    model_type")[0].replace("    model_path: null\n", "")
    text = text.replace("rollout:\n  model:\n", "") + "  model: {model_type: mlp_actor_critic, num_action_chunks: 4}\n"
    (tmp_path / "mlp.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"demonstrations beside the reward are for pi0 or pi0\.5 under PPO"):
        load_config("mlp", (), tmp_path, has_gpu=lambda: False)


def test_other_spellings(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "~actor.use_real_data_co_training",
        "actor.enable_sft_co_train=True",
        "actor.config_name=pi05_maniskill_sim_real_co_training",
        "actor.fsdp_config.gradient_checkpointing=True",
        "actor.model.openpi.num_steps=2",
        "actor.optim.critic_warmup_steps=3",
    )
    assert isinstance(config.algorithm, PpoConfig) and config.algorithm.critic_warmup_steps == 3
    assert config.actor.use_real_data_co_training and config.actor.gradient_checkpointing
    assert config.actor.critic_optim.lr == 2e-3


def test_layers_may_be_computed_again(tmp_path: Path) -> None:
    write_real(tmp_path / "real")
    once, twice = (collect_and_update(load(tmp_path, f"actor.gradient_checkpointing={b}")) for b in (False, True))
    assert twice["actor/grad_norm"] == pytest.approx(once["actor/grad_norm"], rel=1e-5)


def test_all_of_the_model_may_be_trained(tmp_path: Path) -> None:
    config = load(tmp_path, "actor.model.openpi.train_expert_only=False", "actor.use_real_data_co_training=False")
    algorithm = build_algorithm(config, build_networks(config, SPACES, acts=False), torch.device("cpu"))
    assert "model.vlm.embed_tokens.weight" in algorithm.acting_weights()[1]


# ---- memory


def frozen_places(policy: object) -> set[int]:
    assert isinstance(policy, Pi0ActorCritic)
    return {p.data_ptr() for p in policy.parameters() if not p.requires_grad}


def test_policies_of_one_process_keep_the_frozen_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["actor.use_real_data_co_training=False", f"actor.model.model_path={save_tiny(tmp_path / 'stage1')}"]
    config = load(tmp_path, *overrides)
    learner, acting, evaluated = (build_networks(config, SPACES, acts=acts).actor for acts in (False, True, True))
    places = frozen_places(learner)
    assert len(places) > 20 and places == frozen_places(acting) == frozen_places(evaluated)
    trained = {p.data_ptr() for policy in (learner, acting) for p in policy.parameters() if p.requires_grad}
    assert len(trained) == 2 * sum(p.requires_grad for p in learner.parameters()) and not trained & places
    before = {name: p.clone() for name, p in learner.named_parameters() if not p.requires_grad}
    together = collect_and_update(config)
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters() if name in before)
    # An offloaded policy empties what it has; a learner that shares out its weights keeps rows of float32.
    for key in ("rollout.enable_offload=True", "actor.fsdp_config.strategy=fsdp2"):
        alone = build_networks(load(tmp_path, *overrides, key), SPACES, acts=False).actor
        assert not frozen_places(alone) & places
    monkeypatch.setattr(Pi0ActorCritic, "share_frozen", lambda self, key: None)
    assert collect_and_update(config) == together
