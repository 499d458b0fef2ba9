"""Demo folders of RLinf, made here in their layout."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from rlinf.core.errors import DataError
from rlinf.data.demo_folder import check_folder, list_episodes
from rlinf.data.demo_import import import_demos
from rlinf.data.demos import read_demos
from rlinf.launch.cli.main import main


def trajectory(number: int, steps: int = 4, envs: int = 1, chunk: int = 1, extra: bool = False) -> dict:
    """One episode, solved in its last step; its states count from `number`."""
    state = number + torch.arange(steps + 1).float()[:, None, None].expand(-1, envs, 19)
    pictures = torch.full((steps + 1, envs, 8, 8, 3), number, dtype=torch.uint8)
    pictures[-1] = 200
    views = {"main_images": pictures}
    if extra:
        views["extra_view_images"] = torch.stack([pictures + 1, pictures + 2], 2)
    done = torch.zeros(steps + 1, envs, chunk, dtype=torch.bool)
    done[-1, :, -1] = True
    reward = torch.zeros(steps, envs, chunk)
    reward[-1, :, -1] = 1
    observations = {"states": state, **views}
    return {
        "max_episode_length": 100,
        "model_weights_id": "w0",
        "actions": torch.arange(steps * envs * chunk * 6).float().reshape(steps, envs, chunk * 6) / 100,
        "intervene_flags": torch.ones(steps, envs, chunk * 6, dtype=torch.bool),
        "rewards": reward,
        "terminations": done,
        "truncations": torch.zeros_like(done),
        "dones": done,
        "versions": torch.zeros(steps, envs, 1),
        "forward_inputs": {},
        "curr_obs": {name: leaf[:-1].clone() for name, leaf in observations.items()},
        "next_obs": {name: leaf[1:].clone() for name, leaf in observations.items()},
    }


def write(folder: Path, *raws, kind: str = "pt") -> Path:
    folder.mkdir(parents=True)
    entries = {}
    for number, raw in enumerate(raws):
        torch.save(raw, folder / f"trajectory_{number}_w{number}.pt")
        entries[str(number)] = {"num_samples": 4, "trajectory_id": number, "model_weights_id": f"w{number}"}
    info = {"trajectory_format": kind, "size": len(raws), "total_samples": 4, "trajectory_counter": 1, "seed": 0}
    (folder / "metadata.json").write_text(json.dumps(info))
    listing = {"trajectory_index": entries, "trajectory_id_list": list(range(len(raws)))}
    (folder / "trajectory_index.json").write_text(json.dumps(listing))
    return folder


def bring(source: Path, target: Path):
    lines: list[str] = []
    return import_demos(source, target, env_id="PegInsertionEnv-v1", note=lines.append), lines


def test_a_folder_becomes_demonstrations(tmp_path):
    raws = [trajectory(10, extra=True), trajectory(50, steps=3, extra=True)]
    raws[0]["curr_obs"]["task_descriptions"] = raws[0]["next_obs"]["task_descriptions"] = torch.zeros(4, 1, 2)
    raws[1]["curr_obs"]["task_descriptions"] = raws[1]["next_obs"]["task_descriptions"] = torch.zeros(3, 1, 2)
    write(tmp_path / "log/demos", *raws)
    meta, lines = bring(tmp_path / "log", tmp_path / "ours")
    assert lines == ["left out: observations task_descriptions"]
    read, stored = read_demos(str(tmp_path / "ours"))
    assert meta == stored
    assert (meta.num_episodes, meta.num_successes, meta.num_transitions, meta.action_dim) == (2, 2, 7, 6)
    assert meta.obs_shapes == {
        "state": (19,), "images/wrist_1": (8, 8, 3), "images/extra_0": (8, 8, 3), "images/extra_1": (8, 8, 3)
    }  # fmt: skip
    one = read[1]
    assert one.obs["state"][:, 0, 0].tolist() == [50, 51, 52, 53]
    assert one.last_obs["state"][0, 0] == 53
    assert one.obs["images"]["extra_1"][:, 0, 0, 0, 0].tolist() == [52, 52, 52, 202]
    assert torch.equal(one.action[:, :, 0], raws[1]["actions"])
    assert one.reward.flatten().tolist() == [0, 0, 1] and one.terminated.flatten().tolist() == [False, False, True]
    assert bool(one.intervened.all()) and not bool(one.truncated.any())
    assert check_folder(tmp_path / "ours") == []


def test_it_fills_the_demo_buffer_of_the_cell(tmp_path):
    from rlinf.core.types import EnvSpaces
    from rlinf.data.demos import check_demos

    write(tmp_path / "demos", trajectory(1))
    meta = import_demos(tmp_path / "demos", tmp_path / "ours", env_id="Peg", instruction="Insert it.", note=print)
    shapes = {"state": (19,), "images/wrist_1": (8, 8, 3), "instruction": ()}
    check_demos(meta, EnvSpaces(shapes, dict(zip(shapes, ("float32", "uint8", "str"), strict=True)), action_dim=6))
    [one] = read_demos(str(tmp_path / "ours"))[0]
    assert one.obs["instruction"] == [["Insert it."]] * 5 and one.last_obs["instruction"] == ["Insert it."]


def test_environments_chunks_rollouts_and_several_episodes(tmp_path):
    raw = trajectory(0, steps=4, envs=2, chunk=3)
    # Two rollouts of two steps each: a row more for each, that says how the one before ended.
    done = torch.zeros(6, 2, 3, dtype=torch.bool)
    done[2, 0, 2] = True  # after step 1 of environment 0
    done[3, 0] = True  # first row of the second rollout: said already
    cut = torch.zeros_like(done)
    cut[5, 1, 2] = True  # after step 3 of environment 1
    raw |= {"terminations": done, "truncations": cut}
    raw["rewards"] = torch.zeros(4, 2, 3)
    raw["rewards"][1, 0, 2] = 1
    raw["intervene_flags"] = torch.zeros(4, 2, 18, dtype=torch.bool)
    raw["intervene_flags"][0, 1, 6:12] = True
    write(tmp_path / "demos", raw)
    bring(tmp_path / "demos", tmp_path / "ours")
    episodes = list_episodes(tmp_path / "ours")[1]
    assert [(e.length, e.success, round(e.intervened, 3)) for e in episodes] == [
        (6, True, 0.0), (6, False, 0.0), (12, False, round(1 / 12, 3))
    ]  # fmt: skip
    first, rest, other = read_demos(str(tmp_path / "ours"))[0]
    assert first.terminated.shape == (2, 1, 3) and bool(first.terminated[1, 0, 2])
    assert bool(rest.truncated[-1]) and bool(other.truncated[-1])  # what was never finished is cut off
    assert rest.obs["state"][:, 0, 0].tolist() == [2, 3, 4]
    assert other.intervened[0, 0].tolist() == [False, True, False]
    assert torch.equal(other.action.flatten(2)[:, 0], raw["actions"][:, 1])


class Bad:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path):
    raw = trajectory(1)
    raw["forward_inputs"] = {"x": Bad(tmp_path / "ran")}
    write(tmp_path / "demos", raw)
    with pytest.raises(DataError, match=r"something else than tensors.*nothing of it was run"):
        bring(tmp_path / "demos", tmp_path / "ours")
    folder = tmp_path / "pickles"
    folder.mkdir()
    (folder / "trajectory_0_w0.pkl").write_bytes(pickle.dumps(Bad(tmp_path / "ran")))
    with pytest.raises(DataError, match=r"is a pickle, and reading one runs whatever it says, so it is not read"):
        bring(folder, tmp_path / "ours")
    with pytest.raises(DataError, match="trajectory_format is 'pkl'"):
        bring(write(tmp_path / "other", trajectory(1), kind="pkl"), tmp_path / "ours")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


def without(key):
    raw = trajectory(1)
    del raw[key]
    return raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (without("rewards"), "lacks rewards: it is no trajectory of RLinf"),
        (torch.zeros(3), "holds no dict of tensors but Tensor"),
        (trajectory(1) | {"actions": [1, 2]}, "actions is not what a trajectory of RLinf has there"),
        (trajectory(1) | {"actions": torch.zeros(3, 1, 6)}, r"actions \[3, 1, 6\] and rewards \[4, 1, 1\]"),
        (trajectory(1) | {"rewards": torch.zeros(4)}, r"rewards is \[4\], not \[T, B, C\]"),
        (trajectory(1) | {"terminations": torch.zeros(7, 1, 1)}, r"terminations \[7, 1, 1\] do not belong to rewards"),
        (trajectory(1) | {"curr_obs": {}}, "curr_obs has no states"),
    ],
)
def test_other_files_are_named(tmp_path, raw, message):
    write(tmp_path / "demos", raw)
    with pytest.raises(DataError, match=message):
        bring(tmp_path / "demos", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_damaged_folders_are_named(tmp_path):
    folder = write(tmp_path / "demos", trajectory(1), trajectory(2))
    data = (folder / "trajectory_1_w1.pt").read_bytes()
    (folder / "trajectory_1_w1.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"trajectory_1_w1\.pt holds something else than tensors, or is damaged"):
        bring(folder, tmp_path / "ours")
    (folder / "trajectory_1_w1.pt").unlink()
    with pytest.raises(DataError, match=r"the file of trajectory 1 .* is missing"):
        bring(folder, tmp_path / "ours")
    (folder / "trajectory_index.json").write_text("{}")
    with pytest.raises(DataError, match="lacks trajectory_id_list"):
        bring(folder, tmp_path / "ours")
    (folder / "trajectory_index.json").unlink()
    with pytest.raises(DataError, match=r"is no demo folder of RLinf: it holds no trajectory_index\.json"):
        bring(folder, tmp_path / "ours")


def test_the_command(tmp_path, capsys):
    folder, ours = str(write(tmp_path / "peg", trajectory(1))), str(tmp_path / "ours")
    assert main(["demos", "import", folder]) == 2
    assert "demos import PATH --output FOLDER" in capsys.readouterr().err
    assert main(["demos", "import", folder, "--output", ours, "--task", "PegInsertionEnv-v1", "--camera", "side"]) == 0
    assert "1 episodes, 4 transitions" in capsys.readouterr().out
    assert main(["demos", ours]) == 0
    assert "PegInsertionEnv-v1, recorded by RLinf, imported from peg" in capsys.readouterr().out
    assert main(["demos", "import", folder, "--output", ours]) == 2
    assert "is there already: import into a new folder" in capsys.readouterr().err
    assert main(["demos", "import", ours, "--output", ours + "2"]) == 2
    assert "is a folder of demonstrations of this program already" in capsys.readouterr().err
    assert main(["demos", ours, folder]) == 2
    assert "a second folder goes with `import` alone" in capsys.readouterr().err
