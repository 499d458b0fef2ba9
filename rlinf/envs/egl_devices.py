"""Which of EGL's devices is the GPU that a process was given.

CUDA shows a process the GPUs in CUDA_VISIBLE_DEVICES; EGL shows all of the machine, in an order of its own, and draws
on the first. NVIDIA's EGL tells the number under which CUDA knows a device (extension EGL_NV_device_cuda), with some
drivers counted among the visible ones alone. So a process that sees all is asked: this file, as a program.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import subprocess
import sys
from collections.abc import Callable

EGL_CUDA_DEVICE_NV = 0x323A
MOST_DEVICES = 64
ASK_TIMEOUT_S = 60.0
CHOICE = "MUJOCO_EGL_DEVICE_ID"
"""What MuJoCo looks at, a position in EGL's list."""


def choose_device() -> None:
    """Let MuJoCo draw on the GPU of this process, where it is known which that is and the user has not chosen.

    Before MuJoCo is imported. What this process starts inherits the choice.
    """
    if CHOICE in os.environ or (number := own_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"))) is None:
        return
    numbers = cuda_numbers_of_all()
    if number in numbers:
        os.environ[CHOICE] = str(numbers.index(number))


def own_gpu(visible: str | None) -> int | None:
    """Number, among all GPUs of the machine, of the first one in CUDA_VISIBLE_DEVICES.

    None where nothing is said, or by a UUID.
    """
    first = (visible or "").split(",")[0].strip()
    return int(first) if first.isdecimal() else None


def cuda_numbers_of_all() -> list[int | None]:
    """CUDA's number of each of EGL's devices, None for those that CUDA does not know; nothing where EGL fails."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__], capture_output=True, text=True, timeout=ASK_TIMEOUT_S, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    words = done.stdout.split() if done.returncode == 0 else []
    return [int(word) if word.isdecimal() else None for word in words]


def cuda_numbers() -> list[int | None]:
    """As `cuda_numbers_of_all`, as this process sees it. Raises OSError, AttributeError where there is no such EGL."""
    egl = ctypes.CDLL(ctypes.util.find_library("EGL") or "libEGL.so.1")
    egl.eglGetProcAddress.restype, egl.eglGetProcAddress.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    pointer, boolean, integer = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int

    def function(name: str, *arguments: type) -> Callable[..., int]:
        if not (address := egl.eglGetProcAddress(name.encode())):
            raise OSError(f"EGL has no {name}")
        return ctypes.CFUNCTYPE(boolean, *arguments)(address)

    query_devices = function("eglQueryDevicesEXT", integer, ctypes.POINTER(pointer), ctypes.POINTER(integer))
    query_attribute = function("eglQueryDeviceAttribEXT", pointer, integer, ctypes.POINTER(ctypes.c_ssize_t))
    devices, count, number = (pointer * MOST_DEVICES)(), integer(), ctypes.c_ssize_t()
    if not query_devices(MOST_DEVICES, devices, ctypes.byref(count)):
        return []
    known = [
        (bool(query_attribute(device, EGL_CUDA_DEVICE_NV, ctypes.byref(number))), number.value)
        for device in devices[: count.value]
    ]
    return [value if found and value >= 0 else None for found, value in known]


if __name__ == "__main__":
    print(*cuda_numbers())
