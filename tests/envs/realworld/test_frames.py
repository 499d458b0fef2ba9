"""Poses and rotations by hand, and against scipy's Rotation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from rlinf.envs.realworld import frames

NUMBER = st.floats(-4, 4)
VECTOR = st.tuples(NUMBER, NUMBER, NUMBER).map(np.array)
QUATERNION = st.tuples(*[st.floats(-1, 1)] * 4).map(np.array).filter(lambda q: np.linalg.norm(q) > 0.1)
QUATERNION = QUATERNION.map(lambda q: q / np.linalg.norm(q))
POSE = st.tuples(VECTOR, QUATERNION).map(np.concatenate)
TOOL_DOWN = np.array([1.0, 0, 0, 0])


def same_turn(a, b):
    return min(np.abs(a - b).max(), np.abs(a + b).max()) < 1e-7


def four_by_four(pose):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Rotation.from_quat(pose[3:]).as_matrix(), pose[:3]
    return matrix


# ---- rotations against scipy


@given(QUATERNION, QUATERNION)
def test_products_and_inverses(a, b):
    product = frames.multiply(a, b)
    assert same_turn(product, (Rotation.from_quat(a) * Rotation.from_quat(b)).as_quat())
    assert same_turn(frames.multiply(a, frames.conjugate(a)), np.array([0, 0, 0, 1.0]))


@given(QUATERNION)
def test_matrices_vectors_and_euler_angles(q):
    oracle = Rotation.from_quat(q)
    np.testing.assert_allclose(frames.matrix_from_quaternion(q), oracle.as_matrix(), atol=1e-12)
    assert same_turn(frames.quaternion_from_matrix(oracle.as_matrix()), q)
    vector = frames.rotation_vector(q)
    assert np.linalg.norm(vector) <= np.pi + 1e-9
    assert same_turn(frames.quaternion_from_rotation_vector(vector), q)
    assert same_turn(frames.quaternion_from_euler(frames.euler_from_quaternion(q)), q)


@given(VECTOR)
def test_from_vectors_and_from_euler_angles(v):
    assert same_turn(frames.quaternion_from_rotation_vector(v), Rotation.from_rotvec(v).as_quat())
    assert same_turn(frames.quaternion_from_euler(v), Rotation.from_euler("xyz", v).as_quat())


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-6, np.pi - 1e-9, np.pi])
def test_smallest_and_largest_angles(angle):
    for axis in np.eye(3):
        q = frames.quaternion_from_rotation_vector(axis * angle)
        np.testing.assert_allclose(frames.rotation_vector(q), axis * angle, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2])
def test_euler_angles_at_the_pole(pitch):
    q = Rotation.from_euler("xyz", [0.3, pitch, 0.2]).as_quat()
    angles = frames.euler_from_quaternion(q)
    assert angles[2] == 0 and same_turn(frames.quaternion_from_euler(angles), q)


def test_a_tool_that_points_down_is_half_a_turn_about_x():
    np.testing.assert_allclose(frames.euler_from_quaternion(TOOL_DOWN), [np.pi, 0, 0], atol=1e-12)
    np.testing.assert_allclose(frames.matrix_from_quaternion(TOOL_DOWN), np.diag([1, -1, -1]), atol=1e-12)


def test_no_rotation_at_all():
    with pytest.raises(ValueError, match="is no rotation"):
        frames.normalized(np.zeros(4))
    with pytest.raises(ValueError, match="is no rotation"):
        frames.normalized(np.full(4, np.nan))


# ---- poses


@given(POSE, POSE)
def test_poses_compose_as_matrices_do(a, b):
    np.testing.assert_allclose(four_by_four(frames.compose(a, b)), four_by_four(a) @ four_by_four(b), atol=1e-9)
    np.testing.assert_allclose(four_by_four(frames.inverse(a)), np.linalg.inv(four_by_four(a)), atol=1e-9)
    back = frames.compose(a, frames.relative_pose(b, a))
    np.testing.assert_allclose(four_by_four(back), four_by_four(b), atol=1e-9)


def test_a_pose_by_hand():
    # The tool points down at (0.5, 0, 0.3). A point 0.1 ahead of it along its own z is 0.1 below it.
    tool = np.array([0.5, 0, 0.3, *TOOL_DOWN])
    ahead = frames.compose(tool, np.array([0, 0, 0.1, 0, 0, 0, 1]))
    np.testing.assert_allclose(ahead, [0.5, 0, 0.2, *TOOL_DOWN], atol=1e-12)
    np.testing.assert_allclose(frames.relative_pose(ahead, tool), [0, 0, 0.1, 0, 0, 0, 1], atol=1e-12)


@given(QUATERNION, QUATERNION, st.floats(0, 1))
def test_interpolated_turns_are_the_shortest(a, b, fraction):
    whole = frames.angle_between(a, b)
    assert frames.angle_between(a, frames.slerp(a, b, fraction)) == pytest.approx(fraction * whole, abs=1e-6)
    assert frames.angle_between(frames.slerp(a, b, fraction), b) == pytest.approx((1 - fraction) * whole, abs=1e-6)


# ---- twists


@given(POSE, POSE, st.tuples(VECTOR, VECTOR).map(np.concatenate))
def test_adjoints_compose(a, b, twist):
    np.testing.assert_allclose(
        frames.adjoint(frames.compose(a, b)) @ twist, frames.adjoint(a) @ frames.adjoint(b) @ twist, atol=1e-8
    )


def test_adjoint_moves_the_point_and_the_axes_alone_do_not():
    # A tool one metre away along x that turns about z, without going anywhere: seen as a spatial twist, the point at
    # the base's origin moves by −y; the tool's own point stands still.
    pose = np.array([1.0, 0, 0, 0, 0, 0, 1])
    turning = np.array([0.0, 0, 0, 0, 0, 1])
    np.testing.assert_allclose(frames.adjoint(pose) @ turning, [0, -1, 0, 0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(frames.in_base_axes(turning, pose), turning, atol=1e-12)


@given(POSE, VECTOR)
def test_a_translation_of_the_tool_stays_one(pose, way):
    motion = frames.in_base_axes(np.concatenate((way, np.zeros(3))), pose)
    np.testing.assert_array_equal(motion[3:], 0)
    after = frames.moved(pose, motion)
    relative = frames.relative_pose(after, pose)
    np.testing.assert_allclose(relative[:3], way, atol=1e-9)
    assert same_turn(relative[3:], np.array([0, 0, 0, 1.0]))


@given(POSE, VECTOR)
def test_a_turn_of_the_tool_is_about_its_own_point_and_axes(pose, turn):
    after = frames.moved(pose, frames.in_base_axes(np.concatenate((np.zeros(3), turn)), pose))
    relative = frames.relative_pose(after, pose)
    np.testing.assert_allclose(relative[:3], 0, atol=1e-9)
    assert same_turn(relative[3:], Rotation.from_rotvec(turn).as_quat())


@given(POSE, st.tuples(VECTOR, VECTOR).map(np.concatenate))
def test_tool_axes_undo_base_axes(pose, twist):
    np.testing.assert_allclose(frames.in_tool_axes(frames.in_base_axes(twist, pose), pose), twist, atol=1e-9)
