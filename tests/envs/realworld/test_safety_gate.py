"""The safety gate by hand."""

import dataclasses

import numpy as np
import pytest

from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import ArmState, Compliance
from rlinf.envs.realworld.safety import KINDS, SafetyGate, SafetyLimits
from tests.envs.realworld.cell import DOWN, LIMITS, pose


def state(at, time_s=0.0, *, force=(0, 0, 0), torque=(0, 0, 0), velocity=(0,) * 6, error=""):
    return ArmState(
        pose=np.array(at, float),
        velocity=np.array(velocity, float),
        force_n=np.array(force, float),
        torque_nm=np.array(torque, float),
        q=np.zeros(7),
        dq=np.zeros(7),
        jacobian=np.zeros((6, 7)),
        gripper=1.0,
        time_s=time_s,
        error=error,
    )


def started(limits=LIMITS, at=None):
    gate = SafetyGate(limits)
    here = pose(0.5, 0, 0.15) if at is None else at
    gate.start(state(here), 0.0)
    return gate, here


def test_the_target_walks_at_the_speed_limit_and_arrives():
    gate, here = started()
    wish = pose(0.51, 0, 0.15)
    assert gate.submit(wish, state(here), 0.0).accepted
    np.testing.assert_allclose(gate.target(state(here, 0.01), 0.01), pose(0.5025, 0, 0.15), atol=1e-12)
    np.testing.assert_allclose(gate.target(state(here, 0.02), 0.02), pose(0.505, 0, 0.15), atol=1e-12)
    np.testing.assert_allclose(gate.target(state(here, 0.1), 0.1), wish, atol=1e-12)
    assert not gate.counts


def test_the_target_turns_at_the_rate_limit():
    gate, here = started()
    wish = pose(0.5, 0, 0.15, frames.multiply(frames.quaternion_from_rotation_vector([0, 0, 0.15]), DOWN))
    gate.submit(wish, state(here), 0.0)
    target = gate.target(state(here, 0.05), 0.05)
    assert frames.angle_between(target[3:], DOWN) == pytest.approx(0.05)
    assert frames.angle_between(gate.target(state(here, 0.1), 0.15)[3:], wish[3:]) == pytest.approx(0, abs=1e-9)


def test_a_wish_outside_the_box_goes_to_its_wall():
    gate, here = started(at=pose(0.59, 0, 0.15))
    verdict = gate.submit(pose(5, 0, 0.15), state(here), 0.0)
    assert verdict.accepted and "box" in verdict.limited and "step" not in verdict.limited
    np.testing.assert_allclose(gate.target(state(here, 0.1), 0.1), pose(0.6, 0, 0.15), atol=1e-12)
    assert gate.counts["box"] == 1


def test_a_tilted_wish_is_turned_back_to_the_limit():
    gate, here = started()
    tilted = frames.multiply(frames.quaternion_from_rotation_vector([0.35, 0, 0]), DOWN)
    at = here.copy()
    at[3:] = frames.multiply(frames.quaternion_from_rotation_vector([0.28, 0, 0]), DOWN)
    gate.start(state(at), 0.0)
    assert gate.submit(pose(0.5, 0, 0.15, tilted), state(at), 0.0).limited == ("orientation",)
    assert frames.angle_between(gate.target(state(at, 0.1), 0.1)[3:], DOWN) == pytest.approx(0.3)


def test_the_target_stays_within_a_step_of_an_arm_that_is_held_back():
    gate, here = started()
    for k in range(100):
        verdict = gate.submit(pose(0.58, 0, 0.15), state(here, k / 100), k / 100)
        target = gate.target(state(here, (k + 1) / 100), (k + 1) / 100)
    assert verdict.limited == ("step",)
    np.testing.assert_allclose(target, pose(0.53, 0, 0.15), atol=1e-12)


def test_a_jump_between_wishes_counts_as_too_fast():
    gate, here = started()
    gate.submit(pose(0.51, 0, 0.15), state(here), 0.0)
    assert gate.submit(pose(0.51, 0.02, 0.15), state(here, 0.1), 0.1).limited == ()
    assert gate.submit(pose(0.51, -0.02, 0.15), state(here, 0.2), 0.2).limited == ("speed",)


