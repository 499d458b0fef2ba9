"""From recorded episodes to a classifier that a cell takes as its reward."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.core.errors import CheckpointError, DataError
from rlinf.core.types import Trajectory
from rlinf.data.demos import DemoMeta, write_demos
from rlinf.envs.realworld.classifier import SuccessClassifier, load_classifier, pack_classifier
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.envs.realworld.env import make
from rlinf.launch import reward_classifier as trainer
from rlinf.launch.cli.main import main
from rlinf.launch.reward_classifier import ClassifierOptions, Labelled, judge, read_labelled, split, train_classifier

SIDE = 16
SIZES = {"wrist_1": (SIDE, SIDE)}


class Lines:
    """A `Progress` that remembers."""

    def __init__(self) -> None:
        self.notes, self.statuses = [], []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def status(self, text: str) -> None:
        self.statuses.append(text)


@pytest.fixture(autouse=True)
def one_thread():
    """Two would wait for each other longer than they work, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pictures(shows, seed=0, side=SIDE):
    """Dark noise; a bright patch where it shows success. The red corner pixel counts them."""
    drawn = np.random.default_rng(seed).integers(0, 100, (len(shows), side, side, 3), np.uint8)
    for number, bright in enumerate(shows):
        drawn[number, 0, 0, 0] = number
        if bright:
            drawn[number, 4:10, 4:10, 1] = 250
    return drawn


def record(folder: Path, episodes=8, steps=6, success=True, bright=1, side=SIDE, seed=0) -> str:
    """Episodes of `steps` + 1 pictures, of which the last `bright` show the patch."""
    meta = DemoMeta("Peg", "", 2, {"images/wrist_1": (side, side, 3)}, {"images/wrist_1": "uint8"}, "a test")
    made = []
    for number in range(episodes):
        shown = torch.from_numpy(pictures([k > steps - bright for k in range(steps + 1)], seed + number, side))
        ends = torch.zeros(steps, 1, dtype=torch.bool)
        ends[-1] = True
        none = torch.zeros_like(ends)
        one = Trajectory(
            obs={"images": {"wrist_1": torch.cat([shown[:-1], shown[:1]])[:, None]}},  # the next episode's first one
            last_obs={"images": {"wrist_1": shown[-1:]}},
            last_index=torch.tensor([[steps - 1, 0]]),
            decision=torch.zeros(steps, 1, 2),
            action=torch.zeros(steps, 1, 1, 2),
            reward=torch.zeros(steps, 1, 1),
            terminated=(ends if success else none)[..., None],
            truncated=none if success else ends,
            intervened=none[..., None],
            valid=torch.ones_like(ends),
        )
        made.append(one)
    write_demos(str(folder), made, meta, [[success]] * episodes)
    return str(folder)


def options(folder, **keys):
    keys = {"output": f"{folder}/out.safetensors", "steps": 40, **keys}
    return ClassifierOptions(folders=(str(folder),), **keys)


# ---- what shows what


def test_the_last_pictures_of_successes_show_success_and_all_others_do_not(tmp_path):
    folder = record(tmp_path / "demos", episodes=2, bright=2)
    lost = record(tmp_path / "lost", episodes=1, success=False, bright=0)
    found = read_labelled(options(folder, success_frames=2, gap=1, failures=(lost,)))
    assert [episode.success.tolist() for episode in found] == [[False] * 4 + [True] * 2] * 2 + [[False] * 7]
    counted = [episode.pictures["wrist_1"][:, 0, 0, 0].tolist() for episode in found]
    assert counted == [[0, 1, 2, 3, 5, 6]] * 2 + [[0, 1, 2, 3, 4, 5, 6]]
    every = read_labelled(options(folder, failures=(record(tmp_path / "also", episodes=1),)))
    assert not every[-1].success.any()  # its own flag says success


