"""The benchmarks: their instruments measure, their peer computes the same, and each prints its table."""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.models.embodiment.flow_policy import FlowPolicyConfig, build_flow_policy
from rlinf.models.embodiment.state_critic import StateCritic
from rlinf.models.modules.transformer import full_layout

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
WIDTH = 100
HAS_PEER = importlib.util.find_spec("stable_baselines3") is not None


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks import each other as the scripts that they are."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def output_of(script: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def output_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a script prints that is run in this process, which has imported torch already."""

    def run(script: str, *words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [script, *words])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        threads = torch.get_num_threads()
        try:
            assert (importlib.import_module(script.removesuffix(".py")).main() or 0) == code
        finally:
            torch.set_num_threads(threads)
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


def assert_fits(tables: str) -> None:
    assert [line for line in tables.splitlines() if len(line) > WIDTH] == []


# --- instruments ----------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_rates_are_units_per_second():
    from measure import Contender, in_turns

    turns = []

    def run(name: str, units: float):
        def work(budget_s: float) -> float:
            turns.append(name)
            time.sleep(budget_s)
            return units * budget_s

        return work

    results = in_turns([Contender("a", run("a", 100)), Contender("b", run("b", 200))], rounds=3, budget_s=0.05)
    assert turns == ["a", "b"] * 4
    assert 50 < min(results["a"].wall) <= max(results["a"].wall) <= 100
    assert 100 < min(results["b"].wall) <= max(results["b"].wall) <= 200
    # Sleeping costs no CPU time.
    assert min(results["a"].cpu) > 3 * max(results["a"].wall)


def test_repeat_counts_what_it_did_and_does_it_at_least_once():
    from measure import repeat

    calls = []
    assert repeat(lambda: calls.append(1), units=5)(0.01) == 5 * len(calls)
    calls.clear()
    assert repeat(lambda: calls.append(1))(0.0) == len(calls) == 1


