"""Collecting a person's demonstrations, with scripts for persons."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.core.errors import ConfigError, DataError
from rlinf.data.demo_folder import check_folder, delete_episodes, list_episodes
from rlinf.data.demos import read_demos
from rlinf.data.lerobot.check import check as check_dataset
from rlinf.data.lerobot.reader import LeRobotDataset
from rlinf.envs.realworld.teleop.operator import Command, ScriptedOperator
from rlinf.launch import collect as collecting
from rlinf.launch.cli.collect import StatusLine, folders
from rlinf.launch.cli.main import build_parser, main
from rlinf.launch.collect import CollectOptions, collect
from rlinf.launch.config import Root
from rlinf.launch.parse import load_config
from rlinf.launch.record_lerobot import DatasetOptions

ROOT = Path(__file__).parents[2]
TEN_HZ = DatasetOptions(fps=10)


def load(folder: Path, recipe: str = "reach", *overrides: str) -> Root:
    return load_config(recipe, overrides, folder, has_gpu=lambda: False)


class Lines:
    """What the person sees."""

    def __init__(self, at_note=lambda text: None) -> None:
        self.notes: list[str] = []
        self.last = ""
        self._at_note = at_note

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._at_note(text)

    def status(self, text: str) -> None:
        self.last = text


def options(tmp_path: Path, episodes: int, **changed) -> CollectOptions:
    given = {"operator": "scripted", "demos": str(tmp_path / "demos"), "lerobot": TEN_HZ, "patience": 20}
    return CollectOptions(episodes=episodes, **{**given, **changed})


def both(tmp_path: Path, episodes: int, **changed) -> CollectOptions:
    return options(tmp_path, episodes, dataset=str(tmp_path / "set"), **changed)


def same_episodes(tmp_path: Path) -> None:
    """Both forms are whole and hold the same."""
    assert check_folder(tmp_path / "demos") == []
    assert check_dataset(tmp_path / "set", print) == []
    trajectories, data = read_demos(str(tmp_path / "demos"))[0], LeRobotDataset(tmp_path / "set")
    assert data.meta.length.tolist() == [one.num_steps for one in trajectories]
    for key, leaves in {
        "observation.state": [one.obs["state"][:-1, 0] for one in trajectories],
        "action": [one.action[:, 0, 0] for one in trajectories],
        "intervention": [one.intervened[:, 0, 0] for one in trajectories],
    }.items():
        assert np.array_equal(data.column(key), torch.cat(leaves).numpy().reshape(data.column(key).shape)), key


def test_a_person_is_recorded_in_both_forms_in_one_pass(reach_configs: Path, tmp_path: Path) -> None:
    lines = Lines()
    tally = collect(load(reach_configs), both(tmp_path, 4), lines)
    assert (tally.kept, tally.failed) == (4, 0)
    same_episodes(tmp_path)
    meta, episodes = list_episodes(tmp_path / "demos")
    assert meta.recorded_by == "scripted in reach"
    assert [(e.success, e.intervened) for e in episodes] == [(True, 1.0)] * 4
    assert "4/4: success" in lines.notes[-1] and "left" in lines.notes[-2]
    assert lines.last.startswith("episode ")
    # What was recorded is what a demo buffer takes.
    assert all(bool(one.terminated[-1].all()) for one in read_demos(str(tmp_path / "demos"))[0])


def test_a_collection_goes_on_where_it_was(reach_configs: Path, tmp_path: Path) -> None:
    config = load(reach_configs)
    collect(config, both(tmp_path / "whole", 5), Lines())

    def interrupt(text: str) -> None:
        if text.startswith("2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(config, both(tmp_path, 5), Lines(interrupt))
    same_episodes(tmp_path)
    lines = Lines()
    assert collect(config, both(tmp_path, 5), lines).kept == 3
    assert sum("holds 2 episodes already" in note for note in lines.notes) == 2
    same_episodes(tmp_path)
    states = [
        [one.obs["state"] for one in read_demos(str(folder / "demos"))[0]] for folder in (tmp_path / "whole", tmp_path)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    assert collect(config, both(tmp_path, 5), Lines()).kept == 0


def test_ctrl_c_while_an_episode_is_written_waits_for_it(
    reach_configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = collecting.DatasetStore.add

    def interrupted(self, trajectory, success):
        signal.raise_signal(signal.SIGINT)
        return add(self, trajectory, success)

    monkeypatch.setattr(collecting.DatasetStore, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(load(reach_configs), both(tmp_path, 5), Lines())
    assert len(list_episodes(tmp_path / "demos")[1]) == 1
    same_episodes(tmp_path)


def test_an_episode_that_reached_one_form_reaches_the_other_later(
    reach_configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(reach_configs)
    collect(config, both(tmp_path, 2), Lines())

    def fails(self, trajectory, success):
        raise DataError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(collecting.DatasetStore, "add", fails)
        with pytest.raises(DataError, match="no space"):
            collect(config, both(tmp_path, 5), Lines())
    assert len(list_episodes(tmp_path / "demos")[1]) == 3
    lines = Lines()
    collect(config, both(tmp_path, 4), lines)
    assert any("taking over 1 episodes" in note for note in lines.notes)
    same_episodes(tmp_path)
    delete_episodes(tmp_path / "demos", [0])
    with pytest.raises(DataError, match=r"has 1 episodes that .*demos has not: remove .*set"):
        collect(config, both(tmp_path, 5), Lines())
    collect(config, options(tmp_path, 5, noise_std=0.5), Lines())
    with pytest.raises(DataError, match=r"steps in 4 episodes.*not of the same episodes; remove .*set"):
        collect(config, both(tmp_path, 5), Lines())


COLLECT = ["collect", "reach", "--operator", "scripted", "--format", "both", "--fps", "10", "--episodes", "9"]


def test_a_collection_that_is_killed_keeps_what_was_finished(reach_configs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlinf", *COLLECT, "--dir", str(reach_configs), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as collector:
        assert collector.stdout is not None
        for line in collector.stdout:
            if line.startswith("3/"):
                collector.send_signal(signal.SIGKILL)
                break
    assert collector.returncode == -signal.SIGKILL
    there = len(list_episodes(tmp_path / "out/demos")[1])
    assert there >= 3
    assert LeRobotDataset(tmp_path / "out/lerobot").meta.num_episodes in (there, there - 1)
    (tmp_path / "out/lerobot").rename(tmp_path / "set")
    (tmp_path / "out/demos").rename(tmp_path / "demos")
    collect(load(reach_configs), both(tmp_path, 9), Lines())
    same_episodes(tmp_path)


# ---- what is kept


def script(commands):
    """An operator that says these one after the other, then rests."""
    left = list(commands)
    return ScriptedOperator(lambda: left.pop(0) if left else Command(np.zeros(6)))


def step(x: float = 0.0, mark: str = "") -> Command:
    return Command(np.array([x, 0, 0, 0, 0, 0.0]), mark=mark)


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch):
    """Gives the collection an operator by the name of keyboard."""

    def sits_down(commands) -> None:
        operator = script(commands)
        monkeypatch.setattr(collecting, "open_operator", lambda name: operator)

    return sits_down


REST, ASKED_BY_RESET = step(), step()


def test_waiting_is_trimmed_and_who_acted_is_told(reach_configs: Path, tmp_path: Path, person) -> None:
    episode = [ASKED_BY_RESET, REST, REST, step(0.5), step(-0.5), *[REST] * 3, step(mark="success")]
    person(episode)
    config = load(reach_configs, "reach", "env.train.max_episode_steps=30", "env.train.tolerance=0.000001")
    lines = Lines()
    chosen = options(tmp_path, 1, operator="keyboard", keep_idle=2, patience=None)
    collect(config, chosen, lines)
    [one] = read_demos(str(tmp_path / "demos"))[0]
    # Two steps of waiting at the start, four at the end of which two stay: the first one, and the one with the reward.
    assert one.action.flatten().tolist() == pytest.approx([0.5, -0.5, 0.0, 0.0])
    assert one.reward.flatten().tolist()[-1] == 1.0 and bool(one.terminated[-1])
    assert one.intervened.flatten().tolist() == [True] * 4
    assert "4 steps" in lines.notes[-1] and "4 idle steps trimmed" in lines.notes[-1]


def test_failures_and_untouched_episodes_are_forgotten_unless_asked_for(
    reach_configs: Path, tmp_path: Path, person
) -> None:
    failed = [ASKED_BY_RESET, step(0.5), step(mark="failure")]
    untouched = [ASKED_BY_RESET, REST, step(mark="failure")]
    solved = [ASKED_BY_RESET, step(0.5), step(mark="success")]
    config = load(reach_configs, "reach", "env.train.tolerance=0.000001")
    chosen = {"operator": "keyboard", "patience": None}
    person([*failed, *untouched, *solved])
    tally = collect(config, options(tmp_path, 1, **chosen), Lines())
    assert (tally.kept, tally.failed, tally.untouched) == (1, 1, 1)
    assert str(tally) == "1 kept, 1 without success, 1 untouched"
    person([*failed, *untouched, *solved])
    collect(config, options(tmp_path / "all", 2, only_successes=False, **chosen), Lines())
    assert [e.success for e in list_episodes(tmp_path / "all/demos")[1]] == [False, True]


def test_stop_ends_the_collection_and_keeps_the_rest(reach_configs: Path, tmp_path: Path, person) -> None:
    person([ASKED_BY_RESET, step(0.5), step(mark="success"), ASKED_BY_RESET, step(0.5), step(mark="stop")])
    lines = Lines()
    config = load(reach_configs, "reach", "env.train.tolerance=0.000001")
    collect(config, options(tmp_path, 3, operator="keyboard", patience=None), lines)
    assert len(list_episodes(tmp_path / "demos")[1]) == 1
    assert lines.notes[-1] == "the operator said stop; 1 episodes are kept, the same command goes on"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_however_it_ends_the_robot_is_let_go(
    reach_configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    closed: list[str] = []
    make = collecting.make_env

    def watched(section, **keys):
        env = make(section, **keys)
        close = env.close
        env.close = lambda: (closed.append("env"), close())
        return env

    monkeypatch.setattr(collecting, "make_env", watched)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        collect(load(reach_configs), options(tmp_path, 9), Lines(lambda text: signal.raise_signal(number)))
    assert closed == ["env"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(list_episodes(tmp_path / "demos")[1]) == 1


def test_a_folder_from_which_all_was_deleted_is_recorded_into(reach_configs: Path, tmp_path: Path) -> None:
    config = load(reach_configs)
    collect(config, options(tmp_path, 2), Lines())
    delete_episodes(tmp_path / "demos", [0, 1])
    assert collect(config, options(tmp_path, 2), Lines()).kept == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"index\.json is missing"):
        collect(config, options(tmp_path, 2, demos=str(tmp_path / "other")), Lines())


def test_a_script_that_never_succeeds_is_given_up(reach_configs: Path, tmp_path: Path) -> None:
    config = load(reach_configs, "reach", "env.train.tolerance=0.000001", "env.train.max_episode_steps=1")
    with pytest.raises(DataError, match="nothing to keep in 3 episodes; keep failures with --all"):
        collect(config, options(tmp_path, 3, patience=3), Lines())
    assert not (tmp_path / "demos").exists()


def test_a_person_corrects_a_policy(reach_configs: Path, tmp_path: Path, person) -> None:
    from rlinf.launch.run import run_directory, train

    config = load(reach_configs, "reach", "runner.max_epochs=1", "runner.val_check_interval=-1")
    assert train(config) == 0
    person([ASKED_BY_RESET, REST, step(0.5), step(mark="success")])
    chosen = options(tmp_path, 1, operator="keyboard", checkpoint=str(run_directory(config)), keep_idle=5)
    config = load(reach_configs, "reach", "env.train.tolerance=0.000001")
    collect(config, chosen, Lines())
    [one] = read_demos(str(tmp_path / "demos"))[0]
    assert one.intervened.flatten().tolist() == [False, True, True]
    assert float(one.action[0].abs()) > 0  # the policy's


def test_chunks_are_nothing_for_a_person(reach_configs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set actor\.model\.num_action_chunks=1"):
        collect(load(reach_configs, "reach", "actor.model.num_action_chunks=2"), options(tmp_path, 1), Lines())


# ---- the command


def test_the_command_says_what_it_needs(reach_configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--dir", str(reach_configs)]
    for words, message in (
        ([], "say who moves the robot: --operator spacemouse, keyboard, gamepad or scripted"),
        (["--operator", "scripted", "--fps", "10"], "--fps needs --format lerobot or --format both"),
        (["--operator", "scripted", "--episodes", "0"], "--episodes must be at least 1"),
        (["--operator", "keyboard"], "the keyboard needs a terminal"),
    ):
        assert main(["collect", "reach", *place, *words]) == 2
        assert message in capsys.readouterr().err


def test_folders_follow_from_the_form(reach_configs: Path) -> None:
    config = load(reach_configs)
    found = {}
    for words in ("", "--format lerobot", "--format both", "--format both --output x", "--output x"):
        chosen = build_parser().parse_args(["collect", "reach", *words.split()])
        found[words] = folders(chosen, "reach", config)
    assert found == {
        "": ("demos", None),
        "--format lerobot": (None, "datasets/reach"),
        "--format both": ("demos", "datasets/reach"),
        "--format both --output x": ("x/demos", "x/lerobot"),
        "--output x": ("x", None),
    }


def test_recorded_episodes_are_shown_checked_and_deleted(
    reach_configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    out = str(tmp_path / "out")
    assert main([*COLLECT[:-1], "3", "--dir", str(reach_configs), "--output", out]) == 0
    assert "this session: 3 kept" in capsys.readouterr().out
    for folder in ("demos", "lerobot"):
        assert main(["demos", f"{out}/{folder}"]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert [line.split()[3:5] for line in shown[2:5]] == [["yes", "100%"]] * 3
        assert shown[-1].startswith("3 episodes, ") and shown[-1].endswith("3 of 3 successful")
        assert max(map(len, shown[1:])) <= 60
        assert main(["demos", f"{out}/{folder}", "--check"]) == 0
        assert main(["demos", f"{out}/{folder}", "--show", "0"]) == 2
        assert "holds no pictures" in capsys.readouterr().err
    assert main(["demos", f"{out}/demos", "--delete", "0", "2"]) == 0
    assert "2 deleted, 1 episodes are left" in capsys.readouterr().out
    assert main(["demos", f"{out}/lerobot", "--delete", "0"]) == 2
    assert "remove the data set" in capsys.readouterr().err
    (tmp_path / "out/demos/000001.npz").write_bytes(b"")
    assert main(["demos", f"{out}/demos", "--check"]) == 1
    assert main(["demos", f"{out}/demos"]) == 0
    assert "000001.npz is damaged" in capsys.readouterr().out


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_the_status_line_is_wiped_by_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    terminal = Terminal()
    line = StatusLine(terminal)
    line.status("a" * 50)
    line.note("done")
    line.note("more")
    assert terminal.text == "a" * 19 + "\r\x1b[2Kdone\nmore\n"
    line.keys("s success")  # as `operator_keys` shows them
    line.keys("")
    assert terminal.text.endswith("more\ns success\n")


# ---- the robot cell

CELL = """\
defaults:
  - env@env.train: cell
  - env@env.eval: null
  - model@actor.model: mlp_policy
  - _self_
