import numpy as np
import pytest
import torch
from PIL import Image

from rlinf.core.errors import ConfigError, DataError, ShapeError
from rlinf.models.embodiment.openpi import transforms
from rlinf.models.embodiment.openpi.config import PI0, TINY, TINY_PI05
from rlinf.models.embodiment.openpi.dataconfig import DATA_CONFIGS, DataConfig, data_config
from rlinf.models.embodiment.openpi.norm_stats import NormStats
from rlinf.models.embodiment.openpi.tokenizer import ByteTokenizer, prompt_tokens
from rlinf.models.embodiment.openpi.transforms import (
    AbsoluteActions,
    CropActions,
    DeltaActions,
    Normalize,
    PadStatesAndActions,
    PickCameras,
    ResizeImages,
    TokenizePrompt,
    Unnormalize,
    compose,
    model_inputs,
    pad_to,
    resize_with_pad,
)

STATS = NormStats(*(torch.tensor(x, dtype=torch.float64) for x in ([1.0, 0.0], [2.0, 1.0], [0.0, -1.0], [4.0, 1.0])))


def pictures(*shape, seed=0):
    """Random rows and columns of blocks: edges as in pictures, not only noise."""
    rng = np.random.default_rng(seed)
    batch, height, width = shape
    coarse = rng.integers(0, 256, (batch, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return torch.from_numpy(coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width].copy())


# ---- images


@pytest.mark.parametrize(
    ("height", "width", "size"), [(256, 256, 224), (480, 640, 224), (100, 60, 56), (30, 50, 224), (333, 77, 96)]
)
def test_resizing_is_pillows_within_a_level(height, width, size):
    images = pictures(2, height, width)
    found = resize_with_pad(images, size, size)
    assert found.shape == (2, size, size, 3) and found.dtype is torch.uint8
    ratio = max(width / size, height / size)
    inner = int(width / ratio), int(height / ratio)
    for image, out in zip(images, found, strict=True):
        expected = Image.new("RGB", (size, size))
        place = (size - inner[0]) // 2, (size - inner[1]) // 2
        expected.paste(Image.fromarray(image.numpy()).resize(inner, Image.Resampling.BILINEAR), place)
        difference = np.abs(out.numpy().astype(int) - np.asarray(expected))
        assert difference.max() <= 1 and difference.mean() < 0.2


def test_other_devices_resize_within_a_level():
    """What runs where torch has no uint8 kernel: the same in float32."""
    from torch.nn.functional import interpolate

    images = pictures(1, 256, 256).permute(0, 3, 1, 2)
    small = interpolate(images.float(), (224, 224), mode="bilinear", antialias=True).round().clamp(0, 255)
    cpu = resize_with_pad(images.permute(0, 2, 3, 1), 224, 224).permute(0, 3, 1, 2)
    assert (small - cpu.float()).abs().max() <= 1


def test_many_pictures_are_resized_in_parts(monkeypatch):
    images = torch.randint(0, 255, (7, 12, 16, 3), dtype=torch.uint8)
    expected, asked, interpolate = resize_with_pad(images, 8, 8), [], transforms.F.interpolate
    monkeypatch.setattr(transforms, "RESIZED_AT_ONCE", 3)
    monkeypatch.setattr(transforms.F, "interpolate", lambda x, *a, **k: asked.append(len(x)) or interpolate(x, *a, **k))
    assert torch.equal(resize_with_pad(images, 8, 8), expected) and asked == [3, 3, 1]


def test_resizing_by_hand():
    """4 × 2 into 4 × 4 fits: two black columns, one on either side."""
    images = torch.full((1, 4, 2, 3), 9, dtype=torch.uint8)
    found = resize_with_pad(images, 4, 4)
    assert found[0, 0, :, 0].tolist() == [0, 9, 9, 0]
    assert resize_with_pad(images[:, :2], 2, 2) is not None
    tall = resize_with_pad(torch.full((1, 6, 4, 3), 9, dtype=torch.uint8), 3, 3)
    assert tall[0, 0, :, 0].tolist() == [9, 9, 0]
    same = images[:, :2]
    assert resize_with_pad(same, 2, 2) is same


def test_cameras_are_picked_by_any_of_their_names():
    pick = PickCameras({"base_0_rgb": ("main", "image"), "left_wrist_0_rgb": ("wrist",)})
    images = {"wrist": pictures(1, 8, 8), "image": pictures(1, 8, 8, seed=1), "side": pictures(1, 8, 8)}
    picked = pick({"images": images})["images"]
    assert list(picked) == ["base_0_rgb", "left_wrist_0_rgb"]
    assert picked["base_0_rgb"] is images["image"]
    with pytest.raises(DataError, match="no camera for left_wrist_0_rgb: looked for wrist, there is image"):
        pick({"images": {"image": images["image"]}})
    with pytest.raises(DataError, match="no camera for base_0_rgb: looked for main or image, there is none"):
        pick({"state": torch.zeros(1)})
    with pytest.raises(ShapeError, match=r"camera image gives torch.float32 \[1, 3, 8, 8\], not uint8"):
        pick({"images": {"image": torch.zeros(1, 3, 8, 8)}})


# ---- states and actions


def test_normalisation_by_hand():
    sample = {"state": torch.tensor([[5.0, 1.0]]), "actions": torch.tensor([[[1.0, -1.0]], [[3.0, 0.5]]])}
    z = Normalize({"state": STATS, "actions": STATS}, quantiles=False)(sample)
    torch.testing.assert_close(z["state"], torch.tensor([[2.0, 1.0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(z["actions"], torch.tensor([[[0.0, -1.0]], [[1.0, 0.5]]]), atol=1e-5, rtol=0)
    q = Normalize({"state": STATS}, quantiles=True)(sample)
    torch.testing.assert_close(q["state"], torch.tensor([[1.5, 1.0]]), atol=1e-5, rtol=0)
    assert torch.equal(q["actions"], sample["actions"])
    assert z["state"].dtype is torch.float32


@pytest.mark.parametrize("quantiles", [False, True])
def test_unnormalising_inverts_and_leaves_padding(quantiles):
    stats, actions = {"actions": STATS}, torch.randn(3, 4, 2)
    normal = Normalize(stats, quantiles)({"state": actions[:, 0], "actions": actions})["actions"]
    padded = pad_to(normal, 5) + torch.tensor([0, 0, 7.0, 8.0, 9.0])
    back = Unnormalize(stats, quantiles)({"actions": padded})["actions"]
    torch.testing.assert_close(back[..., :2], actions, atol=1e-6, rtol=1e-6)
    assert torch.equal(back[..., 2:], padded[..., 2:])


def test_statistics_of_padded_vectors():
    """Longer than the data they are cut, shorter is an error. A padded element becomes −1 by quantiles, else 0."""
    wide = NormStats(*(torch.cat([x, torch.zeros(1, dtype=torch.float64)]) for x in vars(STATS).values()))
    for quantiles, value in ((True, -1.0), (False, 0.0)):
        state = torch.tensor([[5.0, 1.0, 0.0]])
        assert Normalize({"state": wide}, quantiles)({"state": state})["state"][0, 2] == value
        two = Normalize({"state": wide}, quantiles)({"state": state[:, :2]})["state"]
        assert torch.equal(two, Normalize({"state": STATS}, quantiles)({"state": state[:, :2]})["state"])
    with pytest.raises(ShapeError, match=r"state has 3 numbers, but norm_stats.json only 2"):
        Normalize({"state": STATS}, False)({"state": state})
    with pytest.raises(DataError, match="no 'actions', only state"):
        Unnormalize({"state": STATS}, False)({"actions": state})


def test_small_ranges_keep_their_digits():
    """Statistics are float64: a range of 2e-5 around 1 is resolved."""
    stats = NormStats(*(torch.tensor([x], dtype=torch.float64) for x in (1.0, 1e-5, 1 - 1e-5, 1 + 1e-5)))
    state = torch.tensor([[1.0 + 5e-6]], dtype=torch.float64)
    assert Normalize({"state": stats}, True)({"state": state})["state"].item() == pytest.approx(30 / 21 - 1, abs=1e-6)


def test_delta_actions_by_hand():
    sample = {
        "state": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        "actions": torch.tensor([[[10.0, 20.0, 30.0], [11.0, 21.0, 31.0]]]),
    }
    mask = (True, False)
    delta = DeltaActions(mask)(sample)
    assert delta["actions"].tolist() == [[[9, 20, 30], [10, 21, 31]]]
    assert sample["actions"][0, 0, 0] == 10
    assert torch.equal(AbsoluteActions(mask)(delta)["actions"], sample["actions"])
    assert DeltaActions(mask)({"state": sample["state"]}).keys() == {"state"}
    with pytest.raises(ShapeError, match="5 numbers are relative to the state"):
        DeltaActions((True,) * 5)(sample)


def test_padding_and_cropping():
    sample = PadStatesAndActions(4)({"state": torch.ones(1, 2), "actions": torch.ones(1, 1, 3)})
    assert sample["state"].tolist() == [[1, 1, 0, 0]] and sample["actions"].tolist() == [[[1, 1, 1, 0]]]
    assert CropActions(2)(sample)["actions"].shape == (1, 1, 2)
    assert "actions" not in PadStatesAndActions(4)({"state": torch.ones(1, 2)})
    with pytest.raises(ShapeError, match="5 numbers do not fit into the model's 4"):
        pad_to(torch.ones(1, 5), 4)


def test_prompts_of_environments_and_data_sets():
    tokenizer = ByteTokenizer()
    for key in ("instruction", "prompt"):
        sample = TokenizePrompt(tokenizer, 48, False)({key: ["open"], "state": torch.zeros(1, 2)})
        assert sample["tokens"][sample["token_mask"]].tolist() == prompt_tokens(tokenizer, "open")
    sample = TokenizePrompt(tokenizer, 200, True)({"prompt": ["open"], "state": torch.zeros(1, 2)})
    expected = prompt_tokens(tokenizer, "open", torch.zeros(2))
    assert sample["tokens"][sample["token_mask"]].tolist() == expected


def test_inputs_have_the_cameras_in_the_models_order():
    base, wrist = pictures(2, 64, 64), pictures(2, 64, 64, seed=1)
    sample = {
        "images": {"left_wrist_0_rgb": wrist, "base_0_rgb": base},
        "tokens": torch.ones(2, 8, dtype=torch.int64),
        "token_mask": torch.ones(2, 8, dtype=torch.bool),
        "state": torch.zeros(2, 32),
    }
    inputs = model_inputs(sample, "cpu")
    assert inputs.images.shape == (2, 2, 3, 64, 64) and inputs.image_mask.all()
    for index, image in enumerate((base, wrist)):
        expected = image.permute(0, 3, 1, 2).float() / 127.5 - 1
        torch.testing.assert_close(inputs.images[:, index], expected, atol=1e-6, rtol=0)


# ---- named configurations


def robot(state_dim, cameras=("agentview", "wrist"), batch=2):
    return {
        "images": {name: pictures(batch, 256, 256, seed=n) for n, name in enumerate(cameras)},
        "state": torch.randn(batch, state_dim, generator=torch.Generator().manual_seed(0)),
        "instruction": ["open the drawer"] * batch,
    }


def stats(size):
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.randn(size, generator=generator).double(), 0.5 + torch.rand(size, generator=generator).double()
    return NormStats(mean, std, mean - 2 * std, mean + 2 * std)


@pytest.mark.parametrize("name", DATA_CONFIGS)
def test_named_configurations_go_round(name):
    """Actions → model → the same actions, for every configuration."""
    config = data_config(name)
    size = 32 if config.pad_first else 7
    both = {"state": stats(32 if config.pad_first else 8), "actions": stats(size)}
    pipeline = config.pipeline(both, ByteTokenizer())
    obs, actions = robot(8), torch.randn(2, config.model.action_horizon, 7)
    inputs, target = pipeline.encode_with_actions(obs, actions)
    assert inputs.images.shape == (2, len(config.cameras), 3, 224, 224)
    assert inputs.state.shape == (2, 32) and target.shape == (2, config.model.action_horizon, 32)
    torch.testing.assert_close(pipeline.decode(target, obs["state"]), actions, atol=1e-4, rtol=1e-4)
    acting = pipeline.encode(obs)
    assert torch.equal(acting.images, inputs.images) and torch.equal(acting.state, inputs.state)


def test_pi0_on_libero_step_by_step():
    config = data_config("pi0_libero")
    assert config.model == PI0 and config.model.action_horizon == 50 and not config.quantiles
    assert list(config.cameras) == ["base_0_rgb", "left_wrist_0_rgb"]  # the right wrist is masked
    both = {"state": stats(8), "actions": stats(7)}
    obs, actions = robot(8), torch.randn(2, 50, 7)
    inputs, target = config.pipeline(both, ByteTokenizer()).encode_with_actions(obs, actions)
    delta = actions.clone()
    delta[..., :6] -= obs["state"][:, None, :6]
    expected = (delta - both["actions"].mean) / (both["actions"].std + 1e-6)
    torch.testing.assert_close(target[..., :7].double(), expected, atol=1e-5, rtol=1e-5)
    assert not target[..., 7:].any() and not inputs.state[:, 8:].any()
    z = (obs["state"] - both["state"].mean) / (both["state"].std + 1e-6)
    torch.testing.assert_close(inputs.state[:, :8].double(), z, atol=1e-5, rtol=1e-5)
    assert inputs.tokens[inputs.token_mask].tolist() == 2 * prompt_tokens(ByteTokenizer(), "open the drawer")
    first = resize_with_pad(obs["images"]["agentview"], 224, 224).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(inputs.images[:, 0], first, atol=1e-6, rtol=0)


def test_pi05_on_libero_step_by_step():
    config = data_config("pi05_libero")
    assert config.model.pi05 and config.model.action_horizon == 10 and config.quantiles
    assert config.delta_mask is None and not config.state_in_prompt
    both = {"state": stats(8), "actions": stats(7)}
    actions = torch.randn(2, 10, 7)
    inputs, target = config.pipeline(both, ByteTokenizer()).encode_with_actions(robot(8), actions)
    q01, q99 = both["actions"].q01, both["actions"].q99
    expected = (actions - q01) / (q99 - q01 + 1e-6) * 2 - 1
    torch.testing.assert_close(target[..., :7].double(), expected, atol=1e-5, rtol=1e-5)
    assert inputs.tokens[inputs.token_mask].tolist() == 2 * prompt_tokens(ByteTokenizer(), "open the drawer")


def test_co_training_pads_before_it_normalises():
    config = data_config("pi05_maniskill_sim_real_co_training")
    assert config.model.action_horizon == 8 and list(config.cameras) == ["base_0_rgb"]
    wide = NormStats(*(torch.cat([x, torch.zeros(25, dtype=torch.float64)]) for x in vars(stats(7)).values()))
    pipeline = config.pipeline({"state": wide, "actions": wide}, ByteTokenizer())
    _, target = pipeline.encode_with_actions(robot(7, ("front",)), torch.randn(2, 8, 7))
    assert (target[..., 7:] == -1).all()


def test_state_in_the_prompt_is_normalised_and_not_padded():
    config = DataConfig("robot", TINY_PI05, "robot", {"base_0_rgb": ("main",)}, {}, action_dim=2, state_in_prompt=True)
    both = {"state": STATS, "actions": STATS}
    obs = {"images": {"main": pictures(1, 60, 80)}, "state": torch.tensor([[2.0, 0.0]]), "instruction": ["go"]}
    inputs = config.pipeline(both, ByteTokenizer()).encode(obs)
    expected = prompt_tokens(ByteTokenizer(), "go", torch.tensor([-1e-6, -1e-6]))
    assert inputs.tokens[inputs.token_mask].tolist() == expected
    assert inputs.images.shape[-2:] == (64, 64)


def test_mistakes_in_configurations_are_named():
    with pytest.raises(ConfigError, match=r"no data config is called 'pi0_libro'; did you mean 'pi0_libero'\?"):
        data_config("pi0_libro")
    with pytest.raises(ConfigError, match="there are: pi0_libero"):
        data_config("x")
    with pytest.raises(ConfigError, match="no camera slot is called 'top'"):
        DataConfig("robot", TINY, "robot", {"top": ("main",)}, {})
    with pytest.raises(ConfigError, match="pi0 takes the state as numbers"):
        DataConfig("robot", TINY, "robot", {}, {}, state_in_prompt=True)

    class Large(ByteTokenizer):
        vocab_size = 600

    with pytest.raises(ConfigError, match="tokenizer has 600 tokens, the model 512 embeddings"):
        DataConfig("robot", TINY, "robot", {}, {}).pipeline({}, Large())


def test_transforms_compose_in_order():
    double, crop = (lambda s: {**s, "actions": 2 * s["actions"]}), CropActions(1)
    assert compose([double, crop, double])({"actions": torch.ones(1, 1, 2)})["actions"].tolist() == [[[4]]]
    assert ResizeImages(16)({"images": {"a": pictures(1, 32, 32)}})["images"]["a"].shape == (1, 16, 16, 3)
