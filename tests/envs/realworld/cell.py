"""What the tests of the robot cell share: a clock that is set, a served arm, SERL's client in ten lines."""

import contextlib
import http.client
import json
import threading

import numpy as np

from rlinf.envs.realworld.safety import SafetyLimits
from rlinf.envs.realworld.server.http_server import RobotServer, Routes
from rlinf.envs.realworld.server.station import Station

# Generous with time: a busy machine must not fail the tests that are not about it.
LIMITS = SafetyLimits(box_low=(0.4, -0.1, 0.05), box_high=(0.6, 0.1, 0.25), max_state_age_s=2.0, max_target_age_s=1.0)
DOWN = (1.0, 0.0, 0.0, 0.0)


class Clock:
    """Time that passes when told to."""

    def __init__(self, now=100.0):
        self.now = now

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def pose(x, y, z, quaternion=DOWN):
    return np.array([x, y, z, *quaternion], float)


@contextlib.contextmanager
def served(arm, limits=LIMITS, cameras=None, token="", operator_token="", control_hz=100.0):
    """An arm behind our server on a free port: yields the station and the address."""
    station = Station(arm, limits, control_hz)
    server = RobotServer(("127.0.0.1", 0), Routes(station, cameras or {}), token, operator_token)
    station.start()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield station, server.url()
    finally:
        server.shutdown()
        server.server_close()
        station.close()


class SerlClient:
    """Asks as SERL's client does: POST, JSON, nobody looks at the status."""

    def __init__(self, url, headers=None, timeout=5):
        host, port = url.removeprefix("http://").split(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self.status = 0

    def post(self, route, body=None, method="POST"):
        data = json.dumps(body).encode() if body is not None else b""
        self._connection.request(method, f"/{route}", data, self._headers)
        answer = self._connection.getresponse()
        self.status, data = answer.status, answer.read()
        kind = answer.getheader("Content-Type")
        return json.loads(data) if kind == "application/json" else data if "text" not in kind else data.decode()

    def move(self, target):
        self.post("clearerr")
        return self.post("pose", {"arr": np.array(target).astype(np.float32).tolist()})

    def close(self):
        self._connection.close()
