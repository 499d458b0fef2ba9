"""An arm behind an HTTP server with SERL's routes: SERL's or HIL-SERL's own, or `python -m rlinf robot_server`.

Our server also says how old its measurements are and takes back the time stamp of the one that a target was chosen
on, so that it can refuse targets that come too late. SERL's servers do neither, and do not report the arm's errors.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import NUM_JOINTS, ArmError, ArmState, Compliance

RESET_TIMEOUT_S = 90.0
"""SERL's joint reset takes up to 40 s."""
PARTS = (("pose", 7), ("vel", 6), ("force", 3), ("torque", 3), ("q", NUM_JOINTS), ("dq", NUM_JOINTS), ("jacobian", 42))


class HttpRefusal(ArmError):
    """The server answered, and said no."""


class HttpLink:
    """POST requests over one connection that is kept open. Safe for threads.

    Args:
        url: of the server, such as http://127.0.0.1:5000.
        token: sent with each request; empty for none.
        timeout_s: how long an answer may take.
    """

    def __init__(self, url: str, token: str = "", timeout_s: float = 1.0) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise ArmError(f"{url} is no address of a robot server; write it as http://HOST:5000")
        self.url = f"http://{parts.hostname}:{parts.port or 5000}"
        self._place = (parts.hostname, parts.port or 5000)
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None

    def post(self, route: str, body: Any = None, *, timeout_s: float | None = None) -> tuple[bytes, dict[str, str]]:
        """The answer's body and headers.

        A connection that the server closed meanwhile is opened once more; nothing else is tried twice.

        Raises:
            HttpRefusal: it answered with an error.
            ArmError: it did not answer.
        """
        data = json.dumps(body if body is not None else {}).encode()
        with self._lock:
            for attempt in (0, 1):
                reused = self._connection is not None
                try:
                    status, answer, headers = self._ask(route, data, timeout_s or self._timeout_s)
                    break
                except (OSError, http.client.HTTPException) as error:
                    self._drop()
                    closed = isinstance(error, (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError))
                    if attempt or not (reused and closed):
                        reason = " ".join(str(error).split()) or type(error).__name__
                        raise ArmError(
                            f"{self.url}/{route}: no answer ({reason}); is the robot server running there?"
                        ) from error
                except BaseException:  # Ctrl-C: what comes next, to hold the arm, must not find a question half asked
                    self._drop()
                    raise
        if status != http.client.OK:
            raise HttpRefusal(f"{self.url}/{route}: {_reason(answer) or f'HTTP status {status}'}")
        return answer, headers

    def json(self, route: str, body: Any = None) -> Any:
        """The answer as JSON. Raises ArmError if it is none."""
        answer, _ = self.post(route, body)
        try:
            return json.loads(answer)
        except ValueError as error:
            raise ArmError(f"{self.url}/{route}: the answer is not JSON; is this a robot server?") from error

    def close(self) -> None:
        """Close the connection. Calling it twice is allowed."""
        with self._lock:
            self._drop()

    def _ask(self, route: str, data: bytes, timeout_s: float) -> tuple[int, bytes, dict[str, str]]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(*self._place, timeout=timeout_s)
            self._connection.connect()
        connection = self._connection
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
        connection.request("POST", f"/{route}", data, self._headers)
        response = connection.getresponse()
        return response.status, response.read(), {name.lower(): value for name, value in response.getheaders()}

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class SerlHttpArm:
    """A client of SERL's routes.

    Args:
        url: of the server, such as http://127.0.0.1:5000.
        token: for our server, if it wants one; empty for none.
        timeout_s: how long an answer may take.
        gripper_full: what the server reports as `gripper_pos` when the fingers are open: 1 for ours and SERL's
            Robotiq, 0.08 for SERL's Franka hand, which reports the width in m.
        person: who clears the arm's errors by `recover`; our server wants a name.
    """

    def __init__(
        self, url: str, token: str = "", timeout_s: float = 1.0, gripper_full: float = 1.0, person: str = ""
    ) -> None:
        self._link = HttpLink(url, token, timeout_s)
        self._eye = HttpLink(url, token, timeout_s)  # of its own: a joint reset occupies the other for seconds
        self._gripper_full, self._person = gripper_full, person
        self._stamp: float | None = None  # the server's own, of the newest state
        self._compliance = Compliance()

    def connect(self) -> None:
        """Ask for a state. Raises ArmError if nobody answers, or something else than a robot server does."""
        self.state()

    def state(self) -> ArmState:
        """One request. Raises ArmError without an answer."""
        asked = time.monotonic()
        answer = self._eye.json("getstate")
        try:
            values = {name: np.array(answer[name], float).reshape(size) for name, size in PARTS}
            opening = float(np.asarray(answer["gripper_pos"], float)) / self._gripper_full
            age_s = float(answer.get("age_s", 0.0))
            self._stamp = float(answer["time_s"]) if "time_s" in answer else None
            pose = frames.pose_of(values["pose"][:3], values["pose"][3:])
        except (KeyError, TypeError, ValueError) as error:
            raise ArmError(f"{self._link.url}/getstate: not the answer of a robot server ({error})") from error
        return ArmState(
            pose=pose,
            velocity=values["vel"],
            force_n=values["force"],
            torque_nm=values["torque"],
            q=values["q"],
            dq=values["dq"],
            jacobian=values["jacobian"].reshape(6, NUM_JOINTS),
            gripper=opening,
            time_s=asked - age_s,
            error=str(answer.get("error", "")),
        )

    def set_target_pose(self, pose: np.ndarray) -> None:
        """One request. Raises HttpRefusal when the server's safety gate refuses."""
        body: dict[str, Any] = {"arr": [float(number) for number in pose]}
        if self._stamp is not None:
            body["based_on_s"] = self._stamp
        self._link.post("pose", body)

    def set_compliance(self, compliance: Compliance) -> None:
        """All gains in one request."""
        self._link.post("update_param", compliance.to_serl())
        self._compliance = compliance

    def joint_reset(self, q: np.ndarray | None = None) -> None:
        """The server's own reset; it knows no other. Raises ArmError if q is given."""
        if q is not None:
            raise ArmError("serl_http: the server moves to its own reset joints; leave q out")
        self._link.post("jointreset", timeout_s=RESET_TIMEOUT_S)

    def recover(self) -> None:
        """Clear the arm's error: in the name of `person` on our server."""
        if self._person:
            self._link.post("recover", {"person": self._person}, timeout_s=10.0)
        else:
            self._link.post("clearerr", timeout_s=10.0)

    def gripper(self, opening: float) -> None:
        """Open, close, or, between them, move there."""
        if opening <= 0.0:
            self._link.post("close_gripper")
        elif opening >= 1.0:
            self._link.post("open_gripper")
        else:
            self._link.post("move_gripper", {"gripper_pos": round(255 * opening)})

    def stop(self, reason: str) -> None:
        """Stop the arm until a person clears it at the server. Raises HttpRefusal on SERL's, which knows no stop."""
        self._link.post("stop", {"reason": reason})

    def safety(self) -> dict[str, Any]:
        """What our server's gate did: `stopped`, `counts`, `events`. Raises ArmError on SERL's."""
        return dict(self._eye.json("safety"))

    def close(self) -> None:
        """Close the connection; the server goes on, and holds the arm when its watchdog ends."""
        self._link.close()
        self._eye.close()


def _reason(answer: bytes) -> str:
    """What an error page says, in one line."""
    try:
        parsed = json.loads(answer)
    except ValueError:
        return ""
    return str(parsed.get("error", "")) if isinstance(parsed, dict) else ""
