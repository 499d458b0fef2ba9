import os
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rlinf.core.errors import DataError
from rlinf.models.modules.resnet10 import load_resnet10
from rlinf.models.serl_checkpoint import convert_resnet10

WIDTHS = (64, 128, 256, 512)


def flax_parameters(norm="MyGroupNorm"):
    """Random parameters in the layout of SERL's file."""
    rng = np.random.default_rng(0)

    def kernel(size, fan_in, fan_out):
        shape = (size, size, fan_in, fan_out)
        return {"kernel": (rng.standard_normal(shape) * (2 / (size * size * fan_in)) ** 0.5).astype(np.float32)}

    def scale_and_bias(width):
        scale, bias = 1 + 0.3 * rng.standard_normal(width), 0.3 * rng.standard_normal(width)
        return {"scale": scale.astype(np.float32), "bias": bias.astype(np.float32)}

    tree = {"conv_init": kernel(7, 3, 64), "norm_init": scale_and_bias(64)}
    for index, (fan_in, width) in enumerate(zip((64, *WIDTHS), WIDTHS, strict=False)):
        block = {"Conv_0": kernel(3, fan_in, width), "Conv_1": kernel(3, width, width)}
        block |= {f"{norm}_{part}": scale_and_bias(width) for part in range(2)}
        if fan_in != width:
            block |= {"conv_proj": kernel(1, fan_in, width), "norm_proj": scale_and_bias(width)}
        tree[f"ResNetBlock_{index}"] = block
    head = {"kernel": rng.standard_normal((512, 1000)).astype(np.float32), "bias": np.zeros(1000, np.float32)}
    return tree | {"output_head": head}


def same(size, window, stride):
    """Padding before and after, as XLA defines SAME."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def windows(x, window, stride, pads, fill):
    """[N, H, W, C] → [N, out H, out W, window, window, C]."""
    (top, bottom), (left, right) = pads
    x = F.pad(x, (0, 0, left, right, top, bottom), value=fill)
    return x.unfold(1, window, stride).unfold(2, window, stride).permute(0, 1, 2, 4, 5, 3)


def conv(x, parameters, stride, pads=None):
    kernel = torch.from_numpy(parameters["kernel"]).double()
    pads = pads or tuple(same(size, len(kernel), stride) for size in x.shape[1:3])
    return torch.einsum("nhwabi,abio->nhwo", windows(x, len(kernel), stride, pads, 0.0), kernel)


def group_norm(x, parameters):
    groups = x.reshape(len(x), -1, 4, x.shape[-1] // 4)
    mean, var = groups.mean((1, 3), keepdim=True), groups.var((1, 3), correction=0, keepdim=True)
    normal = ((groups - mean) / torch.sqrt(var + 1e-5)).reshape(x.shape)
    return normal * torch.from_numpy(parameters["scale"]) + torch.from_numpy(parameters["bias"])


def reference(tree, images):
    """SERL's network as its flax modules define it, [N, H, W, C] throughout and in double precision."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    x = conv((images.double() / 255 - mean) / std, tree["conv_init"], 2, ((3, 3), (3, 3)))
    x = F.relu(group_norm(x, tree["norm_init"]))
    pads = tuple(same(size, 3, 2) for size in x.shape[1:3])
    x = windows(x, 3, 2, pads, -torch.inf).amax((3, 4))
    for index in range(4):
        block, stride = tree[f"ResNetBlock_{index}"], 1 if index == 0 else 2
        norms = [block[name] for name in sorted(block) if "GroupNorm" in name]
        y = F.relu(group_norm(conv(x, block["Conv_0"], stride), norms[0]))
        y = group_norm(conv(y, block["Conv_1"], 1), norms[1])
        if "conv_proj" in block:
            x = group_norm(conv(x, block["conv_proj"], stride), block["norm_proj"])
        x = F.relu(x + y)
    return x


@pytest.mark.parametrize("size", [64, 36])  # maps of even sides all the way, and of odd ones too
def test_converted_network_is_serls(tmp_path, size):
    tree = flax_parameters()
    (tmp_path / "resnet10_params.pkl").write_bytes(pickle.dumps(tree))
    file = convert_resnet10(tmp_path / "resnet10_params.pkl", tmp_path / "converted")
    assert file == tmp_path / "converted" / "resnet10_pretrained.safetensors"
    network = load_resnet10(tmp_path / "converted")
    images = torch.randint(256, (2, size, size, 3), dtype=torch.uint8)
    with torch.no_grad():
        out = network(images).permute(0, 2, 3, 1)
    torch.testing.assert_close(out.double(), reference(tree, images), atol=1e-3, rtol=1e-3)


