"""Listing, checking and deleting recorded episodes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.core import tree
from rlinf.core.errors import DataError
from rlinf.core.types import Trajectory
from rlinf.data.demo_folder import check_folder, delete_episodes, list_episodes, read_episode, read_pictures
from rlinf.data.demos import DemoMeta, read_demos, write_demos
from tests.data.counting import CountingSource

ROOT = Path(__file__).parents[2]
META = DemoMeta(
    env_id="Peg-v1",
    control_mode="",
    action_dim=2,
    obs_shapes={"state": (1,), "images/wrist_1": (4, 4, 3)},
    obs_dtypes={"state": "float32", "images/wrist_1": "uint8"},
    recorded_by="spacemouse",
)


def episode(number: int, lengths=(3,), intervened=0, failed=()) -> Trajectory:
    """One episode per entry of `lengths`, each in a column of its own; its states are number, number + 0.01, ..."""
    steps, envs = max(lengths), len(lengths)
    age = torch.arange(steps)[:, None]
    length = torch.tensor(lengths)
    valid = age < length
    last = age == length - 1
    lost = torch.tensor([env in failed for env in range(envs)])
    rows = last.nonzero()
    state = number + torch.arange(envs)[None] + 0.01 * torch.arange(steps + 1)[:, None]
    pictures = torch.full((steps + 1, envs, 4, 4, 3), number, dtype=torch.uint8)
    return Trajectory(
        obs={"state": state[..., None], "images": {"wrist_1": pictures}},
        last_obs={
            "state": state[rows[:, 0] + 1, rows[:, 1]][:, None],
            "images": {"wrist_1": torch.full((len(rows), 4, 4, 3), 99, dtype=torch.uint8)},
        },
        last_index=rows,
        decision=torch.zeros(steps, envs, 2),
        action=torch.zeros(steps, envs, 1, 2),
        reward=(last & ~lost).float()[..., None],
        terminated=(last & ~lost)[..., None],
        truncated=last & lost,
        intervened=((age < intervened) & valid)[..., None],
        valid=valid,
    )


def write(folder: Path, *trajectories: Trajectory) -> None:
    for one in trajectories:
        flags = [bool(one.terminated[t, n].any()) for t, n in one.last_index.tolist()]
        write_demos(str(folder), [one], META, [flags])


def first_states(folder: Path) -> list[float]:
    """What tells the episodes of a folder apart."""
    return [
        pytest.approx(float(one.obs["state"][0, env, 0]))
        for one in read_demos(str(folder))[0]
        for env in range(one.num_envs)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_episodes_are_listed_by_hand(tmp_path):
    write(tmp_path, episode(1), episode(5, lengths=(4, 2), intervened=1, failed=(1,)))
    meta, found = list_episodes(tmp_path)
    assert (meta.num_episodes, meta.num_successes) == (3, 2)
    assert [(e.file, e.env, e.length, e.total_reward, e.success, e.intervened) for e in found] == [
        ("000000.npz", 0, 3, 1.0, True, 0.0),
        ("000001.npz", 1, 2, 0.0, False, 0.5),  # in the order in which they ended
        ("000001.npz", 0, 4, 1.0, True, 0.25),
    ]
    one = read_episode(tmp_path, found[1])
    assert (one.num_steps, one.num_envs) == (2, 1)
    assert torch.allclose(one.obs["state"][:, 0, 0], torch.tensor([6.0, 6.01, 6.02]))
    assert one.last_index.tolist() == [[1, 0]]
    pictures = read_pictures(tmp_path, found[2])["wrist_1"]
    assert pictures.shape == (5, 4, 4, 3)
    assert pictures[:, 0, 0, 0].tolist() == [5, 5, 5, 5, 99]


def test_success_is_unknown_where_it_was_not_recorded(tmp_path):
    source = CountingSource(0, 2, np.random.default_rng(0))
    counting = replace(
        META,
        action_dim=4,
        obs_shapes={"state": (4,), "images/front": (2, 2, 3), "instruction": ()},
        obs_dtypes={"state": "float32", "images/front": "uint8", "instruction": "str"},
    )
    segments = [source.segment(6, continues=i > 0) for i in range(3)]
    write_demos(str(tmp_path), segments, replace(counting, num_successes=1))
    meta, found = list_episodes(tmp_path)
    assert len(found) == meta.num_episodes > 3
    assert {e.success for e in found} == {None}
    assert sum(e.length for e in found) <= meta.num_transitions
    assert not check_folder(tmp_path)


def test_deleted_episodes_are_gone_and_the_others_untouched(tmp_path):
    write(tmp_path, *(episode(number) for number in (10, 20, 30, 40)))
    before = contents(tmp_path)
    meta = delete_episodes(tmp_path, [1, 3])
    assert (meta.num_episodes, meta.num_successes, meta.num_transitions) == (2, 2, 6)
    assert first_states(tmp_path) == [10, 30]
    after = contents(tmp_path)
    assert after.keys() == {"000000.npz", "000002.npz", "index.json"}
    assert all(before[name] == data for name, data in after.items() if name.endswith("npz"))
    # What is recorded next takes no name that is in use.
    write(tmp_path, episode(50))
    assert first_states(tmp_path) == [10, 30, 50]
    assert not check_folder(tmp_path)


def test_one_of_several_columns_can_go(tmp_path):
    write(tmp_path, episode(1), episode(10, lengths=(4, 2, 3), failed=(2,)), episode(5))
    # In the order of their ends: columns 1, 2, 0.
    meta = delete_episodes(tmp_path, [1])
    assert (meta.num_episodes, meta.num_successes) == (4, 3)
    assert first_states(tmp_path) == [1, 10, 12, 5]
    assert [e.success for e in list_episodes(tmp_path)[1]] == [True, False, True, True]
    assert not check_folder(tmp_path)
    delete_episodes(tmp_path, range(4))
    assert list_episodes(tmp_path)[1] == []
    write(tmp_path, episode(7))
    assert first_states(tmp_path) == [7]


@pytest.mark.parametrize(
    ("numbers", "message"), [([4], "has the episodes 0 to 1; 4 cannot be deleted"), ([0, -1], "-1 cannot be deleted")]
)
def test_an_episode_that_is_not_there_deletes_nothing(tmp_path, numbers, message):
    write(tmp_path, episode(1), episode(2))
    before = contents(tmp_path)
    with pytest.raises(DataError, match=message):
        delete_episodes(tmp_path, numbers)
    assert contents(tmp_path) == before


def test_an_episode_that_shares_its_column_cannot_go_alone(tmp_path):
    one = episode(1, lengths=(4,))
    two = replace(
        one,
        truncated=torch.tensor([[False], [True], [False], [False]]),
        last_obs=tree.index(one.last_obs, [0, 0]),
        last_index=torch.tensor([[1, 0], [3, 0]]),
    )
    write_demos(str(tmp_path), [two], META, [[False, True]])
    before = contents(tmp_path)
    with pytest.raises(DataError, match="shares its column"):
        delete_episodes(tmp_path, [0])
    assert contents(tmp_path) == before
    assert delete_episodes(tmp_path, [0, 1]).num_episodes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="uses /dev/full")
@pytest.mark.parametrize("name", ["000002.npz.partial", "index.json.partial"])
def test_a_full_disk_deletes_nothing(tmp_path, name):
    write(tmp_path, episode(1), episode(10, lengths=(2, 2)))
    before = contents(tmp_path)
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"No space left on device.*Nothing was deleted"):
        delete_episodes(tmp_path, [1])
    (tmp_path / name).unlink(missing_ok=True)
    assert contents(tmp_path) == before


def test_another_writer_is_waited_for(tmp_path):
    import fcntl

    write(tmp_path, episode(1))
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for act in (lambda: delete_episodes(tmp_path, [0]), lambda: write(tmp_path, episode(2))):
        with pytest.raises(DataError, match="another program is writing into"):
            act()
    os.close(descriptor)
    assert delete_episodes(tmp_path, [0]).num_episodes == 0


DELETER = """
import sys, time
from pathlib import Path
import rlinf.data.columns as columns, rlinf.data.demo_folder as folder, rlinf.data.demos as demos
moment = sys.argv[2]
def slow(function, name):
    def then(*arguments):
        if moment == "before " + name:
            print("now", flush=True); time.sleep(60)
        result = function(*arguments)
        if moment == "after " + name:
            print("now", flush=True); time.sleep(60)
        return result
    return then
