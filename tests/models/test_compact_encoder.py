"""What DSRL's small networks see, and how they read it."""

import pytest
import torch

from rlinf.core.errors import ShapeError
from rlinf.core.types import EnvSpaces
from rlinf.models.modules.compact_encoder import CompactEncoder, CompactImageEncoder
from rlinf.models.modules.compact_view import CompactView, shrink, viewed_spaces
from rlinf.models.modules.running_norm import RunningNorm


def whole_obs(n=3, side=256):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (n, side, side, 3), generator=generator, dtype=torch.uint8)
    state = torch.randn(n, 8, generator=generator)
    return {"state": state, "images": {"main": image, "wrist": image}, "instruction": ["pick"] * n}


def test_only_state_and_one_small_picture_are_kept():
    seen = CompactView("main")(whole_obs())
    assert seen.keys() == {"state", "images"} and seen["images"].keys() == {"main"}
    assert seen["images"]["main"].shape == (3, 64, 64, 3) and seen["images"]["main"].dtype == torch.uint8
    assert CompactView()(whole_obs()).keys() == {"state"}


def test_seen_twice_is_seen_once():
    view = CompactView("main")
    once = view(whole_obs())
    assert view(once)["images"]["main"] is once["images"]["main"]


def test_a_small_pixel_is_the_mean_of_what_it_covers():
    image = torch.zeros(1, 256, 256, 3, dtype=torch.uint8)
    image[:, ::2] = 200  # rows too thin to be seen one by one
    small = shrink(image, 64)
    assert (small[:, 1:-1].int() - 100).abs().max() <= 1
    flat = torch.full((2, 96, 128, 3), 77, dtype=torch.uint8)
    assert (shrink(flat, 64) == 77).all()


def test_a_missing_camera_is_named():
    with pytest.raises(ShapeError, match="camera 'front' is missing: the observation has main, wrist"):
        CompactView("front")(whole_obs())


def test_spaces_are_those_of_what_is_seen():
    spaces = EnvSpaces(
        {"state": (8,), "images/main": (256, 256, 3), "images/wrist": (256, 256, 3), "instruction": ()},
        {"state": "float32", "images/main": "uint8", "images/wrist": "uint8", "instruction": "str"},
        action_dim=7,
    )
    seen = viewed_spaces(spaces, CompactView("main"))
    assert seen.obs_shapes == {"state": (8,), "images/main": (64, 64, 3)}
    assert seen.obs_dtypes == {"state": "float32", "images/main": "uint8"}
    assert viewed_spaces(spaces, lambda obs: obs) == spaces


def test_whole_and_viewed_observations_give_the_same_features():
    torch.manual_seed(0)
    encoder = CompactEncoder(8, 64, camera="main")
    obs = whole_obs()
    features = encoder(obs)
    assert features.shape == (3, 128) == (3, encoder.out_dim)
    assert features.abs().max() < 1
    assert torch.equal(features, encoder(CompactView("main")(obs)))


def test_without_a_camera_the_state_alone_is_read():
    encoder = CompactEncoder(8, 16)
    assert encoder.out_dim == 16
    assert {name for name, _ in encoder.named_parameters()} == {
        "state.0.weight", "state.0.bias", "state.1.weight", "state.1.bias",
    }  # fmt: skip
    assert encoder({"state": torch.zeros(2, 8)}).shape == (2, 16)


def test_the_state_is_normalised_by_the_shared_statistics():
    norm = RunningNorm(8)
    encoder = CompactEncoder(8, 16, normalizer=norm)
    obs = {"state": 5 + torch.randn(64, 8)}
    before = encoder(obs)
    norm.update(obs["state"])
    assert not torch.equal(before, encoder(obs))
    torch.testing.assert_close(encoder(obs), encoder.state(norm(obs["state"])))


@pytest.mark.parametrize(("strides", "places"), [((2, 2, 2, 2), 4), ((2, 1, 1, 1), 32)])
def test_strides_decide_the_size_of_the_map(strides, places):
    encoder = CompactImageEncoder((64, 64), 64, strides)
    assert encoder.project[0].in_features == 32 * places**2
    assert encoder(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).shape == (2, 64)


def test_pixels_are_scaled_to_minus_one_to_one():
    encoder, seen = CompactImageEncoder((8, 8), 4, (2,)), []
    encoder.convs[0].register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    encoder(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 8, 8, 3))
    assert (seen[0][0] == -1).all() and (seen[0][1] == 1).all()


def test_another_size_or_type_is_refused():
    encoder = CompactImageEncoder((64, 64), 64)
    with pytest.raises(ShapeError, match=r"images uint8 \[64, 64, 3\], not for torch.uint8 \[32, 64, 3\]"):
        encoder(torch.zeros(1, 32, 64, 3, dtype=torch.uint8))
    with pytest.raises(ShapeError, match=r"not for torch.float32"):
        encoder(torch.zeros(1, 64, 64, 3))
