import json
import math

import numpy as np
import pytest

from rlinf.core.errors import DataError
from rlinf.metrics.journal import MetricsFile
from rlinf.metrics.plot import _align, _running_mean, plot_runs, read_run, recipe_name


def make_run(run_dir, steps=60, recipe=None, env_steps=True):
    run_dir.mkdir(parents=True)
    journal = MetricsFile(run_dir)
    for step in range(1, steps + 1):
        metrics = {"env/success_once": step / steps, "env/return": float(step)}
        if env_steps:
            metrics["time/env_steps"] = 100.0 * step
        if step % 10 == 0:
            metrics |= {"eval/success_once": step / steps, "eval/return": 2.0 * step}
        journal.log(step, metrics, elapsed_s=30.0 * step)
    journal.close()
    if recipe is not None:
        (run_dir / "provenance.json").write_text(json.dumps({"recipe": recipe}))
    return run_dir


def legend_of(monkeypatch, run_dirs, path):
    texts = []
    from matplotlib.figure import Figure

    legend = Figure.legend
    monkeypatch.setattr(
        Figure,
        "legend",
        lambda self, handles, **options: (
            texts.extend(handle.get_label() for handle in handles), legend(self, handles=handles, **options)
        ),
    )  # fmt: skip
    plot_runs(run_dirs, path)
    return texts


def test_curves_of_a_run(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=20))
    assert run.axes["env steps"][-1] == 2000
    assert run.axes["minutes"][-1] == 10
    assert np.isfinite(run.values["eval/return"]).nonzero()[0].tolist() == [9, 19]
    assert run.values["eval/return"][19] == 40


def test_global_steps_stand_in_for_env_steps(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=20, env_steps=False))
    assert list(run.axes) == ["global steps", "minutes"]


def test_runs_that_differ_in_their_seed_become_one_curve(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / f"pick-seed{seed}") for seed in (1, 2)] + [make_run(tmp_path / "other")]
    texts = legend_of(monkeypatch, runs, tmp_path / "out.png")
    assert texts == ["pick (2 runs: mean, lowest to highest)", "other", "evaluation", "training"]


def test_runs_of_one_name_and_another_configuration_stay_apart(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / folder / "pick", recipe=folder) for folder in ("gamma08", "gamma09")]
    texts = legend_of(monkeypatch, runs, tmp_path / "out.png")
    assert texts[:2] == ["gamma08", "gamma09"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("pick-seed3", "pick"),
        ("pick_s12", "pick"),
        ("pick_seed=4", "pick"),
        ("pick_cubes3", "pick_cubes3"),
        ("s1", "s1"),
    ],
)
def test_recipe_names(tmp_path, folder, name):
    assert recipe_name(tmp_path / folder) == name


def test_picture_of_a_run_whose_last_line_was_cut(tmp_path):
    run_dir = make_run(tmp_path / "run")
    journal = run_dir / "metrics.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    plot_runs([run_dir], tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "run"]


def test_run_without_evaluation_and_with_nan_can_be_drawn(tmp_path):
    journal = MetricsFile(tmp_path)
    journal.log(1, {"env/return": math.nan, "time/env_steps": 5}, 1.0)
    journal.close()
    plot_runs([tmp_path], tmp_path / "out.svg")
    assert "<svg" in (tmp_path / "out.svg").read_text()


def test_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(DataError, match=r"is not a run directory: it holds no metrics\.jsonl"):
        plot_runs([tmp_path], tmp_path / "out.png")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DataError, match="holds no finished step yet"):
        plot_runs([tmp_path], tmp_path / "out.png")


def test_seeds_are_averaged_where_all_of_them_have_data():
    x, y = _align([(np.array([0.0, 10.0]), np.array([0.0, 1.0])), (np.array([5.0, 20.0]), np.array([1.0, 1.0]))])
    assert (x[0], x[-1]) == (5.0, 10.0)
    assert y[:, 0].tolist() == [0.5, 1.0]
    assert y[:, -1].tolist() == [1.0, 1.0]


def test_running_mean_of_a_line_is_the_line():
    line = np.linspace(3.0, 7.0, 200)
    assert _running_mean(line)[10:-10] == pytest.approx(line[10:-10])
    assert _running_mean(line)[0] == pytest.approx(line[:4].mean())


def test_a_baseline_is_a_level_at_its_last_evaluation(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    levels = []
    draw = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **style: (levels.append(y), draw(self, y, **style)))
    clone = make_run(tmp_path / "clone", steps=20, env_steps=False)
    silent = make_run(tmp_path / "silent", steps=5)
    plot_runs([make_run(tmp_path / "run")], tmp_path / "out.png", baselines=[clone, silent])
    assert levels == [1.0, 1.0, 40.0, 40.0], "success and return, over env steps and minutes; nothing that is not there"
    assert (tmp_path / "out.png").stat().st_size > 10_000