def test_comparisons_are_medians_of_the_ratios_within_rounds(capsys):
    from measure import Contender, Rates, print_table, ratio

    results = {"ours": Rates([4.0, 30.0, 8.0], [1.0, 1.0, 1.0]), "theirs": Rates([2.0, 10.0, 4.0], [1.0, 1.0, 1.0])}
    assert ratio(results, "ours", "theirs") == 2.0
    assert ratio(results, "ours", "nobody") is None
    rows = [Contender("ours", float, peer="theirs", limit="theirs"), Contender("theirs", float)]
    print_table("title", "steps", rows, results)
    ours, theirs = capsys.readouterr().out.splitlines()[-2:]
    assert ours.split() == ["ours", "8.00", "(4.00-30.0)", "1.00", "(1.00-1.00)", "2.00", "200%"]
    assert theirs.split() == ["theirs", "4.00", "(2.00-10.0)", "1.00", "(1.00-1.00)"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_cpu_time_of_other_processes_is_counted():
    from measure import cpu_seconds, descendants

    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    family = []
    try:
        deadline = time.monotonic() + 20
        while len(family) < 2 and time.monotonic() < deadline:
            family = descendants(process.pid)
        before = cpu_seconds(family)
        while cpu_seconds(family) - before < 0.2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(family) == 2
        assert cpu_seconds(family[1:]) - cpu_seconds() >= 0.1
    finally:
        os.killpg(process.pid, 9)
        process.wait()


# --- the flow peer --------------------------------------------------------------------------------------------


def test_full_form_is_the_same_function_as_our_policy():
    from full_form import LOG_STD_RANGE, FullFlowPolicy

    torch.manual_seed(0)
    low, high = LOG_STD_RANGE
    config = FlowPolicyConfig(noise_std_head=True, d_model=16, n_head=2, log_std_min_train=low, log_std_max_train=high)
    ours = build_flow_policy(config, obs_dim=5, action_dim=3, normalizer=None)
    theirs = FullFlowPolicy(5, 3, steps=4, width=16, heads=2, layers=2)
    state = full_layout(ours.flow_actor.state_dict())
    theirs.load_state_dict({name.replace("step_noise.head", "log_std_head"): value for name, value in state.items()})
    obs, noise = torch.randn(7, 5), torch.randn(7, 5, 3)
    action, log_prob = ours.sample({"state": obs}, noise)
    same_action, same_log_prob = theirs(obs, noise)
    torch.testing.assert_close(same_action, action, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same_log_prob, log_prob, atol=1e-3, rtol=1e-4)


def test_looped_critics_are_the_same_function_as_our_ensemble():
    from full_form import LoopedCritics

    torch.manual_seed(0)
    ours = StateCritic(5, 3, hidden_dims=(8, 8), num_heads=3, activation="tanh", layer_norm=True)
    theirs = LoopedCritics(8, (8, 8), heads=3)
    with torch.no_grad():
        for part in ours.parameters():
            part.add_(0.1 * torch.randn_like(part))
        for e, head in enumerate(theirs.heads):
            for own, other in zip(ours.q.net.parameters(), head.parameters(), strict=True):
                other.copy_(own[e].T if other.dim() == 2 else own[e, 0])
    obs, action = torch.randn(7, 5), torch.randn(7, 3)
    torch.testing.assert_close(theirs(obs, action), ours({"state": obs}, action), atol=1e-5, rtol=1e-5)


# --- time to success ------------------------------------------------------------------------------------------

SUCCESSES = [0.1, 0.96, 0.97]


def trial(tmp_path: Path, code: str):
    from time_to_success import Trial

    journal = tmp_path / "run" / "metrics.jsonl"
    journal.parent.mkdir()
    command = [sys.executable, "-c", f"import json, sys, time\nfile = open({str(journal)!r}, 'a')\n{code}"]
    return Trial("rlinf made_up", 0, command, journal, tmp_path / "run.log")


def played(tmp_path: Path, code: str):
    from time_to_success import Record, play, read_command

    record = Record(tmp_path / "out" / "results.jsonl")
    options = read_command(["--minutes", "0.5", "--out", str(record.path)])
    return play(trial(tmp_path, code), options, record, runs_after=0), record


def test_a_run_is_timed_at_its_first_success_and_then_stopped(tmp_path, capsys):
    from time_to_success import print_results

    code = f"""
for i, success in enumerate({SUCCESSES}):
    row = {{"time/env_steps": 100 * i, "time/updates": 50 * i, "eval/success_once": success, "time/eval": 0.1}}
    file.write(json.dumps(row) + "\\n")
file.flush()
time.sleep(60)
"""
    result, record = played(tmp_path, code)
    assert result.reached
    assert (result.point.env_steps, result.point.updates, result.point.success) == (100, 50, 0.96)
    assert result.point.train == pytest.approx(result.point.wall - 0.2 / 60, abs=2e-3)
    assert result.point.wall < 0.4
    kinds = [json.loads(line)["kind"] for line in record.path.read_text().splitlines()]
    assert kinds == ["eval"] * 3 + ["run"]
    assert record.results() == [result]
    print_results(record.results(), 0.95)
    assert "rlinf made_up: 1 of 1 seeds" in capsys.readouterr().out


def test_a_run_that_fails_is_told_with_its_last_words_and_recorded(tmp_path, capsys):
    result, record = played(tmp_path, "print('the cube is gone'); sys.exit(3)")
    assert not result.reached
    assert "failed with exit code 3: the cube is gone" in capsys.readouterr().out
    assert record.results()[0].problem == "exit code 3: the cube is gone"


def test_the_peer_is_compared_by_medians(capsys):
    from time_to_success import PEER, Point, Result, print_results

    def result(name: str, seed: int, wall: float, reached: bool) -> Result:
        return Result(name, seed, reached, 0.97, Point(wall, wall / 2, wall, 0.5, 1000, 500, 0.97))

    rows = [result("rlinf x", seed, 5.0 + seed, True) for seed in range(3)]
    rows += [result(PEER, seed, 12.0, seed > 0) for seed in range(3)]
    print_results(rows, 0.95)
    out = capsys.readouterr().out
    assert "wall at least 2.00, train at least 2.00, cpu at least 2.00" in out
    assert ">12.0" in out
    assert_fits(out)


def test_overrides_may_stand_anywhere():
    from time_to_success import read_command

    options = read_command(["--seeds", "3", "4", "algorithm.gamma=0.9", "--minutes", "2", "runner.max_epochs=5"])
    assert options.seeds == [3, 4]
    assert options.overrides == ["algorithm.gamma=0.9", "runner.max_epochs=5"]


def test_a_wrong_override_is_named_at_once(tmp_path, output_here):
    said = output_here("time_to_success.py", "algorithm.gama=0.9", "--out", str(tmp_path / "r"), code=2)
    assert "did you mean" in said
    assert "algorithm.gamma" in said


def options_and_config(recipe: str, *words: str):
    from time_to_success import CONFIG_DIR, load_config, read_command

    options = read_command(["--recipe", recipe, "--peer", "sb3", *words])
    return options, load_config(recipe, ["profile=cpu", *options.overrides], CONFIG_DIR)


@pytest.mark.parametrize(
    ("recipe", "script", "eval_steps", "interval"),
    [
        ("maniskill_sac_mlp", "sb3_pickcube.py", "10000", 156),
        ("frankasim_ppo_mlp", "sb3_frankasim.py", "64000", 10),
    ],
)
def test_the_peer_follows_from_environment_and_algorithm(recipe, script, eval_steps, interval):
    from time_to_success import peer_trial, recipe_trial

    options, config = options_and_config(recipe)
    command = peer_trial(options, config, seed=3).command
    assert Path(command[1]).name == script
    assert ("PickCube-v1" in command) == ("pd_ee_delta_pos" in command) == (script == "sb3_pickcube.py")
    assert command[command.index("--seed") + 1] == "3"
    assert command[command.index("--eval-steps") + 1] == eval_steps
    assert f"runner.val_check_interval={interval}" in recipe_trial(options, config, seed=3).command


def test_a_given_evaluation_interval_holds_for_recipe_and_peer():
    from time_to_success import peer_trial, recipe_trial

    options, config = options_and_config("frankasim_ppo_mlp", "--eval-steps", "12800")
    assert "12800" in peer_trial(options, config, seed=0).command
    assert "runner.val_check_interval=2" in recipe_trial(options, config, seed=0).command


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("maniskill_ppo_mlp", []),
        ("reach_ppo_mlp", []),
        ("frankasim_ppo_mlp", ["env.train.gym_id=PandaPickCubeVision-v0", "env.eval.gym_id=PandaPickCubeVision-v0"]),
    ],
)
def test_a_recipe_without_a_peer_is_named(recipe, words):
    from time_to_success import peer_trial

    from rlinf.core.errors import ConfigError

    options, config = options_and_config(recipe, *words)
    with pytest.raises(ConfigError, match=f"{recipe} is neither"):
        peer_trial(options, config, seed=0)


