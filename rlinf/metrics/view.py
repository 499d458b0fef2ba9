"""What the terminal shows during training: a live panel, or lines where there is no terminal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

RATE_WINDOW_S = 120.0
REFRESH_PER_S = 2.0
PLAIN_INTERVAL_S = 10.0
NO_VALUE = "-"
RECENT_EPISODES = 20
CELL_TAG = "env/jitter_p99_ms"
"""Who reports this is a robot cell, whose operator wants to see more."""


class View(Protocol):
    """Shows the metrics of every global step to a person; a `logger.Logger` that can also say something."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float], elapsed_s: float) -> None:
        """Show the metrics of `step`."""
        ...

    def note(self, text: str) -> None:
        """Show one message, at once; also after `close`."""
        ...

    def keys(self, text: str) -> None:
        """Show from now on which keys do what; empty: none do."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was found, the last state still readable."""
        ...


class Progress:
    """The newest value of every metric, and how fast steps follow each other."""

    def __init__(self, total_steps: int, step: int = 0) -> None:
        self.total_steps = total_steps
        self.step = step
        self.elapsed_s = 0.0
        self.latest: dict[str, float] = {}
        self._marks: deque[tuple[float, int]] = deque()
        self._recent: deque[tuple[float, int]] = deque()  # mean success of so many episodes
        self.keys = ""

    def update(self, step: int, metrics: Mapping[str, float], elapsed_s: float) -> None:
        """Take in the metrics of `step`; tags that are absent keep their last value."""
        self.step = step
        self.elapsed_s = elapsed_s
        self.latest.update(metrics)
        if (number := int(metrics.get("env/num_episodes", 0))) > 0:
            self._recent.append((metrics.get("env/success_once", 0.0), number))
            while sum(count for _, count in self._recent) - self._recent[0][1] >= RECENT_EPISODES:
                self._recent.popleft()
        self._marks.append((elapsed_s, step))
        while len(self._marks) > 2 and self._marks[1][0] < elapsed_s - RATE_WINDOW_S:
            self._marks.popleft()

    def left_s(self) -> float | None:
        """Seconds until the last step at the pace of the last two minutes; None before there is a pace."""
        if len(self._marks) < 2 or self._marks[-1][1] == self._marks[0][1]:
            return None
        (time_a, step_a), (time_b, step_b) = self._marks[0], self._marks[-1]
        return (self.total_steps - self.step) * (time_b - time_a) / (step_b - step_a)

    def fraction(self) -> float:
        """Share of the steps that are done, in [0, 1]."""
        return min(1.0, self.step / self.total_steps) if self.total_steps > 0 else 0.0

    def fields(self) -> list[tuple[str, str]]:
        """(label, value) pairs that a person wants to see, always the same number in the same order."""
        losses = [tag for tag in self.latest if tag.startswith("train/") and tag.endswith("_loss")]
        alpha = next((tag for tag in self.latest if tag.endswith("/alpha")), "")
        pairs = [
            ("env steps/s", self._text("time/env_steps_per_s", ",.0f")),
            ("success eval", self._text("eval/success_once", ".3f")),
            ("return eval", self._text("eval/return")),
            ("updates/s", self._text("time/updates_per_s", ",.0f")),
            ("success train", self._text("env/success_once", ".3f")),
            ("return train", self._text("env/return")),
            ("entropy", self._text("train/actor/entropy")),
            ("alpha", self._text(alpha)),
        ]
        pairs += [(tag.rsplit("/", 1)[1].replace("_", " "), self._text(tag)) for tag in losses[:4]]
        return pairs + [("", "")] * (12 - len(pairs))

    def cell_fields(self) -> list[tuple[str, str]]:
        """(label, value) pairs for the operator of a robot cell; none where there is no cell."""
        if CELL_TAG not in self.latest:
            return []
        number = sum(count for _, count in self._recent)
        solved = sum(success * count for success, count in self._recent)
        return [
            (f"success of {number}", f"{solved / number:.2f}" if number else NO_VALUE),
            ("by hand", self._text("env/interventions", ".1f")),
            ("force max N", self._text("env/force_max_n", ".1f")),
            ("jitter p99 ms", self._text(CELL_TAG, ".1f")),
            ("missed", self._text("env/missed_deadlines", ".1f")),
            ("queue", self._text("time/waiting_segments", ".0f")),
            ("gate limited", self._text("env/gate_limited", ".1f")),
            ("gate refused", self._text("env/gate_refused", ".1f")),
            ("stops", self._text("env/stops", ".1f")),
            ("weights", self._text("time/weights_version", ",.0f")),
            ("replay", self._text("train/replay_buffer/size", ",.0f")),
            ("demos", self._text("train/demo_buffer/size", ",.0f")),
        ]

    def _text(self, tag: str, form: str | None = None) -> str:
        value = self.latest.get(tag)
        if value is None:
            return NO_VALUE
        return short_number(value) if form is None else format(value, form)