folder.write_atomic = slow(folder.write_atomic, "file")
folder.write_index = slow(folder.write_index, "index")
folder.delete_episodes(sys.argv[1], [1, 3])
"""


@pytest.mark.parametrize(
    ("moment", "left"),
    [("after file", [1, 10, 11, 5]), ("before index", [1, 10, 11, 5]), ("after index", [1, 10])],
)
def test_killed_at_any_moment_all_or_none_are_gone(tmp_path, moment, left):
    write(tmp_path, episode(1), episode(10, lengths=(2, 1)), episode(5))  # of the second file, column 1 ends first
    code = [sys.executable, "-c", DELETER, str(tmp_path), moment]
    with subprocess.Popen(
        code, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    ) as p:
        assert p.stdout is not None
        assert p.stdout.readline() == "now\n"
        p.send_signal(signal.SIGKILL)
    assert first_states(tmp_path) == left
    leftovers = [problem for problem in check_folder(tmp_path) if "belongs to no episode" in problem]
    assert len(leftovers) == len(check_folder(tmp_path)) >= 1  # nothing is damaged
    for _ in range(50):  # the lock goes with the process
        try:
            delete_episodes(tmp_path, [0])
            break
        except DataError:
            time.sleep(0.1)
    assert first_states(tmp_path) == left[1:]
    write(tmp_path, episode(40))
    assert first_states(tmp_path) == [*left[1:], 40]


def test_the_check_names_what_is_damaged(tmp_path):
    write(tmp_path, *(episode(number) for number in (1, 2, 3)))
    assert check_folder(tmp_path) == []
    data = bytearray((tmp_path / "000001.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "000001.npz").write_bytes(bytes(data))
    (tmp_path / "000002.npz").unlink()
    (tmp_path / "000007.npz").write_bytes(b"left behind")
    index = json.loads((tmp_path / "index.json").read_text())
    index["files"][0]["transitions"] = 4
    index["num_successes"] = 2
    (tmp_path / "index.json").write_text(json.dumps(index))
    problems = check_folder(tmp_path)
    assert len(problems) == 5
    for part in ("holds 3 transitions and 1 episodes, index.json says 4 and 1", "000001.npz is corrupt",
                 "000002.npz is listed in index.json and missing", "counts 2 successes, its entries 3",
                 "000007.npz belongs to no episode"):  # fmt: skip
        assert any(part in problem for problem in problems), part
    found = list_episodes(tmp_path)[1]
    assert [(e.length, bool(e.damage)) for e in found] == [(3, False), (3, True), (3, True)]
    with pytest.raises(DataError, match=r"000001\.npz is corrupt"):
        read_pictures(tmp_path, found[1])
    assert delete_episodes(tmp_path, [1, 2]).num_episodes == 1  # damaged ones can go
    assert next(problem.partition(" ")[2] for problem in check_folder(tmp_path)).startswith("holds 3 transitions")


def test_successes_must_be_as_many_as_episodes(tmp_path):
    with pytest.raises(DataError, match="2 successes were given for 1 episodes"):
        write_demos(str(tmp_path / "demos"), [episode(1)], META, [[True, True]])
    assert not (tmp_path / "demos").exists()
