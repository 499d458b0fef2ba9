"""SERL's routes over HTTP, with the standard library.

All routes take POST; those that only look take GET as well. Bodies are JSON.

    /getstate /getpos /getpos_euler /getvel /getforce /gettorque /getq /getdq /getjacobian /get_gripper
    /pose {"arr": [7], "based_on_s": …}   /jointreset   /startimp   /stopimp   /clearerr   /update_param {…}
    /open_gripper /close_gripper /close_gripper_slow /move_gripper {"gripper_pos": 0 … 255}
    /activate_gripper /reset_gripper /set_load

and ours: /safety, /stop {"reason": …}, /recover {"person": …}, /cameras, /camera/NAME (?format=png, raw).

Differs from SERL's server: a wish that the safety gate refuses is answered 409 with the reason; `/clearerr`, which
SERL's client sends before every target, clears nothing: while the arm is stopped or in error it is answered 409, and
a person uses `/recover`. `gripper_pos` is 0 … 1.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rlinf.core.errors import RlinfError
from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import ArmState
from rlinf.envs.realworld.cameras.camera import Camera, CameraError
from rlinf.envs.realworld.server.png import encode_png
from rlinf.envs.realworld.server.station import Busy, Station

LOG = logging.getLogger("rlinf.robot_server")
MAX_BODY_BYTES = 64 << 10
IDLE_S = 60.0
"""A connection without a request for so long is closed."""
FULL_GRIPPER = 255


class BadRequest(RlinfError):
    """The request is not what the route takes."""


class Routes:
    """What every route does, apart from HTTP: `call` takes a route and a body and returns what to answer.

    Args:
        station: the arm.
        cameras: by name, running.
    """

    def __init__(self, station: Station, cameras: Mapping[str, Camera]) -> None:
        self._station, self._cameras = station, cameras
        self.looking: dict[str, Callable[[], Any]] = {
            "getstate": self._state,
            "getpos": lambda: {"pose": station.state().pose.tolist()},
            "getpos_euler": lambda: {"pose": _pose_euler(station.state())},
            "getvel": lambda: {"vel": station.state().velocity.tolist()},
            "getforce": lambda: {"force": station.state().force_n.tolist()},
            "gettorque": lambda: {"torque": station.state().torque_nm.tolist()},
            "getq": lambda: {"q": station.state().q.tolist()},
            "getdq": lambda: {"dq": station.state().dq.tolist()},
            "getjacobian": lambda: {"jacobian": station.state().jacobian.tolist()},
            "get_gripper": lambda: {"gripper": station.state().gripper},
            "safety": station.report,
            "cameras": lambda: {"cameras": sorted(self._cameras)},
        }
        self.acting: dict[str, Callable[[dict[str, Any]], Any]] = {
            "pose": self._pose,
            "update_param": self._update_param,
            "jointreset": _doing(station.joint_reset, "Reset Joint"),
            "startimp": lambda body: self._clear_error("Started impedance"),
            "stopimp": _doing(lambda: station.stop("person", "stopped by /stopimp"), "Stopped impedance"),
            "clearerr": lambda body: self._clear_error("Clear"),
            "open_gripper": _doing(lambda: station.move_gripper(1.0), "Opened"),
            "close_gripper": _doing(lambda: station.move_gripper(0.0), "Closed"),
            "close_gripper_slow": _doing(lambda: station.move_gripper(0.0), "Closed"),
            "move_gripper": self._move_gripper,
            "activate_gripper": lambda body: "Activated",
            "reset_gripper": lambda body: "Reset",
            "set_load": lambda body: self._unsupported("set_load", "set the load in the robot's own settings"),
            "stop": self._stop,
            "recover": self._recover,
        }

    def camera(self, name: str) -> Camera:
        """Raises BadRequest for a name that is none."""
        if name not in self._cameras:
            raise BadRequest(f"no camera {name}; there are: {', '.join(sorted(self._cameras)) or 'none'}")
        return self._cameras[name]

    def _state(self) -> dict[str, Any]:
        state, report = self._station.state(), self._station.is_well()
        return {
            "pose": state.pose.tolist(),
            "vel": state.velocity.tolist(),
            "force": state.force_n.tolist(),
            "torque": state.torque_nm.tolist(),
            "q": state.q.tolist(),
            "dq": state.dq.tolist(),
            "jacobian": state.jacobian.tolist(),
            "gripper_pos": state.gripper,
            "time_s": state.time_s,
            "age_s": self._station.age_s(state),
            "error": report,
        }

    def _pose(self, body: dict[str, Any]) -> Any:
        if "arr" not in body:
            raise BadRequest('give the target: {"arr": [x, y, z, qx, qy, qz, qw]}')
        based_on = body.get("based_on_s")
        try:
            based_on = None if based_on is None else float(based_on)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadRequest("based_on_s is the time_s of the state that the target was chosen on") from error
        verdict = self._station.submit(body["arr"], based_on)
        if not verdict.accepted:
            raise Busy(verdict.reason)
        return "Moved"

    def _update_param(self, body: dict[str, Any]) -> str:
        self._station.update_compliance(body)
        return "Updated compliance parameters"

    def _move_gripper(self, body: dict[str, Any]) -> str:
        try:
            opening = float(body["gripper_pos"]) / FULL_GRIPPER
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadRequest('give the opening: {"gripper_pos": 0 … 255}') from error
        if not 0 <= opening <= 1:
            raise BadRequest("gripper_pos must lie between 0 and 255")
        self._station.move_gripper(opening)
        return "Moved Gripper"

    def _clear_error(self, answer: str) -> str:
        problem = self._station.is_well()
        if problem:
            raise Busy(f'{problem}. A person looks at the arm, then: POST /recover {{"person": "NAME"}}')
        return answer

    def _stop(self, body: dict[str, Any]) -> str:
        self._station.stop("person", str(body.get("reason", "stopped by /stop"))[:200])
        return "Stopped"

    def _recover(self, body: dict[str, Any]) -> str:
        self._station.recover(str(body.get("person", "")))
        return "Recovered"

    def _unsupported(self, route: str, remedy: str) -> str:
        raise BadRequest(f"{route} is not supported: {remedy}")


def _doing(act: Callable[[], None], answer: str) -> Callable[[dict[str, Any]], str]:
    """A route that acts, whatever the body, and then answers."""

    def route(body: dict[str, Any]) -> str:
        act()
        return answer

    return route


class RobotServer(ThreadingHTTPServer):
    """Listens; each connection has a thread.

    Args:
        address: host and port; port 0 takes a free one.
        routes: what to answer.
        token: that every request must carry as `Authorization: Bearer …`; empty for none.
        operator_token: that `/recover` must carry instead; empty: the same token.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], routes: Routes, token: str = "", operator_token: str = "") -> None:
        self.routes, self.token, self.operator_token = routes, token, operator_token
        self._open: set[Any] = set()
        self._open_lock = threading.Lock()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread; remembered, so that `server_close` can end it."""
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Stop listening, and end every connection: nobody moves an arm that is being let go of."""
        super().server_close()
        with self._open_lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):  # it ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else small answers wait 40 ms for an acknowledgement
    timeout = IDLE_S
    server: RobotServer

    def log_message(self, format: str, *args: Any) -> None:  # the base class calls it so
        LOG.debug(format, *args)

    def do_POST(self) -> None:
        self._answer(may_act=True)

    def do_GET(self) -> None:
        self._answer(may_act=False)

    def _answer(self, *, may_act: bool) -> None:
        place = urlsplit(self.path)
        route = place.path.strip("/")
        try:
            body = self._body()  # read in any case: what is left over would be taken for the next request
            self._check_sender(route)
            if route.startswith("camera/"):
                self._send_picture(route[len("camera/") :], parse_qs(place.query))
            else:
                self._send(HTTPStatus.OK, self._call(route, body, may_act))
        except _Refused as error:
            self._send(error.status, {"error": str(error)})
        except BadRequest as error:
            self._send(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except CameraError as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(error)})
        except RlinfError as error:  # the gate, the arm
            self._send(HTTPStatus.CONFLICT, {"error": str(error)})
        except OSError:  # the client is gone
            raise
        except Exception as error:  # of a driver's library; a client without an answer would blame the network
            LOG.exception("/%s", route)
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"/{route}: {type(error).__name__}: {error}"})

    def _call(self, route: str, body: dict[str, Any], may_act: bool) -> Any:
        routes = self.server.routes
        if route in routes.looking:
            return routes.looking[route]()
        if route not in routes.acting:
            known = [*routes.looking, *routes.acting]
            near = get_close_matches(route, known, 1)
            raise _Refused(HTTPStatus.NOT_FOUND, f"no route /{route}" + (f"; did you mean /{near[0]}?" if near else ""))
        if not may_act:
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"/{route} moves the robot: use POST")
        return routes.acting[route](body)

    def _check_sender(self, route: str) -> None:
        """Raises unless the request may be served: a token, and no web page behind it."""
        if self.headers.get("Origin"):
            # Browsers add it when a page of somebody else's posts to this address.
            raise _Refused(HTTPStatus.FORBIDDEN, "requests of web pages are refused")
        wanted = self.server.token
        if route == "recover" and self.server.operator_token:
            wanted = self.server.operator_token
        given = self.headers.get("Authorization", "")
        if wanted and not hmac.compare_digest(given.encode(), f"Bearer {wanted}".encode()):
            who = "the operator's token" if wanted is self.server.operator_token else "the token"
            raise _Refused(HTTPStatus.UNAUTHORIZED, f"this server wants {who}: Authorization: Bearer TOKEN")

    def _body(self) -> dict[str, Any]:
        try:
            length = int(self.headers.get("Content-Length") or 0)
        except ValueError:
            length = -1
        if not 0 <= length <= MAX_BODY_BYTES or self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            raise BadRequest(f"a body has a Content-Length of at most {MAX_BODY_BYTES}")
        data = self.rfile.read(length)
        if not data:
            return {}
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise BadRequest("the body must be a JSON object")
        return body

    def _send_picture(self, name: str, query: dict[str, list[str]]) -> None:
        frame = self.server.routes.camera(name).newest()
        height, width = frame.image.shape[:2]
        headers = {"X-Height": str(height), "X-Width": str(width), "X-Number": str(frame.number)}
        if query.get("format") == ["raw"]:
            self._send_bytes(HTTPStatus.OK, "application/octet-stream", frame.image.tobytes(), headers)
        else:
            self._send_bytes(HTTPStatus.OK, "image/png", encode_png(frame.image), headers)

    def _send(self, status: HTTPStatus, answer: Any) -> None:
        if isinstance(answer, str):
            self._send_bytes(status, "text/plain; charset=utf-8", answer.encode())
        else:
            self._send_bytes(status, "application/json", json.dumps(answer).encode())

    def _send_bytes(self, status: HTTPStatus, kind: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class _Refused(RlinfError):
    """An answer with a status of its own."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def _pose_euler(state: ArmState) -> list[float]:
    return [*state.pose[:3].tolist(), *frames.euler_from_quaternion(state.pose[3:]).tolist()]
