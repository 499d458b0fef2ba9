"""The installer's decisions that need neither a network nor a new environment."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def bash(*words: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def installer(*arguments: str) -> subprocess.CompletedProcess:
    return bash("requirements/install.sh", *arguments)


def call(script: str, code: str) -> str:
    """Output of shell code that sees the functions of a script."""
    done = bash("-c", f"source requirements/{script}; {code}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embodied", "--env", "maniskil"], "unknown --env 'maniskil'; did you mean maniskill?"),
        (["embodied", "--model", "flowpolicy"], "unknown --model 'flowpolicy'; did you mean flow_policy?"),
        (["embodied", "--hardware", "spacemose"], "unknown --hardware 'spacemose'; did you mean spacemouse?"),
        (["embodied", "--hardware"], "--hardware needs a value"),
        (["embodied", "--use-miror"], "unknown argument '--use-miror'; did you mean --use-mirror?"),
        (["embodied", "--env"], "--env needs a value"),
        ([], "the first argument is the kind of installation"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_made(arguments, message, tmp_path):
    done = installer(*arguments)
    assert done.returncode == 1
    assert message in done.stderr


def test_every_name_of_the_seed_recipes_is_accepted():
    code = "choose_env frankasim; choose_env maniskill_libero; choose_model openvla; choose_model openpi"
    report = call("install.sh", f"{code}; printf '%s\\n' \"${{COULD_NOT[@]}}\"")
    assert "frankasim" not in report and "libero" not in report
    for name, extras in (("libero", "libero"), ("maniskill_libero", "maniskill libero")):
        assert call("install.sh", f'choose_env {name}; echo "${{EXTRAS[@]}} $NEEDS_EGL"') == f"{extras} yes"
    assert call("install.sh", 'choose_env frankasim; echo "${EXTRAS[@]} $NEEDS_EGL"') == "frankasim yes"
    assert "--model openvla: not in this version" in report and "openpi" not in report
    assert call("install.sh", 'choose_model openpi; echo "${EXTRAS[@]} ${#COULD_NOT[@]}"') == "openpi 0"
    assert (
        call("install.sh", 'choose_env maniskill; echo "${EXTRAS[@]} $NEEDS_VULKAN ${#COULD_NOT[@]}"')
        == "maniskill yes 0"
    )


def test_the_robot_cell_needs_its_twin_and_what_is_plugged_in():
    for name in ("realworld", "franka"):
        code = f'choose_env {name}; echo "${{EXTRAS[@]}} $NEEDS_EGL ${{#COULD_NOT[@]}}"'
        assert call("install.sh", code) == "realworld yes 0"
    code = 'parse_arguments embodied --env realworld --hardware spacemouse --hardware realsense; echo "${EXTRAS[@]}"'
    assert call("install.sh", code) == "realworld spacemouse realsense"
    assert call("install.sh", "package_of_library libusb-1.0.so.0") == "libusb-1.0-0"


def test_every_extra_that_the_installer_asks_for_exists():
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    assert set(call("install.sh", 'echo "$HARDWARE"').split()) | {"realworld"} <= extras
    # The commands in the errors of what is imported late.
    asked = {
        word
        for path in (ROOT / "rlinf/envs/realworld").rglob("*.py")
        for word in re.findall(r"--hardware (\w+)", path.read_text())
    }
    assert asked == set(call("install.sh", 'echo "$HARDWARE"').split())


def test_tools_of_tests_and_benchmarks_are_asked_for_by_name():
    assert call("install.sh", 'parse_arguments embodied --dev --bench; echo "${EXTRAS[@]}"') == "dev bench"
    assert call("install.sh", 'parse_arguments embodied --lerobot --ray; echo "${EXTRAS[@]}"') == "lerobot ray"


def test_mirror_comes_from_the_environment_and_its_absence_is_reported():
    chosen = "USE_MIRROR=yes RLINF_PIP_MIRROR=file:///mirror; choose_mirror; echo $PIP_INDEX_URL"
    assert call("install.sh", chosen) == "file:///mirror"
    absent = 'unset RLINF_PIP_MIRROR PIP_INDEX_URL; USE_MIRROR=yes; choose_mirror; echo "${COULD_NOT[0]}"'
    assert "neither RLINF_PIP_MIRROR nor PIP_INDEX_URL" in call("install.sh", absent)


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = installer("embodied", "--venv", str(tmp_path))
    assert done.returncode == 1
    assert "is no virtual environment" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def derived(tmp_path: Path, files: dict[str, str]) -> dict[str, str]:
    """Contents of the sources that are derived for bookworm-backports from an apt directory."""
    for relative, content in files.items():
        file = tmp_path / "apt" / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    call("software_vulkan.sh", f"derived_sources {tmp_path}/apt bookworm bookworm-backports {tmp_path}/out")
    return {p.suffix: p.read_text() for p in tmp_path.glob("out.*") if p.read_text()}


def test_backports_are_derived_from_deb822_sources(tmp_path):
    main = "Types: deb deb-src\nURIs: file:///mirror\nSuites: bookworm bookworm-updates\nComponents: main\n"
    other = "Types: deb\nURIs: file:///security\nSuites: bookworm-security\nComponents: main\n"
    off = main.replace("mirror", "off") + "Enabled: no\n"
    sources_only = main.replace("deb deb-src", "deb-src").replace("mirror", "sources")
    text = "\n".join(["# a remark\n" + main, other, off, sources_only])
    expected = "Types: deb deb-src\nURIs: file:///mirror\nSuites: bookworm-backports\nComponents: main\n\n"
    assert derived(tmp_path, {"sources.list.d/debian.sources": text}) == {".sources": expected}


def test_backports_are_derived_when_the_suites_stand_on_lines_of_their_own(tmp_path):
    text = "Types: deb\nURIs: file:///mirror\nSuites:\n bookworm\n bookworm-updates\nComponents: main\n"
    expected = "Types: deb\nURIs: file:///mirror\nSuites: bookworm-backports\nComponents: main\n\n"
    assert derived(tmp_path, {"sources.list.d/debian.sources": text}) == {".sources": expected}


def test_backports_are_derived_from_one_line_sources(tmp_path):
    text = (
        "# deb file:///remark bookworm main\n"
        "deb [ arch=amd64 signed-by=/k.gpg ] file:///mirror bookworm main contrib\n"
        "deb file:///plain bookworm main\n"
        "deb-src file:///mirror bookworm main\n"
        "deb file:///mirror bookworm-updates main\n"
    )
    expected = (
        "deb [ arch=amd64 signed-by=/k.gpg ] file:///mirror bookworm-backports main contrib\n"
        "deb file:///plain bookworm-backports main\n"
    )
    assert derived(tmp_path, {"sources.list": text}) == {".list": expected}


# --- the scripts that install before they run -----------------------------------------------------------------


@pytest.fixture
def repository(tmp_path) -> Path:
    """A copy of the scripts, with an installer and a python that only write down how they were called."""
    scripts = tmp_path / "examples/embodiment"
    scripts.mkdir(parents=True)
    for script in (ROOT / "examples/embodiment").glob("*.sh"):
        shutil.copy2(script, scripts)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/install.sh").write_text(
        'echo "install $*" >>calls\nmkdir -p .venv/bin\n'
        'echo "python() { echo python \\$* >>calls; }; exec() { \\"\\$@\\"; }" >.venv/bin/activate\n'
        "printf 'hash\\nmaniskill\\n' >.venv/rlinf-install.stamp\n"
    )
    return tmp_path


def calls(repository: Path, script: str, *words: str) -> list[str]:
    """What a script called, each as program and first word."""
    (repository / "calls").unlink(missing_ok=True)
    done = bash(str(repository / "examples/embodiment" / script), *words, cwd=repository.parent)
    assert done.returncode == 0, done.stderr
    return (repository / "calls").read_text().splitlines()


def test_collecting_installs_the_twin_and_runs_the_command(repository):
    first, run = calls(repository, "collect_data.sh", "realworld_sac_flow_image", "--operator", "keyboard", "a.b=1")
    assert first == "install embodied --env realworld"
    assert run == "python -m rlinf collect realworld_sac_flow_image --operator keyboard a.b=1"
    stamp = repository / ".venv/rlinf-install.stamp"
    stamp.write_text("hash\nrealworld\n")
    assert calls(repository, "collect_data.sh") == ["python -m rlinf collect realworld_sac_flow_image"]


@pytest.mark.parametrize("script", ["run_embodiment.sh", "record_demos.sh"])
def test_scripts_install_once_and_complete_what_was_interrupted(repository, script):
    install = "install embodied --env maniskill"
    first, run = calls(repository, script, "maniskill_sac_mlp", "runner.seed=3")
    assert first == install
    assert " --config-name maniskill_sac_mlp " in run and run.endswith(" runner.seed=3")
    assert calls(repository, script, "maniskill_sac_mlp", "runner.seed=3")[0].startswith("python ")
    (repository / ".venv/rlinf-install.stamp").unlink()
    assert calls(repository, script)[0] == install
    assert len(calls(repository, script)) == 1


def test_a_recipe_for_another_simulator_than_the_installed_ones_installs_it(repository):
    assert calls(repository, "run_embodiment.sh", "reach_sac_mlp")[0] == "install embodied --env reach"
    stamp = repository / ".venv/rlinf-install.stamp"
    stamp.write_text("hash\ndev\n")
    assert len(calls(repository, "run_embodiment.sh", "reach_sac_mlp")) == 1
    assert calls(repository, "run_embodiment.sh", "maniskill_sac_mlp")[0] == "install embodied --env maniskill"


@pytest.mark.parametrize(
    ("words", "options", "parts"),
    [
        (["libero_spatial_dsrl_openpi"], "--env libero --model openpi", "libero\nopenpi"),
        (
            ["maniskill_ppo_co_training_openpi_pi05_tiny"],
            "--env maniskill --model openpi --lerobot",
            "lerobot\nmaniskill\nopenpi",
        ),
        (["maniskill_sac_mlp", "--format", "lerobot"], "--env maniskill --lerobot", "lerobot\nmaniskill"),
    ],
)
def test_models_and_data_sets_that_a_recipe_needs_are_installed(repository, words, options, parts):
    script = "record_demos.sh" if "--format" in words else "run_embodiment.sh"
    assert calls(repository, script, *words)[0] == f"install embodied {options}"
    assert calls(repository, script, *words)[0] == f"install embodied {options}"  # something is missing still
    (repository / ".venv/rlinf-install.stamp").write_text(f"hash\n{parts}\n")
    assert calls(repository, script, *words)[0].startswith("python ")
