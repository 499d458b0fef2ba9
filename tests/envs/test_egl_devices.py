"""Which device MuJoCo draws on: that of the process, whatever EGL's order is."""

import ctypes
import os
import subprocess
import sys

import pytest

from rlinf.envs import egl_devices
from rlinf.envs.egl_devices import CHOICE, EGL_CUDA_DEVICE_NV, choose_device, cuda_numbers, own_gpu

ORDER = [None, 2, 0, 3, 1]
"""CUDA's numbers of EGL's devices on a machine with four GPUs and a software device, as drivers do number them."""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing chosen, and what a test chooses is taken back."""
    for name in (CHOICE, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("visible", "number"),
    [(None, None), ("", None), ("3", 3), (" 2,0", 2), ("GPU-5ed4ab62-c3a1", None), ("-1", None), ("MIG-1", None)],
)
def test_the_own_gpu_is_the_first_that_is_visible(visible, number):
    assert own_gpu(visible) == number


@pytest.mark.parametrize(("visible", "position"), [("0", "2"), ("1", "4"), ("2,3", "1"), ("3", "3")])
def test_the_position_of_the_own_gpu_is_chosen(monkeypatch, visible, position):
    monkeypatch.setattr(egl_devices, "cuda_numbers_of_all", lambda: ORDER)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    choose_device()
    assert os.environ[CHOICE] == position


@pytest.mark.parametrize("numbers", [[], [None], [None, 0]])
def test_nothing_is_chosen_where_egl_does_not_know_the_gpu(monkeypatch, numbers):
    monkeypatch.setattr(egl_devices, "cuda_numbers_of_all", lambda: numbers)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    choose_device()
    assert CHOICE not in os.environ


@pytest.mark.parametrize(("visible", "chosen"), [("1", "7"), (None, None), ("GPU-5ed4ab62", None)])
def test_nobody_is_asked_where_the_user_has_chosen_or_the_gpu_is_not_known(monkeypatch, visible, chosen):
    monkeypatch.setattr(egl_devices, "cuda_numbers_of_all", lambda: pytest.fail("EGL was asked"))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if chosen is not None:
        monkeypatch.setenv(CHOICE, chosen)
    choose_device()
    assert os.environ.get(CHOICE) == chosen


def test_a_process_that_sees_all_gpus_is_asked(monkeypatch):
    """With nothing but the standard library, and without an EGL too."""
    seen = {}

    def run(command, **how):
        seen.update(how["env"])
        return subprocess.CompletedProcess(command, 0, "None 1 0\n", "")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    real = egl_devices.cuda_numbers_of_all()
    assert all(number is None or number >= 0 for number in real)
    monkeypatch.setattr(egl_devices.subprocess, "run", run)
    assert egl_devices.cuda_numbers_of_all() == [None, 1, 0]
    assert "CUDA_VISIBLE_DEVICES" not in seen and seen["PATH"] == os.environ["PATH"]
    monkeypatch.setattr(egl_devices.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "3", ""))
    assert egl_devices.cuda_numbers_of_all() == []


def test_egls_answers_are_read(monkeypatch):
    """An EGL of callbacks: the second device is known to CUDA as 5, the first not at all."""
    integer, pointer = ctypes.c_int, ctypes.c_void_p

    @ctypes.CFUNCTYPE(ctypes.c_uint, integer, ctypes.POINTER(pointer), ctypes.POINTER(integer))
    def devices(most, listed, count):
        listed[0], listed[1], count[0] = 100, 200, 2
        return 1

    @ctypes.CFUNCTYPE(ctypes.c_uint, pointer, integer, ctypes.POINTER(ctypes.c_ssize_t))
    def attribute(device, name, value):
        assert name == EGL_CUDA_DEVICE_NV
        if device == 200:
            value[0] = 5
        return device == 200

    known = {b"eglQueryDevicesEXT": devices, b"eglQueryDeviceAttribEXT": attribute}

    class Library:
        def __init__(self, name):
            self.eglGetProcAddress = self._Address()

        class _Address:
            def __call__(self, name):
                return ctypes.cast(known[name], pointer).value if name in known else None

    monkeypatch.setattr(egl_devices.ctypes, "CDLL", Library)
    assert cuda_numbers() == [None, 5]
    del known[b"eglQueryDeviceAttribEXT"]
    with pytest.raises(OSError, match="EGL has no eglQueryDeviceAttribEXT"):
        cuda_numbers()


def test_the_choice_is_made_before_mujoco_is_imported():
    code = """
import sys
from rlinf.core.errors import MissingDependency
from rlinf.envs import opengl
from rlinf.envs.frankasim import scene
opengl.choose_device = lambda: print("chosen", "mujoco" in sys.modules)
try:
    scene.import_mujoco()
    scene.import_mujoco()
except MissingDependency:  # there is no MuJoCo or no EGL
    pass
"""
    environment = os.environ | {"MUJOCO_GL": "egl"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert done.stdout.splitlines()[0] == "chosen False" and "chosen True" not in done.stdout, done.stderr


def test_processes_of_a_run_draw_on_the_gpus_of_their_placement(ray_machine):
    from rlinf.runtime.ray_backend import RayRuntime, Seat

    seats = [Seat(f"env {i}", ray_machine.node_id, "127.0.0.1", devices=(3 - i,)) for i in range(2)]
    runtime = RayRuntime(seats)
    group = runtime.group("env", [dict, dict], [0, 1])
    assert group.run(_choice).wait(60) == [("3", "3"), ("2", "1")]
    runtime.close()


def _choice(worker):
    egl_devices.cuda_numbers_of_all = lambda: ORDER
    choose_device()
    return os.environ["CUDA_VISIBLE_DEVICES"], os.environ[CHOICE]
