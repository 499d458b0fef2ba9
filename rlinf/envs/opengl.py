"""MuJoCo and the OpenGL that it draws with, where no display is."""

from __future__ import annotations

import ctypes.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from rlinf.core.errors import MissingDependency
from rlinf.envs.egl_devices import choose_device

EGL_COMMAND = "sudo apt-get install --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri"
SOFTWARE_RENDERERS = ("llvmpipe", "softpipe", "swrast", "software")


def import_mujoco(install_command: str) -> Any:
    """The module `mujoco`, which draws through EGL, on this process's GPU, unless the user chose.

    Raises MissingDependency without it.
    """
    # With MUJOCO_GL=egl and no EGL even the import fails, which state observations need not suffer.
    if sys.platform == "linux" and "mujoco" not in sys.modules and ctypes.util.find_library("EGL") is not None:
        os.environ.setdefault("MUJOCO_GL", "egl")
    if os.environ.get("MUJOCO_GL", "").lower() == "egl" and "mujoco" not in sys.modules:
        choose_device()
    try:
        import mujoco
    except ImportError as error:
        raise MissingDependency(f"MuJoCo cannot be imported ({error}); run `{install_command}`") from error
    return mujoco


def open_context(width: int, height: int, otherwise: str = "") -> Any:
    """MuJoCo's OpenGL context of the kind that MUJOCO_GL names, current in this thread.

    Args:
        width, height: of its surface, in pixels.
        otherwise: what the user may do instead, for the message.

    Raises:
        MissingDependency: there is none.
    """
    import mujoco

    kind = os.environ.get("MUJOCO_GL", "")
    try:
        context = mujoco.GLContext(width, height)
        context.make_current()
        renderer_name()
        return context
    except Exception as error:  # whichever of OpenGL's, GLFW's or ctypes' own it is
        chosen = f"MUJOCO_GL={kind}" if kind else "MUJOCO_GL was not set when mujoco was imported"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MissingDependency(
            f"no OpenGL to draw pictures with ({chosen}; {reason}): run `{EGL_COMMAND}`"
            + (f", or {otherwise}" if otherwise else "")
        ) from error


def renderer_name() -> str:
    """What draws in the current context, as OpenGL calls it. Raises RuntimeError where none is."""
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER)
    if name is None:
        raise RuntimeError("no OpenGL context is current")
    return name.decode() if isinstance(name, bytes) else str(name)


def draws_in_software() -> bool:
    """Whether the processor draws in the current context, not a GPU."""
    return any(name in renderer_name().lower() for name in SOFTWARE_RENDERERS)


def release_context() -> None:
    """Make no context current in this thread, so that another thread may use it."""
    if os.environ.get("MUJOCO_GL", "").lower() == "egl":
        from mujoco import egl

        nothing = egl.EGL.EGL_NO_SURFACE
        egl.EGL.eglMakeCurrent(egl.EGL_DISPLAY, nothing, nothing, egl.EGL.EGL_NO_CONTEXT)


def free_context(context: Any, buffers: Sequence[Any]) -> None:
    """Free first what the context holds (`MjrContext`s): freed later, it would tear holes into another context."""
    context.make_current()
    for held in buffers:
        held.free()
    release_context()
    context.free()
