"""`python -m rlinf robot_server`: an arm over HTTP. Loads nothing that the robot's computer lacks."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rlinf.envs.realworld.server.run import serve
from rlinf.envs.realworld.settings import read_cell


def run(chosen: argparse.Namespace) -> int:
    """Serve as `options.add_robot_server_options` says. Returns the exit code. Raises RlinfError."""
    arm = {"host": chosen.robot_ip} if chosen.robot_ip else {}
    cell = read_cell(Path(chosen.config) if chosen.config else None, chosen.driver, arm)
    if chosen.park:
        cell = dataclasses.replace(cell, park=True)
    return serve(cell, chosen.host, chosen.port, verbose=chosen.verbose)
