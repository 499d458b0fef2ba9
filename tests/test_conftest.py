"""A skipped test fails where the machine should have had what it needs; what shares something runs in one process."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import GROUPS, LONGEST_FIRST

TESTS = Path(__file__).parent

FILES = {
    "test_module.py": "import pytest\npytest.importorskip('no_such_simulator')\n",
    "test_marks.py": "import pytest\n"
    "@pytest.mark.skipif(True, reason='no CUDA device')\n"
    "def test_gpu(): pass\n"
    "@pytest.mark.skipif(True, reason='no Vulkan driver')\n"
    "def test_film(): pass\n"
    "@pytest.mark.xfail\n"
    "def test_later(): assert False\n",
}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "3 skipped, 1 xfailed"),
        (["--may-skip", "no CUDA device", "--may-skip", "no network"], "1 skipped, 1 xfailed, 2 errors"),
    ],
)
def test_what_may_not_be_skipped_fails(tmp_path, monkeypatch, options, told):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # those of the run that this test is part of
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(TESTS / "conftest.py", tests)
    for name, text in FILES.items():
        (tests / name).write_text(text)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # Hydra's and Hypothesis' take longer than the tests
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "xdist", "-n", "1", *options]
    # The default folder is this run's own, too: each would clean it up below the other.
    command += ["--continue-on-collection-errors", "--basetemp", str(tmp_path / "files")]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, timeout=100)
    assert told in done.stdout, done.stdout + done.stderr
    assert (done.returncode == 0) == (not options)
    for name in ("test_module.py", "test_marks.py::test_film"):
        assert (f"{name} must not be skipped in this run. Skipped: " in done.stdout) == bool(options)


MEETING = """
import os, time
import pytest

@pytest.mark.parametrize("i", range(4))
def test_a(i):
    time.sleep(0.05)
    print(f"ran in {os.environ['PYTEST_XDIST_WORKER']}")
"""


def test_a_group_runs_in_one_process_and_the_rest_in_any(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    grouped, alone = ("tests/workers/test_learner_ranks.py", "tests/algorithms/test_ranks.py"), "tests/test_alone.py"
    for name in (*grouped, alone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(MEETING)
    shutil.copy(TESTS / "conftest.py", tmp_path / "tests")
    (tmp_path / "pytest.ini").touch()
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    command = [sys.executable, "-m", "pytest", "-rP", "-v", "-p", "no:cacheprovider", "-p", "xdist", "-n", "2"]
    command += ["--dist", "loadgroup", "--no-loadscope-reorder", "--import-mode=importlib"]
    command += ["--basetemp", str(tmp_path / "files")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    ran = re.findall(r"^\[(gw\d)\] .* PASSED (\S+)::", done.stdout, re.MULTILINE)
    assert len(ran) == 12, done.stdout + done.stderr
    assert len({process for process, file in ran if file in grouped}) == 1
    assert len({process for process, file in ran}) == 2


def test_whoever_shares_something_is_in_the_group_that_shares_it():
    fixtures = "ray_machine|processes_on_ray|on_ray|runtime"
    sharing = {"ray": rf"^def test_\w+\([^)]*\b({fixtures})\b", "ranks": r"^from tests.ranks import "}
    for group, pattern in sharing.items():
        files = {path for path in TESTS.rglob("test_*.py") if re.search(pattern, path.read_text(), re.MULTILINE)}
        assert {path.relative_to(TESTS).as_posix() for path in files} == set(GROUPS[group])
    named = [*LONGEST_FIRST, *(file for files in GROUPS.values() for file in files)]
    assert [file for file in named if not (TESTS / file).is_file()] == []
