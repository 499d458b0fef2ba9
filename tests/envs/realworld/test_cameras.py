"""Newest picture, crop, scale; and cameras that freeze, die and come back."""

import time

import numpy as np
import pytest

from rlinf.core.errors import MissingDependency
from rlinf.envs.realworld.arms.fake import FakeArm
from rlinf.envs.realworld.cameras.camera import Camera, CameraError, cropped, scaled
from rlinf.envs.realworld.cameras.fake import FakeSource
from rlinf.envs.realworld.cameras.http import HttpSource
from rlinf.envs.realworld.cameras.opencv import OpencvSource
from rlinf.envs.realworld.cameras.realsense import RealsenseSource
from tests.envs.realworld.cell import served


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


@pytest.fixture
def make():
    cameras = []

    def build(source, **options):
        camera = Camera("wrist", source, **{"stale_s": 0.15, "retry_s": 0.02, "retries": 3, **options})
        cameras.append(camera)
        camera.start()
        return camera

    yield build
    for camera in cameras:
        camera.close()


def small(**options):
    return FakeSource(**{"height": 48, "width": 64, "fps": 100, **options})


# ---- pictures


def test_without_a_crop_the_middle_square_is_taken():
    picture = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    np.testing.assert_array_equal(cropped(picture, None), picture[:, 2:6])
    np.testing.assert_array_equal(cropped(picture.transpose(1, 0, 2), None), picture.transpose(1, 0, 2)[2:6])
    np.testing.assert_array_equal(cropped(picture, (0.25, 0.5, 0.75, 1)), picture[1:3, 4:8])


@pytest.mark.parametrize("crop", [(0, 0, 1), (0.5, 0, 0.5, 1), (0, -0.1, 1, 1), (0, 0, 1, 1.1)])
def test_a_crop_that_is_none(crop):
    with pytest.raises(CameraError, match="top, left, bottom, right"):
        Camera("wrist", small(), crop=crop)


@pytest.mark.parametrize("size", [(480, 480, 128, 128), (48, 64, 20, 30), (16, 16, 16, 16), (48, 48, 12, 24)])
def test_scaling_averages_over_areas_as_opencv_does(size):
    cv2 = pytest.importorskip("cv2")
    height, width, new_height, new_width = size
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    small_picture = scaled(picture, new_height, new_width)
    oracle = cv2.resize(picture, (new_width, new_height), interpolation=cv2.INTER_AREA)
    assert small_picture.dtype == np.uint8
    assert np.abs(small_picture.astype(int) - oracle).max() <= 1


@pytest.mark.parametrize("size", [(128, 128), (20, 30), (1, 1), (700, 900)])
def test_white_stays_white(size):
    np.testing.assert_array_equal(scaled(np.full((480, 480, 3), 255, np.uint8), *size), np.full((*size, 3), 255))


def test_scaling_by_hand():
    picture = np.array([[[0], [100], [200]]], np.uint8).repeat(3, 2)
    np.testing.assert_array_equal(scaled(picture, 1, 2)[0, :, 0], [33, 167])  # (0 + 100/2)/1.5, (100/2 + 200)/1.5


# ---- time


def test_the_newest_picture_with_its_time(make):
    camera = make(small(), size=(32, 32))
    first = camera.newest(1.0)
    assert first.image.shape == (32, 32, 3) and first.image.dtype == np.uint8
    assert abs(time.monotonic() - first.time_s) < 0.15
    wait_until(lambda: camera.newest(1.0).number > first.number + 3)
    assert camera.newest().time_s > first.time_s


def test_a_frozen_camera_becomes_stale_and_comes_back_alone(make):
    source, other = small(), small()
    camera, neighbour = make(source), make(other)
    camera.newest(1.0), neighbour.newest(1.0)
    source.frozen = True
    wait_until(lambda: _complaint(camera))
    assert "picture is 0." in _complaint(camera)
    neighbour.newest(0.5)
    assert other.opened == 1 and neighbour.restarts == 0
    wait_until(lambda: camera.restarts >= 1)
    source.frozen = False
    camera.newest(3.0)
    assert source.opened >= 2 and other.opened == 1


