"""Behaviour cloning through YAML: recording, training, resuming, what is written, and what is refused."""

import json
import signal
from pathlib import Path

import pytest
import torch

from rlinf.core.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from rlinf.data.demos import read_demos
from rlinf.launch import sft_flow
from rlinf.launch.parse import load_as
from rlinf.launch.sft import run_sft
from rlinf.launch.sft_config import SftConfig
from rlinf.metrics import report
from rlinf.models.embodiment.flow_decoder import load_flow_decoder
from rlinf.runners.checkpoint import find
from rlinf.workers.state_files import load_state

RECIPES = Path(__file__).parents[2] / "examples" / "sft" / "config"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.LearningCurve, "_draw", lambda self: None)


def load(tmp_path: Path, *overrides: str, name: str = "run") -> SftConfig:
    return load_as(
        SftConfig,
        "reach_flow_bc",
        [
            f"runner.logger.log_path={tmp_path}",
            f"runner.logger.experiment_name={name}",
            "runner.logger.logger_backends=[]",
            f"runner.export_dir={tmp_path / 'decoders' / name}",
            f"data.path={tmp_path / 'demos'}",
            "data.record.episodes=20",
            "runner.max_steps=8",
            "runner.save_interval=4",
            "runner.log_interval=2",
            "env.rollout_epoch=1",
            *overrides,
        ],
        RECIPES,
        has_gpu=lambda: False,
    )


def journal(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_valid(name: str, profile: str) -> None:
    config = load_as(SftConfig, name, [f"profile={profile}"], RECIPES)
    assert config.runner.logger.experiment_name == name
    assert SftConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_run_records_trains_evaluates_and_exports(tmp_path: Path) -> None:
    assert run_sft(load(tmp_path)) == 0
    assert read_demos(str(tmp_path / "demos"))[1].num_episodes == 20
    rows = journal(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert {"train/bc/flow_loss", "train/bc/grad_norm", "train/bc/lr"} <= rows[0].keys()
    assert rows[-1]["eval/num_episodes"] == 20 and 0 <= rows[-1]["eval/success_once"] <= 1
    checkpoint = find(tmp_path / "run")
    assert checkpoint.name == "global_step_8"
    exported, saved = (load_flow_decoder(folder) for folder in (tmp_path / "decoders" / "run", checkpoint))
    assert all(torch.equal(one, other) for one, other in zip(exported.parameters(), saved.parameters(), strict=True))
    assert exported.spec.env_id == "reach" and exported.noise_shape == (2, 1)
    assert (tmp_path / "run" / "config.yaml").is_file() and (tmp_path / "run" / "provenance.json").is_file()


def test_a_stopped_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_sft(load(tmp_path, name="straight")) == 0
    batches = sft_flow.numpy_generator

    def interrupting(seed: int, name: str):
        if name == "batch/5":
            signal.raise_signal(signal.SIGINT)
        return batches(seed, name)

    with monkeypatch.context() as context:
        context.setattr(sft_flow, "numpy_generator", interrupting)
        assert run_sft(load(tmp_path, name="stopped")) == 130
    assert find(tmp_path / "stopped").name == "global_step_5"
    assert not (tmp_path / "decoders" / "stopped").exists(), "only what is finished gets a name that others know"
    assert run_sft(load(tmp_path, f"runner.resume_dir={tmp_path / 'stopped'}", name="stopped")) == 0
    one, other = (load_state(find(tmp_path / name) / "trainer.pt") for name in ("straight", "stopped"))
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    assert torch.equal(one["generators"][0], other["generators"][0])
    assert (
        journal(tmp_path / "straight")[-1]["train/bc/flow_loss"]
        == journal(tmp_path / "stopped")[-1]["train/bc/flow_loss"]
    )


def test_the_same_seed_makes_the_same_clone_and_another_another(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run_sft(load(tmp_path, f"runner.seed={seed}", name=name)) == 0
    a, b, c = (next(load_flow_decoder(tmp_path / "decoders" / name).parameters()) for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_what_others_may_depend_on_is_not_overwritten(tmp_path: Path) -> None:
    assert run_sft(load(tmp_path)) == 0
    with pytest.raises(ConfigError, match=r"runner\.export_dir: .* is there already"):
        run_sft(load(tmp_path, name="run"))
    with pytest.raises(ConfigError, match=r"already holds a run; .*runner\.resume_dir"):
        run_sft(load(tmp_path, "runner.export_dir=null"))


def test_another_policy_is_not_resumed(tmp_path: Path) -> None:
    assert run_sft(load(tmp_path)) == 0
    resume = [f"runner.resume_dir={tmp_path / 'run'}", "runner.max_steps=9", "runner.export_dir=null"]
    with pytest.raises(CheckpointError, match="holds another policy"):
        run_sft(load(tmp_path, *resume, "model.denoising_steps=7", name="other"))
    assert run_sft(load(tmp_path, *resume, name="more")) == 0
    assert [row["step"] for row in journal(tmp_path / "more")] == [9]


def test_demonstrations_that_are_missing_or_foreign_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="demos is no directory"):
        run_sft(load(tmp_path, "data.record=null"))
    assert run_sft(load(tmp_path)) == 0
    with pytest.raises(
        DataError, match=r"observation leaf 'state' is float32 \[2\], the environment's is float32 \[4\]"
    ):
        run_sft(load(tmp_path, "env.dim=2", "data.record=null", name="other"))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"the loss is nan at update \d; lower optim\.lr"):
        run_sft(load(tmp_path, "optim.lr=1.0e30", "optim.clip_grad=null"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    broken = ["optim.lr=1.0e30", "optim.clip_grad=null", "runner.log_interval=8"]
    with pytest.raises(NonFiniteError):
        run_sft(load(tmp_path, *broken, "runner.save_interval=4", "runner.max_steps=8"))
    assert not list((tmp_path / "run" / "checkpoints").glob("global_step_*"))


def test_wrong_keys_are_answered_as_everywhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "model.hiden_dims=[8]", "data.record.epsodes=3")
    assert "model.hiden_dims: unknown key; did you mean model.hidden_dims?" in str(caught.value)
    assert "data.record.epsodes: unknown key; did you mean data.record.episodes?" in str(caught.value)
