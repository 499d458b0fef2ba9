"""`python -m rlinf demos`: recorded episodes in a table, as a film, checked, deleted, imported."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlinf.core.errors import ConfigError, DataError
from rlinf.data.demo_folder import check_folder, delete_episodes, list_episodes, read_episode, read_pictures
from rlinf.data.lerobot.layout import INFO_FILE
from rlinf.metrics.view import short_number

FPS = 10.0
"""Of films of demonstrations, which do not know their own rate: that of the robot cell."""
SMALLEST_FILM = 256
NOT_THERE = "-"


@dataclass(frozen=True)
class Row:
    """An episode for people; None where something was not recorded."""

    length: int
    total_reward: float
    success: bool | None
    intervened: float | None
    file: str


def run(chosen: argparse.Namespace) -> int:
    """Do what `options.add_demos_options` says; returns 1 when the check finds something. Raises RlinfError."""
    if chosen.folder == "import":
        return run_import(chosen)
    if chosen.source is not None:
        raise ConfigError(f"{chosen.source}: a second folder goes with `import` alone")
    folder = Path(chosen.folder)
    is_dataset = (folder / INFO_FILE).is_file()
    if chosen.delete is not None:
        return run_delete(folder, chosen.delete, is_dataset)
    if chosen.check:
        return run_check(folder, is_dataset)
    if chosen.show is not None:
        return run_show(folder, chosen, is_dataset)
    head, rows = read_dataset(folder) if is_dataset else read_demonstrations(folder)
    for line in [head, *table(rows, shutil.get_terminal_size((80, 24)).columns)]:
        print(line)
    return 0


def run_import(chosen: argparse.Namespace) -> int:
    """Bring a folder of RLinf's own demonstrations into this format."""
    if chosen.source is None or chosen.output is None:
        raise ConfigError("python -m rlinf demos import PATH --output FOLDER")
    from rlinf.data.demo_import import import_demos

    meta = import_demos(
        chosen.source,
        chosen.output,
        env_id=chosen.task or Path(chosen.source).resolve().name,
        control_mode=chosen.control_mode,
        main_camera=chosen.camera,
        instruction=chosen.instruction,
        note=print,
    )
    print(f"{chosen.output}: {meta.num_episodes} episodes, {meta.num_transitions} transitions")
    return 0


def run_delete(folder: Path, numbers: Sequence[int], is_dataset: bool) -> int:
    """Take episodes out for ever."""
    if is_dataset:
        raise DataError(
            f"{folder} is a LeRobot data set, whose files hold many episodes each: delete in the demonstrations that "
            "were recorded beside it, remove the data set, and `collect --format both` writes it anew"
        )
    meta = delete_episodes(folder, numbers)
    print(f"{folder}: {len(set(numbers))} deleted, {meta.num_episodes} episodes are left")
    return 0


def run_check(folder: Path, is_dataset: bool) -> int:
    """Read everything, and say what is wrong."""
    if is_dataset:
        from rlinf.data.lerobot.check import check

        problems = check(folder, print)
    else:
        problems = check_folder(folder)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    print("everything can be read" if not problems else f"{len(problems)} problem{'s' * (len(problems) > 1)}")
    return 1 if problems else 0


def run_show(folder: Path, chosen: argparse.Namespace, is_dataset: bool) -> int:
    """Film one episode."""
    path = Path(chosen.output or f"{folder.resolve().name}-episode-{chosen.show}.mp4")
    if path.suffix != ".mp4":
        raise ConfigError(f"--output {path}: the name must end in .mp4")
    from rlinf.metrics.video import write_video

    frames, fps = (film_of_dataset if is_dataset else film_of_demonstrations)(folder, chosen.show)
    fps = chosen.fps or fps
    try:
        write_video(path, frames, fps)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; choose another place with -o") from error
    print(path)
    if chosen.window:
        from rlinf.launch.play import require_screen, show

        require_screen()
        show(frames, fps, title=f"{folder}, episode {chosen.show}")
    return 0


# ---- tables


def read_demonstrations(folder: Path) -> tuple[str, list[Row]]:
    """A line about a folder of demonstrations, and its episodes."""
    meta, episodes = list_episodes(folder)
    rows = [
        Row(
            length=episode.length,
            total_reward=episode.total_reward,
            success=episode.success,
            intervened=None if episode.damage else episode.intervened,
            file=f"{episode.file}{' is damaged' if episode.damage else ''}",
        )
        for episode in episodes
    ]
    return f"{folder}: {meta.env_id}, recorded by {meta.recorded_by}", rows


