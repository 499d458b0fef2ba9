"""Published layouts: names and shapes at full size, and files at the tiny one."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from rlinf.core.errors import CheckpointError
from rlinf.models.embodiment.openpi.checkpoint import (
    DEAD_HEAD,
    TIED,
    canonical_name,
    find_files,
    is_dead,
    load_pi0,
    openpi_name,
    save_pi0,
)
from rlinf.models.embodiment.openpi.config import PI0, PI05, TINY, TINY_PI05
from rlinf.models.embodiment.openpi.model import build_pi0, empty_pi0, stays_float32
from tests.models.openpi.pi0_samples import CONFIGS, random_model

KINDS = pytest.mark.parametrize("kind", CONFIGS)

P = "paligemma_with_expert."
VT = f"{P}paligemma.model.vision_tower.vision_model."
LM = f"{P}paligemma.model.language_model."
EX = f"{P}gemma_expert.model."


def published_shapes(pi05):
    """openpi's names and shapes, written down from published files, but for the two lm_heads."""
    shapes = {
        f"{VT}embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{VT}embeddings.patch_embedding.bias": (1152,),
        f"{VT}embeddings.position_embedding.weight": (256, 1152),
        f"{VT}post_layernorm.weight": (1152,),
        f"{VT}post_layernorm.bias": (1152,),
        f"{P}paligemma.model.multi_modal_projector.linear.weight": (2048, 1152),
        f"{P}paligemma.model.multi_modal_projector.linear.bias": (2048,),
        f"{LM}embed_tokens.weight": (257152, 2048),
        f"{LM}norm.weight": (2048,),
        "action_in_proj.weight": (1024, 32),
        "action_in_proj.bias": (1024,),
        "action_out_proj.weight": (32, 1024),
        "action_out_proj.bias": (32,),
    }
    for n in range(27):
        layer = f"{VT}encoder.layers.{n}."
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (1152,), f"{layer}{name}.bias": (1152,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{name}.weight": (1152, 1152), f"{layer}self_attn.{name}.bias": (1152,)}
        shapes |= {f"{layer}mlp.fc1.weight": (4304, 1152), f"{layer}mlp.fc1.bias": (4304,)}
        shapes |= {f"{layer}mlp.fc2.weight": (1152, 4304), f"{layer}mlp.fc2.bias": (1152,)}
    for stream, width, mlp in ((LM, 2048, 16384), (EX, 1024, 4096)):
        for n in range(18):
            layer = f"{stream}layers.{n}."
            shapes |= {
                f"{layer}self_attn.q_proj.weight": (2048, width),
                f"{layer}self_attn.k_proj.weight": (256, width),
                f"{layer}self_attn.v_proj.weight": (256, width),
                f"{layer}self_attn.o_proj.weight": (width, 2048),
                f"{layer}mlp.gate_proj.weight": (mlp, width),
                f"{layer}mlp.up_proj.weight": (mlp, width),
                f"{layer}mlp.down_proj.weight": (width, mlp),
            }
            for norm in ("input_layernorm", "post_attention_layernorm"):
                if stream == EX and pi05:
                    shapes |= {f"{layer}{norm}.dense.weight": (3072, 1024), f"{layer}{norm}.dense.bias": (3072,)}
                else:
                    shapes[f"{layer}{norm}.weight"] = (width,)
    if pi05:
        shapes |= {f"{EX}norm.dense.weight": (3072, 1024), f"{EX}norm.dense.bias": (3072,)}
        for name in ("time_mlp_in", "time_mlp_out"):
            shapes |= {f"{name}.weight": (1024, 1024), f"{name}.bias": (1024,)}
    else:
        shapes[f"{EX}norm.weight"] = (1024,)
        shapes |= {"state_proj.weight": (1024, 32), "state_proj.bias": (1024,)}
        shapes |= {"action_time_mlp_in.weight": (1024, 2048), "action_time_mlp_in.bias": (1024,)}
        shapes |= {"action_time_mlp_out.weight": (1024, 1024), "action_time_mlp_out.bias": (1024,)}
    return shapes


@pytest.mark.parametrize(("config", "count"), [(PI0, 776), (PI05, 811)])
def test_names_and_shapes_at_full_size(config, count):
    ours = {openpi_name(name): tuple(p.shape) for name, p in empty_pi0(config).named_parameters()}
    assert ours == published_shapes(config.pi05)
    assert len(ours) == count
    assert all(canonical_name(name) == name and not is_dead(name) for name in ours)


# ---- layouts


def saved_by_lerobot(weights):
    """Layout of a training run: a prefix, and both of the tied tensors."""
    out = {f"model.{key}": tensor for key, tensor in weights.items()}
    return out | {f"model.{LM}embed_tokens.weight": weights[TIED].clone()}


def under_transformers_5(weights):
    return {k.replace(".vision_model.", "."): v for k, v in saved_by_lerobot(weights).items()}


def lerobots_first(weights):
    """The pi0 of early 2025, with the statistics among the weights."""
    renames = (
        (LM, f"{P}paligemma.language_model.model."),
        (f"{P}paligemma.lm_head", f"{P}paligemma.language_model.lm_head"),
        (f"{P}paligemma.model.", f"{P}paligemma."),
    )
    out = {}
    for key, tensor in weights.items():
        for old, new in renames:
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        out[f"model.{key}"] = tensor
    statistics = ("normalize_inputs.buffer_observation_state.mean", "unnormalize_outputs.buffer_action.std")
    return out | {name: torch.ones(7) for name in statistics}


def without_heads(weights):
    """The embedding under its own name, no lm_head at all."""
    out = {key: tensor for key, tensor in weights.items() if key not in (TIED, DEAD_HEAD)}
    return out | {f"{LM}embed_tokens.weight": weights[TIED]}


LAYOUTS = {
    "openpi": (dict, {DEAD_HEAD}),
    "lerobot": (saved_by_lerobot, {f"model.{DEAD_HEAD}", f"model.{TIED}"}),
    "transformers 5": (under_transformers_5, {f"model.{DEAD_HEAD}", f"model.{TIED}"}),
    "first": (
        lerobots_first,
        {
            f"model.{DEAD_HEAD}",
            "normalize_inputs.buffer_observation_state.mean",
            "unnormalize_outputs.buffer_action.std",
        },
    ),
    "bare": (without_heads, set()),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """kind → (model, folder of its openpi checkpoint, tensors in it)."""
    made = {}
    for kind, config in CONFIGS.items():
        model, folder = random_model(config), tmp_path_factory.mktemp(kind)
        made[kind] = model, folder, load_file(save_pi0(model, folder))
    return made


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(checkpoints, tmp_path, kind, layout):
    model, _, weights = checkpoints[kind]
    rename, dropped = LAYOUTS[layout]
    save_file(rename(weights), tmp_path / "model.safetensors")
    # Beside LeRobot's weights lie files of its pipelines, which are none.
    save_file({"state.mean": torch.zeros(3)}, tmp_path / "policy_preprocessor.safetensors")
    loaded, report = load_pi0(tmp_path, CONFIGS[kind], dtype=torch.float32)
    assert same(loaded, model)
    assert report.files == (tmp_path / "model.safetensors",)
    assert set(report.dropped) == dropped


def sharded(weights, folder, parts=3):
    """Three files and their index."""
    names = sorted(weights)
    index = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        save_file({name: weights[name] for name in names[part::parts]}, folder / file)
        index |= dict.fromkeys(names[part::parts], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@KINDS
def test_shards_load_with_and_without_an_index(checkpoints, tmp_path, kind):
    model, _, weights = checkpoints[kind]
    sharded(saved_by_lerobot(weights), tmp_path)
    for _ in range(2):
        loaded, report = load_pi0(tmp_path, CONFIGS[kind], dtype=torch.float32)
        assert same(loaded, model) and len(report.files) == 3
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)


@KINDS
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_ours_whatever_the_files_are(checkpoints, tmp_path, kind, stored, dtype):
    model, _, weights = checkpoints[kind]
    save_file({name: tensor.to(stored) for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    loaded, _ = load_pi0(tmp_path / "model.safetensors", CONFIGS[kind], dtype=dtype)
    for name, p in loaded.named_parameters():
        expected = torch.float32 if stays_float32(name) else dtype
        assert p.dtype is expected and p.requires_grad and isinstance(p, nn.Parameter)
        assert torch.equal(p, model.get_parameter(name).to(stored).to(expected))


def test_weights_outlive_their_file(checkpoints, tmp_path):
    _, folder, _ = checkpoints["pi0"]
    shutil.copy(folder / "model.safetensors", tmp_path)
    file = tmp_path / "model.safetensors"
    loaded, _ = load_pi0(tmp_path, TINY, dtype=torch.float32)
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    assert same(loaded, checkpoints["pi0"][0])


# ---- saving


class Nested(nn.Module):
    """A module tree with given parameters: what a foreign loader fills."""

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            node = self
            for part in path:
                if not hasattr(node, part):
                    node.add_module(part, nn.Module())
                node = getattr(node, part)
            node.register_parameter(last, nn.Parameter(torch.zeros(shape)))


@KINDS
def test_openpis_strict_loader_takes_what_is_saved(checkpoints, kind):
    """openpi fills its modules with `safetensors.torch.load_model`, strictly, dead head and tied embedding included."""
    model, folder, weights = checkpoints[kind]
    embedding = f"{LM}embed_tokens.weight"
    theirs = Nested({name: tensor.shape for name, tensor in weights.items()} | {embedding: weights[TIED].shape})
    theirs.get_submodule(f"{P}paligemma.model.language_model.embed_tokens").weight = theirs.get_parameter(TIED)
    missing, unexpected = load_model(theirs, folder / "model.safetensors")
    assert not missing and not unexpected
    assert torch.equal(theirs.get_parameter(embedding), model.vlm.embed_tokens.weight)
    assert len(theirs.state_dict()) == len(model.state_dict()) + 2


def test_equal_weights_make_equal_files(tmp_path):
    model = build_pi0(TINY_PI05, generator=torch.Generator().manual_seed(0))
    files = {save_pi0(model, tmp_path).read_bytes() for _ in range(8)}
    assert len(files) == 1


@KINDS
def test_saved_folder(checkpoints, kind):
    _, folder, weights = checkpoints[kind]
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
    assert weights[DEAD_HEAD].shape == (512, 64) and not weights[DEAD_HEAD].any()
    assert f"{LM}embed_tokens.weight" not in weights
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", f"{LM}embed_tokens.weight": TIED}
    assert json.loads((folder / "config.json").read_text()) == {
        "action_dim": 32,
        "action_horizon": 8,
        "paligemma_variant": "custom",
        "action_expert_variant": "custom",
        "precision": "float32",
    }


def test_saving_a_bfloat16_model_keeps_its_types(tmp_path):
    model = random_model(TINY_PI05, torch.bfloat16)
    save_pi0(model, tmp_path / "new" / "folder")
    loaded, _ = load_pi0(tmp_path / "new" / "folder", TINY_PI05)
    assert same(loaded, model)
    assert json.loads((tmp_path / "new/folder/config.json").read_text())["precision"] == "bfloat16"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match=r"taken.* could not be written"):
        save_pi0(random_model(TINY), tmp_path / "taken")


# ---- what is wrong in files

HEAD = f"{EX}layers.1.mlp.down_proj.weight"


def loading(weights, tmp_path, config=TINY):
    save_file(weights, tmp_path / "model.safetensors")
    return load_pi0(tmp_path, config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(HEAD), f"1 missing: {re.escape(HEAD)}$"),
        (lambda w: w.pop(TIED), f"1 missing: {re.escape(LM)}embed_tokens.weight$"),
        (
            lambda w: w.update({"value_head.weight": torch.zeros(1), "noise_head.bias": torch.zeros(1)}),
            "2 unknown: noise_head.bias, value_head.weight$",
        ),
        (
            lambda w: w.update({"state_proj.bias": torch.zeros(3)}),
            r"1 unfit: state_proj.bias is \[3\] instead of \[64\]$",
        ),
        (
            lambda w: w.update({"state_proj.bias": torch.zeros(64, dtype=torch.int8)}),
            "state_proj.bias is of type I8 instead of a float$",
        ),
        (
            lambda w: w.update({f"model.{HEAD}": torch.zeros(1)}),
            rf"1 repeated: {re.escape(HEAD)}|1 repeated: model.{re.escape(HEAD)}",
        ),
        (
            lambda w: (w.pop(HEAD), w.pop("state_proj.bias"), w.update(extra=torch.zeros(1))),
            f"does not hold the weights of this pi0: 2 missing: {re.escape(HEAD)}, state_proj.bias; 1 unknown: extra$",
        ),
    ],
)
def test_what_does_not_fit_is_listed(checkpoints, tmp_path, change, said):
    weights = dict(checkpoints["pi0"][2])
    change(weights)
    with pytest.raises(CheckpointError, match=said):
        loading(weights, tmp_path)


def test_every_missing_name_is_listed(checkpoints, tmp_path):
    weights = checkpoints["pi0"][2]
    gone = {name for name in weights if ".layers.0." in name}
    with pytest.raises(CheckpointError) as caught:
        loading({name: tensor for name, tensor in weights.items() if name not in gone}, tmp_path)
    assert all(name in str(caught.value) for name in gone) and f"{len(gone)} missing" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("pi05", TINY, "does not hold the weights of this pi0 but those of pi0.5"),
        ("pi0", TINY_PI05, "does not hold the weights of this pi0.5 but those of pi0:"),
    ],
)
def test_weights_of_the_other_model_are_recognised(checkpoints, kind, config, said):
    with pytest.raises(CheckpointError, match=said):
        load_pi0(checkpoints[kind][1], config)


