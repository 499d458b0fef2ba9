"""What LIBERO's package is asked, what is said where it or its assets are missing, and that nothing asks back."""

import importlib.util
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.core.errors import MissingDependency
from rlinf.envs.libero import package
from rlinf.envs.libero.config import LiberoConfig
from rlinf.envs.libero.shapes import Y_UP, Shape, box, crate, ring
from rlinf.envs.libero.standin import OBJECTS, files, write

needs_libero = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="LIBERO is not installed")


def config(**keys):
    return LiberoConfig(**({"total_num_envs": 1} | keys))


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- what is missing


def test_without_the_package_the_error_names_the_installer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="LIBERO is not installed") as caught:
        package.open_suite(config(use_standin_assets=True))
    assert "requirements/install.sh embodied --env libero" in one_line(caught)


@pytest.mark.sim
@needs_libero
def test_without_assets_the_error_says_what_to_fetch_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    installed = package.package_folder() / "assets"
    if installed.is_dir():
        monkeypatch.setattr(package, "ASSET_FOLDERS", ("no such folder",))
    with pytest.raises(MissingDependency) as caught:
        package.open_suite(config())
    text = one_line(caught)
    place = tmp_path / ".cache/libero/assets"
    assert str(installed) in text
    assert f"hf download lerobot/libero-assets --repo-type dataset --local-dir {place}" in text
    assert "env.*.assets_dir" in text and "env.*.use_standin_assets: True" in text

    with pytest.raises(MissingDependency, match="looked in /nowhere;"):
        package.find_assets(config(assets_dir="/nowhere"))
    for folder in package.ASSET_FOLDERS:
        (place / folder).mkdir(parents=True)
    assert package.find_assets(config()) == place
    assert package.find_assets(config(assets_dir=str(place))) == place


@pytest.mark.sim
@needs_libero
def test_assets_that_are_incomplete_are_named(tmp_path):
    from rlinf.core.errors import RlinfError
    from rlinf.envs.libero.scene import Scene

    write(tmp_path / "assets", {name: text for name, text in files().items() if "ramekin" not in name})
    suite = package.open_suite(config(assets_dir=str(tmp_path / "assets")))
    with pytest.raises(RlinfError, match=r"cannot build its scene from .*ramekin.*are all its files there\?") as caught:
        Scene(suite, 0)
    one_line(caught)


# ---- no questions, no traces


@pytest.mark.sim
@needs_libero
def test_importing_asks_prints_and_chooses_nothing(tmp_path):
    code = (
        "import os, sys\n"
        "from rlinf.envs.libero.config import LiberoConfig\n"
        "from rlinf.envs.libero.package import import_problems, open_suite\n"
        "assert len(import_problems()) >= 5\n"
        "assert len(open_suite(LiberoConfig(total_num_envs=1, use_standin_assets=True)).tasks) == 10\n"
        "assert 'transformers' not in sys.modules and 'wandb' not in sys.modules\n"
        "sys.stderr.write(os.environ['MUJOCO_GL'])\n"
    )
    log = Path("/tmp/robosuite.log")
    written = log.stat().st_mtime_ns if log.exists() else None
    variables = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    variables |= {"HOME": str(tmp_path), "LIBERO_CONFIG_PATH": str(tmp_path / "libero")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=variables,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "egl")
    assert (tmp_path / "libero/config.yaml").is_file()
    assert not (tmp_path / ".libero").exists()
    assert (log.stat().st_mtime_ns if log.exists() else None) == written


@needs_libero
def test_an_answer_that_somebody_gave_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    (tmp_path / "config.yaml").write_text("datasets: /mine\n")
    package.prepare_import()
    assert (tmp_path / "config.yaml").read_text() == "datasets: /mine\n"


def test_a_kept_file_is_replaced_only_where_it_differs(tmp_path):
    path = tmp_path / "deep" / "file"
    package.keep_file(path, b"one")
    first = path.stat().st_ino
    package.keep_file(path, b"one")
    assert path.stat().st_ino == first
    package.keep_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_numpys_old_generator_is_as_before():
    np.random.seed(3)
    expected = np.random.rand(4)
    np.random.seed(3)
    drawn = []
    for seed in (5, 5):
        with package.numpy_seeded(seed):
            drawn.append(np.random.rand())
    assert drawn[0] == drawn[1]
    assert np.array_equal(np.random.rand(4), expected)


# ---- stored states


def test_stored_states_are_read_as_numbers_alone(tmp_path):
    states = np.arange(12.0).reshape(3, 4)
    torch.save(states, tmp_path / "good")
    assert np.array_equal(package.read_states(tmp_path / "good"), states)
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(touched),)

    torch.save(Evil(), tmp_path / "evil")
    torch.save({"states": 1}, tmp_path / "other")
    with zipfile.ZipFile(tmp_path / "bare", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    for name in ("evil", "other", "bare", "absent"):
        with pytest.raises(MissingDependency, match=name) as caught:
            package.read_states(tmp_path / name)
        one_line(caught)
    assert not touched.exists()


# ---- stand-ins


def test_stand_ins_are_written_once_and_whole(monkeypatch, tmp_path):
    from rlinf.envs.libero import standin

    monkeypatch.setattr(standin, "own_folder", lambda: tmp_path)
    place = standin.standin_folder()
    stamp = place.stat().st_mtime_ns
    assert standin.standin_folder() == place and place.stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
    assert sum(p.is_file() for p in place.rglob("*")) == len(files()) + len(standin.TEXTURES)
    assert all((place / folder).is_dir() for folder in package.ASSET_FOLDERS)


def test_every_object_can_be_gripped_or_held_somewhere():
    for name, shapes in {name: shapes for group in OBJECTS.values() for name, shapes in group.items()}.items():
        thin = min(2 * min(shape.size) for shape in shapes if shape.felt)
        assert thin < 0.075, f"{name} does not fit between fingers that open by 8 cm"


def test_a_ring_closes_and_stands_on_its_floor():
    shapes = ring(0.05, 0.02, (0, 0, 0), sides=8)
    walls = [shape for shape in shapes if shape.kind == "box" and shape.seen]
    assert len(walls) == 8
    assert np.allclose([np.hypot(*wall.pos[:2]) for wall in walls], 0.05)
    lowest = min(shape.pos[2] - shape.size[2] for shape in walls)
    stand = min(shape.pos[2] - shape.size[-1] for shape in shapes if shape.felt and shape not in walls)
    assert stand == pytest.approx(-0.02)
    assert lowest > stand + 0.001


def test_a_crate_has_a_floor_and_four_walls_of_its_size():
    shapes = crate(0.1, 0.2, 0.05, (0, 0, 0), at=(0, 0, 0.05))
    low = [min(s.pos[k] - s.size[k] for s in shapes) for k in range(3)]
    high = [max(s.pos[k] + s.size[k] for s in shapes) for k in range(3)]
    assert np.allclose(low, [-0.103, -0.203, 0]) and np.allclose(high, [0.103, 0.203, 0.1])
    assert len(shapes) == 5


def test_what_is_turned_points_along_the_second_axis():
    shape: Shape = box(0.01, 0.02, 0.03, (0, 0, 0), at=(0.0, 0.0, 1.0)).turned(Y_UP)
    assert shape.pos == pytest.approx((0, 1, 0), abs=1e-12)
    assert shape.quat == pytest.approx(Y_UP)