def read_dataset(folder: Path) -> tuple[str, list[Row]]:
    """A line about a LeRobot data set, and its episodes."""
    from rlinf.data.lerobot.reader import LeRobotDataset

    numbers = {"next.reward", "next.success", "intervention"}
    data = LeRobotDataset(folder, keys=[])
    data = LeRobotDataset(folder, keys=sorted(numbers & data.info.features.keys()))
    rows = []
    for number, (begin, end) in enumerate(zip(data.begins.tolist(), data.ends.tolist(), strict=True)):
        seen = {key: data.column(key)[begin:end] for key in numbers & set(data.keys)}
        rows.append(
            Row(
                length=end - begin,
                total_reward=float(seen["next.reward"].sum()) if "next.reward" in seen else float("nan"),
                success=bool(seen["next.success"].any()) if "next.success" in seen else None,
                intervened=float(seen["intervention"].mean()) if "intervention" in seen else None,
                file=data.meta.data.files[int(data.meta.data.file[number])],
            )
        )
    return f"{folder}: LeRobot {data.info.version}, {data.info.robot_type or 'robot not named'}", rows


def table(rows: Sequence[Row], width: int) -> list[str]:
    """Lines of at most `width` characters: one for each episode, and their sum."""
    if not rows:
        return ["no episode"]
    cells = [("#", "steps", "return", "success", "by hand", "file")]
    for number, row in enumerate(rows):
        success = NOT_THERE if row.success is None else "yes" if row.success else "no"
        hands = NOT_THERE if row.intervened is None else f"{row.intervened:.0%}"
        reward = NOT_THERE if row.total_reward != row.total_reward else short_number(row.total_reward)
        cells.append((str(number), f"{row.length:,}", reward, success, hands, row.file))
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    lines = []
    for line in cells:
        text = "  ".join(
            cell.ljust(size) if column == 5 else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(line, widths, strict=True))
        )
        lines.append(_cut(text.rstrip(), width))
    known = [row.success for row in rows if row.success is not None]
    steps = sum(row.length for row in rows)
    solved = f", {sum(known)} of {len(known)} successful" if known else ""
    return [*lines, _cut(f"{len(rows)} episodes, {steps:,} steps{solved}", width)]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


# ---- films


def film_of_demonstrations(folder: Path, number: int) -> tuple[np.ndarray, float]:
    """Frames uint8 [T, H, W, 3] of an episode, and how many a second has. Raises DataError."""
    _, episodes = list_episodes(folder)
    _check_number(folder, number, len(episodes))
    pictures = read_pictures(folder, episodes[number])
    trajectory = read_episode(folder, episodes[number])
    reward = np.r_[trajectory.reward.sum(-1)[:, 0].numpy(), 0.0]
    hands = np.r_[trajectory.intervened.any(-1)[:, 0].numpy(), False]
    return film(pictures, reward, hands), FPS


def film_of_dataset(folder: Path, number: int) -> tuple[np.ndarray, float]:
    """The same of a LeRobot data set."""
    from rlinf.data.lerobot.meta import read_meta
    from rlinf.data.lerobot.reader import LeRobotDataset

    _check_number(folder, number, read_meta(folder).num_episodes)
    data = LeRobotDataset(folder, episodes=[number])
    cameras = data.info.keys("image", "video")
    if not cameras:
        raise DataError(f"{folder} holds no pictures, so there is nothing to show")
    batch = data.batch(range(len(data)))
    pictures = {key.removeprefix("observation.images."): batch[key] for key in cameras}
    nothing = np.zeros(len(data))
    return film(pictures, batch.get("next.reward", nothing), batch.get("intervention", nothing)), data.info.fps


def film(pictures: dict[str, np.ndarray], reward: np.ndarray, hands: np.ndarray) -> np.ndarray:
    """Cameras beside each other, large enough to be seen, with step and reward, and who acts."""
    from rlinf.metrics.video import overlay

    height = max(max(len(frames[0]) for frames in pictures.values()), SMALLEST_FILM)
    parts = []
    for frames in pictures.values():
        factor = max(1, height // frames.shape[1])
        large = frames.repeat(factor, 1).repeat(factor, 2)
        parts.append(np.pad(large, ((0, 0), (0, height - large.shape[1]), (0, 0), (0, 0))))
    captions = [
        f"step {step}\nreward {value:.2f}" + "\nby hand" * bool(hand)
        for step, (value, hand) in enumerate(zip(reward.tolist(), hands.tolist(), strict=True))
    ]
    return overlay(np.concatenate(parts, 2), captions)


def _check_number(folder: Path, number: int, total: int) -> None:
    if not 0 <= number < total:
        raise DataError(f"{folder} has {total} episodes, numbered from 0; there is no episode {number}")