@pytest.mark.skipif(not HAS_PEER, reason="needs Stable-Baselines3")
def test_the_peers_journal_times_learning_and_evaluation(tmp_path):
    from sb3_journal import PROGRESS_STEPS, Journal

    class Model:
        num_timesteps, _n_updates = 0, 0

    steps, evaluated = PROGRESS_STEPS // 2, []
    model = Model()
    journal = Journal(
        tmp_path / "journal.jsonl", lambda: evaluated.append(1) or 0.5, eval_steps=3 * steps, updates_per_count=16
    )
    journal.model = model
    for _ in range(4):
        journal.on_rollout_start()
        model.num_timesteps += steps
        journal.on_step()
        journal.on_rollout_end()
        time.sleep(0.01)
        model._n_updates += 8
    journal.on_training_end()
    rows = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    # One line tells of progress, one of the evaluation; both count the updates on what was collected before.
    assert [row["time/env_steps"] for row in rows] == [2 * steps, 3 * steps]
    assert [row["time/updates"] for row in rows] == [2 * 128, 3 * 128]
    assert [row.get("eval/success_once") for row in rows] == [None, 0.5]
    assert 0.02 <= rows[0]["time/actor_training"] < 1
    assert 0.01 <= rows[1]["time/actor_training"] < 1
    assert len(evaluated) == 1


@pytest.mark.skipif(not HAS_PEER, reason="needs Stable-Baselines3")
def test_peers_are_evaluated_in_the_same_episodes_every_time():
    from sb3_journal import EVALUATION_SEED, success_once

    class Env:
        """Succeeds in its second step, and only then, in the episodes whose seeds are even."""

        def reset(self, seed: int):
            seeds.append(seed)
            self.seed, self.steps = seed, 0
            return np.zeros(2), {}

        def step(self, action):
            assert action.shape == (1,)
            self.steps += 1
            return np.zeros(2), 0.0, False, False, {"success": self.steps == 2 and self.seed % 2 == 0}

    seeds: list[int] = []
    for _ in range(2):
        assert success_once(lambda obs: obs[:, :1], [Env(), Env()], episodes=5, episode_steps=3) == 3 / 5
    assert seeds == [EVALUATION_SEED + i for i in range(5)] * 2


@pytest.mark.sim
@pytest.mark.skipif(not HAS_PEER, reason="needs Stable-Baselines3")
def test_the_peer_on_franka_sim_has_the_recipes_settings():
    from sb3_frankasim import NUM_ENVS, build
    from time_to_success import CONFIG_DIR, load_config

    model, recipe = build(num_envs=4, seed=1), load_config("frankasim_ppo_mlp", ["profile=cpu"], CONFIG_DIR)
    algorithm, actor, env = recipe.algorithm, recipe.actor, recipe.env.train
    assert (NUM_ENVS, model.n_steps) == (env.total_num_envs, env.max_steps_per_rollout_epoch)
    assert (model.batch_size, model.n_epochs) == (actor.global_batch_size, algorithm.update_epoch)
    assert (model.gamma, model.gae_lambda) == (algorithm.gamma, algorithm.gae_lambda)
    assert model.clip_range(1.0) == algorithm.clip_ratio_low == algorithm.clip_ratio_high
    assert (model.ent_coef, model.target_kl) == (algorithm.entropy_bonus, algorithm.target_kl)
    assert model.normalize_advantage == algorithm.normalize_advantages
    assert (model.lr_schedule(1.0), model.max_grad_norm) == (actor.optim.lr, actor.optim.clip_grad)
    networks = model.policy.mlp_extractor
    for net, hidden in (
        (networks.policy_net, actor.model.hidden_dims),
        (networks.value_net, actor.model.value_hidden_dims),
    ):
        assert tuple(layer.out_features for layer in net[::2]) == hidden
        assert {type(layer).__name__.lower() for layer in net[1::2]} == {actor.model.activation}
    assert model.policy.log_std.tolist() == [actor.model.log_std_init] * 4
    assert model.get_vec_normalize_env().norm_obs == actor.model.normalize_obs
    assert not model.get_vec_normalize_env().norm_reward


