"""ManiSkill tasks as a `VectorEnv`: N scenes on the CPU, in several processes, or one batch on the GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinf.core.errors import ConfigError
from rlinf.core.protocols import VectorEnv
from rlinf.core.types import EnvSpaces, Obs
from rlinf.envs.episodes import EpisodeRules, EpisodicEnv, Outcome, ReplayedEnv, episode_rules
from rlinf.envs.maniskill import twin_fast
from rlinf.envs.maniskill.config import TWIN_TASKS, ManiSkillConfig
from rlinf.envs.maniskill.fast import FastScene, why_not_fast
from rlinf.envs.maniskill.scene import (
    ManiSkillScene,
    Scene,
    SceneSpec,
    instruction_of,
    open_world,
    own_state,
    picture_shapes,
    render_world,
    take_pictures,
)
from rlinf.envs.subproc import SubprocessEnv


class CpuWorlds:
    """A `Simulator` of N scenes that are stepped one after the other.

    The first `num_filmed` scenes can be rendered; the others are built without anything to look at.
    """

    device = torch.device("cpu")

    def __init__(self, spec: SceneSpec, num_envs: int, *, fast: bool, num_filmed: int = 0) -> None:
        self.num_envs = num_envs
        kind: Callable[[SceneSpec], Scene] = _fast_kind(spec) if fast else ManiSkillScene
        blind = replace(spec, render_mode=None)
        self._scenes: list[Scene] = [kind(spec if row < num_filmed else blind) for row in range(num_envs)]
        self._num_filmed = min(num_filmed, num_envs)
        first = self._scenes[0]
        self.spaces = spaces_of(first.state_dim, first.action_dim, first.cameras, first.instruction)
        self._instruction = first.instruction
        # Drawn when they are asked for, for a chunk of actions shows only its end.
        self._outdated = np.ones(num_envs, bool)
        self._pictures = {name: np.zeros((num_envs, *shape), np.uint8) for name, shape in first.cameras.items()}

    def begin(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """As `Simulator.begin`."""
        for row, seed in zip(rows, seeds, strict=True):
            self._scenes[row].begin(seed)
            self._outdated[row] = True

    def advance(self, action: Tensor, active: Tensor) -> Outcome:
        """As `Simulator.advance`."""
        results = [(0.0, False, False)] * self.num_envs
        actions = action.numpy()
        for row in active.nonzero().flatten().tolist():
            results[row] = self._scenes[row].advance(actions[row])
            self._outdated[row] = True
        reward, success, failure = zip(*results, strict=True)
        return Outcome(torch.tensor(reward, dtype=torch.float32), torch.tensor(success), torch.tensor(failure))

    def observe(self) -> Obs:
        """{"state": float32 [N, S]}, and with cameras `images/<camera>` uint8 [N, H, W, 3] and `instruction`."""
        obs: Obs = {"state": torch.from_numpy(np.stack([scene.observe() for scene in self._scenes]))}
        if self._pictures:
            obs["images"] = self._see()
        if self._instruction is not None:
            obs["instruction"] = [self._instruction] * self.num_envs
        return obs

    def _see(self) -> dict[str, Tensor]:
        for row in np.flatnonzero(self._outdated).tolist():
            for name, picture in self._scenes[row].see().items():
                self._pictures[name][row] = picture
        self._outdated[:] = False
        return {name: torch.from_numpy(pictures.copy()) for name, pictures in self._pictures.items()}

    def render(self) -> np.ndarray | None:
        """uint8 [num_filmed, height, width, 3], or None if none is filmed."""
        if not self._num_filmed:
            return None
        return np.stack([scene.render() for scene in self._scenes[: self._num_filmed]])

    def close(self) -> None:
        """As `Simulator.close`. SAPIEN frees a scene with its last reference; ManiSkill's scenes hold cycles."""
        self._scenes.clear()
        gc.collect()


