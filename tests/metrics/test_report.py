import time

import numpy as np
import pytest

from rlinf.core.errors import MissingDependency
from rlinf.metrics import report
from rlinf.metrics.journal import read_rows
from rlinf.metrics.report import Reporter


def open_reporter(run_dir, total_steps=10, backends=(), resume_step=0):
    return Reporter(
        run_dir,
        backends=backends,
        project_name="project",
        experiment_name="reach",
        config={},
        total_steps=total_steps,
        resume_step=resume_step,
    )


class Broken:
    name = "broken"

    def __init__(self):
        self.calls = 0

    def log(self, step, metrics, elapsed_s):
        self.calls += 1
        raise ValueError("no\nluck")

    def close(self):
        raise ValueError("still no luck")


def test_run_directory_after_a_run(tmp_path, capsys):
    with open_reporter(tmp_path, total_steps=2, backends=["tensorboard"]) as reporter:
        reporter.log(1, {"env/return": 1.0, "time/env_steps": 10})
        reporter.note("checkpoint written")
        reporter.log(2, {"env/return": 2.0, "eval/return": 2.5, "eval/success_once": 1.0, "time/env_steps": 20})
    assert [row["env/return"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1.0, 2.0]
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    printed = capsys.readouterr().out
    assert "checkpoint written" in printed and "step 2/2 100%" in printed and str(tmp_path) in printed


def test_failure_of_a_logger_is_told_once_and_does_not_reach_the_others(tmp_path, capsys):
    reporter, broken = open_reporter(tmp_path), Broken()
    reporter._loggers.insert(0, broken)
    for step in (1, 2, 3):
        reporter.log(step, {"env/return": 0.0})
    reporter.close()
    assert broken.calls == 3
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert capsys.readouterr().out.count("broken failed (ValueError: no luck); training goes on") == 1


def test_failing_terminal_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    reporter = open_reporter(tmp_path)

    def fail(*_):
        raise BrokenPipeError("reader went away")

    monkeypatch.setattr(reporter._view, "log", fail)
    monkeypatch.setattr(reporter._view, "note", fail)
    reporter.log(1, {})
    reporter.note("anybody there?")
    reporter.close()
    assert capsys.readouterr().err.count("terminal failed") == 1
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_logger_that_does_not_finish_is_given_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "CLOSE_TIMEOUT_S", 0.05)
    reporter, slow = open_reporter(tmp_path), Broken()
    slow.close = lambda: time.sleep(5)
    reporter._loggers.append(slow)
    began_s = time.monotonic()
    reporter.close()
    assert time.monotonic() - began_s < 2
    assert "did not finish within" in capsys.readouterr().out


def test_missing_service_ends_the_run_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingDependency, match="wandb"):
        open_reporter(tmp_path, backends=["wandb"])


def test_resumed_run_continues_record_and_clock(tmp_path):
    with open_reporter(tmp_path) as first:
        first._began_s -= 100
        for step in (1, 2, 3):
            first.log(step, {})
    with open_reporter(tmp_path, resume_step=2) as second:
        assert second.elapsed_s() >= 100
        second.log(3, {"env/return": 3.0})
    rows = list(read_rows(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["env/return"] == 3.0
    assert rows[2]["elapsed_s"] >= rows[1]["elapsed_s"] >= 100


def test_close_twice_and_without_a_step(tmp_path):
    reporter = open_reporter(tmp_path)
    reporter.close()
    reporter.close()
    assert not (tmp_path / "learning_curve.png").exists()


def test_video_lands_in_the_run_directory_and_a_bad_one_is_only_told(tmp_path, capsys):
    with open_reporter(tmp_path) as reporter:
        reporter.video("eval_1", np.zeros((3, 8, 8, 3), np.uint8), fps=10)
        reporter.video("eval_2", np.zeros((0, 8, 8, 3), np.uint8), fps=10)
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["eval_1.mp4"]
    assert "video failed (ShapeError: there are no frames" in capsys.readouterr().out


def test_learning_curve_is_not_redrawn_when_drawing_is_dear(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("rlinf.metrics.plot.plot_runs", lambda *_: drawn.append(time.sleep(0.05)))
    curve = report.LearningCurve(tmp_path)
    for step in range(10):
        curve.log(step, {"eval/return": 1.0}, 0.0)
    assert len(drawn) == 1
    curve.close()
    assert len(drawn) == 2


def test_a_final_learning_curve_that_is_drawn_is_not_drawn_again(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("rlinf.metrics.plot.plot_runs", lambda *_: drawn.append(1))
    curve = report.LearningCurve(tmp_path)
    curve.log(1, {"eval/return": 1.0}, 0.0)
    curve.close()
    assert len(drawn) == 1
