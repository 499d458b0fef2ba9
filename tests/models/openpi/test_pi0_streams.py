"""Image encoder and language model against transformers' own, on the same weights."""

import pytest
import torch
from transformers import GemmaConfig as HfGemmaConfig
from transformers import GemmaModel, SiglipVisionConfig, SiglipVisionModel

from rlinf.models.embodiment.openpi.attention import attend
from rlinf.models.embodiment.openpi.config import GemmaConfig, SiglipConfig
from rlinf.models.embodiment.openpi.gemma import MASKED, Gemma, key_bias, rotate, rotation
from rlinf.models.embodiment.openpi.siglip import Siglip


def randomise(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * fan_in**-0.5)
    return module.eval()


def hf_gemma(config, vocab_size=64):
    """transformers' Gemma with random weights, and ours with the same."""
    theirs = randomise(
        GemmaModel(
            HfGemmaConfig(
                vocab_size=vocab_size,
                hidden_size=config.width,
                intermediate_size=config.mlp_dim,
                num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                hidden_activation="gelu_pytorch_tanh",
                attn_implementation="eager",
            )
        )
    )
    ours = Gemma(config, vocab_size=vocab_size)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture
def embedded():
    """Random tokens [2, 9, 32]; the second row ends in padding."""
    generator = torch.Generator().manual_seed(1)
    visible = torch.ones(2, 9, dtype=torch.bool)
    visible[1, 6:] = False
    return torch.randn(2, 9, 32, generator=generator), visible


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_gemma_is_transformers_gemma(embedded, num_kv_heads):
    theirs, ours = hf_gemma(GemmaConfig(32, 2, 48, num_heads=4, num_kv_heads=num_kv_heads, head_dim=6))
    x, visible = embedded
    positions = visible.cumsum(1) - 1
    causal = visible[:, None] & torch.ones(9, 9, dtype=torch.bool).tril()
    for seen in (visible[:, None].expand(-1, 9, -1), causal):
        bias = key_bias(seen)[:, None]
        with torch.no_grad():
            expected = theirs(inputs_embeds=x, attention_mask=bias, position_ids=positions).last_hidden_state
            found, _ = ours(x, positions, bias)
        torch.testing.assert_close(found[visible], expected[visible], atol=2e-5, rtol=1e-5)


def test_tokens_are_embedded_as_transformers_gemma_does():
    theirs, ours = hf_gemma(GemmaConfig(32, 1, 48, num_heads=2, head_dim=8))
    tokens = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(7).expand(2, -1)
    causal = key_bias(torch.ones(7, 7, dtype=torch.bool).tril())[None, None]
    with torch.no_grad():
        expected = theirs(input_ids=tokens).last_hidden_state
        found, _ = ours(ours.embed(tokens), positions, causal)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_a_stream_given_in_two_halves_is_the_whole(embedded):
    """Tokens 0–5 leave keys and values; tokens 6–8 attend to them and to themselves."""
    _, ours = hf_gemma(GemmaConfig(32, 3, 48, num_heads=4, head_dim=6))
    x, _ = embedded
    positions = torch.arange(9).expand(2, -1)
    seen = torch.ones(9, 9, dtype=torch.bool)
    seen[:6, 6:] = False
    with torch.no_grad():
        whole, keys_values = ours(x, positions, key_bias(seen)[None, None])
        none, past = ours(x[:, :6], positions[:, :6], torch.zeros(1, 1, 1, 6), with_output=False)
        copies = [(k.clone(), v.clone()) for k, v in past]
        rest, _ = ours(x[:, 6:], positions[:, 6:], torch.zeros(1, 1, 1, 9), past)
    assert none is None
    torch.testing.assert_close(rest, whole[:, 6:], atol=1e-5, rtol=1e-5)
    for (k, v), (copy_k, copy_v), (whole_k, whole_v) in zip(past, copies, keys_values, strict=True):
        assert torch.equal(k, copy_k) and torch.equal(v, copy_v)
        torch.testing.assert_close((k, v), (whole_k[:, :, :6], whole_v[:, :, :6]), atol=1e-5, rtol=1e-5)


def test_siglip_is_transformers_siglip():
    config = SiglipConfig(width=48, depth=3, mlp_dim=80, num_heads=4, image_size=45, patch_size=14)
    theirs = randomise(
        SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=45,
                patch_size=14,
                vision_use_head=False,
            )
        )
    )
    ours = Siglip(config)
    names = {name: name.replace("embeddings.", "").replace("encoder.", "") for name in theirs.state_dict()}
    ours.load_state_dict({names[name]: tensor for name, tensor in theirs.state_dict().items()})
    images = torch.rand(2, 3, 45, 45, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        expected, found = theirs(images).last_hidden_state, ours(images)
    assert found.shape == (2, 9, 48) and config.num_tokens == 9
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_rotation_by_hand():
    """Position 1 turns the pair (x_0, x_2) by 1 rad and (x_1, x_3) by 10000^(-1/2) = 0.01 rad."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4)
    turned = rotate(x, rotation(torch.tensor([[1]]), 4)).flatten()
    torch.testing.assert_close(turned, torch.tensor([0.540302, 0.999950, 0.841471, 0.0099998]), atol=1e-6, rtol=0)
    assert torch.equal(rotate(x, rotation(torch.tensor([[0]]), 4)), x)


def test_scores_of_rotated_vectors_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(4)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def score(i, j):
        one, other = (rotate(x, rotation(torch.tensor([[p]]), 16)) for x, p in ((q, i), (k, j)))
        return (one * other).sum()

    torch.testing.assert_close(score(7, 3), score(907, 903), atol=1e-4, rtol=1e-4)
    assert (score(7, 3) - score(7, 5)).abs() > 1e-2


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_in_bfloat16_is_that_in_float32(num_kv_heads):
    """The CPU's own path for bfloat16, with and without masked keys."""
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(2, 4, 5, 16, generator=generator).bfloat16()
    k, v = torch.randn(2, 2, num_kv_heads, 7, 16, generator=generator).bfloat16()
    visible = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    visible[..., 4:] = False
    for bias in (None, key_bias(visible)):
        found = attend(q, k, v, None if bias is None else bias.bfloat16())
        expected = attend(q.float(), k.float(), v.float(), bias)
        assert found.dtype is torch.bfloat16 and found.shape == (2, 5, 64)
        torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
    hidden = k.clone()
    hidden[:, :, 4:] = 1e4
    assert torch.equal(attend(q, hidden, v, bias.bfloat16()), found)


def test_a_query_without_any_key_gives_an_average_not_nan():
    q, k, v = torch.randn(3, 1, 1, 2, 4)
    found = attend(q, k, v, torch.full((1, 1, 2, 2), MASKED))
    torch.testing.assert_close(found, v.mean(2).expand(-1, 2, -1), atol=1e-6, rtol=1e-6)
