"""Runs that steer a decoder: what they need, what they say, what they refuse, and that they resume exactly."""

from pathlib import Path

import pytest
import torch

from rlinf.core.errors import CheckpointError, ConfigError
from rlinf.core.types import EnvSpaces
from rlinf.launch.build import build_networks, describe_replay
from rlinf.launch.config import Root
from rlinf.launch.parameters import describe
from rlinf.launch.parse import load_config
from rlinf.launch.prerequisites import make_missing_decoder
from rlinf.launch.run import evaluate_run, run_directory, train
from rlinf.launch.steering import learner_view
from rlinf.metrics import report
from rlinf.models.embodiment.flow_decoder import FlowDecoder, FlowDecoderSpec, load_flow_decoder, save_flow_decoder
from rlinf.models.embodiment.latent_policy import LatentPolicy
from rlinf.workers.state_files import load_weights
from tests.launch.conftest import CONFIG_DIR
from tests.launch.test_run import assert_equal_checkpoints, journal

SPACES = EnvSpaces({"state": (2,)}, {"state": "float32"}, action_dim=1)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.LearningCurve, "_draw", lambda self: None)


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    return save(tmp_path / "decoder")


def save(folder: Path, seed: int = 0, **changes: object) -> Path:
    spec = {"obs_dim": 2, "action_dim": 1, "horizon": 2, "hidden_dims": (8,), "denoising_steps": 2, "env_id": "reach"}
    torch.manual_seed(seed)
    save_flow_decoder(FlowDecoder(FlowDecoderSpec(**spec | changes)), folder)
    return folder


def load(tmp_path: Path, *overrides: str, recipe: str = "reach_dsrl_flow") -> Root:
    quick = [
        f"runner.logger.log_path={tmp_path / 'logs'}",
        "runner.logger.logger_backends=[]",
        f"actor.model.decoder_path={tmp_path / 'decoder'}",
        "actor.model.decoder_recipe=null",
        "runner.max_epochs=6",
        "runner.val_check_interval=3",
        "runner.save_interval=3",
        "algorithm.update_epoch=3",
        "algorithm.train_actor_steps=0",
        "algorithm.replay_buffer={capacity: 300, min_buffer_size: 30}",
        "env.train.total_num_envs=4",
        "env.eval.total_num_envs=4",
        "actor.micro_batch_size=8",
        "actor.global_batch_size=16",
    ]
    return load_config(recipe, [*quick, *overrides], CONFIG_DIR, has_gpu=lambda: False)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("aliasing", [False, True])
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path, aliasing: bool) -> None:
    overrides = [f"algorithm.noise_aliasing={aliasing}"]
    straight = load(tmp_path, *overrides)
    assert train(straight) == 0
    half = load(tmp_path, *overrides, "runner.max_epochs=3", f"runner.logger.log_path={tmp_path / 'half'}")
    assert train(half) == 0
    rest = load(
        tmp_path, *overrides, f"runner.resume_dir={run_directory(half)}", f"runner.logger.log_path={tmp_path / 'rest'}"
    )
    assert train(rest) == 0
    assert_equal_checkpoints(run_directory(straight), run_directory(rest))
    assert journal(run_directory(straight))[-1]["time/updates"] > 0
    assert ("train/sac/noise_critic_loss" in journal(run_directory(straight))[-1]) == aliasing


@pytest.mark.parametrize("aliasing", [False, True])
def test_a_whole_run_leaves_the_decoder_alone_and_out_of_its_checkpoint(
    tmp_path: Path, decoder: Path, aliasing: bool
) -> None:
    before = (decoder / "model.safetensors").read_bytes()
    config = load(tmp_path, f"algorithm.noise_aliasing={aliasing}")
    assert train(config) == 0
    assert (decoder / "model.safetensors").read_bytes() == before
    checkpoint = run_directory(config) / "checkpoints" / "latest"
    names = set(load_weights(checkpoint / "model.safetensors")[1])
    assert names and all(name.startswith("head.") for name in names)
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if "buffers" not in path.parts)
    trained = 4 * 50_000
    assert size < 8 * trained, "weights, target and two moments; nothing of a decoder"
    assert evaluate_run(run_directory(config))["eval/num_episodes"] == 4


def test_what_is_trained_is_told_by_name_and_sum(tmp_path: Path, decoder: Path, capsys: pytest.CaptureFixture) -> None:
    config = load(tmp_path, "runner.max_epochs=1", "runner.val_check_interval=-1", "runner.save_interval=-1")
    assert train(config) == 0
    networks = build_networks(config, SPACES, acts=False)
    actor = sum(p.numel() for p in networks.actor.parameters())
    critic = sum(p.numel() for p in networks.critic.parameters())
    told = capsys.readouterr().out
    assert f"trained parameters: actor {actor:,} (encoder 160, net " in told
    assert f"+ critic {critic:,} (encoder 160, q " in told
    assert f"+ temperature 1 = {actor + critic + 1:,}" in told
    assert "memory: learning takes " in told and "; acting, in each process that does, " in told


def test_parameters_are_summed_by_their_first_name() -> None:
    named = {
        "actor": [("net.0.weight", torch.zeros(3, 4)), ("net.0.bias", torch.zeros(4)), ("mean.b", torch.zeros(2000))],
        "temperature": [("theta", torch.zeros(()))],
        "encoder": [],
    }  # fmt: skip
    assert describe(named) == "trained parameters: actor 2,016 (net 16, mean 2,000) + temperature 1 = 2,017"