def test_what_cannot_be_learned_from_is_said(tmp_path):
    one, lost = record(tmp_path / "one", 2), record(tmp_path / "lost", 2, success=False)
    for given, said in {
        options(lost): "none of 2 episodes was successful",
        options(one, success_frames=7): "no picture of failure: with --success-frames 7",
        options(one, failures=(record(tmp_path / "large", 1, side=20),)): "their cameras differ",
        options(record(tmp_path / "single", 1)): "1 episodes leave no picture of success to hold out",
        options(one, output=f"{one}/index.json/x.safetensors", steps=1): "cannot write",
        options(tmp_path / "nothing"): "is no directory",
    }.items():
        with pytest.raises(DataError, match=said):
            train_classifier(given, Lines())
    assert not (tmp_path / "lost/out.safetensors").exists()
    blind = DemoMeta("Peg", "", 2, {"state": (1,)}, {"state": "float32"}, "a test")
    write_demos(str(tmp_path / "blind"), [], blind)
    with pytest.raises(DataError, match=r"holds no pictures \(state\)"):
        train_classifier(options(tmp_path / "blind"), Lines())


def test_folders_that_do_not_tell_success_are_failures_or_nothing(tmp_path):
    both = record(tmp_path / "both", episodes=3)
    # Successes and failures of which nobody says which is which.
    index = tmp_path / "both/index.json"
    content = json.loads(index.read_text())
    content["num_successes"] = 2
    for entry in content["files"]:
        del entry["success"]
    index.write_text(json.dumps(content))
    with pytest.raises(DataError, match="does not say which of its episodes were successful"):
        read_labelled(options(both))
    found = read_labelled(options(record(tmp_path / "good", episodes=2), failures=(both,)))
    assert [bool(episode.success.any()) for episode in found] == [True, True, False, False, False]


def test_episodes_are_held_out_whole_and_of_both_kinds():
    episodes = [
        Labelled({"wrist_1": pictures([False, True], number)}, np.array([False, number < 10])) for number in range(15)
    ]
    learned, held = split(episodes, 0.2, seed=3)
    assert len(learned) == 12 and len(held) == 3
    assert sum(bool(episode.success.any()) for episode in held) == 2
    assert {id(episode) for episode in learned} | {id(episode) for episode in held} == {*map(id, episodes)}
    assert [id(episode) for episode in split(episodes, 0.2, seed=3)[1]] == [id(episode) for episode in held]
    assert [id(episode) for episode in split(episodes, 0.2, seed=4)[1]] != [id(episode) for episode in held]


# ---- figures by hand


class Redness(SuccessClassifier):
    """Log odds: the red corner pixel / 10 - 1."""

    def forward(self, stacked):
        return stacked[:, 0, 0, 0] * 25.5 - 1


def test_figures_by_hand():
    def episode(reds, shows):
        images = np.zeros((len(reds), 2, 2, 3), np.uint8)
        images[:, 0, 0, 0] = reds
        return Labelled({"wrist_1": images}, np.array(shows))

    # Above one half: 20 and more.
    found = judge(
        Redness(),
        [
            episode([0, 0, 20], [False, False, True]),  # paid when it came
            episode([0, 20, 20], [False, False, True]),  # a step too early
            episode([0, 0, 0], [False, False, True]),  # never
            episode([0, 20], [False, False]),  # for nothing
        ],
        0.5,
    )
    assert (found.paid, found.early, found.successful, found.episodes, found.pictures) == (1, 2, 3, 4, (3, 8))
    assert found.accuracy == pytest.approx(8 / 11)
    assert found.precision == pytest.approx(2 / 4) and found.recall == pytest.approx(2 / 3)
    high, low = np.log1p(np.exp(1.0)), np.log1p(np.exp(-1.0))  # of log odds on the wrong and on the right side
    assert found.loss == pytest.approx(((2 * low + high) / 3 + (6 * low + 2 * high) / 8) / 2)
    none = judge(Redness(), [episode([0, 0], [False, True])], 0.5)
    assert np.isnan(none.precision) and none.recall == 0


