import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlinf.launch.cli import doctor, probes
from rlinf.launch.cli.doctor import Check, Finding, look, report
from rlinf.launch.cli.main import describe, main
from rlinf.metrics.journal import MetricsFile

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples" / "embodiment" / "config").glob("*.yaml"))


def run_module(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def make_run(folder):
    folder.mkdir()
    journal = MetricsFile(folder)
    for step in range(1, 4):
        journal.log(step, {"eval/success_once": 0.5, "time/env_steps": 10.0 * step}, 1.0 * step)
    journal.close()
    return folder


# --- the command line -----------------------------------------------------------------------------------------------


def test_help_comes_at_once_and_without_heavy_imports():
    code = (
        "import sys\n"
        "from rlinf.launch.cli.main import main\n"
        "assert main([]) == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'matplotlib', 'hydra', 'pydantic'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
    began_s = time.perf_counter()
    done = run_module("rlinf")
    assert time.perf_counter() - began_s < 1.5  # 0.03 s on an idle machine
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("doctor", "configs", "plot", "eval"))


def test_unknown_command_is_an_error_of_use():
    done = run_module("rlinf", "trian")
    assert done.returncode == 2
    assert "invalid choice: 'trian'" in done.stderr


def test_configs_lists_every_recipe_with_its_first_comment(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # found from anywhere
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [recipe.stem for recipe in RECIPES]
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# SAC on a reach.\n# More.\ndefaults: []\n", "SAC on a reach."),
        ("# @package _global_\n#\n# What it is.\n", "What it is."),
        ("defaults: []\n# too late\n", ""),
        ("", ""),
    ],
)
def test_description_is_the_first_comment_line(tmp_path, text, line):
    (tmp_path / "a.yaml").write_text(text)
    assert describe(tmp_path / "a.yaml") == line