@pytest.mark.parametrize(
    ("wish", "kind"),
    [
        ([0.5, 0, 0.15, 1, 0, 0], "shape"),
        ([[0.5, 0, 0.15, 1, 0, 0, 0]], "shape"),
        (None, "shape"),
        ("left a bit", "shape"),
        ([0.5, 0, 0.15, 1, 0, 0, {}], "shape"),
        ([0.5, 0, 0.15, 1, 0, 0, 10**400], "shape"),
        ([float("nan"), 0, 0.15, 1, 0, 0, 0], "not_finite"),
        ([0.5, 0, 0.15, float("inf"), 0, 0, 0], "not_finite"),
        ([0.5, 0, 0.15, 0, 0, 0, 0], "quaternion"),
        ([0.5, 0, 0.15, 1e308, 1e308, 0, 0], "quaternion"),
    ],
)
def test_nonsense_is_refused_and_the_arm_holds(wish, kind):
    gate, here = started()
    gate.submit(pose(0.51, 0, 0.15), state(here), 0.0)
    before = gate.target(state(here, 0.01), 0.01)
    verdict = gate.submit(wish, state(here, 0.01), 0.01)
    assert (verdict.accepted, verdict.kind) == (False, kind) and verdict.reason
    np.testing.assert_array_equal(gate.target(state(here, 0.05), 0.05), before)
    assert gate.counts == {kind: 1} and gate.events[-1].reason == verdict.reason


def test_interpolated_quaternions_are_normalised():
    gate, here = started()
    assert gate.submit(np.array([0.5, 0, 0.15, 0.8, 0, 0, 0]), state(here), 0.0).accepted
    np.testing.assert_allclose(gate.target(state(here, 0.1), 0.1), here, atol=1e-12)


def test_late_and_overtaken_targets_are_refused():
    gate, here = started()
    near = pose(0.505, 0, 0.15)
    assert gate.submit(near, state(here, 1.0), 1.0, based_on_s=0.9).accepted
    assert gate.submit(here, state(here, 1.0), 1.0, based_on_s=0.8).kind == "out_of_order"
    np.testing.assert_allclose(gate.target(state(here, 1.1), 1.1), near, atol=1e-12)  # the newer one is followed
    assert gate.submit(here, state(here, 2.0), 2.0, based_on_s=0.9).kind == "stale_target"
    assert gate.submit(here, state(here, 2.0), 2.0, based_on_s=float("nan")).kind == "stale_target"


def test_a_time_that_is_still_to_come_shuts_nobody_out():
    gate, here = started()
    verdict = gate.submit(
        here, state(here, 1.0), 1.0, based_on_s=1.7e9
    )  # the time of day, of a clock that counts otherwise
    assert verdict.kind == "stale_target" and "another clock" in verdict.reason
    assert gate.submit(here, state(here, 1.0), 1.0, based_on_s=1.0).accepted


@pytest.mark.parametrize("stopped", [False, True])
def test_an_arm_that_was_moved_while_nobody_looked_is_not_pulled_back(stopped):
    gate, here = started(dataclasses.replace(LIMITS, max_state_age_s=0.25))
    moved = pose(0.5, 0.09, 0.15)
    if stopped:
        gate.stop("arm_error", "not heard of", None, 0.1)
    np.testing.assert_array_equal(gate.target(state(here, 3.0), 3.0), here)  # it is where it was
    for now in (6.0, 6.01):
        np.testing.assert_allclose(gate.target(state(moved, now), now), moved)
    np.testing.assert_allclose(gate.target(state(here, 6.02), 6.02), moved)  # seen to be pushed, it is held against it


def test_silence_ends_in_holding():
    gate, here = started(dataclasses.replace(LIMITS, max_speed=0.01))
    gate.submit(pose(0.52, 0, 0.15), state(here), 0.0)
    for k in range(1, 51):
        moving = gate.target(state(here, k / 100), k / 100)
    assert moving[0] == pytest.approx(0.505)
    held = gate.target(state(here, 0.51), 0.51)
    for k in range(52, 200):
        np.testing.assert_array_equal(gate.target(state(here, k / 100), k / 100), held)
    assert gate.counts == {"watchdog": 1}
    assert gate.submit(pose(0.52, 0, 0.15), state(here, 2.0), 2.0).accepted  # and goes on when somebody speaks again
    assert gate.target(state(here, 2.01), 2.01)[0] > held[0]


def test_a_pause_is_not_made_up_for():
    gate, here = started()
    gate.submit(pose(0.53, 0, 0.15), state(here), 0.0)
    assert gate.target(state(here, 0.4), 0.4)[0] == pytest.approx(0.525)  # a tenth of a second's way, not four


