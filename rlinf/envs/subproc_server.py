"""What runs in a worker process of `subproc.py`: builds an environment and answers commands until its pipe ends."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import traceback
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import torch

from rlinf.core import tree
from rlinf.core.errors import RlinfError, ShapeError
from rlinf.core.types import Obs
from rlinf.envs.episodes import ReplayedEnv
from rlinf.envs.shared_arrays import TEXT_BYTES, SharedArrays, receive, send


class Server:
    """Answers the commands of one `SubprocessEnv`."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._env: ReplayedEnv | None = None
        self._shared: SharedArrays | None = None
        self._rows = slice(0, 0)

    def serve(self) -> None:
        """Answer until the other end of the pipe is closed, by intention or because its process died."""
        while True:
            try:
                command, content = receive(self._pipe)
            except (EOFError, ConnectionResetError):
                break
            if not self._reply(command, content):
                break

    def _reply(self, command: str, content: Any) -> bool:
        failure: RlinfError | str | None = None
        answer = None
        try:
            answer = getattr(self, f"_{command}")(content)
        except RlinfError as error:
            failure = error
        except Exception:  # whatever a simulator raises goes to the caller, who stops the run with it
            failure = traceback.format_exc()
        try:
            send(self._pipe, (failure, answer))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    @property
    def env(self) -> ReplayedEnv:
        """The environment, which the first command builds."""
        assert self._env is not None
        return self._env

    def _make(self, maker: Any) -> Any:
        self._env = maker()
        gc.enable()
        return self._env.num_envs, self._env.spaces

    def _memory(self, content: Any) -> None:
        layout, self._rows = content
        if self._shared is not None:
            self._shared.close()
        self._shared = SharedArrays.open(reduction.recv_handle(self._pipe), layout)

    def _reset(self, seed: int | None) -> None:
        self._write_obs("obs", self.env.reset(seed))

    def _step(self, _: None) -> None:
        assert self._shared is not None
        step = self.env.step(torch.from_numpy(self._shared.arrays["action"][self._rows].copy()))
        for name in ("reward", "terminated", "truncated"):
            self._write(name, getattr(step, name))
        for name, value in step.info.items():
            self._write(f"info/{name}", value)
        self._write_obs("obs", step.obs)
        # Always: another process's rows may have ended, and then the caller reads all.
        self._write_obs("last_obs", step.last_obs)

    def _render(self, _: None) -> Any:
        return self.env.render()

    def _save(self, _: None) -> dict[str, Any]:
        return self.env.state_dict()

    def _load(self, state: dict[str, Any]) -> None:
        self.env.load_state_dict(state)

    def _write_obs(self, kind: str, obs: Obs) -> None:
        for path, leaf in tree.leaves(obs):
            self._write(f"{kind}/{path}", leaf)

    def _write(self, name: str, value: torch.Tensor | list[str]) -> None:
        assert self._shared is not None
        self._shared.arrays[name][self._rows] = encoded(value) if isinstance(value, list) else value.numpy()


def encoded(texts: list[str]) -> list[bytes]:
    """As UTF-8. Raises ShapeError for a text that is longer than its place."""
    codes = [text.encode() for text in texts]
    longest = max(codes, key=len, default=b"")
    if len(longest) > TEXT_BYTES:
        raise ShapeError(
            f"a text has {len(longest)} bytes, more than {TEXT_BYTES}: {longest[:40].decode(errors='ignore')!r}..."
        )
    return codes


def serve(pipe: int) -> None:
    """Serve the pipe of this descriptor."""
    faulthandler.enable()
    # Ctrl-C and SIGTERM may reach the whole process group; the caller decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    Server(Connection(pipe)).serve()
    # The system frees all that the simulator holds, and a hundred times faster than it would itself.
    os._exit(0)
