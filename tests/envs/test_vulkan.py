import json
import sys

import pytest

from rlinf.core.errors import MissingDependency
from rlinf.envs.maniskill import vulkan


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without any driver; returns a function that puts one somewhere."""
    for variable in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(vulkan, "_SYSTEM", (str(tmp_path / "system"),))
    monkeypatch.setattr(vulkan, "_sapiens_nvidia", lambda: [])

    def put(place):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"ICD": {}}))
        return path

    return put


def test_a_named_driver_goes_before_all_others(machine, monkeypatch):
    machine("venv/share/lavapipe/lvp.json")
    named = machine("named.json")
    monkeypatch.setenv("VK_DRIVER_FILES", f"/nowhere.json:{named}")
    assert vulkan.find_icd() == named


def test_the_environments_own_driver_goes_before_the_systems(machine):
    system = machine("system/lvp_icd.json")
    assert vulkan.find_icd() == system
    own = machine("venv/share/lavapipe/lvp.json")
    assert vulkan.find_icd() == own


def test_a_gpu_renders_itself_if_it_can(machine, monkeypatch):
    own, nvidia = machine("venv/share/lavapipe/lvp.json"), machine("system/nvidia_icd.json")
    assert vulkan.find_icd(cuda=True) == nvidia
    assert vulkan.find_icd(cuda=False) == own
    monkeypatch.setenv("VK_ICD_FILENAMES", "")
    assert vulkan.use_icd(cuda=True) == "sapien_cuda"
    assert vulkan.use_icd(cuda=False) == "sapien_cuda"  # the first choice has become the named one


def test_without_a_driver_the_message_holds_both_remedies(machine, monkeypatch):
    assert vulkan.find_icd() is None
    with pytest.raises(MissingDependency) as caught:
        vulkan.use_icd()
    assert str(caught.value) == (
        "no Vulkan driver to render with: run `bash requirements/install.sh embodied --env maniskill`, or do without "
        "films: env.eval.video_cfg.save_video=False"
    )
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nowhere.json")
    with pytest.raises(MissingDependency, match=r"VK_ICD_FILENAMES=/nowhere\.json names no file; run"):
        vulkan.use_icd()
