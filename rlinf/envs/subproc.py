"""Environments in several processes, each stepping some of the rows for a whole chunk per message.

Observations, actions and rewards lie in shared memory; the pipe carries one short message per chunk and
process. A worker process is started as a program of its own (`subproc_main.py`), not forked: it inherits
neither locks nor the caller's `__main__`, sees no terminal, and ends when its pipe does, so none survives the
caller however that one dies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe, reduction
from multiprocessing import connection as pipes
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.errors import RlinfError, WorkerDied
from rlinf.core.types import EnvSpaces, EnvStep, Obs
from rlinf.envs.episodes import INFO_DTYPES, ReplayedEnv, check_action, join_states, split_state
from rlinf.envs.shared_arrays import TEXT_DTYPE, Layout, SharedArrays, receive, send

START_TIMEOUT_S = 300.0
"""Importing a simulator and compiling shaders for many scenes may take minutes on a slow disk."""
ANSWER_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 2.0
KILL_TIMEOUT_S = 30.0
"""On a machine with more work than cores a process that holds a renderer takes seconds to be gone."""
LAST_WORDS_BYTES = 2000

Command = Literal["make", "memory", "reset", "step", "render", "save", "load", "close"]
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
"""A worker is one core's share of the machine; more threads would only fight for the others'."""


class SubprocessEnv:
    """A `VectorEnv` of the rows of several others, each in its own process.

    Args:
        makers: what builds the environment of each process; has to be picklable. Rows follow its order.
        label: what the rows are, for messages.
        start_timeout_s: longest wait for a process to build its environment.
        answer_timeout_s: longest wait for any other answer.

    Raises:
        WorkerDied: a process died, failed or did not answer in time; with its last words or its traceback.
        RlinfError: as raised in a process. After either, the environment is closed.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[], ReplayedEnv]],
        *,
        label: str,
        start_timeout_s: float = START_TIMEOUT_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self._answer_timeout_s = answer_timeout_s
        self._memory: SharedArrays | None = None
        self._horizon = 0
        self._workers = [_Worker(f"environment worker {i} of {len(makers)} ({label})") for i in range(len(makers))]
        self._finalizer = weakref.finalize(self, _stop, self._workers)
        built: list[tuple[int, EnvSpaces]] = self._ask_all("make", list(makers), timeout_s=start_timeout_s)
        self._sizes = [num_envs for num_envs, _ in built]
        self.num_envs = sum(self._sizes)
        self.spaces = built[0][1]
        first = 0
        for worker, size in zip(self._workers, self._sizes, strict=True):
            worker.rows = slice(first, first + size)
            first += size
        self._share(horizon=1)

    def reset(self, seed: int | None = None) -> Obs:
        """As `VectorEnv.reset`."""
        self._ask_all("reset", seed)
        return self._read_obs("obs")

    def step(self, action: Tensor) -> EnvStep:
        """As `VectorEnv.step`."""
        self._check_open()
        executed = check_action(action, self.num_envs, self.spaces.action_dim).cpu().clone()
        if executed.shape[1] != self._horizon:
            self._share(horizon=executed.shape[1])
        self._arrays["action"][:] = executed.numpy()
        self._ask_all("step", None)
        terminated, truncated = self._read("terminated"), self._read("truncated")
        obs = self._read_obs("obs")
        ended = bool(terminated.any() | truncated.any())
        return EnvStep(
            obs=obs,
            last_obs=self._read_obs("last_obs") if ended else obs,
            reward=self._read("reward"),
            terminated=terminated,
            truncated=truncated,
            executed=executed,
            intervened=torch.zeros_like(terminated),
            info={name: self._read(f"info/{name}") for name in INFO_DTYPES},
        )

    def render(self) -> np.ndarray | None:
        """uint8 [M ≤ N, height, width, 3] of the rows that are filmed, or None if none is."""
        pictures = [part for part in self._ask_all("render", None) if part is not None]
        return np.concatenate(pictures) if pictures else None

    def state_dict(self) -> dict[str, Any]:
        """As `ReplayedEnv.state_dict`, over all rows: another number of processes may load it."""
        return join_states(self._ask_all("save", None))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises CheckpointError as `ReplayedEnv.load_state_dict`."""
        self._ask_all("load", split_state(state, self._sizes))

    def close(self) -> None:
        """End the processes. Calling it twice is allowed."""
        self._finalizer()
        if self._memory is not None:
            self._memory.close()

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order of the rows."""
        return [worker.process.pid for worker in self._workers]

    @property
    def _arrays(self) -> dict[str, np.ndarray]:
        assert self._memory is not None
        return self._memory.arrays

    def _share(self, horizon: int) -> None:
        """Lay out the shared memory for chunks of `horizon` actions."""
        layout = _layout(self.spaces, self.num_envs, horizon)
        if self._memory is not None:
            self._memory.close()
        self._memory = SharedArrays.create(layout)
        self._horizon = horizon
        with self._closed_on_failure():
            for worker in self._workers:
                worker.send("memory", (layout, worker.rows))
                reduction.send_handle(worker.pipe, self._memory.file, worker.process.pid)
            self._collect(self._answer_timeout_s)

    def _read(self, name: str) -> Tensor:
        return torch.from_numpy(self._arrays[name].copy())

    def _read_obs(self, kind: Literal["obs", "last_obs"]) -> Obs:
        return tree.from_leaves({path: self._read_leaf(f"{kind}/{path}") for path in self.spaces.obs_shapes})

    def _read_leaf(self, name: str) -> Tensor | list[str]:
        array = self._arrays[name]
        return [text.decode() for text in array.tolist()] if array.dtype.kind == "S" else self._read(name)

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this environment is closed")

    def _ask_all(self, command: Command, content: Any, timeout_s: float | None = None) -> list[Any]:
        """The answers of all workers. A list is content for each worker in turn, all else goes to every one."""
        self._check_open()
        contents = content if isinstance(content, list) else [content] * len(self._workers)
        with self._closed_on_failure():
            for worker, part in zip(self._workers, contents, strict=True):
                worker.send(command, part)
            return self._collect(self._answer_timeout_s if timeout_s is None else timeout_s)

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        """Answers of an exchange that broke off, be it by Ctrl-C, would be taken for those of the next."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                self.close()

    def _collect(self, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        while len(answers) < len(self._workers):
            waiting = {w.pipe: i for i, w in enumerate(self._workers) if i not in answers}
            ready = pipes.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = self._workers[min(waiting.values())]
                raise WorkerDied(f"{silent.describe()} gave no answer for {timeout_s:g} s")
            for pipe, index in waiting.items():
                if pipe in ready:
                    answers[index] = self._workers[index].receive()
        return [answers[index] for index in range(len(self._workers))]


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = slice(0, 0)
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        self.pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rlinf.envs.subproc_main", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                pass_fds=(theirs.fileno(),),
                env=os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )

    def send(self, command: Command, content: Any) -> None:
        try:
            send(self.pipe, (command, content))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._death() from error

    def receive(self) -> Any:
        try:
            failure, answer = receive(self.pipe)
        except (EOFError, ConnectionResetError) as error:
            raise self._death() from error
        if isinstance(failure, RlinfError):
            raise failure
        if failure is not None:
            raise WorkerDied(f"{self.describe()} failed: {failure}")
        return answer

    def describe(self) -> str:
        if self.rows.stop == 0:
            return self.name
        return f"{self.name}, environments {self.rows.start} to {self.rows.stop - 1},"

    def stop(self, deadline: float) -> None:
        """Wait for the process to end until `deadline`, then kill it."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(KILL_TIMEOUT_S)
        self.output.close()

    def _death(self) -> WorkerDied:
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            how = "closed its pipe"
        size = self.output.seek(0, os.SEEK_END)
        self.output.seek(max(0, size - LAST_WORDS_BYTES))
        words = self.output.read().decode(errors="replace").strip()
        return WorkerDied(f"{self.describe()} {how}" + (f"; its last words:\n{words}" if words else ""))


def _stop(workers: list[_Worker]) -> None:
    """End all processes: a closed pipe asks them to."""
    for worker in workers:
        worker.pipe.close()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for worker in workers:
        worker.stop(deadline)


def _layout(spaces: EnvSpaces, num_envs: int, horizon: int) -> Layout:
    layout: Layout = {
        "action": ((num_envs, horizon, spaces.action_dim), "float32"),
        "reward": ((num_envs, horizon), "float32"),
        "terminated": ((num_envs, horizon), "bool"),
        "truncated": ((num_envs,), "bool"),
    }
    for name, dtype in INFO_DTYPES.items():
        layout[f"info/{name}"] = ((num_envs,), str(dtype).removeprefix("torch."))
    for path, shape in spaces.obs_shapes.items():
        for kind in ("obs", "last_obs"):
            name = spaces.obs_dtypes[path]
            layout[f"{kind}/{path}"] = ((num_envs, *shape), TEXT_DTYPE if name == "str" else name)
    return layout