@pytest.mark.usefixtures("decoder")
def test_the_learner_builds_no_decoder_unless_it_asks_it(tmp_path: Path) -> None:
    plain, aliased = load(tmp_path), load(tmp_path, "algorithm.noise_aliasing=True")

    def has_decoder(config: Root, acts: bool) -> bool:
        actor = build_networks(config, SPACES, acts=acts).actor
        assert isinstance(actor, LatentPolicy)
        return bool(actor._decoder)

    assert (has_decoder(plain, True), has_decoder(plain, False)) == (True, False)
    assert has_decoder(aliased, False)
    one, other = (build_networks(plain, SPACES, acts=acts) for acts in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(one.actor.parameters(), other.actor.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.critic.parameters(), other.critic.parameters(), strict=True))


@pytest.mark.usefixtures("decoder")
def test_what_is_stored_is_what_is_learned_from(tmp_path: Path) -> None:
    """With images: kilobytes of a small picture in place of two large ones."""
    spaces = EnvSpaces(
        {"state": (2,), "images/main": (256, 256, 3), "images/wrist": (256, 256, 3), "instruction": ()},
        {"state": "float32", "images/main": "uint8", "images/wrist": "uint8", "instruction": "str"},
        action_dim=1,
    )
    seeing = load(tmp_path, "actor.model.dsrl_camera=main", "algorithm.replay_buffer.capacity=1000")
    row = 64 * 64 * 3 + 8 + 4 + 17
    assert f"up to 1,000 rows of {row:,} bytes" in str(describe_replay(seeing, spaces))
    obs = {"state": torch.zeros(1, 2), "images": {"main": torch.zeros(1, 256, 256, 3, dtype=torch.uint8)}}
    assert learner_view(seeing)(obs)["images"]["main"].shape == (1, 64, 64, 3)
    aliased = load(tmp_path, "actor.model.dsrl_camera=main", "algorithm.noise_aliasing=True")
    assert learner_view(aliased)(obs) is obs, "the decoder is asked about it again"


# ---- what is refused


def test_a_missing_decoder_is_answered_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(load(tmp_path))
    path = tmp_path / "decoder"
    assert str(caught.value) == (
        f"actor.model.decoder_path: there is no decoder in {path}; train one: bash examples/sft/run_sft.sh "
        f"RECIPE runner.export_dir={path}"
    )


def test_a_missing_decoder_is_made_by_its_recipe_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = tmp_path / "examples" / "sft" / "config"
    quick.mkdir(parents=True)
    shipped = Path(__file__).parents[2] / "examples" / "sft" / "config" / "reach_flow_bc.yaml"
    text = shipped.read_text().replace("max_steps: 600", "max_steps: 5").replace("episodes: 60", "episodes: 20")
    (quick / "reach_flow_bc.yaml").write_text(text)
    config = load(tmp_path, "actor.model.decoder_recipe=reach_flow_bc")
    assert make_missing_decoder(config) == 0
    assert load_flow_decoder(tmp_path / "decoder").spec.env_id == "reach"
    assert (tmp_path / "logs" / "reach_flow_bc" / "metrics.jsonl").is_file(), "the clone's run is beside its user's"
    written = (tmp_path / "decoder" / "model.safetensors").stat().st_mtime_ns
    assert make_missing_decoder(config) == 0
    assert (tmp_path / "decoder" / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"obs_dim": 5}, "state size is 5 there and 2 in the environment"),
        ({"action_dim": 3}, "action size is 3 there and 1 in the environment"),
        ({"control_mode": "pd_ee_delta_pos"}, "control mode is pd_ee_delta_pos there and none in the environment"),
    ],
)
def test_a_decoder_of_another_environment_is_refused(tmp_path: Path, changes: dict[str, object], text: str) -> None:
    save(tmp_path / "decoder", **changes)
    with pytest.raises(ConfigError, match=text):
        build_networks(load(tmp_path), SPACES)


def test_a_policy_that_steers_another_decoder_is_refused(tmp_path: Path, decoder: Path) -> None:
    config = load(tmp_path)
    assert train(config) == 0
    save(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"learned to steer another decoder"):
        evaluate_run(run_directory(config), [f"actor.model.decoder_path={tmp_path / 'other'}"])


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["actor.precision=bf16"], "actor.precision: networks that steer a decoder are small and learn in float32"),
        (["algorithm.demo_buffer={load_path: demos}"], "demonstrations hold actions, and this policy learns"),
        (["algorithm.random_shift=4"], "algorithm.random_shift shifts images, and dsrl_flow sees none"),
        (["algorithm.critic_subsample_size=9"], r"is more than actor.model.dsrl_num_q_heads \(4\)"),
        (["actor.model.num_action_chunks=5"], "the decoder makes 2 actions at once"),
    ],
)  # fmt: skip
def test_what_cannot_be(tmp_path: Path, overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        train(load(tmp_path, *overrides))


def test_noise_aliasing_needs_a_decoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for policies that steer a decoder, and mlp_policy has"):
        load_config("reach_sac_mlp", ["algorithm.noise_aliasing=True"], CONFIG_DIR)


def test_a_run_of_cloning_is_a_decoder_too(tmp_path: Path) -> None:
    """decoder_path may name a run directory; its newest checkpoint is taken."""
    from rlinf.runners.checkpoint import CheckpointStore
    from rlinf.workers.learner_worker import Progress

    def fill(directory: Path) -> Progress:
        save(directory)
        return Progress(updates=3)

    CheckpointStore(tmp_path / "decoder" / "checkpoints").write(3, fill)
    assert isinstance(build_networks(load(tmp_path), SPACES).actor, LatentPolicy)