class LiveView:
    """A panel at the bottom of the terminal, redrawn twice a second; messages scroll by above it."""

    name = "terminal"

    def __init__(
        self, title: str, run_dir: Path, total_steps: int, *, step: int = 0, console: Console | None = None
    ) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._title = title
        self._run_dir = run_dir
        self._progress = Progress(total_steps, step)
        self._message = ""
        self._last_log_s = time.monotonic()
        self._console = console or RichConsole()
        self._size = self._console.size
        self._lock = threading.Lock()
        self._live = Live(
            get_renderable=self._draw,
            console=self._console,
            refresh_per_second=REFRESH_PER_S,
            vertical_overflow="crop",
        )
        self._live.start()

    def log(self, step: int, metrics: Mapping[str, float], elapsed_s: float) -> None:
        """Show the metrics of `step` with the next redrawing."""
        with self._lock:
            self._progress.update(step, metrics, elapsed_s)
            self._last_log_s = time.monotonic()

    def note(self, text: str) -> None:
        """Print the message above the panel, and keep it inside until the next one comes."""
        with self._lock:
            self._message = text
        self._console.print(f"[{time.strftime('%H:%M:%S')}] {text}", markup=False, highlight=False, soft_wrap=True)

    def keys(self, text: str) -> None:
        """As `View.keys`."""
        with self._lock:
            self._progress.keys = text

    def close(self) -> None:
        """Draw the last state and leave it standing."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        size = self._console.size
        if size != self._size:
            # The terminal has folded the old panel anew; only a clean screen gets rid of its remains.
            self._size = size
            self._console.file.write("\x1b[2J\x1b[H")
        with self._lock:
            since_s = time.monotonic() - self._last_log_s
            return draw_panel(self._title, self._run_dir, self._progress, self._message, since_s, size.width)


def draw_panel(
    title: str, run_dir: Path, progress: Progress, message: str, since_s: float, width: int
) -> RenderableType:
    """The panel of the live view for a terminal of `width` columns; `since_s` seconds after the last step."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    left_s = progress.left_s()
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    bar = ProgressBar(total=max(progress.total_steps, 1), completed=progress.step, complete_style="cyan")
    head.add_row(bar, f"step {progress.step:,} of {progress.total_steps:,}  {progress.fraction():4.0%}")

    columns = 3 if width >= 76 else 2 if width >= 52 else 1
    body: list[RenderableType] = [_grid(progress.fields(), columns), Text("")]
    if cell := progress.cell_fields():
        body += [_grid(cell, columns), Text("")]

    times = f"elapsed {clock(progress.elapsed_s + since_s)}"
    if progress.step < progress.total_steps:
        times += f"   left {NO_VALUE if left_s is None else 'about ' + clock(max(0.0, left_s - since_s))}"
    env_steps = progress.latest.get("time/env_steps")
    if env_steps is not None:
        times += f"   env steps {env_steps:,.0f}"
    lines = [Text(times), Text(f"run {_short_path(run_dir)}", style="dim")]
    if progress.keys:
        lines.append(Text(progress.keys, style="bold"))
    if message:
        lines.append(Text(" ".join(message.split()), style="italic"))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    content = Group(head, Text(""), *body, *lines)
    return Panel(content, title=title, title_align="left", border_style="cyan", width=min(width, 100))


