import contextlib
import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from rlinf.core.errors import ConfigError
from rlinf.launch import provenance
from rlinf.launch.provenance import git_state, prepare_run_dir, recipe_digest, write_provenance

CONFIG = {
    "runner": {"logger": {"log_path": "logs"}, "max_epochs": 100, "resume_dir": None},
    "actor": {"seed": 1, "optim": {"lr": 3e-4, "betas": [0.9, 0.999]}},
}


def changed(**actor):
    return {**CONFIG, "actor": {**CONFIG["actor"], **actor}}


def test_run_directory_is_made_and_left_empty(tmp_path):
    prepare_run_dir(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_directory_below_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    run_dir = tmp_path / "file" / "run"
    with pytest.raises(ConfigError) as caught:
        prepare_run_dir(run_dir)
    assert str(caught.value) == (
        f"cannot write into the run directory {run_dir}: Not a directory; "
        "choose another place with runner.logger.log_path=PATH"
    )


def test_full_disk_is_noticed_before_training(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(provenance.os, "fsync", full)
    with pytest.raises(ConfigError, match=r"No space left on device; make room .* runner\.logger\.log_path=PATH"):
        prepare_run_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def without_privileges():
    """Root may write everywhere, so it is nobody for a while."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_directory_without_the_right_to_write():
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which only its owner may enter
        os.chmod(folder, 0o555)
        with without_privileges(), pytest.raises(ConfigError, match="Permission denied; choose another place"):
            prepare_run_dir(Path(folder) / "run")


def test_configuration_and_origin_come_back(tmp_path):
    write_provenance(tmp_path, CONFIG, seed=7)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record["seed"] == 7
    assert record["recipe"] == recipe_digest(CONFIG)
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "numpy", "rlinf"} <= record["versions"].keys()
    assert record["machine"]["cores"] >= 1 and record["machine"]["cpu"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "provenance.json"]


def test_resumed_run_keeps_the_earlier_record(tmp_path):
    write_provenance(tmp_path, CONFIG, seed=1)
    write_provenance(tmp_path, changed(seed=2), seed=2)
    assert yaml.safe_load((tmp_path / "config.1.yaml").read_text())["actor"]["seed"] == 1
    assert json.loads((tmp_path / "provenance.1.json").read_text())["seed"] == 1
    assert json.loads((tmp_path / "provenance.json").read_text())["seed"] == 2


def test_seeds_and_places_are_not_part_of_a_recipe_but_learning_rates_are():
    assert recipe_digest(changed(seed=5)) == recipe_digest(CONFIG)
    assert recipe_digest({**CONFIG, "runner": {"max_epochs": 100}}) == recipe_digest(CONFIG)
    assert recipe_digest(changed(optim={"lr": 1e-3, "betas": [0.9, 0.999]})) != recipe_digest(CONFIG)


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
    )


def test_commit_and_modification_are_seen(tmp_path):
    assert git_state(tmp_path) == {"commit": None, "modified": None}
    git(tmp_path, "init")
    assert git_state(tmp_path)["commit"] is None
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["modified"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": state["commit"], "modified": True}


def test_machine_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == {"commit": None, "modified": None}
