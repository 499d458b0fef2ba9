"""Learning curves from the journals of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlinf.core.errors import DataError
from rlinf.metrics.journal import FILE_NAME, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#1f6fb4", "#d9622b", "#2f8f4e", "#8c4fa8", "#b8860b", "#c23b5a", "#3d8f94", "#6b6b6b")
MEASURES = (("success_once", "success rate"), ("return", "return"))
LineStyle = Literal["--", ":", "-."]
LEVEL_COLOR = "#222222"
LINE_STYLES: tuple[LineStyle, ...] = ("--", ":", "-.")
EVALUATION, TRAINING = (2.2, 1.0), (1.2, 0.4)  # line width, opacity
SMOOTHING = 0.03  # width of the running mean over training episodes, as a share of the curve
GRID_POINTS = 300


@dataclass(frozen=True)
class Curves:
    """What a journal says about one run.

    Attributes:
        run_dir: where they come from.
        recipe: (name without its seed, digest of the configuration); runs of equal recipes are drawn as one.
        axes: "env steps" (or "global steps" where the journal does not count env steps) and "minutes" → [L].
        values: tag → [L], NaN where a line does not have it.
    """

    run_dir: Path
    recipe: tuple[str, str]
    axes: dict[str, np.ndarray]
    values: dict[str, np.ndarray]


def plot_runs(run_dirs: Sequence[str | Path], path: str | Path, *, baselines: Sequence[str | Path] = ()) -> None:
    """Draw success rate and return against env steps and against wall clock into the picture `path`.

    Evaluation is drawn strong, training faint. Several runs of one recipe (names and configurations that
    differ only in a seed) become their mean and the band from the lowest to the highest. The last evaluation of each of
    `baselines` is drawn as a level: what was there before, such as a clone's run.

    Raises: DataError where a directory holds no journal or an empty one.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    runs = [read_run(Path(run_dir)) for run_dir in run_dirs]
    levels = [read_run(Path(run_dir)) for run_dir in baselines]
    recipes = _labels(runs)
    units = list(dict.fromkeys(axis for run in runs for axis in run.axes))
    figure = Figure(figsize=(5.5 * len(units), 6.6), dpi=110, layout="constrained")
    grid = figure.subplots(len(MEASURES), len(units), sharex="col", sharey="row", squeeze=False)
    for axes_row, (measure, label) in zip(grid, MEASURES, strict=True):
        for axes, unit in zip(axes_row, units, strict=True):
            for recipe, color in zip(recipes, _cycle(len(recipes)), strict=True):
                members = [run for run in runs if run.recipe == recipe and unit in run.axes]
                if members:
                    _draw_recipe(axes, members, measure, unit, color)
            for baseline, style in zip(levels, _line_styles(len(levels)), strict=True):
                _draw_level(axes, baseline, measure, style)
            _dress(axes, measure, unit)
        axes_row[0].set_ylabel(label)
    for axes, unit in zip(grid[-1], units, strict=True):
        axes.set_xlabel("wall clock (minutes)" if unit == "minutes" else unit)
    _legend(figure, runs, recipes, levels)
    _save(figure, Path(path))


def read_run(run_dir: Path) -> Curves:
    """Curves of one run directory. Raises DataError where it holds no journal or an empty one."""
    journal = run_dir / FILE_NAME
    if not journal.is_file():
        raise DataError(f"{run_dir} is not a run directory: it holds no {FILE_NAME}")
    rows = list(read_rows(journal))
    if not rows:
        raise DataError(f"{journal} holds no finished step yet; nothing can be drawn")
    tags = {f"{source}/{measure}" for source in ("eval", "env") for measure, _ in MEASURES}
    values = {tag: _column(rows, tag) for tag in tags}
    env_steps = _column(rows, "time/env_steps")
    counted = bool(np.isfinite(env_steps).all())
    axes = {
        "env steps" if counted else "global steps": env_steps if counted else _column(rows, "step"),
        "minutes": _column(rows, "elapsed_s") / 60,
    }
    return Curves(run_dir, (recipe_name(run_dir), _recipe_digest(run_dir)), axes, values)


def recipe_name(run_dir: Path) -> str:
    """Name of the run's directory without its seed: `pick-seed3` and `pick_s3` give `pick`."""
    name = run_dir.resolve().name
    return re.sub(r"[-_.]+(seed|s)[-_=]?\d+$", "", name, flags=re.IGNORECASE) or name