def _grid(fields: list[tuple[str, str]], columns: int) -> RenderableType:
    """(label, value) pairs, row by row."""
    from rich.table import Table

    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in range(columns):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(justify="right", no_wrap=True, ratio=1)
    for row in range(0, len(fields), columns):
        cells: list[str] = []
        for label, value in fields[row : row + columns]:
            cells += ["  " + label if cells and label else label, value]
        if any(cells):
            grid.add_row(*cells)
    return grid


class PlainView:
    """Whole lines on a stream that is no terminal: one every few seconds, each evaluation, the last step."""

    name = "terminal"

    def __init__(
        self,
        title: str,
        run_dir: Path,
        total_steps: int,
        *,
        step: int = 0,
        stream: TextIO | None = None,
        interval_s: float = PLAIN_INTERVAL_S,
    ) -> None:
        self._progress = Progress(total_steps, step)
        self._stream = stream or sys.stdout
        self._interval_s = interval_s
        self._printed_at_s = -interval_s
        self._printed_step = step
        self._print(f"{title}: {total_steps:,} global steps, run directory {run_dir}")

    def log(self, step: int, metrics: Mapping[str, float], elapsed_s: float) -> None:
        """Print the line of `step` when it is time for one."""
        self._progress.update(step, metrics, elapsed_s)
        due = elapsed_s - self._printed_at_s >= self._interval_s
        if due or step >= self._progress.total_steps or any(tag.startswith("eval/") for tag in metrics):
            self._print_step()

    def note(self, text: str) -> None:
        """Print the message with the time of day."""
        self._print(f"[{time.strftime('%H:%M:%S')}] {text}")

    def keys(self, text: str) -> None:
        """As `View.keys`."""
        if text:
            self._print(f"keys: {text}")

    def close(self) -> None:
        """Print the last step if it was not printed."""
        if self._progress.step != self._printed_step:
            self._print_step()

    def _print_step(self) -> None:
        progress = self._progress
        self._printed_at_s, self._printed_step = progress.elapsed_s, progress.step
        digits = len(f"{progress.total_steps:,}")
        value = dict(progress.fields())
        left_s = progress.left_s()
        parts = [
            f"step {progress.step:>{digits},}/{progress.total_steps:,} {progress.fraction():4.0%}",
            f"{value['env steps/s']:>6} env/s {value['updates/s']:>6} upd/s",
            f"success {value['success train']:>5} eval {value['success eval']:>5}",
            f"return {value['return train']:>7}",
            f"alpha {value['alpha']:>7}",
            f"{clock(progress.elapsed_s):>7} left {NO_VALUE if left_s is None else clock(left_s):>7}",
        ]
        if cell := dict(progress.cell_fields()):
            [solved] = [f"{label} {text}" for label, text in cell.items() if label.startswith("success of ")]
            parts += [
                solved,
                f"by hand {cell['by hand']}",
                f"force {cell['force max N']} N",
                f"jitter p99 {cell['jitter p99 ms']} ms, missed {cell['missed']}",
                f"refused {cell['gate refused']}, stops {cell['stops']}",
                f"queue {cell['queue']}, weights {cell['weights']}",
            ]
        self._print(" | ".join(parts))

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def open_view(title: str, run_dir: Path, total_steps: int, step: int) -> View:
    """The live panel where stdout is a terminal that can move its cursor, plain lines elsewhere."""
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveView(title, run_dir, total_steps, step=step)
    return PlainView(title, run_dir, total_steps, step=step)


def short_number(value: float) -> str:
    """At most nine characters: four significant digits, `-3.21`, `0.0412`, `12,345`, `1.2e-07`, `nan`."""
    size = abs(value)
    if size >= 1e6 or (0 < size < 1e-4):
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    decimals = 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.1 or size == 0 else 5
    return f"{value:.{decimals}f}"


def clock(seconds: float) -> str:
    """`h:mm:ss`; days are written out: `2 d 03:15:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def _short_path(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
