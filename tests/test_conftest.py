"""A skipped test fails where the machine should have had what it needs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    shutil.copy(Path(__file__).with_name("conftest.py"), tests)
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