def _recipe_digest(run_dir: Path) -> str:
    """What `launch.provenance` wrote about the configuration; empty where it did not."""
    try:
        return str(json.loads((run_dir / "provenance.json").read_text()).get("recipe", ""))
    except (OSError, ValueError):
        return ""


def _labels(runs: Sequence[Curves]) -> dict[tuple[str, str], str]:
    """A name for every recipe: its own, or that of the first run's parent folder where several share a name."""
    labels: dict[tuple[str, str], str] = {}
    for run in runs:
        name = run.recipe[0]
        shared = len({other.recipe for other in runs if other.recipe[0] == name}) > 1
        labels.setdefault(run.recipe, run.run_dir.resolve().parent.name if shared else name)
    return labels


def _column(rows: Sequence[dict[str, Any]], tag: str) -> np.ndarray:
    return np.array([row.get(tag, np.nan) for row in rows], float)


def _draw_recipe(axes: Axes, runs: Sequence[Curves], measure: str, unit: str, color: str) -> None:
    """Curves of equal runs: training faint and smoothed, evaluation strong with a point per evaluation."""
    for source, (linewidth, alpha) in (("env", TRAINING), ("eval", EVALUATION)):
        curves = [_finite(run.axes[unit], run.values[f"{source}/{measure}"]) for run in runs]
        curves = [(x, y if source == "eval" else _running_mean(y)) for x, y in curves if len(x)]
        if not curves:
            continue
        if len(curves) == 1:
            [(x, mean)] = curves
        else:
            x, together = _align(curves)
            mean = together.mean(0)
            if source == "eval":
                axes.fill_between(x, together.min(0), together.max(0), color=color, alpha=0.18, linewidth=0)
        few = source == "eval" and len(curves) == 1 and len(x) <= 60
        axes.plot(
            x,
            mean,
            color=color,
            marker="o" if few else None,
            markersize=3.5,
            linewidth=linewidth,
            alpha=alpha,
        )


def _draw_level(axes: Axes, run: Curves, measure: str, style: LineStyle) -> None:
    """The last evaluation of a run, over the whole width."""
    values = run.values[f"eval/{measure}"]
    if (known := values[np.isfinite(values)]).size:
        axes.axhline(known[-1], color=LEVEL_COLOR, linestyle=style, linewidth=EVALUATION[0] * 0.7)


def _line_styles(number: int) -> list[LineStyle]:
    return [LINE_STYLES[index % len(LINE_STYLES)] for index in range(number)]


def _finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(y)
    return x[known], y[known]


def _running_mean(y: np.ndarray) -> np.ndarray:
    """Centred mean over a window that shrinks at both ends, so that nothing is invented there."""
    half = int(len(y) * SMOOTHING / 2)
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
    return (total[high] - total[low]) / (high - low)


def _align(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(x [L], y [runs, L]) on the stretch that all curves cover."""
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(low, max(low, high), GRID_POINTS)
    return grid, np.stack([np.interp(grid, x, y) for x, y in curves])


def _dress(axes: Axes, measure: str, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if unit != "minutes":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    if measure.startswith("success"):
        axes.set_ylim(-0.02, 1.02)
    axes.xaxis.label.set_fontsize(11)
    axes.yaxis.label.set_fontsize(11)


def _legend(
    figure: Figure, runs: Sequence[Curves], recipes: Mapping[tuple[str, str], str], levels: Sequence[Curves]
) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for (recipe, label), color in zip(recipes.items(), _cycle(len(recipes)), strict=True):
        number = sum(run.recipe == recipe for run in runs)
        label = label if number == 1 else f"{label} ({number} runs: mean, lowest to highest)"
        handles.append(Line2D([], [], color=color, linewidth=EVALUATION[0], label=label))
    for run, style in zip(levels, _line_styles(len(levels)), strict=True):
        handles.append(Line2D([], [], color=LEVEL_COLOR, linestyle=style, label=f"{run.recipe[0]} alone"))
    handles.append(Line2D([], [], color="#555555", linewidth=EVALUATION[0], label="evaluation"))
    handles.append(Line2D([], [], color="#555555", linewidth=TRAINING[0], alpha=TRAINING[1], label="training"))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 4), frameon=False, fontsize=10)


def _save(figure: Figure, path: Path) -> None:
    """Save in one step, so that no half picture ever stands where a whole one was."""
    unfinished = path.with_name(f".{path.name}")
    try:
        figure.savefig(unfinished, format=path.suffix.removeprefix(".") or "png")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _cycle(number: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(number)]