# ---- from the command to the cell


def test_a_cell_is_paid_by_what_the_command_trained(tmp_path, capsys):
    folder, file = record(tmp_path / "demos"), tmp_path / "new/seen.safetensors"
    words = ["reward_classifier", folder, "-o", str(file), "--steps", "60", "--held-out", "0.25", "--shift", "1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "learned from: 6 episodes, 6 pictures of success and 36 of failure" in said
    assert "at threshold 0.85: accuracy 1.000, precision 1.000, recall 1.000" in said
    assert "as a reward: 2 of 2 successes paid when they came, 0 of 2 episodes paid too early or wrongly" in said
    assert "about 0 s left" in said and f"classifier_path={file}" in said
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    network = load_classifier(file, SIZES)
    assert all(network.probability({"wrist_1": picture}) > 0.85 for picture in pictures([True] * 9, 100))
    assert all(network.probability({"wrist_1": picture}) < 0.15 for picture in pictures([False] * 9, 100))
    camera = {"wrist_1": {"driver": "fake", "size": (SIDE, SIDE)}}
    for threshold, pays in ((1e-6, True), (1 - 1e-6, False)):
        keys = {"cameras": camera, "classifier_threshold": threshold, "classifier_path": str(file)}
        config = RealWorldConfig(override_cfg={"driver": "fake", "reward": "classifier", **keys})
        env = make(config, num_envs=1, seed=0, control_mode=None, num_workers=0, render=False)
        env.reset(0)
        step = env.step(torch.zeros(1, 1, 6))
        assert bool(step.info["success"]) == pays == bool(step.reward)
        assert float(step.info["episode/target_reached"]) == 0  # the pose has its own opinion
        env.close()


def test_a_file_of_other_pictures_or_of_something_else_is_refused(tmp_path):
    file = tmp_path / "some.safetensors"
    file.write_bytes(pack_classifier(SuccessClassifier(), SIZES, {}))
    for sizes, said in (
        ({"wrist_1": (32, 32)}, r"of wrist_1 \(16 x 16\), and the cell has wrist_1 \(32 x 32\)"),
        ({"front": (SIDE, SIDE)}, r"the cell has front \(16 x 16\)"),
        ({**SIZES, "front": (SIDE, SIDE)}, r"front \(16 x 16\), wrist_1"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load_classifier(file, sizes)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="python -m rlinf reward_classifier"):
        load_classifier(file, SIZES)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="holds no success classifier"):
        load_classifier(file, SIZES)


def test_an_interruption_leaves_the_best_weights_so_far(tmp_path, monkeypatch, capsys):
    folder = record(tmp_path / "demos")
    losses, judged = iter([0.5, 0.2, 0.3, 0.1]), []

    def worse_and_better(network, episodes, threshold):
        judged.append({name: value.clone() for name, value in network.state_dict().items()})
        if len(judged) == 4:
            raise KeyboardInterrupt
        return dataclasses.replace(judge(network, episodes, threshold), loss=next(losses))

    monkeypatch.setattr(trainer, "judge", worse_and_better)
    assert main(["reward_classifier", folder, "--steps", "40", "--success-frames", "1"]) == 130
    file = Path(folder) / "reward_classifier.safetensors"
    assert f"interrupted; the best weights so far are in {file}" in capsys.readouterr().err
    kept = load_classifier(file, SIZES).state_dict()
    assert all(torch.equal(kept[name], judged[1][name]) for name in kept)  # 0.2, and not the later 0.3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--success-frames", "0"], "--success-frames must be at least 1"),
        (["--held-out", "1"], "--held-out must be between 0 and 1"),
        (["-o", "file.pt"], "must end in .safetensors"),
    ],
)
def test_options_that_mean_nothing(tmp_path, capsys, words, said):
    assert main(["reward_classifier", str(tmp_path), *words]) == 2
    assert said in capsys.readouterr().err
