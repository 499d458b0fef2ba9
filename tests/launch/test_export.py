"""What a run has learned as a folder that others load: the frozen part and what was trained, in one set of files."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from rlinf.core.errors import CheckpointError
from rlinf.core.types import Obs
from rlinf.launch import export, registry
from rlinf.launch.build import build_networks, load_weights_into
from rlinf.launch.cli.main import main
from rlinf.launch.config import Root
from rlinf.launch.export import export_run
from rlinf.launch.run import load_run_config, run_directory, train
from rlinf.launch.sft import run_sft
from rlinf.launch.sft_openpi import OpenpiTrainee
from rlinf.metrics import report
from rlinf.models.embodiment.openpi.decoder import load_openpi_decoder
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.models.embodiment.openpi.tokenizer import WordTokenizer
from rlinf.runners.checkpoint import CheckpointStore, find, load_policy
from rlinf.workers.learner_worker import Progress
from rlinf.workers.state_files import save_weights
from tests.launch import test_co_training_openpi, test_run, test_sft_openpi, test_steering_openpi
from tests.launch.test_co_training_openpi import (
    IMAGE,
    SPACES,
    STATE,
    TEXT,
    collect_and_update,
    load,
    one_camera,
    save_tiny,
    write_real,
)

__all__ = ["one_camera"]
PI0_FILES = {"model.safetensors", "config.json", "norm_stats.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A run of one step, PPO alone, that began with stage I's weights."""
    root = tmp_path_factory.mktemp("run")
    begun = save_tiny(root / "stage1", seed=3)
    keys = [f"actor.model.model_path={begun}", "actor.use_real_data_co_training=False", "actor.optim.lr=0.01"]
    config = load(root, *keys, "runner.max_epochs=1", "runner.val_check_interval=-1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.ENVS, "reach", test_co_training_openpi.__name__ + ":make")
        patch.setattr(report.LearningCurve, "_draw", lambda self: None)
        assert train(config) == 0
    return config


def seen(rows: int = 3) -> Obs:
    draw = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 255, (rows, IMAGE, IMAGE, 3), dtype=torch.uint8, generator=draw)
    return {
        "state": torch.randn(rows, STATE, generator=draw),
        "images": {"front": picture},
        "instruction": [TEXT] * rows,
    }


def actions_of_run(config: Root, noise: Tensor) -> Tensor:
    actor = build_networks(config, SPACES).actor
    load_weights_into(actor, load_policy(run_directory(config))[1], "the run")
    return actor.act(seen(), "eval", noise[:, None]).action