def test_configs_of_an_empty_folder(tmp_path, capsys):
    assert main(["configs", "--dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no recipe (*.yaml); name the folder with --dir\n"


def test_plot_of_one_run_goes_into_it_and_of_several_where_it_is_told(tmp_path, capsys):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    assert main(["plot", str(runs[0])]) == 0
    assert (runs[0] / "learning_curve.png").exists()
    assert main(["plot", str(runs[0]), str(runs[1]), "-o", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").exists()
    assert capsys.readouterr().out.split() == [str(runs[0] / "learning_curve.png"), str(tmp_path / "both.png")]


def test_plot_says_in_one_line_what_is_wrong(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for arguments, words in (
        (["plot", str(tmp_path)], "is not a run directory"),
        (["plot", str(run), "-o", "curve.xyz"], "must end in .png, .pdf or .svg"),
        (["plot", str(run), "-o", str(tmp_path / "no" / "folder.png")], "No such file or directory; choose another"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_eval_prints_what_the_evaluation_gives(tmp_path, capsys, monkeypatch):
    asked = []

    def evaluate_run(run_dir, overrides):
        asked.append((run_dir, overrides))
        return {"eval/success_once": 0.95, "eval/return": 31.4}

    monkeypatch.setitem(sys.modules, "rlinf.launch.run", SimpleNamespace(evaluate_run=evaluate_run))
    assert main(["eval", str(tmp_path), "env.eval.total_num_envs=4", "seed=2"]) == 0
    assert asked == [(tmp_path, ["env.eval.total_num_envs=4", "seed=2"])]
    assert capsys.readouterr().out == "eval/success_once      0.950\neval/return            31.40\n"


def test_eval_of_what_is_not_there(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'} is not a run directory\n"


# --- placement ------------------------------------------------------------------------------------------------------

HYBRID = ["cluster.num_nodes=2", "cluster.component_placement={env: 0-7, rollout: 8-15, actor: 0-15}"]
HYBRID += ["rollout.pipeline_stage_num=2", "actor.micro_batch_size=16"]

TOLD = [
    "role rank node devices share of each host process",
    "env 0-7 0 0-7 16 environments in 2 stages 0-7",
    "rollout 0-7 1 0-7 16 environments 8-15",
    "actor 0-7 0 0-7 16 of 256 samples 16-23",
    "actor 8-15 1 0-7 16 of 256 samples 24-31",
    "env 0 1 2 3 4 5 6 7",
    "actor 0 1 2 3 4 5 6 7",
    "rollout 0 1 2 3 4 5 6 7",
    "actor 8 9 10 11 12 13 14 15",
    "env 0-7 0 rollout 0-7 network actor 0-7",
    "env 0-7 1 rollout 0-7 network actor 8-15",
    "Weights: actor 0 to rollout 0-7, each global step.",
    "Gradients: averaged over actor 0-15, each update.",
    "Backend: ray (cluster.num_nodes is 2) on a running cluster, else one of its own.",
    "Restarts: at most 3 in all, of processes of env and rollout.",
]


def printed(capsys, *arguments):
    assert main(["placement", "frankasim_ppo_mlp", *arguments]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert all(len(line) <= 80 for line in lines)
    return [" ".join(line.strip("│ ").split()) for line in lines]


def test_placement_tells_that_weights_are_shared_out(capsys):
    lines = printed(capsys, "--gpus-per-node", "8", *HYBRID, "actor.fsdp_config.strategy=fsdp2")
    assert "Weights, gradients and moments: shared out over actor 0-15, each update." in lines


@pytest.mark.parametrize("arguments", [["--gpus-per-node", "8", *HYBRID], [*HYBRID, "--gpus-per-node", "8"]])
def test_placement_tells_who_sits_where_and_talks_to_whom(capsys, arguments):
    lines = printed(capsys, *arguments)
    assert lines[0] == "frankasim_ppo_mlp on 2 nodes with 8 accelerators each"
    assert lines[1] == "assumed: --gpus-per-node 8"
    assert [line for line in lines if line in TOLD] == TOLD


def test_placement_on_this_machine_says_so(capsys):
    lines = printed(capsys, "profile=cpu")
    assert lines[:2] == [
        "frankasim_ppo_mlp on 1 node with no accelerator",
        "assumed: every node is like this machine with profile cpu",
    ]
    assert "env 0 0 rollout 0 own memory actor 0" in lines
    assert "Backend: local, threads of one process." in lines


@pytest.mark.parametrize(
    ("placement", "told"),
    [
        ("{env: 0-3:0-7, rollout: 4-7, actor: 4-7:0-1}", "env 0-7 0 0-3, 2 on each 16 environments 0-7"),
        ("{env: 0-3:0-7, rollout: 4-7, actor: 4-7:0-1}", "actor 0-1 0 4-7, 2 for each 128 of 256 samples 12-13"),
        ("{env: 0-3:0-7, rollout: 4-7, actor: 4-7:0-1}", "env 0-1 2-3 4-5 6-7 · · · ·"),
        ("{env: 0-3:0-7, rollout: 4-7, actor: 4-7:0-1}", "env 4-5 0 rollout 2 same node actor 1"),
        ("'env: 0-1; rollout: 1,0; actor: 0'", "env 0 0 rollout 1 own memory actor 0"),
        ("'env: 0-1; rollout: 2-3; actor: 1,0'", "env 1 0 rollout 1 same node actor 0"),
        ("{env: 0-3, rollout: 0-3, actor: 0-7}", "env 0-3 0 rollout 0-3 own memory actor 0-7 (2 for each)"),
    ],
)
def test_placement_of_shared_devices(capsys, placement, told):
    arguments = [f"cluster.component_placement={placement}", "actor.micro_batch_size=1", "--gpus-per-node", "8"]
    assert told in printed(capsys, *arguments)


def test_placement_names_robots(capsys):
    robot = "{type: Franka, configs: [{robot_ip: 172.16.0.2, node_rank: 1}]}"
    lines = printed(
        capsys,
        "cluster.num_nodes=2",
        f"cluster.node_groups=[{{label: arm, node_ranks: 1, hardware: {robot}}}]",
        "cluster.component_placement={env: {node_group: arm, placement: 0}}",
        "--gpus-per-node=1",
    )
    assert "env 0 1 172.16.0.2 128 environments 0" in lines
    assert "device 0 172.16.0.2" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["cluster.component_placement='env: 8-15; rollout,actor: 0'"],
            "error: cluster.component_placement: env: 8-15 needs accelerator 15, but the 1 node has 8; stay below 8 or "
            "raise cluster.num_nodes\n",
        ),
        (
            ["cluster.component_placement='actor,env,rollout: all'"],
            "error: actor.global_batch_size (256) is not a multiple of actor.micro_batch_size (256) x the 8 processes "
            "of actor; write 32\n",
        ),
    ],
)
def test_placement_says_in_one_line_what_is_wrong(capsys, arguments, message):
    assert main(["placement", "frankasim_ppo_mlp", "--gpus-per-node", "8", *arguments]) == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("arguments", [["--gpus-per-node", "-1"], ["--gpus-per-node", "many"], ["--gpu=8"]])
def test_placement_refuses_what_is_no_option(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(["placement", "frankasim_ppo_mlp", *arguments])
    assert ended.value.code == 2


# --- doctor ---------------------------------------------------------------------------------------------------------


def fake_probe(monkeypatch, tmp_path, body):
    """Make the doctor's child run `body` in place of the real checks."""
    package = tmp_path / "rlinf" / "launch" / "cli"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "probes.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return look(Check("any", "any", ""), timeout_s=0.5 if "sleep" in body else 30)


@pytest.mark.parametrize(
    ("body", "state", "detail"),
    [
        ('print("noise"); print(\'{"state": "works", "detail": "fine"}\')', "works", "fine"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "broken", "crashed with SIGSEGV"),
        ("import time; time.sleep(60)", "broken", "no answer within 0.5 s"),
        ("import subprocess; subprocess.run(['sleep', '60'])", "broken", "no answer within 0.5 s"),
        ("raise SystemExit('gave up')", "broken", "ended with exit code 1: gave up"),
        ("pass", "broken", "ended with exit code 0: no message"),
    ],
)
def test_whatever_a_check_does_is_a_finding(monkeypatch, tmp_path, body, state, detail):
    began_s = time.monotonic()
    finding = fake_probe(monkeypatch, tmp_path, body)
    assert (finding.state, finding.detail) == (state, detail)
    assert time.monotonic() - began_s < 20


@pytest.mark.parametrize("name", ["python", "packages", "torch", "disk", "shared", "ffmpeg"])
def test_checks_that_hold_wherever_the_tests_run(name):
    assert probes.PROBES[name]()


def test_every_check_has_its_probe():
    assert {check.probe for check in doctor.CHECKS} == set(probes.PROBES)
    assert set(probes.PROBES) >= doctor.OPTIONAL


def test_answer_of_a_probe_distinguishes_missing_from_broken(monkeypatch, capsys):
    def missing():
        probes.load("a_package_that_does_not_exist")

    def broken():
        raise ValueError("two\nlines")

    monkeypatch.setattr(probes, "PROBES", {"missing": missing, "broken": broken})
    probes.main("missing")
    probes.main("broken")
    assert capsys.readouterr().out.splitlines() == [
        '{"state": "missing", "detail": "not installed"}',
        '{"state": "broken", "detail": "ValueError: two lines"}',
    ]


def test_package_that_lacks_one_of_its_own_is_broken_not_missing(tmp_path, monkeypatch):
    (tmp_path / "half_a_package.py").write_text("import something_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_that_is_not_there"):
        probes.load("half_a_package")


def test_report_unites_what_one_command_mends_and_leaves_commands_unfolded():
    command = "bash requirements/install.sh embodied --env maniskill " + "x" * 80
    findings = [
        Finding(Check("torch", "torch", "install torch", core=True), "works", "2.13"),
        Finding(Check("maniskill", "ManiSkill", command), "missing", "not installed"),
        Finding(Check("vulkan", "Vulkan", command), "broken", "word " * 40),
        Finding(Check("gpu", "GPU", "install CUDA"), "missing", "none here"),
    ]
    lines = report(findings, width=60, color=False)
    assert f"    {command}" in lines and "  ManiSkill, Vulkan:" in lines
    assert not any("install torch" in line or "install CUDA" in line for line in lines)
    table = lines[: lines.index("")]
    assert max(map(len, table)) <= 60
    assert lines[-1] == "The core works."


def test_broken_core_is_said_and_gives_exit_code_one(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (Check("torch", "torch", "install torch", core=True),))
    monkeypatch.setattr(doctor, "look", lambda check, _: Finding(check, "broken", "ImportError"))
    assert doctor.examine(1.0) == 1
    printed = capsys.readouterr().out
    assert printed.endswith("The core does not work: torch.\n") and "install torch" in printed