@pytest.mark.parametrize(
    ("measured", "kind"),
    [
        ({"force": (0, 0, 51)}, "force"),
        ({"torque": (21, 0, 0)}, "torque"),
        ({"velocity": (0.7, 0, 0, 0, 0, 0)}, "overspeed"),
        ({"velocity": (0, 0, 0, 0, 3.1, 0)}, "overspeed"),
        ({"error": "cartesian_reflex"}, "arm_error"),
        ({"force": (float("nan"), 0, 0)}, "state"),
    ],
)
def test_what_the_arm_feels_stops_it_until_a_person_clears(measured, kind):
    gate, _ = started()
    gate.submit(pose(0.52, 0, 0.15), state(pose(0.5, 0, 0.15)), 0.0)
    there = pose(0.503, 0, 0.149)
    stop = gate.target(state(there, 0.05, **measured), 0.05)
    np.testing.assert_allclose(stop, there)  # where it is: the springs are relieved
    assert gate.stopped.startswith(kind) and gate.counts[kind] == 1
    well = state(pose(0.504, 0, 0.15), 0.1)
    assert gate.submit(pose(0.5, 0, 0.15), well, 0.1).kind == "stopped"
    np.testing.assert_allclose(gate.target(well, 0.1), there)
    assert "name the person" in gate.clear(" ", well, 0.1)
    assert gate.stopped
    assert gate.clear("Ada", well, 0.1) == "" and not gate.stopped
    assert gate.events[-1].reason.startswith("Ada cleared: " + kind)
    assert gate.submit(pose(0.5, 0, 0.15), well, 0.1).accepted


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        ({"force": (60, 0, 0)}, "more force than its limit"),
        ({"error": "reflex"}, "still reports: reflex"),
        ({"torque": (float("nan"), 0, 0)}, "numbers that are none"),
        ({"time_s": -9.0}, "not heard of"),
    ],
)
def test_nobody_clears_what_still_lasts(measured, reason):
    gate, here = started()
    gate.stop("person", "button", state(here), 0.0)
    assert reason in gate.clear("Ada", state(here, **measured), 0.0)
    assert gate.stopped == "person: button"


def test_the_first_reason_of_a_stop_is_kept_and_all_are_counted():
    gate, here = started()
    gate.stop("force", "bang", state(here), 0.0)
    gate.stop("person", "button", state(pose(0.4, 0, 0.1)), 0.1)
    assert gate.stopped == "force: bang" and gate.counts == {"force": 1, "person": 1}
    np.testing.assert_allclose(gate.target(state(here, 0.1), 0.1), here)


def test_an_arm_that_is_not_heard_of_holds_and_goes_on_when_it_is():
    gate, here = started(dataclasses.replace(LIMITS, max_state_age_s=0.25))
    gate.submit(pose(0.52, 0, 0.15), state(here), 0.0)
    first = gate.target(state(here, 0.01), 0.01)
    for now in (0.3, 0.31, 0.32):
        np.testing.assert_array_equal(gate.target(state(here, 0.01), now), first)
    assert gate.submit(pose(0.52, 0, 0.15), state(here, 0.01), 0.33).kind == "stale_state"
    assert gate.counts["stale_state"] == 2  # once for its beginning, once for the wish
    assert gate.submit(pose(0.52, 0, 0.15), state(here, 0.34), 0.34).accepted
    assert gate.target(state(here, 0.35), 0.35)[0] > first[0]


def test_an_arm_outside_its_box_takes_no_targets():
    gate, _ = started()
    far = pose(0.7, 0, 0.15)
    gate.start(state(far), 0.0)
    verdict = gate.submit(pose(0.5, 0, 0.15), state(far), 0.0)
    assert verdict.kind == "outside" and "0.100 m" in verdict.reason
    np.testing.assert_array_equal(gate.target(state(far, 0.1), 0.1), far)


def test_gains_that_press_too_hard_are_named():
    gate, _ = started()
    assert gate.check_compliance(Compliance()) == ""
    hard = Compliance(translational_clip=(0.03, 0.003, 0.01))
    assert "60.0 N" in gate.check_compliance(hard) and "max_force_n 50" in gate.check_compliance(hard)
    assert "N m" in gate.check_compliance(Compliance(rotational_clip_neg=(0, 0, 0.2)))


def test_the_log_keeps_what_matters():
    gate, here = started()
    gate.stop("force", "bang", state(here), 0.0)
    for k in range(500):
        assert gate.submit(here, state(here, k), k).kind == "stopped"
    assert [event.kind for event in gate.events] == ["force", "stopped"] and gate.num_events == 2
    assert gate.events[-1].time_s == 499 and gate.counts["stopped"] == 500


def test_before_the_start_there_is_no_target():
    gate = SafetyGate(LIMITS)
    with pytest.raises(RuntimeError, match="not started"):
        gate.target(state(pose(0.5, 0, 0.15)), 0.0)


def test_everything_that_is_counted_is_known():
    gate, here = started()
    gate.submit(None, state(here), 0.0)
    gate.submit(pose(9, 9, 9), state(here), 0.0)
    gate.target(state(here, force=(99, 0, 0)), 0.01)
    assert gate.counts.keys() <= set(KINDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box_low": (0.4, 0.2, 0.05)}, "box_low"),
        ({"box_low": (0.4, float("nan"), 0.05)}, "finite"),
        ({"orientation": (1, 1, 0, 0)}, "length 1"),
        ({"max_rotation_rad": (3.1, 0, 0)}, "at most 3.0"),
        ({"max_force_n": 0}, "positive"),
        ({"watchdog_s": float("inf")}, "positive"),
        ({"max_speed": 1.0}, "stop_speed"),
    ],
)
def test_limits_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        SafetyLimits(**{"box_low": (0.4, -0.1, 0.05), "box_high": (0.6, 0.1, 0.25), **change})