def actions_of_folder(config: Root, folder: Path, noise: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    model = config.actor.model
    assert isinstance(model, OpenpiConfig)
    decoder = load_openpi_decoder(model.robot(), folder, WordTokenizer(), num_steps=model.num_steps, dtype=dtype)
    return decoder.decode(seen(), noise)[:, : model.num_action_chunks]


def types_of(folder: Path) -> set[torch.dtype]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {file.get_tensor(name).dtype for name in file.keys() if ".mlp." in name}  # noqa: SIM118


def test_what_was_trained_and_what_is_frozen_come_together(
    run: Root, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "exported"
    assert main(["export", str(run_directory(run)), "-o", str(folder)]) == 0
    told = capsys.readouterr()
    assert told.out == f"{folder}\n"
    assert f"actor.model.model_path={folder}, of run_sft.sh model.model_path={folder}" in told.err
    assert "the value head and noise network are for PPO alone" in told.err
    assert {path.name for path in folder.iterdir()} == PI0_FILES

    noise, begun = torch.randn(3, 8, 32), run.actor.model.model_path
    assert isinstance(begun, str)
    acted = actions_of_run(run, noise)
    assert torch.equal(acted, actions_of_folder(run, folder, noise))
    assert not torch.allclose(acted, actions_of_folder(run, Path(begun), noise))

    assert main(["export", str(run_directory(run)), "-o", str(folder)]) == 2
    assert f"{folder} is there already, and runs may depend on it" in capsys.readouterr().err


def test_stage_two_and_stage_one_go_on_from_it(run: Root, tmp_path: Path) -> None:
    folder = export_run(run_directory(run)).folder
    assert folder == run_directory(run) / "exports" / "global_step_1"
    more = load(tmp_path, f"actor.model.model_path={folder}", "actor.use_real_data_co_training=False")
    assert collect_and_update(more)["actor/ratio"] == pytest.approx(1, abs=1e-5)
    write_real(tmp_path / "real")
    tuned = test_sft_openpi.load(tmp_path, tmp_path, *both(tmp_path / "real"), f"model.model_path={folder}")
    trainee = OpenpiTrainee(tuned, None, lambda text: None)
    trainee.export(tmp_path / "copy")
    for name in PI0_FILES:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


def both(data: Path) -> list[str]:
    return [f"data.datasets.{name}.path={data}" for name in ("sim", "real")]


def test_a_policy_that_acts_in_bfloat16_is_exported_so_unless_asked_otherwise(run: Root, tmp_path: Path) -> None:
    checkpoint, keys = run_directory(run) / "checkpoints" / "global_step_1", ["actor.model.precision=bf16"]
    half = export_run(checkpoint, tmp_path / "half", keys).folder
    whole = export_run(checkpoint, tmp_path / "whole", keys, dtype=torch.float32).folder
    assert types_of(half) == {torch.bfloat16} and types_of(whole) == {torch.float32}
    noise = torch.randn(3, 8, 32)
    acted = actions_of_run(load_run_config(run_directory(run), keys), noise)
    for folder in (half, whole):
        assert torch.equal(actions_of_folder(run, folder, noise, torch.bfloat16), acted)


def test_a_folder_is_there_whole_or_not_at_all(run: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: object, pipeline: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_openpi", fails)
    with pytest.raises(CheckpointError, match=r"exported could not be written: .*No space left"):
        export_run(run_directory(run), tmp_path / "there" / "exported")
    assert not list((tmp_path / "there").iterdir())


def test_the_weights_that_a_run_began_with_have_to_be_there(run: Root, tmp_path: Path) -> None:
    def of(weights: Path) -> None:
        export_run(run_directory(run), tmp_path / "exported", [f"actor.model.model_path={weights}"])

    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        of(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="trained beside another frozen model; name theirs"):
        of(save_tiny(tmp_path / "other", seed=4))
    assert not (tmp_path / "exported").exists()
    of(save_tiny(tmp_path / "same", seed=3))


def test_other_policies_are_exported_with_what_builds_them(
    reach_configs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()  # the reach task itself
    keys = ["runner.max_epochs=1", "runner.save_interval=-1", "runner.val_check_interval=-1"]
    config = test_run.load(reach_configs, *keys)
    assert train(config) == 0
    made = export_run(run_directory(config))
    described = json.loads((made.folder / "config.json").read_text())
    assert described["actor"]["model"]["hidden_dims"] == [16]
    file = made.folder / "model.safetensors"
    assert file.read_bytes() == (find(run_directory(config)) / "model.safetensors").read_bytes()
    assert made.remarks[-1].endswith(f"runner.ckpt_path={file}")
    again = test_run.load(reach_configs, *keys, f"runner.ckpt_path={file}", "runner.logger.experiment_name=more")
    assert train(again) == 0


def test_of_a_steered_policy_comes_the_small_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the frozen one was trained; where it is, is told."""
    frozen = test_steering_openpi.save_tiny(tmp_path / "pi0")
    config = test_steering_openpi.load(tmp_path, f"actor.model.model_path={frozen}")
    state = build_networks(config, test_steering_openpi.SPACES, acts=False).actor.state_dict()
    run_dir = run_directory(config)

    def fill(directory: Path) -> Progress:
        save_weights(directory / "model.safetensors", 3, state)
        return Progress(updates=3)

    CheckpointStore(run_dir / "checkpoints").write(1, fill)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    made = export_run(run_dir)
    assert made.remarks[-1].endswith(f"as nothing of that was trained: {frozen}")
    assert load_policy(made.folder / "model.safetensors")[1].keys() == state.keys()


def test_a_run_of_stage_one_is_exported_again_as_it_was(tmp_path: Path) -> None:
    write_real(tmp_path / "real")
    assert run_sft(test_sft_openpi.load(tmp_path, tmp_path, *both(tmp_path / "real"), "runner.max_steps=1")) == 0
    folder = export_run(tmp_path / "run", tmp_path / "again").folder
    assert {path.name for path in folder.iterdir()} == PI0_FILES
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "exports" / "run" / path.name).read_bytes()


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a run directory" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        export_run(tmp_path)
