"""From a placement to processes: seats, layout, and a run of the seed's layout over sixteen accelerators."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from rlinf.core.errors import ConfigError, ProcessDied
from rlinf.core.ranks import OneRank
from rlinf.launch import run
from rlinf.launch.machine import Neighbours
from rlinf.launch.parse import load_config
from rlinf.launch.processes import layout_of, nodes_of, seats_of
from rlinf.launch.run import train
from rlinf.runners.checkpoint import find, verify
from rlinf.runtime.cluster import Machine
from rlinf.runtime.placement import NodeGroup, make_plan
from tests.fakes import CountingActor, CountingAlgorithm, CountingEnv, build_crew_on

CONFIG_DIR = Path(__file__).resolve().parents[2] / "examples/embodiment/config"
MACHINES = [Machine(f"id {i}", f"gpu{i}", f"10.0.0.{i}", 16, 8) for i in range(2)]
HYBRID = {"env": "0-7", "rollout": "8-15", "actor": "0-15"}


def plan_of(placement, stages, machines=MACHINES, groups=(), accelerators=True):
    plan = make_plan(placement, nodes_of(machines, accelerators=accelerators), groups)
    hosts = plan.hosts(stages)
    return hosts, seats_of(hosts, machines), layout_of(plan, hosts, stages)


def test_the_hybrid_layout_of_sixteen_accelerators():
    hosts, seats, layout = plan_of(HYBRID, stages=2)
    assert len(hosts) == len(seats) == 32
    places = [(seat.node_id, seat.devices) for seat in seats]
    assert [places[host] for host in layout.env] == [("id 0", (i,)) for i in range(8)]
    assert [places[host] for host in layout.rollout] == [("id 1", (i,)) for i in range(8)]
    assert [places[host] for host in layout.learner] == [(f"id {i // 8}", (i % 8,)) for i in range(16)]
    assert {layout.answerer((rank, stage)) for rank in range(8) for stage in range(2)} == set(range(8))
    assert sorted(r for source in layout.learned_by.values() for r in source) == list(range(16))
    assert {seat.ip for seat in seats} == {"10.0.0.0", "10.0.0.1"}
    assert layout.beside(layout.env[0]) == Neighbours(envs=8, learners=8, all_envs=8)
    assert layout.beside(layout.learner[8]) == Neighbours(envs=0, learners=8, all_envs=8), "on the other machine"
    assert layout.describe() == "ray backend with 32 processes (8 env, 8 rollout, 16 actor)"


def test_env_and_policy_on_one_device_share_a_process():
    hosts, seats, layout = plan_of({"env,rollout,actor": "all"}, stages=1)
    assert len(hosts) == 32
    assert layout.env == layout.rollout and not set(layout.env) & set(layout.learner)
    assert seats[0].name == "env 0 + rollout 0"


def test_a_group_gives_its_processes_their_environment_and_one_machine_listens_on_loopback():
    robot = NodeGroup("robot", (0,), {0: {"A": "b"}}, {0: "/opt/python"})
    placement = {"env": {"node_group": "robot", "placement": 0}, "rollout,actor": 0}
    hosts, seats, layout = plan_of(placement, 1, MACHINES[:1], [robot], accelerators=False)
    assert layout == layout_of(make_plan(placement, nodes_of(MACHINES[:1], accelerators=False), [robot]), hosts, 1)
    env, rollout = seats[layout.env[0]], seats[layout.rollout[0]]
    assert env.env_vars["A"] == "b" and env.python == "/opt/python"
    assert "A" not in rollout.env_vars and rollout.python is None
    assert {seat.ip for seat in seats} == {"127.0.0.1"}
    assert all(seat.devices == () for seat in seats)


@dataclass(frozen=True)
class Alone(OneRank):
    """One of many learners, which do not talk to each other here."""

    rank: int = 0


def test_all_experience_of_the_hybrid_layout_reaches_its_learners(runtime, tmp_path):
    """With four processes in place of 32: whose worker sits where is all that differs."""
    _, _, layout = plan_of(HYBRID, stages=2)
    folded = type(layout)(
        *(tuple(host % 4 for host in hosts) for hosts in (layout.env, layout.rollout, layout.learner)),
        layout.answered_by,
        layout.learned_by,
    )
    envs = [[partial(CountingEnv, 2, 4 * rank + 2 * stage) for stage in range(2)] for rank in range(8)]
    crew = build_crew_on(
        runtime, folded, envs, CountingActor, CountingAlgorithm, learner_ranks=Alone, name=str(tmp_path)
    )
    crew.publish()
    for _ in range(3):
        crew.collect(chunks=4, segments=1).wait()
        crew.ingest()
    seen = crew.learner.run(_seen).wait()
    assert crew.close() == []
    assert [count for count, _ in seen] == [3] * 16, "a segment of each collection"
    assert torch.equal(torch.cat([ids for _, ids in seen]).sort().values, torch.arange(32.0)), "every environment once"


def _seen(worker):
    segments = worker.algorithm.seen
    return len(segments), segments[0].obs["state"][0, :, 0]


@pytest.mark.parametrize("joining", [[], ["cluster.address=auto"]], ids=["alone", "in a cluster"])
def test_more_than_there_is_leaves_nothing_behind(tmp_path, capfd, ray_machine, joining):
    placement = "cluster.component_placement='env: 3; rollout: 0; actor: 0'"
    overrides = ["profile=cpu", f"runner.logger.log_path={tmp_path / 'logs'}", placement, *joining]
    with pytest.raises(ConfigError, match="env: 3 needs node 3, but there is 1 node and no accelerator"):
        train(load_config("reach_sac_mlp", overrides, CONFIG_DIR))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_machines_without_a_cluster_are_one_line_and_leave_nothing_behind(tmp_path):
    pytest.importorskip("ray")
    script = CONFIG_DIR.parent / "train.py"
    words = ["--config-name", "reach_sac_mlp", "cluster.num_nodes=2", f"runner.logger.log_path={tmp_path / 'logs'}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_TMPDIR"] = str(tmp_path)  # where Ray notes which cluster is this machine's: other tests start some
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, timeout=100, env=environment
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: no Ray cluster answers on this machine (none was started); start it with: "
        "bash examples/embodiment/ray_up.sh head, and on every other machine: "
        "bash examples/embodiment/ray_up.sh worker HEAD_ADDRESS\n"
    )
    assert (done.stdout, list(tmp_path.iterdir())) == ("", [])


@pytest.mark.parametrize("recipe", ["reach_sac_mlp", "reach_ppo_mlp"])
def test_a_recipe_gives_the_same_on_both_backends(tmp_path, ray_machine, recipe):
    logged = {}
    for backend in ("local", "ray"):
        overrides = [
            "profile=cpu", f"cluster.backend={backend}", f"runner.logger.log_path={tmp_path / backend}",
            "runner.max_epochs=3", "runner.val_check_interval=2", "actor.num_threads=1", "rollout.pipeline_stage_num=2",
        ]  # fmt: skip
        assert train(load_config(recipe, overrides, CONFIG_DIR)) == 0
        rows = (tmp_path / backend / recipe / "metrics.jsonl").read_text().splitlines()
        logged[backend] = [
            {tag: value for tag, value in json.loads(row).items() if not tag.startswith(("time/", "elapsed"))}
            for row in rows
        ]
        assert (tmp_path / backend / recipe / "checkpoints" / "global_step_3").is_dir()
    assert logged["ray"] == logged["local"]
    assert len(logged["ray"]) == 3


# Who notices first, the call that waits for it or the runner that looks around, gives it its own name.
GONE = r"^(\w+\[1\]|the learner) is gone: the process 'actor 1' \(process \d+ on .*\) ended$"


def test_two_learners_and_two_env_processes_learn_until_one_is_killed_and_the_command_that_is_named_goes_on(
    tmp_path, ray_machine, capfd, monkeypatch
):
    run_dir = tmp_path / "reach_sac_mlp"
    overrides = [
        "profile=cpu", "cluster.component_placement='env: 0:0-1; rollout: 0; actor: 0:0-1'", "runner.save_interval=3",
        f"runner.logger.log_path={tmp_path}", "runner.max_epochs=100000", "runner.val_check_interval=-1",
        "actor.micro_batch_size=32", "algorithm.update_epoch=4", "actor.num_threads=1",
    ]  # fmt: skip
    build = run.build_crew

    def build_and_kill(*arguments):
        crew = build(*arguments)
        pid = crew.learner.run(_pid).wait()[1]
        killer = threading.Thread(target=kill_after_two_checkpoints, args=[run_dir / "checkpoints", pid], daemon=True)
        killer.start()
        return crew

    monkeypatch.setattr(run, "build_crew", build_and_kill)
    began = time.monotonic()
    with pytest.raises(ProcessDied, match=GONE):
        train(load_config("reach_sac_mlp", overrides, CONFIG_DIR))
    assert time.monotonic() - began < 100
    told = capfd.readouterr().out
    [resume] = re.findall(r"the run failed in step \d+ .*\. Go on with: (runner\.resume_dir=\S+)", told)
    [failed_in] = map(int, re.findall(r"the run failed in step (\d+)", told))
    kept = verify(find(run_dir))
    assert resume == f"runner.resume_dir={find(run_dir)}"
    assert kept.global_step % 3 == 0 and failed_in - kept.global_step <= 3
    monkeypatch.setattr(run, "build_crew", build)
    # A checkpoint does not know whether weights were shared out.
    more = [
        *overrides, resume, f"runner.max_epochs={kept.global_step + 2}", "actor.fsdp_config.strategy=fsdp2",
        "runner.val_check_interval=2",
    ]  # fmt: skip
    assert train(load_config("reach_sac_mlp", more, CONFIG_DIR)) == 0
    after = verify(find(run_dir))
    assert after.global_step == kept.global_step + 2
    assert after.progress.updates == kept.progress.updates + 2 * 4
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, after.global_step + 1))
    # Every env step of both processes and both runs was taken in by one of the learners.
    last, steps = rows[-1], after.global_step
    assert last["train/replay_buffer/size"] == last["time/env_steps"] == 160 * steps
    assert last["time/updates"] == after.progress.updates == 4 * steps
    assert any("eval/success_once" in row for row in rows)


def _pid(worker):
    return os.getpid()


MARK = "RLINF_TEST_RUN"
"""In the environment of a run, which all its processes inherit, those of Ray too."""


def test_a_run_over_processes_that_gets_sigterm_saves_says_how_to_go_on_and_leaves_nobody_behind(tmp_path):
    pytest.importorskip("ray")
    words = [
        "--config-name", "reach_sac_mlp", "profile=cpu", "cluster.backend=ray", f"runner.logger.log_path={tmp_path}",
        "runner.max_epochs=1000000", "runner.val_check_interval=-1", "actor.num_threads=1", "algorithm.update_epoch=4",
        "runner.logger.logger_backends=[]",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    mark, output, run_dir = f"{MARK}={tmp_path}", tmp_path / "output", tmp_path / "reach_sac_mlp"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(CONFIG_DIR.parent / "train.py"), *words],
            stdout=file, stderr=file, env=environment | {MARK: str(tmp_path)},
        )  # fmt: skip
    journal, until = run_dir / "metrics.jsonl", time.monotonic() + 100
    while not (journal.is_file() and len(journal.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < until, output.read_text()
        time.sleep(0.05)
    busy = processes_with(mark)
    process.send_signal(signal.SIGTERM)
    code, said = process.wait(60), output.read_text()
    assert code == 128 + signal.SIGTERM, said
    assert "SIGTERM: stopping and saving a checkpoint; once more to end at once" in said
    [(step, resume)] = re.findall(r"stopped by SIGTERM in step (\d+); nothing is lost\. Go on with: (\S+)", said)
    assert resume == f"runner.resume_dir={find(run_dir)}"
    kept, rows = verify(find(run_dir)), journal.read_text().splitlines()
    assert kept.global_step == int(step) >= 3
    assert kept.progress.updates >= 4 * len(rows) > 0
    assert any("ray::" in words for words in busy) and "raylet" in str(busy), "they were there"
    until = time.monotonic() + 20
    while left := processes_with(mark):
        assert time.monotonic() < until, left
        time.sleep(0.1)


def processes_with(mark: str) -> list[str]:
    """Commands of the processes that have this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:100])
    return found


def kill_after_two_checkpoints(checkpoints: Path, pid: int) -> None:
    while not (checkpoints / "global_step_6").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
