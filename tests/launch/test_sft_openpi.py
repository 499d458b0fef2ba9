"""Supervised fine-tuning of a tiny π0.5 through YAML: from data sets to a folder that other recipes load."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.core.errors import CheckpointError, ConfigError, DataError, MissingDependency
from rlinf.core.types import EnvSpaces
from rlinf.data.lerobot.layout import Feature
from rlinf.data.lerobot.writer import LeRobotWriter
from rlinf.launch import lerobot_sources, sft_openpi
from rlinf.launch.cli.main import main
from rlinf.launch.parse import load_as
from rlinf.launch.sft import run_sft
from rlinf.launch.sft_config import SftConfig
from rlinf.launch.sft_openpi import check_fit
from rlinf.metrics import report
from rlinf.models.embodiment.openpi.decoder import find_tokenizer, load_openpi_decoder
from rlinf.models.embodiment.openpi.norm_stats import read_norm_stats, write_norm_stats
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.runners.checkpoint import find
from rlinf.workers.state_files import load_state

RECIPES = Path(__file__).parents[2] / "examples" / "sft" / "config"
RECIPE = "maniskill_sft_openpi_pi05_tiny"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(report.LearningCurve, "_draw", lambda self: None)


def write(root, episodes, seed, camera="observation.images.front", action_dim=7):
    features = {
        "observation.state": Feature("float32", (7,)),
        camera: Feature("image", (64, 64, 3)),
        "action": Feature("float32", (action_dim,)),
    }
    draw = np.random.default_rng(seed)
    with LeRobotWriter(root, fps=5, features=features) as writer:
        for _ in range(episodes):
            data = {
                "observation.state": draw.normal(seed, 1, (6, 7)).astype(np.float32),
                camera: draw.integers(0, 255, (6, 64, 64, 3), dtype=np.uint8),
                "action": draw.uniform(-1, 1, (6, action_dim)).astype(np.float32),
            }
            writer.add_episode(data, "Pick up the object on the table and place it into the white tray.")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    write(folder / "sim", 8, 0)
    write(folder / "real", 2, 3)
    return folder


def options(datasets):
    return [
        f"data.datasets.sim.path={datasets / 'sim'}",
        f"data.datasets.real.path={datasets / 'real'}",
        "data.datasets.sim.record=null",
        "data.datasets.real.record=null",
        "data.datasets.sim.weight=3",
        "model.noises_per_example=1",
        "global_batch_size=8",
    ]


def load(tmp_path, datasets, *overrides, name="run"):
    values = [
        f"runner.logger.log_path={tmp_path}",
        f"runner.logger.experiment_name={name}",
        "runner.logger.logger_backends=[]",
        f"runner.export_dir={tmp_path / 'exports' / name}",
        "runner.max_steps=4",
        "runner.save_interval=2",
        "runner.log_interval=1",
        "runner.val_check_interval=0",
        *options(datasets),
    ]
    return load_as(SftConfig, RECIPE, [*values, *overrides], RECIPES, has_gpu=lambda: False)


def robot():
    return OpenpiConfig(
        openpi={"config_name": "pi05_maniskill_sim_real_co_training", "size": "tiny", "use_dsrl": True}
    ).robot()


def journal(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_exported_folder_is_what_acts_elsewhere(tmp_path, datasets):
    config = load(tmp_path, datasets, "model.padding_weight=0")
    assert run_sft(config) == 0
    rows = journal(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:  # six of one and two of the other in every batch
        assert row["train/sft_loss/sim"] > 0 and row["train/sft_loss/real"] > 0
    assert rows[0]["train/lr"] < rows[-1]["train/lr"]

    folder = tmp_path / "exports" / "run"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "norm_stats.json"}
    tokenizer = find_tokenizer(None, folder, tiny=True)
    decoder = load_openpi_decoder(robot(), folder, tokenizer, num_steps=4, dtype=torch.float32)
    obs = {
        "state": torch.zeros(2, 7),
        "images": {"front": torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8)},
        "instruction": ["put it there"] * 2,
    }
    noise = torch.randn(2, *decoder.noise_shape)

    trainee = sft_openpi.OpenpiTrainee(config, None, lambda text: None)
    trainee.resume(find(tmp_path / "run"))
    with trainee.acting() as policy:
        assert policy.executed == 4 and policy.noise_shape == decoder.noise_shape
        with torch.no_grad():
            assert torch.equal(policy.decode(obs, noise), decoder.decode(obs, noise))
    flat = torch.cat([p.detach().flatten() for p in trainee.tuning.trained])
    assert not torch.equal(flat, trainee.tuning.average), "the average acts, the last weights learn on"


def test_a_run_starts_from_what_another_exported(tmp_path, datasets):
    assert run_sft(load(tmp_path, datasets)) == 0
    folder = tmp_path / "exports" / "run"
    again = load(tmp_path, datasets, f"model.model_path={folder}", f"model.norm_stats_path={folder}", name="more")
    trainee = sft_openpi.OpenpiTrainee(again, None, lambda text: None)
    trainee.export(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "copy" / "norm_stats.json").read_bytes() == (folder / "norm_stats.json").read_bytes()


def test_weights_are_trained_on_by_the_statistics_beside_them(tmp_path, datasets):
    assert run_sft(load(tmp_path, datasets, "runner.max_steps=1")) == 0
    folder, told = tmp_path / "exports" / "run", []
    other = ["data.datasets.sim.weight=1", f"model.model_path={folder}"]
    trainee = sft_openpi.OpenpiTrainee(load(tmp_path, datasets, *other, name="more"), None, told.append)
    assert torch.equal(trainee.stats["state"].mean, read_norm_stats(folder)["state"].mean)
    assert f"normalised as the weights are, by {folder / 'norm_stats.json'}" in "".join(told)


def test_numbers_far_outside_of_the_statistics_are_named(tmp_path, datasets):
    config = load(tmp_path, datasets)
    stats = sft_openpi.OpenpiTrainee(config, None, lambda text: None).stats
    stats["actions"].q01[6] = stats["actions"].q99[6] = 0.25
    file = write_norm_stats(stats, tmp_path / "narrow")
    message = rf"/sim: actions number 6 \(from 0\) goes from -.* to .*{file}, from about 0\.25 to 0\.250001: normalised"
    with pytest.raises(DataError, match=message):
        run_sft(load(tmp_path, datasets, f"model.norm_stats_path={file}"))


def test_weights_beside_other_frozen_ones_do_not_go_on(tmp_path, datasets):
    for seed in (0, 1):
        overrides = [f"runner.seed={seed}", "runner.max_steps=1"]
        assert run_sft(load(tmp_path, datasets, *overrides, name=f"base{seed}")) == 0
    stats = f"model.norm_stats_path={tmp_path / 'exports' / 'base0'}"
    one, other = (
        [stats, "model.train.vision=False", f"model.model_path={tmp_path / 'exports' / f'base{seed}'}"]
        for seed in (0, 1)
    )
    assert run_sft(load(tmp_path, datasets, *one, "runner.max_steps=1")) == 0
    resume = [f"runner.resume_dir={tmp_path / 'run'}", "runner.max_steps=2"]
    with pytest.raises(CheckpointError, match=r"trained beside other frozen weights than those of .*base1; name those"):
        run_sft(load(tmp_path, datasets, *other, *resume, name="other"))
    assert run_sft(load(tmp_path, datasets, *one, *resume, name="same")) == 0


def test_what_a_machine_lacks_is_said_before_there_is_a_run(tmp_path, datasets, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependency, match="profile=gpu, but torch sees no CUDA device"):
        run_sft(load(tmp_path, datasets, "profile=gpu"))
    assert not (tmp_path / "run").exists()


def test_folders_of_data_sets_may_be_written_with_a_tilde(tmp_path, datasets, monkeypatch):
    monkeypatch.setenv("HOME", str(datasets))
    monkeypatch.setenv("HF_LEROBOT_HOME", "~/nowhere")
    named = ["data.datasets.sim.path='~/sim'", f"data.map_to={tmp_path / 'packed'}"]
    assert len(lerobot_sources.open_datasets(load(tmp_path, datasets, *named).data, robot(), None, print)["sim"]) == 48
    assert len(list((tmp_path / "packed").iterdir())) == 2, "a file for each data set"
    monkeypatch.setenv("HF_LEROBOT_HOME", "~")
    recorded = load_as(
        SftConfig,
        RECIPE,
        [
            *("data.datasets.sim.path=sim", "data.datasets.sim.record.episodes=8"),
            *("data.datasets.real.path=real", "data.datasets.real.record.episodes=2"),
        ],
        RECIPES,
        has_gpu=lambda: False,
    )
    monkeypatch.setattr(lerobot_sources, "record_episodes", lambda *_, **__: pytest.fail("nothing is missing"))
    assert len(lerobot_sources.open_datasets(recorded.data, robot(), None, print)["sim"]) == 48


def test_a_stopped_run_goes_on_exactly(tmp_path, datasets, monkeypatch):
    assert run_sft(load(tmp_path, datasets, name="straight")) == 0
    update = sft_openpi.OpenpiTrainee.update

    def interrupting(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return update(self, step)

    with monkeypatch.context() as context:
        context.setattr(sft_openpi.OpenpiTrainee, "update", interrupting)
        assert run_sft(load(tmp_path, datasets, name="stopped")) == 130
    assert find(tmp_path / "stopped").name == "global_step_3"
    assert run_sft(load(tmp_path, datasets, f"runner.resume_dir={tmp_path / 'stopped'}", name="stopped")) == 0
    one, other = (load_state(find(tmp_path / name) / "trainer.pt") for name in ("straight", "stopped"))
    assert torch.equal(one["weights"], other["weights"]) and torch.equal(one["average"], other["average"])
    with pytest.raises(CheckpointError, match="normalises by other statistics"):
        resume = ["runner.max_steps=5", f"runner.resume_dir={tmp_path / 'stopped'}", "data.datasets.real.weight=2"]
        run_sft(load(tmp_path, datasets, *resume, name="other"))


def test_statistics_are_computed_by_a_command_too(tmp_path, datasets, capsys):
    overrides = options(datasets)
    assert main(["norm_stats", RECIPE, "-o", str(tmp_path / "stats"), "--dir", str(RECIPES), *overrides]) == 0
    printed = capsys.readouterr().out
    assert "sim: 8 episodes, 48 frames" in printed and printed.rstrip().endswith("norm_stats.json")
    stats = read_norm_stats(tmp_path / "stats")
    assert stats["actions"].size == 32 and float(stats["state"].mean[0]) == pytest.approx(0.25 * 3, abs=0.5)
    missing = [item for item in overrides if ".record=" not in item] + [f"data.datasets.sim.path={tmp_path / 'none'}"]
    assert main(["norm_stats", RECIPE, "-o", str(tmp_path / "stats"), "--dir", str(RECIPES), *missing]) == 2
    assert "none lacks some of 1000 episodes, which run_sft.sh records first" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    used = load(tmp_path, datasets, f"model.norm_stats_path={tmp_path / 'stats'}")
    trainee = sft_openpi.OpenpiTrainee(used, None, lambda text: None)
    computed = sft_openpi.OpenpiTrainee(load(tmp_path, datasets), None, lambda text: None)
    assert torch.equal(trainee.stats["actions"].q01, computed.stats["actions"].q01)
    assert main(["norm_stats", "reach_flow_bc", "--dir", str(RECIPES)]) == 2
    assert "flow_decoder, which needs no norm_stats.json" in capsys.readouterr().err


def test_data_sets_of_another_robot_are_named(tmp_path, datasets):
    write(tmp_path / "blind", 1, 0, camera="observation.images.side")
    write(tmp_path / "arm6", 1, 0, action_dim=6)
    with pytest.raises(DataError, match=r"blind/meta/info\.json: there is no feature image or observation\.images\.f"):
        run_sft(load(tmp_path, datasets, f"data.datasets.real.path={tmp_path / 'blind'}"))
    with pytest.raises(DataError, match=r"arm6/meta/info\.json: feature action has 6 numbers and the robot's .* 7"):
        run_sft(load(tmp_path, datasets, f"data.datasets.real.path={tmp_path / 'arm6'}"))
    with pytest.raises(ConfigError, match=r"data\.datasets\.real\.columns: .* has no 'images/wrist'"):
        run_sft(load(tmp_path, datasets, "+data.datasets.real.columns={images/wrist: side}"))


def test_what_contradicts_itself_is_refused(tmp_path, datasets):
    with pytest.raises(ConfigError, match="datasets have a weight each or none; sim lacks one"):
        load(tmp_path, datasets, "data.datasets.sim.weight=null")
    with pytest.raises(ConfigError, match="data: give either path or datasets"):
        load(tmp_path, datasets, "data.path=demos")
    with pytest.raises(ConfigError, match="model_path must name the folder with the weights"):
        load(tmp_path, datasets, "model.openpi.size=full")
    with pytest.raises(ConfigError, match=r"config_name pi05_.* does not fit the environment: .* camera .*; it reads"):
        check_fit(robot(), EnvSpaces({"state": (4,)}, {"state": "float32"}, 7))