@pytest.fixture
def fake_jax(monkeypatch):
    """Classes whose objects pickle as jax's arrays and flax's frozen dicts do, under the names of those."""

    def _reconstruct_array(function, args, state, aval_state):
        raise AssertionError("the converter must not call jax")

    class FrozenDict:
        def __init__(self, content):
            self.content = content

        def __reduce__(self):
            return FrozenDict, (self.content,)

    class Array:
        def __init__(self, value):
            self.value = value

        def __reduce__(self):
            function, args, state = self.value.__reduce__()
            return _reconstruct_array, (function, args, state, {"weak_type": False, "named_shape": {}})

    for name in ("jax", "jax._src", "jax._src.array", "flax", "flax.core", "flax.core.frozen_dict"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module, thing in (("jax._src.array", _reconstruct_array), ("flax.core.frozen_dict", FrozenDict)):
        thing.__module__, thing.__qualname__ = module, thing.__name__
        setattr(sys.modules[module], thing.__name__, thing)
    return Array, FrozenDict


def mapped(tree, array, dictionary=dict):
    """The tree with its arrays and its dicts replaced."""
    return dictionary(
        {
            key: mapped(child, array, dictionary) if isinstance(child, dict) else array(child)
            for key, child in tree.items()
        }
    )


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_spellings_of_the_file(tmp_path, fake_jax, protocol):
    array, frozen_dict = fake_jax
    tree = flax_parameters()
    spellings = [
        tree,
        flax_parameters("GroupNorm"),
        {"params": {"pretrained_encoder": tree}},
        mapped(tree, array),
        mapped(tree, array, frozen_dict),
        mapped(tree, np.asfortranarray),
    ]
    for number, spelling in enumerate(spellings):
        source = tmp_path / f"{number}.pkl"
        source.write_bytes(pickle.dumps(spelling, protocol))
        weights = load_file(convert_resnet10(source, tmp_path / f"{number}.safetensors"))
        assert len(weights) == 36
        for name, flax in (("conv1.weight", "conv_init"), ("layer4.0.downsample.0.weight", "ResNetBlock_3/conv_proj")):
            *parents, last = flax.split("/")
            kernel = (tree[parents[0]] if parents else tree)[last]["kernel"]
            assert np.array_equal(weights[name].numpy(), kernel.transpose(3, 2, 0, 1))
        assert np.array_equal(weights["layer2.0.bn2.bias"].numpy(), tree["ResNetBlock_1"]["MyGroupNorm_1"]["bias"])


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


def test_only_arrays_are_admitted(tmp_path):
    victim, source = tmp_path / "victim", tmp_path / "resnet10_params.pkl"
    for thing, asked in (
        (Malicious(str(victim)), rf"{os.mkdir.__module__}\.mkdir"),
        (OrderedDict(), r"collections\.OrderedDict"),
        (torch.nn.Identity, r"torch\.nn\.modules\.linear\.Identity"),
    ):
        source.write_bytes(pickle.dumps(flax_parameters() | {"extra": thing}))
        with pytest.raises(
            DataError, match=f"resnet10_params.pkl was not loaded: it asks for {asked}, and only arrays"
        ):
            convert_resnet10(source, tmp_path / "out")
    assert not victim.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree["ResNetBlock_2"].pop("Conv_1"), "layer3.0.conv2.weight is missing"),
        (
            lambda tree: tree.update(ResNetBlock_4={"Conv_0": {"kernel": np.zeros(1)}}),
            "'ResNetBlock_4/Conv_0/kernel' is",
        ),
        (lambda tree: tree.update(norm_init={"scale": None}), "'norm_init/scale' is not one of its arrays"),
        (
            lambda tree: tree["norm_init"].update(scale=np.zeros(3, np.float32)),
            r"bn1.weight is \[3\] instead of \[64\]",
        ),
        (lambda tree: tree["norm_init"].update(scale=np.array(["text"], object)), "'norm_init/scale' is not one"),
    ],
)
def test_another_networks_parameters_are_named(tmp_path, change, said):
    tree = flax_parameters()
    change(tree)
    (tmp_path / "foreign.pkl").write_bytes(pickle.dumps(tree))
    with pytest.raises(DataError, match=f"foreign.pkl does not hold SERL's ResNet-10: {said}"):
        convert_resnet10(tmp_path / "foreign.pkl", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist; resnet10_params.pkl is among the releases"),
        (b"", "cannot be read"),
        (pickle.dumps(flax_parameters())[:1000], "cannot be read"),
        (pickle.dumps([1]), "holds a list"),
    ],
)
def test_unreadable_sources_are_named(tmp_path, content, said):
    source = tmp_path / "resnet10_params.pkl"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(DataError, match=said):
        convert_resnet10(source, tmp_path)


def test_unwritable_target_is_named(tmp_path):
    (tmp_path / "resnet10_params.pkl").write_bytes(pickle.dumps(flax_parameters()))
    (tmp_path / "taken").write_text("a file where a folder is wanted")
    with pytest.raises(DataError, match="could not be written"):
        convert_resnet10(tmp_path / "resnet10_params.pkl", tmp_path / "taken")
