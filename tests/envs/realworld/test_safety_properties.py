"""Ten thousand random and adversarial commands, and what the arm must never do, whoever holds the gate.

The gate is tried in the server alone (a loop at 100 Hz walks the target) and in the environment alone (one target per
command), each with the kinematic arm and with the twin, which can also be pressed against things. `max_speed` and
`max_turn_rate` are exact limits of the target; a compliant arm swings a little about it, within `stop_speed`.
"""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arms.fake import FakeArm
from rlinf.envs.realworld.safety import SafetyGate, SafetyLimits
from rlinf.envs.realworld.server.station import Station
from tests.envs.realworld.cell import DOWN, LIMITS, Clock, pose

TWIN_LIMITS = SafetyLimits(
    box_low=(0.44, -0.06, 0.05),
    box_high=(0.56, 0.06, 0.2),
    max_speed=0.1,
    stop_speed=0.15,
    max_force_n=60.0,
    max_torque_nm=15.0,
)
CONTACT_M = 0.004
"""The box is one of targets and of the tool in free space; a peg on an edge may tilt the tool by this much."""

# ---- commands

UNIT = st.floats(-1, 1)
WILD = st.one_of(st.just(math.nan), st.just(math.inf), st.just(-math.inf), st.floats(allow_nan=True), st.just(1e308))
QUATERNION = st.tuples(UNIT, UNIT, UNIT, UNIT)
NONSENSE = st.one_of(
    st.none(),
    st.just("down"),
    st.just([]),
    st.lists(UNIT, max_size=9),
    st.lists(WILD, min_size=7, max_size=7),
    st.just([[0.5] * 7]),
    st.just({"arr": 1}),
)


@st.composite
def wishes(draw):
    """A wish, made of the pose where the arm is; and when it is made."""
    kind = draw(
        st.sampled_from(["near", "far", "drill", "sweep", "turn", "flip", "wall", "nonsense", "silence", "late"])
    )
    a, b, c = draw(UNIT), draw(UNIT), draw(UNIT)
    if kind == "nonsense":
        broken = draw(NONSENSE)
        return lambda here: (broken, None, 0.0)
    if kind == "silence":
        return lambda here: (here, None, 0.5 * abs(a))
    if kind == "late":
        return lambda here: (_shifted(here, 0.02 * a, 0.02 * b, 0.02 * c), a, 0.0)
    if kind == "turn":
        turn = frames.quaternion_from_rotation_vector(np.array([a, b, c]) * draw(st.sampled_from([0.05, 0.5, 4.0])))
        return lambda here: (np.append(here[:3], frames.multiply(turn, here[3:])), None, 0.0)
    if kind == "flip":
        quaternion = draw(QUATERNION)
        return lambda here: (np.append(here[:3], quaternion), None, 0.0)
    scale = {"near": 0.02, "far": 10.0, "drill": 0.02, "sweep": 0.1, "wall": 0.2}[kind]
    down = kind in ("drill", "sweep")
    return lambda here: (_shifted(here, scale * a, scale * b, -abs(scale * c) if down else scale * c), None, 0.0)


def _shifted(here, x, y, z):
    return here + np.array([x, y, z, 0, 0, 0, 0])


# ---- what must hold


class Track:
    """The targets that an arm was given, in stretches without a stop; looked at in the end."""

    def __init__(self, limits, period):
        self._limits, self._period, self._stretches = limits, period + 1e-9, [[]]

    def add(self, target, stopped):
        if stopped:
            self.end()
        else:
            self._stretches[-1].append(np.array(target))

    def end(self):
        if self._stretches[-1]:
            self._stretches.append([])

    def check(self):
        limits = self._limits
        for stretch in filter(None, self._stretches):
            targets = np.array(stretch)
            assert np.isfinite(targets).all()
            np.testing.assert_allclose(np.linalg.norm(targets[:, 3:], axis=1), 1, atol=1e-9)
            assert (targets[:, :3] >= np.array(limits.box_low) - 1e-9).all()
            assert (targets[:, :3] <= np.array(limits.box_high) + 1e-9).all()
            turns = Rotation.from_quat(targets[:, 3:])
            away = (turns * Rotation.from_quat(DOWN).inv()).as_rotvec()
            assert (np.abs(away) <= np.array(limits.max_rotation_rad) + 1e-7).all()
            ways = np.linalg.norm(np.diff(targets[:, :3], axis=0), axis=1)
            assert (ways <= limits.max_speed * self._period + 1e-9).all()
            if len(targets) > 1:
                assert ((turns[1:] * turns[:-1].inv()).magnitude() <= limits.max_turn_rate * self._period + 1e-6).all()


class Recorder:
    """Passes everything on to an arm, and remembers the last target."""

    def __init__(self, arm):
        self._arm, self.target = arm, None

    def set_target_pose(self, target):
        self.target = target
        self._arm.set_target_pose(target)

    def __getattr__(self, name):
        return getattr(self._arm, name)


TICK_S = 0.01
TIMES = 3
"""Every wish is made so often in a row, each time of the pose where the arm then is."""


