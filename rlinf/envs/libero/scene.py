"""One task as LIBERO builds it: a compiled scene, where its worlds begin, and when the task is solved.

A scene serves any number of worlds. What differs between them is MuJoCo's data and where the fixtures stand, which
LIBERO writes into the model itself; that is put back whenever another world's turn comes. So a task is built once in a
process, though building takes a second.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlinf.core.errors import RlinfError
from rlinf.envs.libero.control import OPEN, Arm, PoseControl, Target
from rlinf.envs.libero.package import BUILDING, Suite, import_problems, numpy_seeded

STATE_DIM, FULL_STATE_DIM = 8, 14
OBJECT, PLACE = slice(8, 11), slice(11, 14)
"""Where the full state holds the positions of what is to be moved and of where it belongs."""
MEMORY_BYTES = 64 << 20
"""Room for the contacts of a world, of which only what is used is taken; robosuite reserves 1.3 GB."""
PLACEMENTS = 1000
"""Most draws of places for fixtures and objects (whose own are not used then) until none overlap."""

REST = np.array([0, 0, 0, 0, 0, 0, OPEN], np.float64)


@dataclass
class World:
    """One world of a scene.

    Attributes:
        data: robosuite's wrapper around MuJoCo's data.
        fixture_pos, fixture_quat: of the scene's fixtures, [F, 3] and [F, 4].
        target: of the arm.
    """

    data: Any
    fixture_pos: np.ndarray
    fixture_quat: np.ndarray
    target: Target

    @property
    def physics(self) -> Any:
        """MuJoCo's own data."""
        return self.data._data


class Scene:
    """One task of a suite, built.

    Raises:
        MissingDependency: LIBERO cannot be imported.
        RlinfError: it cannot build the task, or the stored initial states are of other objects.
    """

    def __init__(self, suite: Suite, task: int) -> None:
        self.task = suite.tasks[task]
        problem_kinds = import_problems()
        import mujoco
        from robosuite.utils.binding_utils import MjData

        self._mujoco, self._wrapper = mujoco, MjData
        try:
            self._problem = problem = build_problem(suite, self.task.problem_file, problem_kinds)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise RlinfError(
                f"{suite.name}, {self.task.name}: LIBERO cannot build its scene from {suite.assets} "
                f"({type(error).__name__}: {' '.join(str(error).split())}); are all its files there?"
            ) from error
        self.model = model = problem.sim.model._model
        self._at_home = problem.sim.data  # what robosuite itself resets
        self.arm = Arm.of(problem)
        self._control = PoseControl(model, self.arm)
        self._fixtures = [model.body(fixture.root_body).id for fixture in problem.fixtures_dict.values()]
        size, needed = self.task.states.shape[1], 1 + model.nq + model.nv
        if size != needed:
            raise RlinfError(
                f"{suite.name}, {self.task.name}: its stored initial states have {size} numbers, but the scene built "
                f"from {suite.assets} needs {needed}: other objects or joints"
            )

    @property
    def xml(self) -> str:
        """The scene in MuJoCo's language."""
        return str(self._problem.model.get_xml())

    def begin(self, trial: int, seed: int, *, steps: int) -> World:
        """A world in a stored initial state, after `steps` steps of rest; the seed decides where fixtures stand."""
        problem, model = self._problem, self.model
        problem.sim.data = self._at_home
        with BUILDING, numpy_seeded(seed):
            _reset(problem)
        world = World(
            self._wrapper(problem.sim.model),
            model.body_pos[self._fixtures].copy(),
            model.body_quat[self._fixtures].copy(),
            self._control.at_rest(self._at_home._data),
        )
        state, data = self.task.states[trial], world.physics
        data.time = state[0]
        data.qpos[:], data.qvel[:] = state[1 : 1 + model.nq], state[1 + model.nq :]
        self._mujoco.mj_forward(model, data)
        for _ in range(steps):
            self._control.advance(data, world.target, REST)
        return world

    def advance(self, world: World, action: np.ndarray) -> bool:
        """Apply one action, [7] in [−1, 1]. Returns whether the task is solved then."""
        self._enter(world)
        self._control.advance(world.physics, world.target, np.asarray(action, np.float64))
        return bool(self._problem._check_success())

    def is_solved(self, world: World) -> bool:
        """LIBERO's own test of the goal, on a state whose contacts are worked out."""
        self._enter(world)
        return bool(self._problem._check_success())

    def dress(self, world: World) -> None:
        """Put into the model what is seen of a world and not in its data: places of fixtures, the glow of a stove."""
        self._enter(world)
        self._problem._post_process()

    def state(self, world: World) -> np.ndarray:
        """Proprioception, float32 [8]: tool position, axis times angle of the hand, both fingers."""
        data, arm = world.physics, self.arm
        seen = (data.site_xpos[arm.tool], axis_angle(data.xquat[arm.hand]), data.qpos[arm.fingers])
        return np.concatenate(seen).astype(np.float32)

    def full_state(self, world: World) -> np.ndarray:
        """float32 [14]: `state`, and positions of the two things (or one, twice) that the goal's first part names."""
        self._enter(world)
        _, *names = self._problem.parsed_problem["goal_state"][0]
        things = [self._problem.object_states_dict[name].get_geom_state()["pos"] for name in (names[0], names[-1])]
        return np.concatenate([self.state(world), *things]).astype(np.float32)

    def _enter(self, world: World) -> None:
        self._problem.sim.data = world.data
        self.model.body_pos[self._fixtures] = world.fixture_pos
        self.model.body_quat[self._fixtures] = world.fixture_quat


