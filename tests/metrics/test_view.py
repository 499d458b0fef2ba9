import io
from pathlib import Path

import pytest
from rich.console import Console

from rlinf.metrics import view
from rlinf.metrics.view import LiveView, PlainView, Progress, clock, draw_panel, short_number

METRICS = {
    "env/success_once": 0.4375,
    "env/return": 12.345,
    "eval/success_once": 0.95,
    "eval/return": 31.4,
    "train/sac/critic_loss": 0.01234,
    "train/sac/actor_loss": -3.2,
    "train/sac/alpha_loss": 1e-5,
    "train/sac/alpha": 0.0412,
    "train/actor/entropy": -4.2,
    "time/env_steps": 168_000.0,
    "time/env_steps_per_s": 1234.5,
    "time/updates_per_s": 103.4,
}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.000"), (0.0412, "0.04120"), (-3.2105, "-3.211"), (12.345, "12.35"), (123.45, "123.5"), (12345, "12,345"),
     (1.23e-7, "1.2e-07"), (-2.5e9, "-2.5e+09"), (float("nan"), "nan")],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (97200 + 61, "1 d 03:01:01")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_time_left_follows_the_recent_pace():
    progress = Progress(total_steps=1000)
    assert progress.left_s() is None
    for step in range(1, 101):  # a quick start of 0.1 s per step, then 10 s per step
        progress.update(step, {}, 0.1 * step)
    for step in range(101, 131):
        progress.update(step, {}, 10.0 + 10.0 * (step - 100))
    assert progress.left_s() == pytest.approx((1000 - 130) * 10.0, rel=0.01)


def test_time_left_of_a_resumed_run_does_not_count_old_steps():
    progress = Progress(total_steps=200, step=100)
    progress.update(101, {}, 5001.0)
    progress.update(102, {}, 5003.0)
    assert progress.left_s() == pytest.approx(98 * 2.0)


def panel_lines(width, metrics=METRICS, message="checkpoint written"):
    progress = Progress(total_steps=10_000)
    progress.update(1200, metrics, 100.0)
    progress.update(1234, metrics, 110.0)
    console = Console(file=io.StringIO(), width=width, height=40, force_terminal=True, color_system=None)
    console.print(draw_panel("maniskill_sac_flow_state", Path("logs/run"), progress, message, 0.0, width))
    return console.file.getvalue().splitlines()


def test_panel_shows_what_matters_in_80_columns():
    lines = panel_lines(80)
    text = "\n".join(lines)
    for part in ("maniskill_sac_flow_state", "step 1,234 of 10,000", "12%", "1,234", "103", "0.438", "0.950", "12.35",
                 "31.40", "-4.200", "0.04120", "0.01234", "-3.200", "1.0e-05", "elapsed 0:01:50", "left about 0:42:58",
                 "env steps 168,000", "logs/run", "checkpoint written"):  # fmt: skip
        assert part in text, part
    assert len(lines) <= 14
    assert "…" not in text


@pytest.mark.parametrize("width", [24, 40, 60, 80, 200])
def test_panel_never_is_wider_than_the_terminal(width):
    assert max(map(len, panel_lines(width, message="a long message " * 20))) <= width


def test_panel_keeps_its_height_before_there_are_metrics():
    assert abs(len(panel_lines(80, metrics={})) - len(panel_lines(80))) <= 1


def test_live_view_leaves_messages_above_and_the_last_state_below(tmp_path):
    console = Console(file=io.StringIO(), width=80, height=30, force_terminal=True, color_system=None)
    live = LiveView("reach", tmp_path, 10, console=console)
    live.log(10, METRICS, 5.0)
    live.note("checkpoint [bold] written")
    live.close()
    live.note("finished")
    text = console.file.getvalue()
    assert 0 < text.index("checkpoint [bold] written") < text.rindex("step 10 of 10")
    assert text.rindex("finished") > text.rindex("\x1b[?25h")  # when the cursor is visible again


