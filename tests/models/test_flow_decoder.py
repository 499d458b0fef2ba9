"""The small decoder: a walk without noise of its own, and the folder that it lives in."""

import json

import pytest
import torch

from rlinf.core.errors import CheckpointError
from rlinf.models.embodiment.flow_decoder import (
    FlowDecoder,
    FlowDecoderSpec,
    fingerprint,
    load_flow_decoder,
    read_flow_decoder_spec,
    save_flow_decoder,
    time_features,
)

SPEC = FlowDecoderSpec(6, 2, 3, (16, 16), 5, "Task-v1", "pd_ee_delta_pos")


def decoder_of(spec=SPEC, seed=0):
    torch.manual_seed(seed)
    decoder = FlowDecoder(spec)
    decoder.state_mean.normal_()
    decoder.state_std.uniform_(0.5, 2)
    return decoder


def test_decoding_is_eulers_method_on_the_velocity():
    decoder = decoder_of()
    obs, noise = {"state": torch.randn(4, 6)}, torch.randn(4, 3, 2)
    x = noise
    for k in range(5):
        x = x + decoder.velocity(obs, x, torch.full((4,), k / 5)) / 5
    decoded = decoder.decode(obs, noise)
    torch.testing.assert_close(decoded, x.clamp(-1, 1))
    assert not decoded.requires_grad
    assert torch.equal(decoded, decoder.decode(obs, noise)), "the same noise, the same actions"
    assert decoder.noise_shape == (3, 2)


def test_every_row_is_decoded_by_itself():
    decoder = decoder_of()
    obs, noise = {"state": torch.randn(4, 6)}, torch.randn(4, 3, 2)
    alone = torch.cat([decoder.decode({"state": obs["state"][i : i + 1]}, noise[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(decoder.decode(obs, noise), alone)


def test_states_are_normalised_by_the_demonstrations():
    decoder = decoder_of()
    x, t = torch.randn(2, 3, 2), torch.tensor([0.1, 0.9])
    state = torch.randn(2, 6)
    features = torch.cat([(state - decoder.state_mean) / decoder.state_std, x.flatten(1), time_features(t)], -1)
    torch.testing.assert_close(decoder.velocity({"state": state}, x, t), decoder.net(features).view(2, 3, 2))


def test_times_are_told_apart():
    features = time_features(torch.linspace(0, 1, 11))
    assert torch.cdist(features, features)[~torch.eye(11, dtype=torch.bool)].min() > 0.3
    assert torch.equal(time_features(torch.zeros(1))[0, :8], torch.ones(8))


def test_a_decoder_comes_back_from_its_folder_frozen(tmp_path):
    decoder = decoder_of()
    save_flow_decoder(decoder, tmp_path / "deep" / "folder")
    loaded = load_flow_decoder(tmp_path / "deep" / "folder")
    obs, noise = {"state": torch.randn(4, 6)}, torch.randn(4, 3, 2)
    assert torch.equal(loaded.decode(obs, noise), decoder.decode(obs, noise))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.spec == SPEC == read_flow_decoder_spec(tmp_path / "deep" / "folder")


def test_fingerprints_tell_decoders_apart(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        save_flow_decoder(decoder_of(seed=seed), tmp_path / name)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "c") != fingerprint(tmp_path / "b")
    with pytest.raises(CheckpointError, match="cannot be read"):
        fingerprint(tmp_path / "nowhere")


def test_what_is_no_decoder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json is missing: .* holds no decoder"):
        load_flow_decoder(tmp_path)
    save_flow_decoder(decoder_of(), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"hidden_dims": [32, 16]}))
    with pytest.raises(CheckpointError, match=r"model.safetensors does not hold the weights"):
        load_flow_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described | {"version": 9}))
    with pytest.raises(CheckpointError, match=r"version 9"):
        load_flow_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "pi0"}))
    with pytest.raises(CheckpointError, match="does not describe a decoder"):
        load_flow_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model.safetensors does not hold"):
        load_flow_decoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        load_flow_decoder(tmp_path)