def axis_angle(quat: np.ndarray) -> np.ndarray:
    """Axis times angle, [3] in rad, of a unit quaternion (w, x, y, z); the angle is 2 arccos w, up to 2 π.

    It keeps the quaternion's sign, as the data sets do that policies for LIBERO are trained on.
    """
    w = min(1.0, max(-1.0, float(quat[0])))
    sine = np.sqrt(1 - w * w)
    return np.zeros(3) if np.isclose(sine, 0) else quat[1:] * 2 * np.arccos(w) / sine


# ---- what is asked of LIBERO and robosuite


def build_problem(suite: Suite, problem_file: Any, kinds: Any) -> Any:
    """LIBERO's environment of a task, without its own pictures and observations.

    Args:
        suite: for the folder of its assets.
        problem_file: the task's description.
        kinds: as `import_problems` returns.
    """
    import libero.libero
    from libero.libero.envs.bddl_utils import get_problem_info
    from robosuite import load_controller_config

    kind = kinds[get_problem_info(str(problem_file))["problem_name"]]
    changes = {"_initialize_sim": _compile, "check_contact": _touch, "_setup_observables": lambda _: {}}
    lean = type(kind.__name__, (kind,), changes)
    with BUILDING, numpy_seeded(0):
        libero.libero._assets_path_cache = str(suite.assets)
        return lean(
            str(problem_file),
            robots=["Panda"],
            controller_configs=load_controller_config(default_controller="OSC_POSE"),
            gripper_types="default",
            initialization_noise=None,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
            control_freq=20,
            hard_reset=False,  # the model stays, and is as good as new
        )


def _compile(problem: Any, xml_string: str | None = None) -> None:
    """In place of robosuite's `_initialize_sim`: the same model, with less memory reserved."""
    import mujoco
    from robosuite.utils.binding_utils import MjSim

    spec = mujoco.MjSpec.from_string(xml_string or problem.model.get_xml())
    spec.memory, spec.nconmax, spec.njmax = MEMORY_BYTES, -1, -1
    problem.sim = MjSim(spec.compile())
    problem.sim.forward()
    problem.initialize_time(problem.control_freq)


def _touch(problem: Any, geoms_1: Any, geoms_2: Any = None) -> bool:
    """In place of robosuite's `check_contact`, which compares names one by one: half a step's time."""
    pairs = problem.sim.data._data.contact.geom
    first = _members(problem, geoms_1)[pairs]
    second = np.ones_like(first) if geoms_2 is None else _members(problem, geoms_2)[pairs]
    return bool((first & second[:, ::-1]).any())


def _members(problem: Any, geoms: Any) -> np.ndarray:
    """Which of the model's geometries a model of robosuite touches with, or a list names; bool [G]."""
    known: dict[Any, np.ndarray] = problem.__dict__.setdefault("_rlinf_members", {})
    key = tuple(geoms) if isinstance(geoms, list) else geoms
    if key not in known:
        names = [geoms] if isinstance(geoms, str) else getattr(geoms, "contact_geoms", geoms)
        mask = np.zeros(problem.sim.model.ngeom, bool)
        mask[[problem.sim.model.geom_name2id(name) for name in names]] = True
        known[key] = mask
    return known[key]


def _reset(problem: Any) -> None:
    """Fixtures and objects at drawn places, the arm at home."""
    from robosuite.utils.errors import RandomizationError

    for _ in range(PLACEMENTS):
        with suppress(RandomizationError):
            problem.reset()
            return
    raise RlinfError(f"{problem.bddl_file_name}: found no places for its objects in {PLACEMENTS} draws")
