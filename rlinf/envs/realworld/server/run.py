"""What `python -m rlinf robot_server` does: builds the cell, serves it, and leaves the arm held or parked."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import Any

from rlinf.core.errors import ConfigError
from rlinf.envs.realworld.arm import Arm
from rlinf.envs.realworld.cameras.camera import Camera
from rlinf.envs.realworld.server.http_server import RobotServer, Routes
from rlinf.envs.realworld.server.station import Station
from rlinf.envs.realworld.settings import CAMERAS, CameraSettings, CellSettings, construct, make_arm

LOG = logging.getLogger("rlinf.robot_server")
TOKEN, OPERATOR_TOKEN = "RLINF_ROBOT_TOKEN", "RLINF_OPERATOR_TOKEN"
"""Environment variables with the tokens: what stands on a command line, others on the machine can read."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
FIRST_PICTURE_S = 5.0


def serve(cell: CellSettings, host: str, port: int, *, verbose: bool = False) -> int:
    """Serve until SIGTERM, SIGINT or the end of the control loop. Returns 0, or 1 if the loop crashed.

    Raises:
        ConfigError: the port is taken.
        ArmError, CameraError, MissingDependency: the cell is not all there.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    token, operator_token = os.environ.get(TOKEN, ""), os.environ.get(OPERATOR_TOKEN, "")
    arm = make_arm(cell.driver, cell.arm)
    station = Station(arm, cell.safety, cell.control_hz)
    cameras: dict[str, Camera] = {}
    server: RobotServer | None = None
    serving: threading.Thread | None = None
    opened = False
    ended = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: ended.set())
    try:
        cameras = {name: make_camera(name, settings, arm) for name, settings in cell.cameras.items()}
        routes = Routes(station, cameras)
        try:
            server = RobotServer((host, port), routes, token, operator_token)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
        opened = True
        station.start()
        for camera in cameras.values():
            camera.start()
            camera.newest(FIRST_PICTURE_S)
        serving = threading.Thread(target=server.serve_forever, args=(0.1,), name="http", daemon=True)
        serving.start()
        if host not in LOOPBACK and not token:
            LOG.warning("everybody who reaches %s can move this arm: set %s", server.url(), TOKEN)
        if station.is_well():
            LOG.warning("the arm takes no targets: %s", station.is_well())
        print(f"robot server ready: {server.url()} driver {cell.driver}", flush=True)
        while not ended.wait(0.2) and not station.crashed:
            pass
        return 1 if station.crashed else 0
    finally:
        if server is not None:
            if serving is not None:
                server.shutdown()
            server.server_close()
        if opened:  # before the cameras, which may be stuck
            print(f"robot server ended: arm {station.close(park=cell.park)}", flush=True)
        for camera in cameras.values():
            camera.close()


def make_camera(name: str, settings: CameraSettings, arm: Arm) -> Camera:
    """A camera that is not yet started. Raises ConfigError for options that its driver does not know."""
    options: dict[str, Any] = dict(settings.options)
    if settings.driver == "twin":
        from rlinf.envs.realworld.arms.twin import TwinArm

        if not isinstance(arm, TwinArm):
            raise ConfigError(f"cameras.{name}: only driver twin has cameras of the twin")
        options["twin"] = arm
    source = construct(settings.driver, CAMERAS[settings.driver], options, f"cameras.{name}.options")
    return Camera(
        name,
        source,
        crop=settings.crop,
        size=settings.size,
        stale_s=settings.stale_s,
        retries=settings.retries,
        retry_s=settings.retry_s,
    )
