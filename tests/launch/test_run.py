"""Whole runs on the reach task, through YAML: training, resuming, evaluating, and what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from rlinf.core.errors import CheckpointError, ConfigError, DataError, MissingDependency
from rlinf.core.types import Trajectory
from rlinf.data.demos import DemoMeta, write_demos
from rlinf.envs.reach import ReachWorlds
from rlinf.launch import crew, machine
from rlinf.launch.config import Root
from rlinf.launch.machine import Neighbours
from rlinf.launch.parse import load_config
from rlinf.launch.play import play_run
from rlinf.launch.run import evaluate_run, run_directory, train
from rlinf.runners.checkpoint import find
from rlinf.workers.state_files import load_state, load_weights
from tests.launch.conftest import CONFIG_DIR


def load(folder: Path, *overrides: str) -> Root:
    return load_config("reach", overrides, folder, has_gpu=lambda: False)


def journal(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_equal_trees(one: object, other: object, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal_trees(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for position, pair in enumerate(zip(one, other, strict=True)):
            assert_equal_trees(*pair, path=f"{path}/{position}")
    elif isinstance(one, torch.Tensor | np.ndarray):
        assert np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True), path
    else:
        assert one == other, path


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    one, other = find(one), find(other)
    for name in ("learner.pt", "workers.pt"):
        assert_equal_trees(load_state(one / name), load_state(other / name), name)
    assert_equal_trees(load_weights(one / "model.safetensors")[1], load_weights(other / "model.safetensors")[1])
    arrays = sorted(path.relative_to(one) for path in (one / "buffers").rglob("*.npy"))
    assert arrays
    for path in arrays:
        assert (one / path).read_bytes() == (other / path).read_bytes(), path


# ---- asynchronous


def test_an_asynchronous_run_trains_evaluates_and_resumes(reach_configs: Path, tmp_path: Path) -> None:
    root = load(reach_configs, "runner.asynchronous=True", "algorithm.replay_buffer.samples_per_insert=64")
    assert train(root) == 0
    run_dir = run_directory(root)
    rows = journal(run_dir)
    assert [row["step"] for row in rows if "time/updates" in row] == [1, 2, 3, 4, 5, 6]
    limit = 64 / root.actor.global_batch_size
    assert all(row["time/updates"] <= limit * row["time/env_steps"] for row in rows if "time/updates" in row)
    assert rows[-1]["eval/weights_version"] == rows[-1]["time/updates"]
    again = load(
        reach_configs,
        "runner.asynchronous=True",
        f"runner.resume_dir={run_dir}",
        "runner.max_epochs=8",
        f"runner.logger.log_path={tmp_path / 'again'}",
    )
    assert train(again) == 0
    assert {row["step"] for row in journal(run_directory(again))} >= {7, 8}


def test_ppo_is_refused_to_run_asynchronously() -> None:
    with pytest.raises(ConfigError, match=r"runner\.asynchronous: PPO learns from what the present policy did"):
        load_config("reach_ppo_mlp", ["runner.asynchronous=True"], CONFIG_DIR)


def test_weights_are_synchronised_every_few_steps(reach_configs: Path) -> None:
    root = load(reach_configs, "runner.weight_sync_interval=3", "runner.overlap=False", "runner.val_check_interval=-1")
    assert train(root) == 0
    updates = root.algorithm.update_epoch
    stale = [row["train/staleness/max"] for row in journal(run_directory(root))]
    learned = [row["time/updates"] for row in journal(run_directory(root))]
    assert stale[-1] > 0
    assert max(stale) <= 3 * updates <= max(learned)


# ---- playing


@pytest.mark.parametrize("chosen", ["run", "checkpoint"])
def test_play_films_episodes_of_a_checkpoint(
    reach_configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    root = load(reach_configs)
    assert train(root) == 0
    run_dir = run_directory(root)
    pictures = np.zeros((3, 32, 32, 3), np.uint8)
    monkeypatch.setattr(ReachWorlds, "render", lambda task: pictures)
    path = run_dir if chosen == "run" else find(run_dir)
    metrics = play_run(path, num_envs=3, seed=5, stochastic=False, window=False, output=tmp_path / "film.mp4")
    assert metrics["eval/num_episodes"] == 3
    assert (tmp_path / "film.mp4").stat().st_size > 0
    monkeypatch.setattr(ReachWorlds, "render", lambda task: None)
    with pytest.raises(ConfigError, match="draws no pictures"):
        play_run(path, num_envs=3, seed=5, stochastic=True, window=False, output=None)


def test_play_says_before_anything_else_that_there_is_no_window(
    reach_configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    with pytest.raises(MissingDependency, match="leave out --window and open the mp4"):
        play_run(Path("nowhere"), num_envs=1, seed=None, stochastic=False, window=True, output=None)


# ---- training and resuming


def test_a_run_leaves_its_record_and_a_picture(reach_configs: Path) -> None:
    root = load(reach_configs)
    assert train(root) == 0
    run_dir = run_directory(root)
    assert Root.model_validate(yaml.safe_load((run_dir / "config.yaml").read_text())) == root
    assert json.loads((run_dir / "provenance.json").read_text())["seed"] == 0
    assert (run_dir / "learning_curve.png").stat().st_size > 0
    assert find(run_dir).name == "global_step_6"
    rows = journal(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    tags = set().union(*rows)
    assert {
        "env/success_once",
        "env/return",
        "env/episode_len",
        "env/reward",
        "eval/success_once",
        "train/sac/critic_loss",
        "train/critic/grad_norm",
        "train/sac/actor_loss",
        "train/actor/entropy",
        "train/actor/grad_norm",
        "train/sac/alpha_loss",
        "train/sac/alpha",
        "train/alpha/grad_norm",
        "train/replay_buffer/size",
        "train/replay_buffer/max_reward",
        "train/replay_buffer/min_reward",
        "train/replay_buffer/mean_reward",
        "train/replay_buffer/std_reward",
        "train/replay_buffer/utilization",
        "time/step",
        "time/env_steps_per_s",
        "time/updates_per_s",
    } <= tags
    assert all("eval/success_once" in row for row in rows if row["step"] in (3, 6))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("model", ["mlp_policy", "flow_policy"])
def test_a_resumed_run_equals_one_that_never_stopped(
    reach_configs: Path, tmp_path: Path, model: str, overlap: bool
) -> None:
    """The replay buffer has wrapped round by then: 150 rows for 144 transitions and the ends of episodes."""
    common = (f"model@actor.model={model}", f"runner.overlap={overlap}", "rollout.pipeline_stage_num=2")
    whole = load(reach_configs, *common, f"runner.logger.log_path={tmp_path}/whole")
    half = load(reach_configs, *common, f"runner.logger.log_path={tmp_path}/half", "runner.max_epochs=3")
    assert train(whole) == train(half) == 0
    assert_equal_checkpoints(tmp_path / "whole/reach/checkpoints/global_step_3", tmp_path / "half/reach")
    rest = load(
        reach_configs,
        *common,
        f"runner.logger.log_path={tmp_path}/half",
        f"runner.resume_dir={tmp_path}/half/reach",
    )
    assert train(rest) == 0
    assert_equal_checkpoints(tmp_path / "whole/reach", tmp_path / "half/reach")
    for one, other in zip(journal(tmp_path / "whole/reach"), journal(tmp_path / "half/reach"), strict=True):
        timeless = {tag for tag in one if not tag.startswith("time/") and tag != "elapsed_s"}
        assert {tag: one[tag] for tag in timeless} == {tag: other[tag] for tag in timeless}


def test_another_seed_learns_something_else(reach_configs: Path, tmp_path: Path) -> None:
    states = []
    for seed in (0, 0, 1):
        root = load(
            reach_configs,
            f"runner.seed={seed}",
            "runner.max_epochs=1",
            "runner.val_check_interval=-1",
            f"runner.logger.log_path={tmp_path}/{len(states)}",
        )
        assert train(root) == 0
        states.append(load_weights(find(run_directory(root)) / "model.safetensors")[1])
    assert_equal_trees(states[0], states[1])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_weights_alone_start_a_fresh_run(reach_configs: Path, tmp_path: Path) -> None:
    assert train(load(reach_configs)) == 0
    first = find(tmp_path / "logs/reach")
    root = load(
        reach_configs,
        f"runner.logger.log_path={tmp_path}/second",
        f"runner.ckpt_path={first}",
        "runner.max_epochs=1",
        "algorithm.replay_buffer.min_buffer_size=100",
    )
    assert train(root) == 0
    second = find(run_directory(root))
    # Nothing was learned yet, but what was seen has gone into the running statistics of the observations.
    before, after = load_weights(first / "model.safetensors")[1], load_weights(second / "model.safetensors")[1]
    learned = [name for name in before if not name.startswith("normalizer.")]
    assert learned
    assert all(torch.equal(before[name], after[name]) for name in learned)
    assert journal(run_directory(root))[0]["step"] == 1


def test_a_signal_saves_and_gives_its_exit_code(reach_configs: Path) -> None:
    root = load(reach_configs, "runner.max_epochs=100000", "runner.save_interval=-1", "runner.val_check_interval=-1")
    run_dir = run_directory(root)

    def interrupt() -> None:
        while not (run_dir / "metrics.jsonl").is_file() or len(journal(run_dir)) < 3:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert train(root) == 128 + signal.SIGTERM
    assert int(find(run_dir).name.removeprefix("global_step_")) >= 3


def test_the_script_prints_one_line_and_the_code_2_for_a_mistake(reach_configs: Path) -> None:
    script = CONFIG_DIR.parent / "train.py"
    command = [sys.executable, script, "--config-path", reach_configs, "--config-name", "reach", "runner.sed=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: configuration 'reach' has 1 problem:",
        "  runner.sed: unknown key; did you mean runner.seed?   [command line: runner.sed=1]",
    ]


@pytest.mark.parametrize("script", ["train.py", "record_demos.py"])
def test_an_option_is_not_guessed_from_its_beginning(script: str) -> None:
    command = [sys.executable, CONFIG_DIR.parent / script, "--config-nam", "reach_sac_mlp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "--config-name" in done.stderr


# ---- evaluation


def test_a_run_can_be_evaluated_later_and_stays_as_it_was(reach_configs: Path, tmp_path: Path) -> None:
    assert train(load(reach_configs)) == 0
    run_dir = tmp_path / "logs/reach"
    before = (run_dir / "metrics.jsonl").read_bytes()
    metrics = evaluate_run(run_dir)
    last = journal(run_dir)[-1]
    assert metrics == {tag: last[tag] for tag in metrics}
    assert metrics["eval/num_episodes"] == 2
    more = evaluate_run(run_dir, ["env.eval.total_num_envs=3", "env.eval.rollout_epoch=2"])
    assert more["eval/num_episodes"] == 6
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_how_a_run_was_started_says_nothing_about_its_evaluation(reach_configs: Path, tmp_path: Path) -> None:
    assert train(load(reach_configs)) == 0
    root = load(
        reach_configs,
        f"runner.logger.log_path={tmp_path}/second",
        f"runner.ckpt_path={tmp_path}/logs/reach/checkpoints/latest",
        "runner.max_epochs=2",
    )
    assert train(root) == 0
    run_dir = run_directory(root)
    kept = run_dir / "config.yaml"
    wide = yaml.safe_load(kept.read_text())
    wide["cluster"]["component_placement"] = "env: 0:0-7; rollout: 0; actor: 0"  # eight processes never share two rows
    kept.write_text(yaml.safe_dump(wide))
    metrics = evaluate_run(run_dir)
    assert metrics == {tag: journal(run_dir)[-1][tag] for tag in metrics}, "its own last weights, in one process"


def test_only_eval_evaluates_once(reach_configs: Path, tmp_path: Path) -> None:
    assert train(load(reach_configs)) == 0
    last = journal(tmp_path / "logs/reach")[-1]
    root = load(
        reach_configs,
        "runner.only_eval=True",
        f"runner.ckpt_path={tmp_path}/logs/reach/checkpoints/latest",
        f"runner.logger.log_path={tmp_path}/evaluation",
    )
    assert train(root) == 0
    [row] = journal(run_directory(root))
    assert row["eval/return"] == last["eval/return"]
    assert not (run_directory(root) / "checkpoints").exists()


# ---- prior data


def record(folder: Path, chunk: int = 1, state_dim: int = 2) -> Path:
    t, n = 6, 3
    flags = torch.zeros(t, n, chunk, dtype=torch.bool)
    trajectory = Trajectory(
        obs={"state": torch.rand(t + 1, n, state_dim)},
        last_obs={"state": torch.zeros(0, state_dim)},
        last_index=torch.zeros(0, 2, dtype=torch.int64),
        decision=torch.zeros(t, n, chunk),
        action=torch.zeros(t, n, chunk, 1),
        reward=torch.ones(t, n, chunk),
        terminated=flags,
        truncated=flags[..., 0],
        intervened=flags,
        valid=~flags[..., 0],
    )
    meta = DemoMeta("reach", "none", 1, {"state": (state_dim,)}, {"state": "float32"}, "a test")
    write_demos(str(folder), [trajectory], meta)
    return folder


def test_demonstrations_are_counted_saved_and_resumed(reach_configs: Path, tmp_path: Path) -> None:
    demos = record(tmp_path / "demos")
    root = load(reach_configs, f"algorithm.demo_buffer={{load_path: {demos}}}", "runner.max_epochs=2")
    assert train(root) == 0
    row = journal(run_directory(root))[-1]
    assert row["train/demo_buffer/size"] == 18
    assert row["train/demo_buffer/mean_reward"] == 1
    again = load(
        reach_configs,
        f"algorithm.demo_buffer={{load_path: {demos}}}",
        f"runner.resume_dir={run_directory(root)}",
        "runner.max_epochs=3",
    )
    assert train(again) == 0


def test_demonstrations_of_another_task_are_refused(reach_configs: Path, tmp_path: Path) -> None:
    demos = record(tmp_path / "demos", state_dim=5)
    with pytest.raises(DataError, match=r"'state' is float32 \[5\], the environment's is float32 \[2\]"):
        train(load(reach_configs, f"algorithm.demo_buffer={{load_path: {demos}}}"))


def test_demonstrations_with_other_chunks_are_refused(reach_configs: Path, tmp_path: Path) -> None:
    demos = record(tmp_path / "demos", chunk=2)
    with pytest.raises(DataError, match="have 2 actions per decision and"):
        train(load(reach_configs, f"algorithm.demo_buffer={{load_path: {demos}}}"))


def test_a_missing_demo_folder_is_named(reach_configs: Path, tmp_path: Path) -> None:
    missing = f"algorithm.demo_buffer={{load_path: {tmp_path}/nowhere}}"
    with pytest.raises(DataError, match=r"demo_buffer\.load_path: .*nowhere is no directory.*/record_demos\.sh RECIPE"):
        train(load(reach_configs, missing))


# ---- what is refused


def test_a_directory_that_holds_a_run_is_not_overwritten(reach_configs: Path, tmp_path: Path) -> None:
    root = load(reach_configs, "runner.max_epochs=1")
    assert train(root) == 0
    before = (tmp_path / "logs/reach/metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run; choose another .*runner\.resume_dir="):
        train(root)
    assert (tmp_path / "logs/reach/metrics.jsonl").read_bytes() == before
    shutil.rmtree(tmp_path / "logs/reach/checkpoints")
    with pytest.raises(ConfigError, match="or remove it: it has no checkpoint"):
        train(root)


def test_a_run_that_failed_before_it_began_leaves_its_directory_free(reach_configs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        train(load(reach_configs, f"algorithm.demo_buffer={{load_path: {tmp_path}/nowhere}}"))
    assert train(load(reach_configs, "runner.max_epochs=1")) == 0
    assert [row["step"] for row in journal(tmp_path / "logs/reach")] == [1]


def test_a_checkpoint_of_another_model_is_refused_and_the_run_keeps_its_record(
    reach_configs: Path, tmp_path: Path
) -> None:
    assert train(load(reach_configs, "runner.max_epochs=1")) == 0
    run_dir = tmp_path / "logs/reach"
    before = (run_dir / "config.yaml").read_bytes()
    wide = ("actor.model.hidden_dims=[8]", f"runner.resume_dir={run_dir}")
    with pytest.raises(CheckpointError, match=r"hidden_dims is \[16\] there and \[8\] here\. Resume with") as caught:
        train(load(reach_configs, *wide))
    assert str(run_dir) in str(caught.value) and "does not fit this configuration" in str(caught.value)
    flow = ("model@actor.model=flow_policy", f"runner.resume_dir={run_dir}")
    with pytest.raises(CheckpointError, match="model_type is mlp_policy there and") as caught:
        train(load(reach_configs, *flow))
    assert len(str(caught.value)) < 600
    assert (run_dir / "config.yaml").read_bytes() == before
    with pytest.raises(
        CheckpointError, match=r"do not fit actor\.model: net\.0\.weight is \[16, 2\] there and \[8, 2\]"
    ):
        evaluate_run(run_dir, ["actor.model.hidden_dims=[8]"])


def test_a_missing_checkpoint_is_named_before_anything_is_made(reach_configs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        train(load(reach_configs, f"runner.resume_dir={tmp_path}/nowhere"))
    assert not (tmp_path / "logs").exists()


def test_a_directory_without_a_run_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        evaluate_run(tmp_path)


def test_the_gpu_profile_needs_a_gpu(reach_configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependency, match="profile=gpu, but torch sees no CUDA"):
        train(load(reach_configs, "profile=gpu"))


@pytest.mark.parametrize(("key", "size"), [("obs_dim", 2), ("action_dim", 1)])
def test_expected_sizes_are_compared_with_the_environment(reach_configs: Path, key: str, size: int) -> None:
    with pytest.raises(ConfigError, match=f"actor.model.{key} is 7, but the environment has {size}; write {size}"):
        train(load(reach_configs, f"actor.model.{key}=7"))


def test_environments_are_closed_when_the_rest_cannot_be_built(
    reach_configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    make_env = crew.make_env

    def watched(*arguments: object, **keywords: object) -> object:
        env = make_env(*arguments, **keywords)
        close = env.close
        monkeypatch.setattr(env, "close", lambda: (closed.append(env), close()))
        return env

    monkeypatch.setattr(crew, "make_env", watched)
    with pytest.raises(ConfigError):
        train(load(reach_configs, "actor.model.obs_dim=7", "rollout.pipeline_stage_num=2"))
    assert len(closed) == 2


# ---- numbers that follow from the machine


@pytest.mark.parametrize(("cores", "envs", "workers"), [(2, 32, 2), (3, 32, 2), (16, 6, 6), (4, 5, 1), (1, 8, 1)])
def test_auto_workers_share_environments_evenly(
    monkeypatch: pytest.MonkeyPatch, cores: int, envs: int, workers: int
) -> None:
    monkeypatch.setattr(machine, "num_cores", lambda: cores)
    env = load_config("maniskill_sac_mlp", ["profile=cpu"], CONFIG_DIR).env.train
    assert machine.num_simulator_processes(env, envs) == workers


def test_auto_threads_leave_cores_to_simulators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "num_cores", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def threads(*overrides: str) -> int:
        fixed = ["profile=cpu", "env.train.total_num_envs=32", "runner.overlap=True", "actor.num_threads=auto"]
        return machine.num_learner_threads(load_config("maniskill_sac_mlp", [*fixed, *overrides], CONFIG_DIR))

    assert threads("env.train.num_workers=4") == 1
    assert threads("env.train.num_workers=1") == 2  # at most half of all
    assert threads("env.train.num_workers=auto") == 2  # three cores could step 32 environments: two processes do
    assert threads("env.train.num_workers=auto", "runner.overlap=False") == 2
    assert threads("actor.num_threads=3") == 3


@pytest.mark.parametrize(
    ("here", "threads", "cores"),
    [
        (Neighbours(envs=1, learners=1, all_envs=1), 4, 15),
        (Neighbours(envs=0, learners=1, all_envs=2), 8, 15),  # the environments are on other machines
        (Neighbours(envs=2, learners=0, all_envs=2), 4, 8),  # the learner is on another machine
        (Neighbours(envs=2, learners=2, all_envs=2), 2, 7),
        (Neighbours(envs=1, learners=1, all_envs=2), 4, 15),  # half of the simulators are elsewhere
        (Neighbours(envs=24, learners=24, all_envs=24), 1, 1),
    ],
)
def test_cores_are_shared_by_the_processes_of_the_same_machine(
    monkeypatch: pytest.MonkeyPatch, here: Neighbours, threads: int, cores: int
) -> None:
    monkeypatch.setattr(machine, "num_cores", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fixed = ["profile=cpu", "runner.overlap=True", "actor.num_threads=auto", "env.train.num_workers=auto"]
    config = load_config("maniskill_sac_mlp", [*fixed, "env.train.total_num_envs=24"], CONFIG_DIR)
    assert machine.cores_for_training_envs(config, here) == cores
    assert machine.num_learner_threads(config, here) == threads


@pytest.mark.parametrize(
    ("overrides", "cores"),
    [([], 3), (["runner.overlap=False"], 4), (["profile=gpu"], 4)],
)
def test_a_learner_on_the_cpu_gets_a_core_for_itself(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], cores: int
) -> None:
    monkeypatch.setattr(machine, "num_cores", lambda: 4)
    config = load_config("maniskill_sac_mlp", ["profile=cpu", *overrides], CONFIG_DIR)
    assert machine.cores_for_training_envs(config) == cores
