import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file

from rlinf.core.errors import CheckpointError, ConfigError, ShapeError
from rlinf.models.embodiment.cnn_policy import CnnPolicyConfig, build_cnn_policy
from rlinf.models.embodiment.flow_policy import FlowPolicyConfig
from rlinf.models.embodiment.image_encoder import ImageEncoder
from rlinf.models.modules.resnet10 import ResNet10, load_resnet10
from rlinf.models.modules.running_norm import RunningNorm
from rlinf.models.modules.small_cnn import SmallCnn
from rlinf.models.modules.spatial_embedding import SpatialLearnedEmbeddings

S, A, B, SIZE = 7, 4, 3, 64
SHAPES = {"state": (S,), "images/wrist": (SIZE, SIZE, 3), "images/front": (SIZE, SIZE, 3), "instruction": ()}

# torchvision's names for a ResNet of one basic block per stage.
RESNET10_LAYOUT = {
    "conv1.weight": (64, 3, 7, 7),
    "bn1.weight": (64,),
    "bn1.bias": (64,),
    "layer1.0.conv1.weight": (64, 64, 3, 3),
    "layer1.0.bn1.weight": (64,),
    "layer1.0.bn1.bias": (64,),
    "layer1.0.conv2.weight": (64, 64, 3, 3),
    "layer1.0.bn2.weight": (64,),
    "layer1.0.bn2.bias": (64,),
    "layer2.0.conv1.weight": (128, 64, 3, 3),
    "layer2.0.bn1.weight": (128,),
    "layer2.0.bn1.bias": (128,),
    "layer2.0.conv2.weight": (128, 128, 3, 3),
    "layer2.0.bn2.weight": (128,),
    "layer2.0.bn2.bias": (128,),
    "layer2.0.downsample.0.weight": (128, 64, 1, 1),
    "layer2.0.downsample.1.weight": (128,),
    "layer2.0.downsample.1.bias": (128,),
    "layer3.0.conv1.weight": (256, 128, 3, 3),
    "layer3.0.bn1.weight": (256,),
    "layer3.0.bn1.bias": (256,),
    "layer3.0.conv2.weight": (256, 256, 3, 3),
    "layer3.0.bn2.weight": (256,),
    "layer3.0.bn2.bias": (256,),
    "layer3.0.downsample.0.weight": (256, 128, 1, 1),
    "layer3.0.downsample.1.weight": (256,),
    "layer3.0.downsample.1.bias": (256,),
    "layer4.0.conv1.weight": (512, 256, 3, 3),
    "layer4.0.bn1.weight": (512,),
    "layer4.0.bn1.bias": (512,),
    "layer4.0.conv2.weight": (512, 512, 3, 3),
    "layer4.0.bn2.weight": (512,),
    "layer4.0.bn2.bias": (512,),
    "layer4.0.downsample.0.weight": (512, 256, 1, 1),
    "layer4.0.downsample.1.weight": (512,),
    "layer4.0.downsample.1.bias": (512,),
}