def test_a_dead_camera_is_given_up_after_some_attempts(make):
    source = small()
    camera = make(source, retries=3)
    camera.newest(1.0)
    source.dead = True
    wait_until(lambda: "given up" in _complaint(camera))
    assert "after 3 attempts" in _complaint(camera) and "dead" in _complaint(camera)
    assert camera.restarts == 3 and source.opened == 1
    started = time.monotonic()
    with pytest.raises(CameraError):
        camera.newest(5.0)
    assert time.monotonic() - started < 1.0  # nobody waits for what will not come


def test_a_picture_in_between_forgives_the_failures(make):
    source = small()
    camera = make(source, retries=4, retry_s=0.05)
    for _ in range(3):
        camera.newest(1.0)
        before = camera.restarts
        source.dead = True
        wait_until(lambda before=before: camera.restarts > before)
        source.dead = False
        camera.newest(2.0)
    assert "given up" not in _complaint(camera)


def _complaint(camera):
    try:
        camera.newest()
    except CameraError as error:
        return str(error)
    return ""


def test_what_a_library_throws_is_a_failure_like_others(make):
    """A thread that ended by it would leave a camera that nobody opens again."""
    source = small()
    camera = make(source, retries=4, retry_s=0.05)
    camera.newest(1.0)
    read = source.read
    source.read = lambda: np.zeros((4, 4), np.uint8)  # without colours
    wait_until(lambda: camera.restarts >= 1 and "Error: " in _complaint(camera))
    source.read = read
    camera.newest(3.0)


def test_a_camera_that_does_not_open_is_said_at_once(make):
    source = small()
    source.dead = True
    with pytest.raises(CameraError, match="dead"):
        make(source)


# ---- drivers


def test_opencv_reads_files_and_puts_red_first(tmp_path, make):
    cv2 = pytest.importorskip("cv2")
    for k in range(5):
        cv2.imwrite(str(tmp_path / f"{k}.png"), np.full((48, 64, 3), (0, 0, 200), np.uint8))  # blue, green, red
    source = OpencvSource(str(tmp_path / "%d.png"))
    source.open()
    np.testing.assert_array_equal(source.read()[0, 0], [200, 0, 0])
    for _ in range(4):
        source.read()
    with pytest.raises(CameraError, match="gave no picture"):
        source.read()
    source.close()
    source.close()


def test_opencv_says_which_device_does_not_open():
    with pytest.raises(CameraError, match=r"/dev/video99 does not open; see `v4l2-ctl"):
        OpencvSource("/dev/video99").open()


@pytest.mark.parametrize(
    ("source", "module", "command"),
    [(OpencvSource("0"), "cv2", "opencv-python-headless"), (RealsenseSource(), "pyrealsense2", "pyrealsense2")],
)
def test_a_missing_library_of_a_camera_is_named_with_its_command(source, module, command, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingDependency, match=f"run `pip install {command}`"):
        source.open()


def test_pictures_over_http_are_the_servers_own(make):
    camera = make(small(), size=(40, 50))
    camera.newest(1.0)
    with served(FakeArm(), cameras={"wrist": camera}) as (_, url):
        remote = make(HttpSource(url, "wrist", fps=50), size=(40, 50), crop=(0, 0, 1, 1))
        seen = remote.newest(2.0).image
        assert seen.shape == (40, 50, 3) and seen.max() > 150
        camera.close()
        wait_until(lambda: "no picture" in _complaint(remote) or "given up" in _complaint(remote))
    other = HttpSource(url, "wrist")
    other.open()
    with pytest.raises(CameraError, match="is the robot server running"):
        other.read()


@pytest.mark.sim
def test_the_twins_cameras_see_the_tool_move():
    from rlinf.envs.realworld.arms.twin import TwinArm
    from rlinf.envs.realworld.cameras.twin import TwinSource

    twin = TwinArm(realtime=False)
    cameras = {
        view: Camera(view, TwinSource(twin, view, rendering="cheap"), size=(64, 64)) for view in ("wrist", "front")
    }
    pictures = []
    for height in (0.15, 0.22):
        twin.restart(np.array([0.5, 0, height, 1, 0, 0, 0]))
        for camera in cameras.values():
            camera.start()
            pictures.append(camera.newest().image)
            assert pictures[-1].shape == (64, 64, 3) and pictures[-1].std() > 5
    for before, after in ((0, 2), (1, 3)):
        assert np.abs(pictures[before].astype(int) - pictures[after]).mean() > 1
    with pytest.raises(CameraError, match="has no view back"):
        TwinSource(twin, "back")
    twin.close()