runner: {logger: {log_path: logs, experiment_name: cell, logger_backends: []}, max_epochs: 6, val_check_interval: -1}
algorithm: {replay_buffer: {capacity: 150, min_buffer_size: 8}}
actor: {micro_batch_size: 8, global_batch_size: 16, num_threads: 1}
"""


@pytest.fixture
def cell_configs(reach_configs: Path) -> Path:
    (reach_configs / "cell.yaml").write_text(CELL)
    (reach_configs / "env/cell.yaml").write_text("env_type: realworld\noverride_cfg: {driver: fake}\n")
    return reach_configs


def test_the_cell_asks_its_own_operator(cell_configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    words = ["collect", "cell", "--dir", str(cell_configs), "--output", out, "--format", "both", "--episodes", "2"]
    assert main(words) == 2
    assert "nobody would move the robot: say --operator" in capsys.readouterr().err
    assert main([*words, "--operator", "scripted", "--task", "Insert the peg."]) == 0
    assert "2/2: success" in capsys.readouterr().out
    meta, episodes = list_episodes(f"{out}/demos")
    assert (meta.env_id, meta.obs_shapes["state"]) == ("PegInsertionEnv-v1", (19,))
    assert [(e.success, e.intervened) for e in episodes] == [(True, 1.0)] * 2
    data = LeRobotDataset(f"{out}/lerobot")
    assert (data.info.fps, data[0]["task"]) == (10, "Insert the peg.")
    assert data[0]["observation.images.wrist_1"].shape == (128, 128, 3)
    assert main(["demos", f"{out}/demos", "--show", "1", "-o", str(tmp_path / "one.mp4")]) == 0
    assert main(["demos", f"{out}/lerobot", "--show", "1", "-o", str(tmp_path / "two.mp4")]) == 0
    assert (tmp_path / "one.mp4").stat().st_size > 1000 and (tmp_path / "two.mp4").stat().st_size > 1000
    assert main(["demos", f"{out}/demos", "--show", "2"]) == 2
    assert "has 2 episodes, numbered from 0; there is no episode 2" in capsys.readouterr().err


def test_a_person_at_the_cell_is_given_real_time(cell_configs: Path) -> None:
    from rlinf.launch.cli.collect import cell_overrides

    config = load(cell_configs, "cell", *cell_overrides("keyboard"))
    assert (config.env.train.teleop, config.env.train.pace) == ("keyboard", "realtime")
    config = load(cell_configs, "cell", *cell_overrides("scripted"))
    assert (config.env.train.teleop, config.env.train.pace) == ("scripted", "auto")
    config = load(cell_configs, "cell", *cell_overrides("scripted", 0.25))
    assert config.env.train.teleop_options == {"noise_std": 0.25}
    assert cell_overrides(None) == []
