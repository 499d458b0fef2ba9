"""Watch what a run has learned: episodes of one of its checkpoints as a film or in a window."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rlinf.core.errors import ConfigError, MissingDependency
from rlinf.envs.libero.config import LiberoConfig
from rlinf.launch.run import evaluate_run, load_run_config, video_directory
from rlinf.metrics.video import write_video


def play_run(
    run: Path, *, num_envs: int, seed: int | None, stochastic: bool, window: bool, output: Path | None
) -> dict[str, float]:
    """Play one episode in each of `num_envs` environments and film all of them. Returns the `eval/...` means.

    Args:
        run: run directory, or one `checkpoints/global_step_<N>` in it.
        seed: derives the initial states; None for those of the run's evaluations.
        stochastic: explore as in training.
        window: show the film too, in a window.
        output: the mp4; None for videos/play_step_<N>.mp4 of the run.

    Raises ConfigError where there is no run or its environment draws nothing, CheckpointError where there is no
    checkpoint, MissingDependency where nothing can be shown.
    """
    run_dir, checkpoint = run, None
    if not (run / "config.yaml").is_file() and run.parent.name == "checkpoints":
        run_dir, checkpoint = run.parents[1], run
    if window:
        require_screen()
    overrides = [
        f"env.eval.total_num_envs={num_envs}",
        "env.eval.rollout_epoch=1",
        "env.eval.num_workers=0",
        "env.eval.video_cfg.save_video=True",
        f"env.eval.video_cfg.max_envs={num_envs}",
    ]
    overrides += [f"env.eval.seed={seed}"] if seed is not None else []
    overrides += [f"runner.ckpt_path={checkpoint}"] if checkpoint is not None else []
    config = load_run_config(run_dir, overrides)
    if isinstance(config.env.eval, LiberoConfig) and config.env.eval.is_eval:
        overrides.append("env.eval.is_eval=False")  # a few episodes, not all of the suite
    folder = video_directory(config, run_dir)
    film = _Film(folder, output)
    metrics = evaluate_run(run_dir, overrides, reporter=film, mode="train" if stochastic else "eval")
    if film.frames is None:
        raise ConfigError("this environment draws no pictures, so there is nothing to watch")
    if window:
        show(film.frames, film.fps, title=str(run))
    return metrics


class _Film:
    """Reporter that keeps the film and writes it."""

    def __init__(self, folder: Path, output: Path | None) -> None:
        self._folder, self._output = folder, output
        self.frames: np.ndarray | None = None
        self.fps = 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing: the caller gets the metrics."""

    def note(self, text: str) -> None:
        """Print to stderr."""
        print(text, file=sys.stderr)

    def video(self, name: str, frames: np.ndarray, fps: float) -> None:
        """Keep the frames, write the film, say where."""
        self.frames, self.fps = frames, fps
        path = self._output or self._folder / f"{name.replace('eval', 'play')}.mp4"
        try:
            write_video(path, frames, fps)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error}; choose another place with -o") from error
        self.note(f"video: {path}")


def show(frames: np.ndarray, fps: float, *, title: str) -> None:
    """Play uint8 [T, height, width, 3] over and over in a window, until it is closed."""
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation

    figure, axes = plt.subplots(num=title)
    axes.set_axis_off()
    picture = axes.imshow(frames[0])
    # The name keeps the animation alive while the window is open.
    animation = FuncAnimation(
        figure, lambda number: picture.set_data(frames[number]), frames=len(frames), interval=1000 / fps
    )
    plt.show()
    del animation


def require_screen() -> None:
    """Raise MissingDependency, before anything is played, where matplotlib has no window to draw in."""
    import matplotlib.pyplot as plt

    try:
        figure = plt.figure()
    except Exception as error:  # whatever the window system raises
        raise MissingDependency(
            f"no window can be opened here ({error}); leave out --window and open the mp4"
        ) from error
    interactive = plt.get_backend().lower() not in ("agg", "pdf", "svg", "ps", "cairo")
    plt.close(figure)
    if not interactive:
        raise MissingDependency(
            "matplotlib has no window system here (a screen and, for instance, python3-tk are needed); leave out "
            "--window and open the mp4"
        )