def observations(batch=B, seed=1, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    return {
        "state": torch.randn(batch, S, generator=generator),
        "images": {
            camera: torch.randint(256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
            for camera in ("wrist", "front")
        },
        "instruction": ["lift the block"] * batch,
    }


def encoder(resnet=None, **keys):
    torch.manual_seed(0)
    shapes = {"wrist": (SIZE, SIZE, 3), "front": (SIZE, SIZE, 3)}
    return ImageEncoder(shapes, S, resnet=resnet, image_feature_dim=16, state_feature_dim=8, **keys)


def policy(normalizer=None, **keys):
    torch.manual_seed(0)
    config = CnnPolicyConfig(image_feature_dim=16, state_feature_dim=8, hidden_dims=(8,), **keys)
    return build_cnn_policy(config, obs_shapes=SHAPES, action_dim=A, normalizer=normalizer)


@pytest.fixture(scope="module")
def resnet_weights():
    """A file's content with weights of a size that lets every layer be seen in the output."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in RESNET10_LAYOUT.items():
        fan_in = torch.Size(shape[1:]).numel()
        scale = (2 / fan_in) ** 0.5 if len(shape) == 4 else 0.3
        weights[name] = scale * torch.randn(shape, generator=generator) + (1.0 if name.endswith("bn1.weight") else 0.0)
    return weights


@pytest.fixture(scope="module")
def folder(resnet_weights, tmp_path_factory):
    """Laid out like the published one: a .pt file with a classifier."""
    path = tmp_path_factory.mktemp("RLinf-ResNet10-pretrained")
    classifier = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(resnet_weights | classifier, path / "resnet10_pretrained.pt")
    return path


# ---- ResNet-10


def test_layout_is_torchvisions():
    assert {name: tuple(tensor.shape) for name, tensor in ResNet10().state_dict().items()} == RESNET10_LAYOUT


def test_published_layout_loads_from_folder_and_file(folder, resnet_weights, tmp_path):
    save_file(resnet_weights, tmp_path / "weights.safetensors")
    for path in (folder, folder / "resnet10_pretrained.pt", tmp_path / "weights.safetensors", str(folder)):
        loaded = load_resnet10(path).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in resnet_weights.items())


def reference_resnet10(weights, images):
    """Written out from torchvision's forward, channels first and in double precision."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x, name):
        return F.group_norm(x, 4, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    x = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    x = F.relu(norm(F.conv2d(x, w["conv1.weight"], stride=2, padding=3), "bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in (1, 2, 3, 4):
        block, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        y = F.relu(norm(F.conv2d(x, w[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn1"))
        y = norm(F.conv2d(y, w[f"{block}.conv2.weight"], padding=1), f"{block}.bn2")
        if stage > 1:
            x = norm(F.conv2d(x, w[f"{block}.downsample.0.weight"], stride=stride), f"{block}.downsample.1")
        x = F.relu(x + y)
    return x


@pytest.mark.parametrize(("height", "width", "map_size"), [(128, 128, (4, 4)), (65, 96, (3, 3))])
def test_forward_is_torchvisions(folder, resnet_weights, height, width, map_size):
    images = torch.randint(256, (2, height, width, 3), dtype=torch.uint8)
    network = load_resnet10(folder)
    with torch.no_grad():
        out = network(images)
    assert out.shape == (2, 512, *map_size) == (2, 512, *network.map_size(height, width))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), reference_resnet10(resnet_weights, images), atol=1e-3, rtol=1e-3)


def test_missing_weights_name_the_remedy(tmp_path):
    remedy = "hf download RLinf/RLinf-ResNet10-pretrained --local-dir RLinf-ResNet10-pretrained"
    for path, said in (
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path, "holds no resnet10_pretrained.pt"),
    ):
        with pytest.raises(CheckpointError) as error:
            load_resnet10(path)
        assert said in str(error.value) and remedy in str(error.value) and "model_path: null" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("layer3.0.bn2.bias"), "layer3.0.bn2.bias is missing"),
        (lambda w: w.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}), r"conv1.weight is \[64, 3, 3, 3\] instead of"),
        (lambda w: w.update({"layer1.1.conv1.weight": torch.zeros(1)}), "layer1.1.conv1.weight is unknown"),
        (lambda w: w.update({"bn1.weight": 3}), "bn1.weight is a int"),
    ],
)
def test_foreign_weights_are_named(resnet_weights, tmp_path, change, said):
    weights = dict(resnet_weights)
    change(weights)
    torch.save(weights, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=said):
        load_resnet10(tmp_path / "foreign.pt")


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("save", [torch.save, lambda tree, path: path.write_bytes(pickle.dumps(tree, 2))])
def test_code_in_a_file_does_not_run(tmp_path, save):
    file, victim = tmp_path / "resnet10_pretrained.pt", tmp_path / "victim"
    save({"conv1.weight": Malicious(str(victim))}, file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_resnet10(tmp_path)
    assert not victim.exists()


@pytest.mark.parametrize("name", ["resnet10_pretrained.pt", "resnet10_pretrained.safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (b"no weights", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} .*{said}"):
        load_resnet10(tmp_path)


# ---- parts


def test_spatial_embedding_by_hand():
    layer = SpatialLearnedEmbeddings(2, 1, 2, 3)
    assert layer.kernel.shape == (2, 1, 2, 3)
    with torch.no_grad():
        layer.kernel.copy_(torch.arange(12.0).view(2, 1, 2, 3))
    # Channel 0 is (1, 10) over the kernel rows (0 1 2), (3 4 5); channel 1 is (2, 0) over (6 7 8), (9 10 11).
    out = layer(torch.tensor([[[[1.0, 10.0]], [[2.0, 0.0]]]]))
    assert out.tolist() == [[30.0, 41.0, 52.0, 12.0, 14.0, 16.0]]


@pytest.mark.parametrize("channels", [(4,), (4, 6), (4, 6, 5, 5)])
@pytest.mark.parametrize("size", [(32, 48), (30, 33)])
def test_small_cnn_knows_the_size_of_its_map(channels, size):
    network = SmallCnn(channels)
    out = network(torch.zeros(2, *size, 3, dtype=torch.uint8))
    assert out.shape == (2, channels[-1], *network.map_size(*size))


# ---- encoder


def test_features_depend_on_every_camera_and_the_state_alone():
    network, obs = encoder(), observations()
    features = network(obs)
    assert features.keys() == {"state"}
    assert features["state"].shape == (B, network.out_dim) == (B, 2 * 16 + 8)
    other = observations(seed=2)
    changed = {
        "front": obs | {"images": obs["images"] | {"front": other["images"]["front"]}},
        "wrist": obs | {"images": obs["images"] | {"wrist": other["images"]["wrist"]}},
        "state": obs | {"state": other["state"]},
    }
    moved = {what: (network(seen)["state"] != features["state"]).any(0) for what, seen in changed.items()}
    columns = {"front": slice(0, 16), "wrist": slice(16, 32), "state": slice(32, 40)}  # cameras in order of names
    for what, columns_of in columns.items():
        assert moved[what][columns_of].all()
        assert moved[what].sum() == columns_of.stop - columns_of.start
    without_text = {key: value for key, value in obs.items() if key != "instruction"}
    assert torch.equal(network(without_text)["state"], features["state"])


def test_features_of_an_image_do_not_depend_on_its_batch():
    network, obs = encoder(), observations()
    alone = {"state": obs["state"][1:2], "images": {name: image[1:2] for name, image in obs["images"].items()}}
    torch.testing.assert_close(network(alone)["state"], network(obs)["state"][1:2], atol=1e-5, rtol=1e-4)


def test_wrong_observations_are_named():
    network, obs = encoder(), observations()
    with pytest.raises(ShapeError, match="camera 'front' is missing: the observation has wrist"):
        network(obs | {"images": {"wrist": obs["images"]["wrist"]}})
    with pytest.raises(ShapeError, match="camera 'front' is missing: the observation has no images"):
        network({"state": obs["state"]})
    with pytest.raises(ShapeError, match=r"'front' are uint8 \[32, 32, 3\], but .* built for uint8 \[64, 64, 3\]"):
        network(observations(size=32))
    floats = {name: image.float() for name, image in obs["images"].items()}
    with pytest.raises(ShapeError, match="'front' are float32"):
        network(obs | {"images": floats})


def test_frozen_backbone_is_shared_and_gets_no_gradient(folder):
    network = encoder(load_resnet10(folder))
    backbone = set(network.backbone.parameters())
    trained = network.trained_parameters()
    assert not backbone & set(trained)
    assert backbone | set(trained) == set(network.parameters())
    network(observations())["state"].square().sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone)
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
    shared = [name for name in network.state_dict() if "backbone" in name]
    assert shared == [f"backbone.{name}" for name in RESNET10_LAYOUT]


def test_unfrozen_backbones_begin_alike_and_are_trained(folder):
    network = encoder(load_resnet10(folder), freeze_backbone=False)
    assert network.backbone is None
    assert set(network.trained_parameters()) == set(network.parameters())
    network(observations())["state"].square().sum().backward()
    stems = [network.encoders[camera].backbone.conv1.weight for camera in ("front", "wrist")]
    assert torch.equal(*stems)
    assert all(stem.grad.abs().sum() > 0 for stem in stems)


def test_small_encoder_is_trained_from_end_to_end():
    network = encoder()
    network(observations())["state"].square().sum().backward()
    assert set(network.trained_parameters()) == set(network.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_target_is_a_frozen_copy_that_shares_what_does_not_change(folder):
    norm = RunningNorm(S)
    network = encoder(load_resnet10(folder), normalizer=norm)
    target = network.make_target()
    assert target.normalizer is norm and target.backbone is network.backbone
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert all(parameter.requires_grad for parameter in network.trained_parameters())
    pairs = list(zip(target.trained_parameters(), network.trained_parameters(), strict=True))
    assert all(torch.equal(copy, original) and copy is not original for copy, original in pairs)
    torch.testing.assert_close(target(observations()), network(observations()))


def test_only_a_generator_makes_it_drop():
    network, obs = encoder(dropout=0.5), observations()
    kept = network(obs)["state"]
    assert torch.equal(network.train()(obs)["state"], kept)
    assert torch.equal(network.eval()(obs)["state"], kept)
    first, again, other = (network(obs, torch.Generator().manual_seed(seed))["state"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, kept)
    assert torch.equal(first[:, 32:], kept[:, 32:])  # the state's features are never dropped
    undropped = encoder()
    undropped.load_state_dict(network.state_dict())
    assert torch.equal(undropped(obs, torch.Generator().manual_seed(1))["state"], kept)


def test_dropout_keeps_the_mean():
    camera = encoder(dropout=0.25).encoders["front"]
    camera.mlp = torch.nn.Identity()
    image = observations()["images"]["front"][:1]
    kept = camera(image, None)
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([camera(image, generator) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean.mean(), kept.mean(), atol=0.02 * kept.abs().mean().item(), rtol=0)


def test_normaliser_is_applied_to_the_state_and_saved():
    norm = RunningNorm(S)
    network, obs = encoder(normalizer=norm), observations()
    before = network(obs)["state"]
    norm.update(10 + torch.randn(100, S))
    after = network(obs)["state"]
    assert torch.equal(before[:, :32], after[:, :32])
    assert not torch.equal(before[:, 32:], after[:, 32:])
    assert "normalizer.mean" in network.state_dict()


# ---- policy


def test_acting_is_a_function_of_observation_and_noise():
    network, obs = policy(dropout=0.5), observations()
    noise = torch.randn(B, *network.noise_shape)
    for mode, epsilon in (("eval", None), ("train", noise)):
        outs = [network.train(training).act(obs, mode, epsilon) for training in (True, False)]
        assert torch.equal(outs[0].action, outs[1].action)
    assert outs[0].action.shape == (B, 1, A)
    decision, log_prob = network.sample(obs, noise)
    torch.testing.assert_close(decision, outs[0].decision)
    torch.testing.assert_close(log_prob, outs[0].log_prob)
    assert network.default_target_entropy() == -A


def test_policy_is_the_head_on_the_encoders_features():
    network, obs = policy(num_action_chunks=2), observations()
    noise = torch.randn(B, *network.noise_shape)
    assert network.noise_shape == (2 * A,)
    features = network.encoder(obs)
    torch.testing.assert_close(network.sample(obs, noise), network.head.sample(features, noise))
    assert network.head.normalizer is None


def test_weights_and_statistics_travel_together():
    norm = RunningNorm(S)
    norm.update(torch.randn(10, S))
    source, obs = policy(norm), observations()
    torch.manual_seed(9)
    other = build_cnn_policy(
        CnnPolicyConfig(image_feature_dim=16, state_feature_dim=8, hidden_dims=(8,)),
        obs_shapes=SHAPES,
        action_dim=A,
        normalizer=RunningNorm(S),
    )
    assert not torch.equal(other.act(obs, "eval").action, source.act(obs, "eval").action)
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.act(obs, "eval").action, source.act(obs, "eval").action)
    assert {name.split(".")[0] for name in source.state_dict()} == {"encoder", "head"}


def test_a_flow_policy_acts_on_the_encoders_features():
    torch.manual_seed(0)
    norm = RunningNorm(S)
    norm.update(torch.randn(10, S))
    keys = {"image_feature_dim": 16, "state_feature_dim": 8, "d_model": 16, "denoising_steps": 2}
    config = FlowPolicyConfig(input_type="mixed", policy_setup=None, image_num=2, **keys)
    network = build_cnn_policy(config, obs_shapes=SHAPES, action_dim=A, normalizer=norm)
    assert network.noise_shape == (3, A) and network.head.normalizer is None
    obs, noise = observations(), torch.randn(B, 3, A)
    action, log_prob = network.sample(obs, noise)
    features = network.encoder(obs)
    assert features["state"].shape == (B, 2 * 16 + 8)
    torch.testing.assert_close(action, network.head.sample(features, noise)[0])
    assert network.act(obs, "eval").action.shape == (B, 1, A) and log_prob.shape == (B,)
    assert network.default_target_entropy() == network.head.default_target_entropy()
    with pytest.raises(ValidationError, match="input_type: mixed"):
        FlowPolicyConfig(image_num=1)


def test_pretrained_policy_is_built_from_its_path(folder, resnet_weights):
    network = policy(model_path=str(folder))
    stem = network.state_dict()["encoder.backbone.conv1.weight"]
    assert torch.equal(stem, resnet_weights["conv1.weight"])
    assert network.act(observations(), "eval").action.shape == (B, 1, A)


@pytest.mark.parametrize(
    ("keys", "shapes", "said"),
    [
        ({"image_num": 1}, SHAPES, "actor.model.image_num is 1, but the environment has cameras front, wrist; write 2"),
        ({"obs_dim": 19}, SHAPES, "actor.model.obs_dim is 19, but the environment's robot state has 7; write 7"),
        ({}, {"state": (S,)}, "actor.model.input_type is mixed, but the environment has no camera"),
        ({}, {"images/front": (SIZE, SIZE, 3)}, "actor.model.input_type is mixed, .* has no robot state"),
    ],
)
def test_other_observations_than_configured_name_the_key(keys, shapes, said):
    with pytest.raises(ConfigError, match=said):
        build_cnn_policy(CnnPolicyConfig(**keys), obs_shapes=shapes, action_dim=A, normalizer=None)


def test_keys():
    config = CnnPolicyConfig()
    assert (config.num_q_heads, config.q_hidden_dims, config.policy_setup) == (10, (256, 256), None)
    assert all(field.description for field in CnnPolicyConfig.model_fields.values())
    for wrong in ({"small_channels": ()}, {"dropout": 1.0}, {"input_type": "state"}, {"spatial_embeddings": 0}):
        with pytest.raises(ValidationError):
            CnnPolicyConfig(**wrong)
