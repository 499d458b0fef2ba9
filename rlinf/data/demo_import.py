"""Demonstrations that RLinf's data collection wrote, brought into this format.

Its folder is a saved replay buffer:

    metadata.json            trajectory_format, size, total_samples, trajectory_counter, seed
    trajectory_index.json    trajectory_id_list, and trajectory_index: id → {num_samples, trajectory_id, ...}
    trajectory_<id>_<weights id>.pt    a dict of tensors and of dicts of tensors

    actions [T, B, C·D]      intervene_flags [T, B, C·D] (may be absent)      rewards [T, B, C]
    terminations, truncations, dones [T + E, B, C]    E episodes' first rows say how the one before ended, and go
    curr_obs, next_obs       states [T, B, S], main_images [T, B, H, W, 3], extra_view_images [T, B, K, H, W, 3]

Tensors are loaded with `weights_only`: nothing in a file is run. `.pkl` folders are refused, since reading a pickle
runs what it says. Observations that have no place here (wrist_images, task_descriptions) are left out, which is told.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlinf.core.errors import DataError
from rlinf.core.types import Trajectory
from rlinf.data.demos import INDEX, DemoMeta, write_demos

LISTING, INFO = "trajectory_index.json", "metadata.json"
FIELDS = ("actions", "rewards", "terminations", "truncations", "curr_obs", "next_obs")
IMAGE_KEYS = ("main_images", "extra_view_images")


def import_demos(
    source: str | Path,
    output: str | Path,
    *,
    env_id: str,
    control_mode: str = "",
    main_camera: str = "wrist_1",
    instruction: str | None = None,
    note: Callable[[str], None],
) -> DemoMeta:
    """Read RLinf's demonstrations in `source` (or in its `demos`) and write them into `output`, a new folder.

    Args:
        env_id, control_mode: kept in the folder; its own say nothing of them.
        main_camera: name of the camera of `main_images`; further ones are called extra_0, extra_1, ...
        instruction: what the robot was told, for environments that show it; None leaves it out.
        note: gets a line about each thing that is left out.

    Raises DataError for anything that is not such a folder; nothing is written then.
    """
    folder, target = find_folder(Path(source)), Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} is there already: import into a new folder")
    trajectories: list[Trajectory] = []
    success: list[list[bool]] = []
    for path in trajectory_files(folder):
        raw = load(path)
        for env in range(_shape(raw, "rewards", path)[1]):
            for one in episodes(raw, env, main_camera, path):
                trajectories.append(one if instruction is None else _instructed(one, instruction))
                # The last step's reward is how that collection tells success.
                success.append([float(one.reward[-1, 0].sum()) >= 0.5])
    if not trajectories:
        raise DataError(f"{folder} lists no trajectory: there is nothing to import")
    left_out = sorted(set(raw["curr_obs"]) - {"states", *IMAGE_KEYS})
    if left_out:
        note(f"left out: observations {', '.join(left_out)}")
    first = trajectories[0]
    leaves = _leaves(first.obs)
    texts = {} if instruction is None else {"instruction": "str"}
    meta = DemoMeta(
        env_id=env_id,
        control_mode=control_mode,
        action_dim=first.action.shape[-1],
        obs_shapes={name: tuple(leaf.shape[2:]) for name, leaf in leaves.items()} | dict.fromkeys(texts, ()),
        obs_dtypes={name: str(leaf.dtype).removeprefix("torch.") for name, leaf in leaves.items()} | texts,
        recorded_by=f"RLinf, imported from {folder.name}",
    )
    return write_demos(str(target), trajectories, meta, success)


def find_folder(path: Path) -> Path:
    """The folder with the listing: `path` itself, or `demos` in it. Raises DataError."""
    for folder in (path, path / "demos"):
        if (folder / LISTING).is_file():
            return folder
    if (path / INDEX).is_file():
        raise DataError(f"{path} is a folder of demonstrations of this program already: use it as it is")
    pickles = sorted(path.glob("*.pkl")) if path.is_dir() else []
    if pickles:
        raise DataError(
            f"{pickles[0]} is a pickle, and reading one runs whatever it says, so it is not read. Load it where it was "
            "made, and save its replay buffer with trajectory_format: pt"
        )
    raise DataError(f"{path} is no demo folder of RLinf: it holds no {LISTING}, and no demos/{LISTING} either")


def trajectory_files(folder: Path) -> list[Path]:
    """The files that the listing names, in its order. Raises DataError."""
    listing, info = _json(folder / LISTING), _json(folder / INFO)
    kind = info.get("trajectory_format", "pt")
    if kind != "pt":
        raise DataError(
            f"{folder / INFO}: trajectory_format is {kind!r}; reading that kind runs whatever a file says, so it is "
            "not read. Save the buffer with trajectory_format: pt where it was made"
        )
    ids, entries = listing.get("trajectory_id_list"), listing.get("trajectory_index")
    if not isinstance(ids, list) or not isinstance(entries, dict):
        raise DataError(f"{folder / LISTING} lacks trajectory_id_list or trajectory_index")
    return [_file_of(folder, number, entries.get(str(number))) for number in ids]


def _file_of(folder: Path, number: Any, entry: Any) -> Path:
    if not isinstance(number, int) or not isinstance(entry, dict):
        raise DataError(f"{folder / LISTING} lists trajectory {number!r} and says nothing about it")
    found = sorted(folder.glob(f"trajectory_{number}_*.pt"))
    weights = entry.get("model_weights_id")
    named = [path for path in found if path.name == f"trajectory_{number}_{weights}.pt"] or found
    if len(named) != 1:
        what = "is missing" if not named else "is there several times"
        raise DataError(f"{folder}: the file of trajectory {number} (trajectory_{number}_*.pt) {what}")
    return named[0]


def load(path: Path) -> dict[str, Any]:
    """The dict of tensors in a file. Raises DataError for anything else, which is not run."""
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"{path} holds something else than tensors, or is damaged; nothing of it was run ({first})"
        ) from (error)
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise DataError(f"{path} holds no dict of tensors but {type(raw).__name__}")
    absent = [name for name in FIELDS if name not in raw]
    if absent:
        raise DataError(f"{path} lacks {', '.join(absent)}: it is no trajectory of RLinf")
    wrong = [name for name in FIELDS[:4] if not isinstance(raw[name], Tensor)]
    wrong += [name for name in FIELDS[4:] if not isinstance(raw[name], dict)]
    wrong += [f"{name}/{key}" for name in FIELDS[4:] if name not in wrong for key, leaf in raw[name].items()
              if key in ("states", *IMAGE_KEYS) and not isinstance(leaf, Tensor)]  # fmt: skip
    if wrong:
        raise DataError(f"{path}: {', '.join(wrong)} is not what a trajectory of RLinf has there")
    if "states" not in raw["curr_obs"]:
        raise DataError(f"{path}: curr_obs has no states")
    return raw


def episodes(raw: dict[str, Any], env: int, main_camera: str, path: Path) -> list[Trajectory]:
    """What one environment of a file played, an episode each; an unfinished last one ends by truncation."""
    steps, _, chunk = _shape(raw, "rewards", path)
    action = raw["actions"][:, env].float()
    if len(action) != steps or action.shape[1] % chunk:
        raise DataError(f"{path}: actions {list(raw['actions'].shape)} and rewards {list(raw['rewards'].shape)}")
    action = action.reshape(steps, chunk, -1)
    flags = {}
    for name in ("terminations", "truncations"):
        rows = raw[name][:, env].bool().reshape(len(raw[name]), -1)
        rollouts = len(rows) - steps
        if rollouts < 0 or (rollouts and steps % rollouts) or rows.shape[1] not in (1, chunk):
            raise DataError(f"{path}: {name} {list(raw[name].shape)} do not belong to rewards {[steps, chunk]}")
        if rollouts:  # the first row of each says how the one before ended
            rows = rows.reshape(rollouts, -1, rows.shape[1])[:, 1:].flatten(0, 1)
        flags[name] = rows
    terminated = torch.zeros(steps, chunk, dtype=torch.bool)
    terminated[:, -flags["terminations"].shape[1] :] = flags["terminations"]
    truncated = flags["truncations"].any(1) & ~terminated.any(1)
    intervened = torch.ones(steps, chunk, dtype=torch.bool)
    if isinstance(given := raw.get("intervene_flags"), Tensor):
        intervened = given[:, env].bool().reshape(steps, chunk, -1).any(-1)
    now, then = (_observation(raw[name], env, main_camera, path) for name in ("curr_obs", "next_obs"))
    ends = (terminated.any(1) | truncated).nonzero().flatten().tolist()
    if not ends or ends[-1] != steps - 1:
        ends.append(steps - 1)
        truncated[-1] = True
    result, begin = [], 0
    for last in ends:
        part = slice(begin, last + 1)
        obs = {name: torch.cat([leaf[part], then[name][last : last + 1]])[:, None] for name, leaf in now.items()}
        result.append(
            Trajectory(
                obs=_nested(obs),
                last_obs=_nested({name: leaf[last : last + 1] for name, leaf in then.items()}),
                last_index=torch.tensor([[last - begin, 0]]),
                decision=action[part].flatten(1)[:, None],
                action=action[part][:, None],
                reward=raw["rewards"][part, env].float()[:, None],
                terminated=terminated[part][:, None],
                truncated=truncated[part][:, None],
                intervened=intervened[part][:, None],
                valid=torch.ones(last + 1 - begin, 1, dtype=torch.bool),
            )
        )
        begin = last + 1
    return result


def _observation(raw: dict[str, Any], env: int, main_camera: str, path: Path) -> dict[str, Tensor]:
    """Leaves [T, ...] of one environment, by our names."""
    leaves = {"state": raw["states"][:, env].float()}
    if isinstance(main := raw.get("main_images"), Tensor):
        leaves[f"images/{main_camera}"] = main[:, env]
    if isinstance(extra := raw.get("extra_view_images"), Tensor):
        leaves |= {f"images/extra_{view}": extra[:, env, view] for view in range(extra.shape[2])}
    for name, leaf in leaves.items():
        picture = name.startswith("images/")
        if picture and (leaf.dtype != torch.uint8 or leaf.ndim != 4 or leaf.shape[-1] != 3):
            raise DataError(f"{path}: {name} is {leaf.dtype} {list(leaf.shape)}, not uint8 [T, H, W, 3]")
    return leaves


def _shape(raw: dict[str, Any], name: str, path: Path) -> torch.Size:
    shape = raw[name].shape
    if len(shape) != 3 or 0 in shape:
        raise DataError(f"{path}: {name} is {list(shape)}, not [T, B, C]")
    return shape


def _instructed(one: Trajectory, text: str) -> Trajectory:
    return replace(
        one,
        obs=one.obs | {"instruction": [[text]] * (one.num_steps + 1)},
        last_obs=one.last_obs | {"instruction": [text]},
    )


def _nested(leaves: dict[str, Tensor]) -> dict[str, Any]:
    images = {name.removeprefix("images/"): leaf for name, leaf in leaves.items() if name.startswith("images/")}
    return {"state": leaves["state"]} | ({"images": images} if images else {})


def _leaves(obs: dict[str, Any]) -> dict[str, Tensor]:
    return {"state": obs["state"]} | {f"images/{name}": leaf for name, leaf in obs.get("images", {}).items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object")
    return content