def test_a_truncated_file_is_named(checkpoints, tmp_path):
    content = (checkpoints["pi0"][1] / "model.safetensors").read_bytes()
    for length in (0, 4, 5000, len(content) - 1):
        (tmp_path / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read .*; download it again"):
            load_pi0(tmp_path, TINY)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "model-00001.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors cannot be read"):
        load_pi0(tmp_path, TINY)


def test_a_pointer_of_git_lfs_is_recognised(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"git-lfs pointer.*git lfs pull"):
        load_pi0(tmp_path, TINY)


def test_absent_files_are_named(checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; download"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor"):
        find_files(tmp_path)
    sharded(dict(checkpoints["pi0"][2]), tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003.safetensors, which its index names"):
        load_pi0(tmp_path, TINY)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not an index of safetensors files"),
        ('{"weight_map": 3}', "is not an index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "which is not a file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "which is not a file beside it"),
    ],
)
def test_a_strange_index_is_named(tmp_path, content, said):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        find_files(tmp_path)


def test_names_of_no_layout_stay_unknown():
    with pytest.raises(KeyError):
        openpi_name("value_head.weight")
    assert canonical_name("value_head.weight") == "value_head.weight"
    assert canonical_name(f"{P}paligemma.vision_tower.post_layernorm.bias") == f"{VT}post_layernorm.bias"