def run_server(arm, limits, clock, advance, script, period, observe):
    """The gate in the server alone. A stop is cleared by a person, so that the rest of the script is tried too."""
    recorder, track = Recorder(arm), Track(limits, TICK_S)
    station = Station(recorder, limits, control_hz=1 / TICK_S, clock=clock)
    station.open()
    for make in [m for m in script for _ in range(TIMES)]:
        wish, late, silence = make(station.state().pose)
        station.submit(wish, None if late is None else clock() + late)
        for _ in range(round((period + silence) / TICK_S)):
            was_stopped = station.gate.stopped
            station.tick()
            track.add(recorder.target, station.gate.stopped)
            advance(TICK_S)
            observe(arm.state(), station.gate, TICK_S)
            assert not was_stopped or station.gate.stopped
        if station.gate.stopped and np.linalg.norm(arm.state().force_n) < limits.max_force_n:
            station.recover("Ada")
            track.end()
    track.check()


def run_env(arm, limits, clock, advance, script, period, observe):
    """The gate in the environment alone: the arm is told one target per command."""
    gate, track = SafetyGate(limits), Track(limits, period)
    gate.start(arm.state(), clock())
    for make in [m for m in script for _ in range(TIMES)]:
        state = arm.state()
        wish, late, silence = make(state.pose)
        gate.submit(wish, state, clock(), based_on_s=None if late is None else clock() + late)
        for _ in range(round((period + silence) / period)):
            target = gate.target(arm.state(), clock())
            track.add(target, gate.stopped)
            arm.set_target_pose(target)
            advance(period)
            observe(arm.state(), gate, period)
        if gate.stopped and not gate.clear("Ada", arm.state(), clock()):
            track.end()
    track.check()


def distance_outside(position, limits):
    return float(np.linalg.norm(position - np.clip(position, limits.box_low, limits.box_high)))


# ---- the kinematic arm: 2 x 70 x 20 x 3 = 8,400 commands

MANY = settings(max_examples=70, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def fake_cell():
    clock = Clock()
    arm = FakeArm(home=tuple(pose(0.5, 0.02, 0.1)), clock=clock)
    last = [arm.state().pose[:3]]

    def observe(state, gate, period):
        assert distance_outside(state.pose[:3], LIMITS) < 1e-9
        assert np.linalg.norm(state.pose[:3] - last[0]) <= LIMITS.max_speed * period * 1.001 + 1e-9
        assert not gate.stopped
        last[0] = state.pose[:3]

    return arm, LIMITS, clock, clock.advance, observe


@MANY
@given(st.lists(wishes(), min_size=20, max_size=20))
def test_gate_in_the_server_alone(script):
    arm, limits, clock, advance, observe = fake_cell()
    run_server(arm, limits, clock, advance, script, 0.02, observe)


@MANY
@given(st.lists(wishes(), min_size=20, max_size=20))
def test_gate_in_the_environment_alone(script):
    arm, limits, clock, advance, observe = fake_cell()
    run_env(arm, limits, clock, advance, script, 0.1, observe)


# ---- the twin: 2 x 3 x 10 x 10 x 3 = 1,800 commands

STARTS = {
    "above the table": pose(0.5, 0.05, 0.058),
    "on the rim": pose(0.504, 0.003, 0.088),
    "in the hole": pose(0.5, 0, 0.06),
}
SOME = settings(MANY, max_examples=10)


@pytest.fixture(scope="module")
def twin():
    from rlinf.envs.realworld.arms.twin import TwinArm

    return TwinArm(realtime=False)


def twin_cell(twin, start):
    twin.restart(STARTS[start])
    twin.connect()

    def observe(state, gate, period):
        assert distance_outside(state.pose[:3], TWIN_LIMITS) < CONTACT_M
        assert np.linalg.norm(state.velocity[:3]) <= TWIN_LIMITS.stop_speed
        assert np.linalg.norm(state.force_n) <= TWIN_LIMITS.max_force_n
        assert np.linalg.norm(state.torque_nm) <= TWIN_LIMITS.max_torque_nm

    return TWIN_LIMITS, lambda: float(twin.data.time), twin.advance, observe


@SOME
@given(st.lists(wishes(), min_size=10, max_size=10))
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.sim
def test_gate_in_the_server_alone_with_the_twin(twin, start, script):
    limits, clock, advance, observe = twin_cell(twin, start)
    run_server(twin, limits, clock, advance, script, 0.04, observe)


@SOME
@given(st.lists(wishes(), min_size=10, max_size=10))
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.sim
def test_gate_in_the_environment_alone_with_the_twin(twin, start, script):
    limits, clock, advance, observe = twin_cell(twin, start)
    run_env(twin, limits, clock, advance, script, 0.05, observe)


@pytest.mark.sim
@pytest.mark.parametrize("start", ["above the table", "on the rim"])
def test_the_twin_is_really_pressed_against_something(twin, start):
    """Else the tests above would show nothing about forces."""
    limits, clock, advance, observe = twin_cell(twin, start)
    felt = []

    def remember(state, gate, period):
        observe(state, gate, period)
        felt.append(np.linalg.norm(state.force_n))

    down = lambda here: (_shifted(here, 0, 0, -0.02), None, 0.0)  # noqa: E731
    run_server(twin, limits, clock, advance, [down] * 10, 0.04, remember)
    assert max(felt) > 15
