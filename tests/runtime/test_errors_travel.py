"""An exception arrives in another process as what it was, or at least as what it said."""

import runpy
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from ray.exceptions import GetTimeoutError, OutOfMemoryError

from rlinf.core.errors import ConfigError, MissingDependency, ProcessDied, WorkerDied, raised_in
from rlinf.runtime import ray_process
from rlinf.runtime.local import CHANNEL_TIMEOUT_S, ChannelClosed
from rlinf.runtime.ray_backend import _RemoteReplica
from rlinf.runtime.ray_process import HostedWeights, Outcome, interface_of, pack_error, unpack_error, visible_devices

TRAIN = Path(__file__).resolve().parents[2] / "examples/embodiment/train.py"


class WithOtherArguments(ConfigError):
    def __init__(self, key, wrong):
        super().__init__(f"{key} is {wrong}")
        self.key = key


class WithALock(Exception):
    def __init__(self):
        super().__init__("locked")
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    "error",
    [ValueError("a", 1), KeyError("k"), FileNotFoundError(2, "No such file", "x"), WithOtherArguments("a.b", 3),
     ProcessDied("gone", 4)],
)  # fmt: skip
def test_it_is_the_same(error):
    twin = unpack_error(pack_error(error))
    assert type(twin).__name__ == type(error).__name__ and isinstance(twin, type(error).__mro__[1])
    assert str(twin) == str(error) and twin.args == error.args and twin.__dict__ == error.__dict__


def test_a_closed_channel_keeps_its_cause():
    twin = unpack_error(pack_error(ChannelClosed("obs", WithOtherArguments("a.b", 3))))
    assert isinstance(twin, ChannelClosed) and twin.cause.key == "a.b"
    assert str(twin) == "channel 'obs' was closed: a.b is 3"


def test_what_cannot_travel_says_what_it_was():
    twin = unpack_error(pack_error(WithALock()))
    assert type(twin) is RuntimeError and str(twin) == "WithALock: locked"


def test_an_error_whose_class_is_not_there_says_what_it_was(tmp_path, monkeypatch):
    (tmp_path / "driver_of_a_robot.py").write_text("class ArmError(Exception):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import driver_of_a_robot

    packed = pack_error(driver_of_a_robot.ArmError("joint 3 is hot"))
    assert type(unpack_error(packed)) is driver_of_a_robot.ArmError
    monkeypatch.delitem(sys.modules, "driver_of_a_robot")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    twin = unpack_error(packed)
    assert type(twin) is RuntimeError and str(twin) == "ArmError: joint 3 is hot"


@pytest.mark.parametrize(
    ("visible", "devices", "expected"),
    [(None, (0, 2), "0,2"), ("", (1,), "1"), ("4,5", (1,), "5"), ("GPU-a,GPU-b", (1, 0), "GPU-b,GPU-a")],
)
def test_devices_are_counted_among_the_visible_ones(visible, devices, expected):
    assert visible_devices(visible, devices) == expected


def test_an_interface_is_known_by_its_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None, "of nobody: kept for documents"


class Somewhere:
    """What a replica needs of a runtime."""

    def new_number(self):
        return 0

    def describe(self, host):
        return f"'env 0' (process 7 on robot, 10.0.0.{host})"


def test_an_error_of_another_process_is_printed_with_its_place(monkeypatch, capsys):
    ended, answer = Future(), Future()
    ended.set_result(Outcome(error=pack_error(MissingDependency("no mujoco: pip install mujoco")), trace="Traceback"))
    _RemoteReplica(Somewhere(), "EnvGroup[0]", 2)._take(ended, answer)
    place = "in EnvGroup[0], 'env 0' (process 7 on robot, 10.0.0.2)"
    assert raised_in(answer.exception()) == place
    assert raised_in(MissingDependency("of this process")) == ""

    monkeypatch.setattr("rlinf.launch.parse.load_config", lambda *words: None)
    monkeypatch.setattr("rlinf.launch.run.train", lambda config: answer.result())
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-name", "any"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(TRAIN), run_name="__main__")
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: no mujoco: pip install mujoco\n  {place}\n"


class Peer:
    """Of whom Ray says nothing but that time is over."""

    take_weights = type("Method", (), {"remote": staticmethod(lambda name, version, state: "reference")})


@pytest.mark.parametrize(("raised", "expected"), [(GetTimeoutError("late"), WorkerDied), (OutOfMemoryError("x"), None)])
def test_who_does_not_take_over_weights_is_named_and_the_dead_are_left_to_others(monkeypatch, raised, expected):
    def get(reference, timeout):
        assert reference == "reference" and timeout == CHANNEL_TIMEOUT_S
        raise raised

    monkeypatch.setattr(ray_process, "this_exchange", lambda: SimpleNamespace(index=0))
    monkeypatch.setattr(ray_process, "_peers_of_process", {3: Peer})
    monkeypatch.setattr(ray_process.ray, "put", lambda state: state)
    monkeypatch.setattr(ray_process.ray, "get", get)
    publish = lambda: HostedWeights("policy", [3]).publish(1, {})  # noqa: E731
    if expected is None:
        return publish()
    with pytest.raises(expected, match="process 3 did not take over weights 'policy' within 600 s"):
        publish()
