import pickle

import numpy as np
import pytest
import torch

from rlinf.core.errors import CheckpointError
from rlinf.workers.state_files import load_state, load_weights, save_state, save_weights


def test_state_comes_back_as_it_was(tmp_path):
    generator = np.random.Generator(np.random.PCG64(3))
    state = {
        "nested": [{"tensor": torch.arange(3)}, (1, 2.5, None, True, "text")],
        "array": np.arange(6.0).reshape(2, 3),
        "scalar": np.array(4),
        "number": np.float32(1.5),
        "generator": generator.bit_generator.state,
        7: "integer keys",
    }
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert torch.equal(loaded["nested"][0]["tensor"], torch.arange(3))
    assert loaded["nested"][1] == (1, 2.5, None, True, "text")
    assert loaded["array"].dtype == np.float64
    assert np.array_equal(loaded["array"], state["array"])
    assert loaded["scalar"].shape == ()
    assert loaded["number"] == 1.5
    assert loaded["generator"] == state["generator"], "128-bit integers survive"
    assert loaded[7] == "integer keys"


def test_weights_come_back_with_their_version_even_if_they_share_memory(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    save_weights(tmp_path / "w.safetensors", 12, {"a": base, "view": base.T, "tied": base, "bf16": base.bfloat16()})
    version, weights = load_weights(tmp_path / "w.safetensors")
    assert version == 12
    assert torch.equal(weights["view"], base.T)
    assert torch.equal(weights["tied"], base)
    assert weights["bf16"].dtype == torch.bfloat16


class Harmful:
    def __reduce__(self):
        return (eval, ("1/0",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", pickle.dumps({"a": Harmful()})],
    ids=["empty", "text", "harmful"],
)
def test_foreign_files_are_refused_without_being_executed(tmp_path, content):
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read .*; choose another checkpoint"):
        load_state(path)
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        load_weights(path)


def test_truncated_files_are_refused(tmp_path):
    save_state(tmp_path / "state.pt", {"a": torch.zeros(1000)})
    save_weights(tmp_path / "w.safetensors", 1, {"a": torch.zeros(1000)})
    for name, load in (("state.pt", load_state), ("w.safetensors", load_weights)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load(path)


def test_missing_files_and_other_contents_are_named(tmp_path):
    for load in (load_state, load_weights):
        with pytest.raises(CheckpointError, match="nothing is missing"):
            load(tmp_path / "nothing")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a state"):
        load_state(tmp_path / "list.pt")


@pytest.mark.skipif("not __import__('os').path.exists('/dev/full')", reason="needs /dev/full")
def test_a_full_disk_is_a_checkpoint_error():
    with pytest.raises(CheckpointError, match="/dev/full could not be written"):
        save_state("/dev/full", {"a": torch.zeros(100_000)})


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o775, 0o664), (0o700, 0o600)])
def test_who_may_read_the_folder_may_read_the_weights(tmp_path, folder, file):
    place = tmp_path / "checkpoint"
    place.mkdir()
    place.chmod(folder)
    save_weights(place / "w.safetensors", 1, {"a": torch.zeros(3)})
    assert (place / "w.safetensors").stat().st_mode & 0o777 == file