CELL = {
    "env/num_episodes": 4.0,
    "env/success_once": 0.75,
    "env/interventions": 12.5,
    "env/force_max_n": 8.25,
    "env/jitter_p99_ms": 3.14,
    "env/missed_deadlines": 0.5,
    "env/gate_limited": 7.0,
    "env/gate_refused": 0.25,
    "env/stops": 0.125,
    "time/waiting_segments": 1.0,
    "time/weights_version": 12_345.0,
    "train/replay_buffer/size": 2_468.0,
    "train/demo_buffer/size": 987.0,
}


def test_the_operator_of_a_cell_sees_more():
    lines = panel_lines(80, METRICS | CELL)
    text = "\n".join(lines)
    parts = (
        *("success of", "0.75", "by hand", "12.5", "force max N", "8.2", "jitter p99 ms", "3.1", "missed"),
        *("gate limited", "7.0", "gate refused", "stops", "queue", "weights", "12,345", "2,468", "987"),
    )
    for part in parts:
        assert part in text, part
    assert len(lines) <= 20 and "…" not in text
    assert "jitter" not in "\n".join(panel_lines(80))
    for width in (24, 40, 60):
        assert max(map(len, panel_lines(width, METRICS | CELL))) <= width


def test_success_is_that_of_the_last_twenty_episodes():
    progress = Progress(total_steps=100)
    assert progress.cell_fields() == []
    for step in range(1, 11):  # ten steps of four episodes each; the first five of them without success
        progress.update(step, CELL | {"env/success_once": float(step > 5)}, float(step))
    assert progress.cell_fields()[0] == ("success of 20", "1.00")
    progress.update(11, CELL | {"env/success_once": 0.0}, 11.0)
    assert progress.cell_fields()[0] == ("success of 20", "0.80")
    progress.update(12, {"env/jitter_p99_ms": 1.0}, 12.0)  # no episode ended
    assert progress.cell_fields()[0] == ("success of 20", "0.80")


def test_keys_are_named_where_they_work(tmp_path):
    console = Console(file=io.StringIO(), width=80, height=30, force_terminal=True, color_system=None)
    live = LiveView("cell", tmp_path, 10, console=console)
    live.keys("Space stop")
    live.log(1, CELL, 1.0)
    live.close()
    assert "Space stop" in console.file.getvalue()
    stream = io.StringIO()
    plain = PlainView("cell", tmp_path, 10, stream=stream, interval_s=0.0)
    plain.keys("")
    plain.keys("Space stop")
    plain.log(1, CELL, 1.0)
    lines = stream.getvalue().splitlines()[1:]
    assert lines[0] == "keys: Space stop"
    assert lines[1].endswith(
        "success of 4 0.75 | by hand 12.5 | force 8.2 N | jitter p99 3.1 ms, missed 0.5 | refused 0.2, stops 0.1 | "
        "queue 1, weights 12,345"
    )


def test_plain_view_prints_first_evaluated_and_last_steps_and_one_in_between(tmp_path):
    stream = io.StringIO()
    plain = PlainView("reach", tmp_path, 50, stream=stream, interval_s=10.0)
    for step in range(1, 51):
        plain.log(step, METRICS if step == 7 else {"env/return": 1.0}, elapsed_s=float(step))
    plain.close()
    lines = stream.getvalue().splitlines()[1:]
    assert [int(line.split("/")[0].removeprefix("step")) for line in lines] == [1, 7, 17, 27, 37, 47, 50]
    assert len({line.index("| success") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1
    assert max(map(len, lines)) < 140


def test_plain_view_prints_the_step_at_which_a_run_was_stopped(tmp_path):
    stream = io.StringIO()
    plain = PlainView("reach", tmp_path, 50, stream=stream, interval_s=1000.0)
    for step in (1, 2, 3):
        plain.log(step, {}, elapsed_s=float(step))
    plain.close()
    assert stream.getvalue().splitlines()[-1].startswith("step  3/50")


@pytest.mark.parametrize(("tty", "term", "kind"), [(False, "xterm", PlainView), (True, "dumb", PlainView)])
def test_plain_lines_where_the_cursor_cannot_move(tmp_path, monkeypatch, tty, term, kind):
    monkeypatch.setattr(view.sys.stdout, "isatty", lambda: tty, raising=False)
    monkeypatch.setenv("TERM", term)
    assert isinstance(view.open_view("reach", tmp_path, 1, 0), kind)
