"""The benchmarks: their instruments measure, their peer computes the same, and each prints its table."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

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


def output_of(script: str, *words: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick", *words],
        cwd=cwd, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


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


def test_a_wrong_override_is_named_at_once(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "time_to_success.py"), "algorithm.gama=0.9", "--out", str(tmp_path / "r")],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean" in done.stderr
    assert "algorithm.gamma" in done.stderr


# --- every script ---------------------------------------------------------------------------------------------


def test_updates_prints_both_tables():
    out = output_of("updates.py")
    assert_fits(out.partition("\n\n")[2])
    assert "mlp: actor and 2 critics 3x256" in out
    assert "flow: d_model 96, 2 critics 3x256" in out
    assert "limit: matrix products, bf16" in out
    assert ("stable_baselines3, fp32" in out) == HAS_PEER
    assert ("(stable_baselines3 skipped" in out) != HAS_PEER


def test_replay_prints_its_tables():
    assert "stable_baselines3" in output_of("replay.py")


@pytest.mark.sim
@pytest.mark.slow
def test_env_steps_prints_its_table():
    out = output_of("env_steps.py")
    assert_fits(out.partition("\n\n")[2])
    for row in ("rlinf      1 proc, 2 envs, H=5", "as shipped 1 proc", "scene loop 1 proc", "physics    1 proc"):
        assert row in out


@pytest.mark.sim
@pytest.mark.slow
def test_frankasim_steps_prints_its_tables():
    out = output_of("frankasim_steps.py")
    for row in ("rlinf      1 proc, 16 envs, H=5", "numpy      1 proc", "mj_step    1 proc", "cheap      1 proc"):
        assert row in out


@pytest.mark.sim
@pytest.mark.slow
def test_time_to_success_runs_a_recipe_and_its_peer(tmp_path):
    peer = ["--peer", "sb3"] if HAS_PEER else []
    out = output_of("time_to_success.py", *peer, "--out", str(tmp_path / "results.jsonl"), cwd=tmp_path)
    assert "rlinf maniskill_sac_flow_state: 0 of 1 seeds" in out
    assert ("stable_baselines3: 0 of 1 seeds" in out) == HAS_PEER
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert kinds.count("run") == 1 + HAS_PEER
    assert "eval" in kinds