# --- every script ---------------------------------------------------------------------------------------------


def test_updates_prints_both_tables():
    out = output_of("updates.py")
    assert_fits(out.partition("\n\n")[2])
    assert "mlp: actor and 2 critics 3x256" in out
    assert "flow: d_model 96, 2 critics 3x256" in out
    assert "limit: matrix products, bf16" in out
    assert ("sb3, torch's fp32" in out) == HAS_PEER
    assert ("(stable_baselines3 skipped" in out) != HAS_PEER


def test_replay_prints_its_tables(output_here):
    assert "stable_baselines3" in output_here("replay.py", "--quick")


def test_a_run_over_processes_ends_cleanly(output_here):
    pytest.importorskip("ray")
    assert "ray     1 of 1 clean" in output_here("clean_ends.py", "--quick", "--backends", "ray")


def test_a_run_that_does_not_end_in_time_is_told_with_what_it_left(monkeypatch):
    import clean_ends

    code = "import subprocess, sys, time; subprocess.Popen(['sleep', '99'], start_new_session=True); time.sleep(60)"
    monkeypatch.setattr(clean_ends, "LEAVE_S", 0.2)
    monkeypatch.setattr(clean_ends.subprocess, "Popen", partial(start_instead, subprocess.Popen, code))
    late, code, checkpoint, left = clean_ends.end_of("local", "finished", 1.0).problems
    assert late == "still there after 1 s" and code.startswith("exit code -9") and checkpoint == "no checkpoint"
    assert left == "left behind: sleep 99 "


def start_instead(popen, code: str, command: list[str], **how) -> subprocess.Popen:
    return popen([sys.executable, "-c", code], **how)


@pytest.mark.sim
@pytest.mark.slow
def test_env_steps_prints_its_table(output_here):
    out = output_here("env_steps.py", "--quick")
    assert_fits(out.partition("\n\n")[2])
    for row in ("rlinf      1 proc, 2 envs, H=5", "as shipped 1 proc", "scene loop 1 proc", "physics    1 proc"):
        assert row in out


@pytest.mark.sim
@pytest.mark.slow
def test_frankasim_steps_prints_its_tables(output_here):
    out = output_here("frankasim_steps.py", "--quick")
    for row in ("rlinf      1 proc, 16 envs, H=5", "numpy      1 proc", "mj_step    1 proc", "cheap      1 proc"):
        assert row in out


@pytest.mark.sim
@pytest.mark.slow
def test_libero_steps_prints_its_table(output_here):
    out = output_here("libero_steps.py", "--quick")
    assert_fits(out.partition("\n\n")[2])
    assert "rlinf      1 proc, 2 envs, H=5" in out


@pytest.mark.sim
@pytest.mark.slow
def test_time_to_success_runs_a_recipe_and_its_peer(tmp_path, output_here):
    recipe = "maniskill_sac_flow_state"
    words = ["--recipe", recipe, "--out", str(tmp_path / "results.jsonl"), *(["--peer", "sb3"] if HAS_PEER else [])]
    out = output_here("time_to_success.py", "--quick", *words)
    assert f"rlinf {recipe}: 0 of 1 seeds" in out
    assert ("stable_baselines3: 0 of 1 seeds" in out) == HAS_PEER
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("run") == 1 + HAS_PEER
    assert {row["name"] for row in rows if row["kind"] == "eval"} == {row["name"] for row in rows}


@pytest.mark.sim
@pytest.mark.slow
def test_the_peer_on_franka_sim_learns_and_is_evaluated(tmp_path, output_here):
    pytest.importorskip("stable_baselines3")
    journal = tmp_path / "peer.jsonl"
    words = ["--envs", "4", "--journal", str(journal), "--eval-steps", "16", "--episodes", "2", "--steps", "64"]
    output_here("sb3_frankasim.py", *words)
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert rows[-1]["time/updates"] > 0
    assert any("eval/success_once" in row for row in rows)