class GpuWorlds:
    """A `Simulator` of N worlds in one PhysX scene on a CUDA device, stepped by ManiSkill's own `step`.

    PhysX on the GPU does not repeat itself to the bit, so these worlds cannot be restored by replay. ManiSkill
    draws the initial states of a batch from one generator: they depend on the seed of the first row that is
    begun and on which rows are begun with it.
    """

    def __init__(self, spec: SceneSpec, num_envs: int, *, num_filmed: int = 0) -> None:
        self.num_envs = num_envs
        self.device = torch.device("cuda")
        self._world = open_world(spec, num_envs=num_envs, gpu=True)
        self._only_success = spec.reward == "only_success"
        self._sees = spec.obs_mode == "rgb"
        self._num_filmed = min(num_filmed, num_envs) if spec.render_mode is not None else 0
        self._closed = False
        self._state = self._read(self._world.reset(seed=0)[0], None)
        action_dim = int(self._world.single_action_space.shape[0])
        cameras = picture_shapes(self._world) if self._sees else {}
        self._instruction = instruction_of(self._world) if self._sees else None
        self.spaces = spaces_of(self._state.shape[1], action_dim, cameras, self._instruction)
        self._outdated = torch.ones(num_envs, dtype=torch.bool, device=self.device)
        self._pictures = {
            name: torch.zeros(num_envs, *shape, dtype=torch.uint8, device=self.device)
            for name, shape in cameras.items()
        }

    def begin(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """As `Simulator.begin`."""
        chosen = torch.tensor(list(rows), device=self.device)
        observation, _ = self._world.reset(seed=[seeds[0]] * self.num_envs, options={"env_idx": chosen})
        state = self._read(observation, None)
        self._state = self._state.index_copy(0, chosen, state[chosen])
        self._outdated[chosen] = True

    def advance(self, action: Tensor, active: Tensor) -> Outcome:
        """As `Simulator.advance`; inactive worlds move on unseen until they are begun anew."""
        observation, reward, _, _, info = self._world.step(action)
        self._state = torch.where(active[:, None], self._read(observation, info), self._state)
        self._outdated |= active
        nothing = torch.zeros_like(active)
        success, failure = info.get("success", nothing), info.get("fail", nothing)
        return Outcome(success.float() if self._only_success else reward.float(), success, failure)

    def observe(self) -> Obs:
        """As `CpuWorlds.observe`, on the device."""
        obs: Obs = {"state": self._state.clone()}
        if self._pictures:
            if bool(self._outdated.any()):
                for name, seen in take_pictures(self._world).items():
                    changed = self._outdated.view(-1, 1, 1, 1)
                    self._pictures[name] = torch.where(changed, seen, self._pictures[name])
                self._outdated = torch.zeros_like(self._outdated)
            obs["images"] = {name: pictures.clone() for name, pictures in self._pictures.items()}
        if self._instruction is not None:
            obs["instruction"] = [self._instruction] * self.num_envs
        return obs

    def render(self) -> np.ndarray | None:
        """uint8 [num_filmed, height, width, 3], or None if none is filmed."""
        return render_world(self._world)[: self._num_filmed] if self._num_filmed else None

    def close(self) -> None:
        """As `Simulator.close`."""
        if not self._closed:
            self._closed = True
            self._world.close()

    def _read(self, observation: Any, info: dict[str, Any] | None) -> Tensor:
        if not self._sees:
            state: Tensor = observation.float()
            return state
        return own_state(self._world, self._world.get_info() if info is None else info)


def spaces_of(
    state_dim: int, action_dim: int, cameras: Mapping[str, tuple[int, int, int]], instruction: str | None
) -> EnvSpaces:
    """What worlds with these cameras emit."""
    shapes: dict[str, tuple[int, ...]] = {"state": (state_dim,)}
    dtypes = {"state": "float32"}
    for name, shape in cameras.items():
        shapes[f"images/{name}"], dtypes[f"images/{name}"] = shape, "uint8"
    if instruction is not None:
        shapes["instruction"], dtypes["instruction"] = (), "str"
    return EnvSpaces(shapes, dtypes, action_dim)


def make(
    config: ManiSkillConfig,
    *,
    num_envs: int,
    seed: int,
    control_mode: str | None,
    num_workers: int,
    render: bool,
) -> VectorEnv:
    """Environments as configured.

    Args:
        config: what to build; of its numbers of environments and workers, the arguments here are used.
        num_envs: N.
        seed: root seed until the first seeded reset.
        control_mode: ManiSkill's controller, where the configuration names none.
        num_workers: processes on the CPU; 0 steps in the calling process.
        render: whether the first `video_cfg.max_envs` environments can be rendered.
    """
    spec = _spec(config, control_mode, render)
    num_filmed = min(config.video_cfg.max_envs, num_envs) if render else 0
    rules = episode_rules(config)
    if uses_gpu(config):
        if config.stepping == "fast":
            raise ConfigError(
                "env.*.stepping: fast steps scenes on the CPU, but PhysX runs on the GPU; set sim_backend: cpu"
            )
        return EpisodicEnv(GpuWorlds(spec, num_envs, num_filmed=num_filmed), rules, seed=seed)
    fast = uses_fast_stepping(config, spec)
    if num_workers == 0:
        return make_cpu(spec, rules, seed, fast=fast, num_filmed=num_filmed, first_row=0, num_envs=num_envs)
    makers, first_row = [], 0
    for rows in split_evenly(num_envs, min(num_workers, num_envs)):
        filmed = max(0, min(num_filmed - first_row, rows))
        makers.append(
            partial(make_cpu, spec, rules, seed, fast=fast, num_filmed=filmed, first_row=first_row, num_envs=rows)
        )
        first_row += rows
    return SubprocessEnv(makers, label=spec.task)


def make_cpu(
    spec: SceneSpec,
    rules: EpisodeRules,
    seed: int,
    *,
    fast: bool,
    num_filmed: int,
    first_row: int,
    num_envs: int,
) -> ReplayedEnv:
    """Environments first_row to first_row + num_envs − 1, stepped in this process."""
    worlds = CpuWorlds(spec, num_envs, fast=fast, num_filmed=num_filmed)
    return ReplayedEnv(worlds, rules, seed=seed, first_row=first_row)


def uses_gpu(config: ManiSkillConfig) -> bool:
    """Whether PhysX is to run on the GPU.

    Raises:
        ConfigError: the configuration asks for a GPU where there is none.
    """
    backend = config.init_params.sim_backend
    if backend == "gpu" and not torch.cuda.is_available():
        raise ConfigError("env.*.init_params.sim_backend is gpu, but torch sees no CUDA device; set it to auto or cpu")
    return backend == "gpu" or (backend == "auto" and torch.cuda.is_available())


def uses_fast_stepping(config: ManiSkillConfig, spec: SceneSpec) -> bool:
    """Whether CPU scenes are stepped by `fast.py` or `twin_fast.py`.

    Raises:
        ConfigError: the configuration demands it where it cannot be.
    """
    if config.stepping == "maniskill":
        return False
    reason = twin_fast.why_not_fast(spec) if spec.task in TWIN_TASKS else why_not_fast(spec)
    if config.stepping == "fast" and reason is not None:
        raise ConfigError(f"env.*.stepping: fast is impossible here: {reason}; set it to auto")
    return reason is None


def _fast_kind(spec: SceneSpec) -> Callable[[SceneSpec], Scene]:
    return twin_fast.TwinScene if spec.task in TWIN_TASKS else FastScene


def split_evenly(count: int, parts: int) -> list[int]:
    """Sizes of `parts` shares of `count` that differ by one at most, the larger ones first."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def _spec(config: ManiSkillConfig, control_mode: str | None, render: bool) -> SceneSpec:
    params = config.init_params
    controller = params.control_mode or control_mode
    if controller is None:
        raise ConfigError("env.*.init_params.control_mode is not set and no controller follows from the policy")
    return SceneSpec(
        task=params.id,
        control_mode=controller,
        reward=params.reward_mode if config.reward_mode == "raw" else config.reward_mode,
        robot=params.robot_uids,
        sim_freq=params.sim_config.sim_freq,
        control_freq=params.sim_config.control_freq,
        render_mode=params.render_mode if render else None,
        render_size=(config.video_cfg.width, config.video_cfg.height),
        sensor_configs=params.sensor_configs,
        obs_mode=params.obs_mode,
        twin=params.twin,
    )
