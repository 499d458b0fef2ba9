"""One ManiSkill world: opened with clear errors, begun without memory of the past, stepped by ManiSkill itself."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

from rlinf.core.errors import ConfigError, MissingDependency
from rlinf.envs.maniskill.config import PUBLISHED_TWIN_TASK, TWIN_TASKS, TwinWorld
from rlinf.envs.maniskill.novulkan import no_visuals
from rlinf.envs.maniskill.vulkan import INSTALL_COMMAND, WITHOUT_FILM, use_icd


@dataclass(frozen=True)
class SceneSpec:
    """Which world to open. The names are ManiSkill's.

    `reward` is `normalized_dense`, `dense`, `sparse`, `only_success` or None for the task's default. `robot` is
    None for the task's default. With `obs_mode` `rgb` the world has pictures, and its state is what the robot knows of
    itself. `twin` are the numbers of a digital twin.
    """

    task: str
    control_mode: str
    reward: str | None = None
    robot: str | None = None
    sim_freq: int = 100
    control_freq: int = 20
    render_mode: str | None = None
    render_size: tuple[int, int] = (256, 256)
    sensor_configs: dict[str, Any] = field(default_factory=dict)
    obs_mode: Literal["state", "rgb"] = "state"
    twin: TwinWorld | None = None

    @property
    def draws(self) -> bool:
        """Whether anything of the world is ever drawn."""
        return self.render_mode is not None or self.obs_mode == "rgb"


class Scene(Protocol):
    """One world on the CPU, in numpy."""

    state_dim: int
    action_dim: int
    cameras: dict[str, tuple[int, int, int]]
    """Camera → shape of its picture, [height, width, 3]; none in a world that is observed by its state."""
    instruction: str | None
    """What the robot is told, in a world that is observed by pictures."""

    def begin(self, seed: int) -> None:
        """Put the world into the initial state of this seed, free of what happened before."""
        ...

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Apply an action, float32 [A] in [−1, 1]. Returns (reward, success, failure)."""
        ...

    def observe(self) -> np.ndarray:
        """Present state, float32 [S]."""
        ...

    def see(self) -> dict[str, np.ndarray]:
        """Camera → its present picture, uint8 [height, width, 3]."""
        ...

    def render(self) -> np.ndarray:
        """uint8 [height, width, 3]."""
        ...


def open_world(spec: SceneSpec, *, num_envs: int = 1, gpu: bool = False) -> Any:
    """ManiSkill's environment (`BaseEnv`, unwrapped) of `num_envs` worlds, on PhysX's CPU or GPU backend.

    Raises:
        MissingDependency: ManiSkill, a Vulkan device or the task's assets are missing.
        ConfigError: ManiSkill does not know the task, or the task not the controller, reward or robot.
    """
    # ManiSkill asks on stdin whether to download missing assets, and nobody is there to answer. It is not to
    # download on its own either (`_check_assets`); where a task does so all the same, it fails at once offline.
    os.environ["MS_SKIP_ASSET_DOWNLOAD_PROMPT"] = "1"
    rendering = spec.draws
    renderer = use_icd(cuda=torch.cuda.is_available()) if rendering else "none"
    with _quiet():
        registry = _import_registry()
        if spec.task in TWIN_TASKS:
            from rlinf.envs.maniskill import twin_assets, twin_task  # noqa: F401  # registers them
        _check_task(spec, registry)
        _check_assets(spec, registry)
        with _clear_errors(spec), nullcontext() if rendering else no_visuals():
            return registry[spec.task].make(**_arguments(spec, num_envs, gpu, renderer))


def _import_registry() -> dict[str, Any]:
    try:
        import mani_skill.envs  # noqa: F401  # registers the tasks
        from mani_skill.utils.registration import REGISTERED_ENVS
    except ImportError as error:
        raise MissingDependency(f"ManiSkill cannot be imported ({error}); run `{INSTALL_COMMAND}`") from error
    return REGISTERED_ENVS


