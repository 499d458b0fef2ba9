"""Where metrics go: TensorBoard, Weights & Biases, SwanLab. All speak one protocol.

wandb and swanlab are imported only when they are asked for, and work offline where there are no credentials.
Constructors raise before training begins; what fails later is borne by `report.Reporter`.
"""

from __future__ import annotations

import importlib
import math
import netrc
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import urlsplit

from rlinf.core.errors import ConfigError, MissingDependency
from rlinf.metrics.journal import AppendFile

Note = Callable[[str], None]

INIT_TIMEOUT_S = 20


class Logger(Protocol):
    """Takes the metrics of every global step."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float], elapsed_s: float) -> None:
        """Record the metrics of `step`, finished `elapsed_s` seconds after the beginning of the run."""
        ...

    def close(self) -> None:
        """Bring everything to safety. Called once."""
        ...


class TensorBoardLogger:
    """Scalars under their tags in `<run_dir>/tensorboard`.

    Writes the event file itself, one record per step, and not through SummaryWriter: that one writes from a
    thread of its own, where a full disk is noticed too late and can block the caller.
    """

    name = "tensorboard"

    def __init__(self, run_dir: Path, resume_step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        origin = f"{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = AppendFile(folder / f"events.out.tfevents.{int(time.time()):010d}.{origin}")
        self._records = RecordWriter(_Appender(self._file))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # Tells TensorBoard to forget what an earlier session logged for the steps that are now played again.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float], elapsed_s: float) -> None:
        """Write one record with all metrics of `step`."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Free the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


class _Appender:
    """The file face that RecordWriter wants, over an AppendFile."""

    def __init__(self, file: AppendFile) -> None:
        self.write = file.append


class WandbLogger:
    """A Weights & Biases run in `<run_dir>/wandb`; offline without a key or without an answer."""

    name = "wandb"

    def __init__(
        self, run_dir: Path, *, project_name: str, experiment_name: str, config: Mapping[str, Any], note: Note
    ) -> None:
        wandb = import_backend("wandb")
        # The live view draws on stdout; captured, every redrawing would end up in the log of the service.
        settings = wandb.Settings(init_timeout=INIT_TIMEOUT_S, console="off", silent=True)

        def begin(mode: str) -> Any:
            return wandb.init(
                mode=mode,
                project=project_name,
                name=experiment_name,
                config=dict(config),
                dir=str(run_dir),
                settings=settings,
            )

        wanted = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key(settings.base_url) else "offline")
        self._run, mode = _begin_or_offline("wandb", wanted, begin, note)
        if mode == "offline":
            note(f"wandb records offline; to upload: wandb login && wandb sync {Path(self._run.dir).parent}")

    def log(self, step: int, metrics: Mapping[str, float], elapsed_s: float) -> None:
        """Send the metrics of `step`."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is waiting."""
        self._run.finish()


class SwanLabLogger:
    """A SwanLab run in `<run_dir>/swanlab`; offline without a key or without an answer."""

    name = "swanlab"

    def __init__(
        self, run_dir: Path, *, project_name: str, experiment_name: str, config: Mapping[str, Any], note: Note
    ) -> None:
        # As with wandb, nothing that the live view draws may be captured. Read when the package is imported.
        os.environ.setdefault("SWANLAB_TERMINAL_PROXY_TYPE", "none")
        self._swanlab = import_backend("swanlab")
        folder = run_dir / "swanlab"
        folder.mkdir(exist_ok=True)

        def begin(mode: str) -> Any:
            return self._swanlab.init(
                mode=mode,
                project=project_name,
                experiment_name=experiment_name,
                config=dict(config),
                logdir=str(folder),
            )

        wanted = os.environ.get("SWANLAB_MODE") or ("cloud" if _has_swanlab_key() else "offline")
        _, mode = _begin_or_offline("swanlab", wanted, begin, note)
        if mode == "offline":
            note(f"swanlab records offline; to upload: swanlab login && swanlab sync {folder}/run-*")

    def log(self, step: int, metrics: Mapping[str, float], elapsed_s: float) -> None:
        """Send the metrics of `step`; SwanLab refuses values that are not finite."""
        finite = {tag: value for tag, value in metrics.items() if math.isfinite(value)}
        self._swanlab.log(finite, step=step)

    def close(self) -> None:
        """Upload what is waiting."""
        self._swanlab.finish()


def open_loggers(
    backends: Sequence[str],
    run_dir: Path,
    *,
    project_name: str,
    experiment_name: str,
    config: Mapping[str, Any],
    resume_step: int,
    note: Note,
) -> list[Logger]:
    """One logger per name in `backends` (tensorboard, wandb, swanlab).

    Raises: MissingDependency where the package is not installed, ConfigError for an unknown name or a service
        that does not start even offline.
    """
    loggers: list[Logger] = []
    for backend in backends:
        if backend == "tensorboard":
            loggers.append(TensorBoardLogger(run_dir, resume_step))
        elif backend in ("wandb", "swanlab"):
            service = WandbLogger if backend == "wandb" else SwanLabLogger
            loggers.append(
                service(
                    run_dir,
                    project_name=project_name,
                    experiment_name=experiment_name,
                    config=config,
                    note=note,
                )
            )
        else:
            raise ConfigError(f"runner.logger.logger_backends: '{backend}' is none of tensorboard, wandb, swanlab")
    return loggers


def import_backend(package: str) -> ModuleType:
    """The module `package`. Raises MissingDependency with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependency(
            f"runner.logger.logger_backends: {package} cannot be imported ({one_line(error)}); "
            f'install it with: {sys.executable} -m pip install -e ".[{package}]"'
        ) from error


def _begin_or_offline(name: str, mode: str, begin: Callable[[str], Any], note: Note) -> tuple[Any, str]:
    """(what `begin` gives, the mode that worked). Raises ConfigError where not even offline works."""
    try:
        return begin(mode), mode
    except Exception as error:  # the services pass on whatever their own libraries raise
        if mode == "offline":
            raise ConfigError(f"runner.logger.logger_backends: {name} does not start: {one_line(error)}") from error
        note(f"{name}: no connection ({one_line(error)})")
        return _begin_or_offline(name, "offline", begin, note)


def _has_wandb_key(base_url: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    hosts = {urlsplit(base_url).hostname or "", "api.wandb.ai"}
    files = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    return any(_netrc_knows(Path(file).expanduser(), host) for file in files if file for host in hosts)


def _has_swanlab_key() -> bool:
    folder = Path(os.environ.get("SWANLAB_SAVE_DIR", "~/.swanlab")).expanduser()
    return bool(os.environ.get("SWANLAB_API_KEY")) or (folder / ".netrc").is_file()


def _netrc_knows(path: Path, host: str) -> bool:
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