def _check_task(spec: SceneSpec, registry: dict[str, Any]) -> None:
    if spec.task in registry:
        return
    import difflib

    near = difflib.get_close_matches(spec.task, registry, n=1)
    hint = f"; did you mean {near[0]}?" if near else f" among its {len(registry)} tasks"
    raise ConfigError(f"env.*.init_params.id: ManiSkill has no task {spec.task}{hint}")


def _check_assets(spec: SceneSpec, registry: dict[str, Any]) -> None:
    from mani_skill.utils import assets

    if spec.task == PUBLISHED_TWIN_TASK:
        from rlinf.envs.maniskill.twin_assets import find_assets

        find_assets()
    groups = registry[spec.task].asset_download_ids or []
    expand = assets.expand_data_group_into_individual_data_source_ids
    sources = [s for group in groups for s in (expand(group) if group in assets.DATA_GROUPS else [group])]
    missing = [source for source in sources if not assets.is_data_source_downloaded(source)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise MissingDependency(
            f"ManiSkill's assets of {spec.task} are not on this machine: {', '.join(missing[:3])}{more}; run "
            f"`python -m mani_skill.utils.download_asset {spec.task}`"
        )


def _arguments(spec: SceneSpec, num_envs: int, gpu: bool, renderer: str) -> dict[str, Any]:
    width, height = spec.render_size
    arguments: dict[str, Any] = {
        "num_envs": num_envs,
        # Pictures are taken when they are asked for, not in every step.
        "obs_mode": "none" if spec.obs_mode == "rgb" else "state",
        "control_mode": spec.control_mode,
        "sim_backend": "physx_cuda" if gpu else "physx_cpu",
        "render_backend": renderer,
        "render_mode": spec.render_mode,
        "sim_config": {"sim_freq": spec.sim_freq, "control_freq": spec.control_freq},
        "sensor_configs": deepcopy(spec.sensor_configs),
        "human_render_camera_configs": {"width": width, "height": height},
    }
    if spec.reward is not None:
        arguments["reward_mode"] = "none" if spec.reward == "only_success" else spec.reward
    if spec.robot is not None:
        arguments["robot_uids"] = spec.robot
    if spec.twin is not None:
        arguments["twin"] = spec.twin
    return arguments


@contextmanager
def _quiet() -> Iterator[None]:
    """ManiSkill warns about every default that it takes; none of that is for our reader."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextmanager
def _clear_errors(spec: SceneSpec) -> Iterator[None]:
    """Turn what ManiSkill and SAPIEN raise while building a world into one line with a remedy."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        # Such a task paints into its own visuals.
        raise ConfigError(
            f"ManiSkill cannot build {spec.task} here ({error}); tasks that draw their own pictures need rendering"
        ) from error
    except (OSError, EOFError, RuntimeError, KeyError, AssertionError, NotImplementedError, ValueError) as error:
        text = str(error) or type(error).__name__
        if "vk::" in text or "rendering device" in text or "physical device" in text:
            raise MissingDependency(
                f"no usable Vulkan device to render {spec.task} with ({text}): run `{INSTALL_COMMAND}`, or do "
                f"without films: {WITHOUT_FILM}"
            ) from error
        if isinstance(error, (OSError, EOFError)) or "download" in text or "asset" in text:
            raise MissingDependency(
                f"ManiSkill's assets of {spec.task} are not on this machine ({text}): run "
                f"`python -m mani_skill.utils.download_asset {spec.task}`"
            ) from error
        raise ConfigError(
            f"ManiSkill cannot build {spec.task} with control_mode {spec.control_mode}, reward_mode {spec.reward} "
            f"and robot_uids {spec.robot}: {text}"
        ) from error


def renew_physics(world: Any) -> None:
    """Move everything in a CPU world into a new PhysX scene.

    PhysX keeps contact caches and the order of its pairs from one episode to the next, so that the same
    initial state and actions end a little differently after another past. In a new scene nothing is left over;
    the bodies are the same objects, and moving them takes a fifth of a millisecond.
    """
    import sapien

    old = world.scene.sub_scenes[0]
    physics = sapien.physx.PhysxCpuSystem()
    physics.timestep = world.scene.px.timestep
    renderer = [old.render_system] if world.scene.can_render() else []
    new = sapien.Scene([physics, *renderer])
    entities = list(old.entities)
    for entity in entities:
        old.remove_entity(entity)
    for entity in entities:
        new.add_entity(entity)
    world.scene.px = physics
    world.scene.sub_scenes[0] = new


def begin_world(world: Any, seed: int) -> Any:
    """ManiSkill's observation after a reset that is a function of the seed alone."""
    building = nullcontext() if world.scene.can_render() else no_visuals()
    # Tasks with a reconfiguration frequency rebuild their scene in every reset.
    if world.reconfiguration_freq == 0:
        renew_physics(world)
        building = nullcontext()
    with building:
        observation, _ = world.reset(seed=seed)
    return observation


class ManiSkillScene:
    """Any ManiSkill task, stepped by ManiSkill's own `step`."""

    def __init__(self, spec: SceneSpec) -> None:
        self._world = open_world(spec)
        self._spec = spec
        self.begin(seed=0)
        self.state_dim = len(self.observe())
        self.action_dim = int(self._world.single_action_space.shape[0])
        sees = spec.obs_mode == "rgb"
        self.cameras = picture_shapes(self._world) if sees else {}
        self.instruction = instruction_of(self._world) if sees else None

    def begin(self, seed: int) -> None:
        """As `Scene.begin`."""
        observation = begin_world(self._world, seed)
        self._read(observation, self._world.get_info() if self._spec.obs_mode == "rgb" else {})

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """As `Scene.advance`."""
        observation, reward, _, _, info = self._world.step(action)
        self._read(observation, info)
        success, failure = bool(info.get("success", False)), bool(info.get("fail", False))
        return float(success) if self._spec.reward == "only_success" else float(reward), success, failure

    def observe(self) -> np.ndarray:
        """As `Scene.observe`."""
        return self._state

    def see(self) -> dict[str, np.ndarray]:
        """As `Scene.see`."""
        return {name: picture[0].numpy() for name, picture in take_pictures(self._world).items()}

    def render(self) -> np.ndarray:
        """As `Scene.render`."""
        return render_world(self._world)[0]

    def _read(self, observation: Any, info: dict[str, Any]) -> None:
        state = own_state(self._world, info) if self._spec.obs_mode == "rgb" else observation
        self._state = state[0].numpy().astype(np.float32, copy=True)


def own_state(world: Any, info: dict[str, Any]) -> torch.Tensor:
    """What the robots of a world that is observed by pictures know of themselves, [N, S]."""
    from mani_skill.utils.common import flatten_state_dict

    parts = {"agent": world._get_obs_agent(), "extra": world._get_obs_extra(info)}
    state: torch.Tensor = flatten_state_dict(parts, use_torch=True, device=world.device)
    return state.float()


def take_pictures(world: Any) -> dict[str, torch.Tensor]:
    """Camera → uint8 [N, height, width, 3] of what the task's cameras see now."""
    for thing in world._hidden_objects:
        thing.hide_visual()
    world.scene.update_render(update_sensors=True, update_human_render_cameras=False)
    world.capture_sensor_data()
    only_colours = {"rgb": True, "depth": False, "position": False, "segmentation": False}
    return {
        name: camera.get_obs(**only_colours)["rgb"].to(torch.uint8).contiguous()
        for name, camera in world.scene.sensors.items()
    }


def picture_shapes(world: Any) -> dict[str, tuple[int, int, int]]:
    """Camera → [height, width, 3]. Raises ConfigError where the task has no camera."""
    cameras = {name: camera.config for name, camera in world.scene.sensors.items()}
    if not cameras:
        raise ConfigError("env.*.init_params.obs_mode: rgb needs a camera, and the task has none; set it to state")
    return {name: (camera.height, camera.width, 3) for name, camera in cameras.items()}


def instruction_of(world: Any) -> str | None:
    """The words of the task, where it has some."""
    if not hasattr(world, "get_language_instruction"):
        return None
    words: list[str] = world.get_language_instruction()
    return words[0]


def render_world(world: Any) -> np.ndarray:
    """uint8 [N, height, width, 3] of all worlds that were opened with a render mode."""
    pictures = world.render()
    return np.ascontiguousarray(pictures.cpu().numpy().astype(np.uint8, copy=False))
