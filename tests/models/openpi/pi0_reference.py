"""π0 and π0.5 from their equations: one sequence, one sample, one head at a time, in float64 and without a cache.

Parameters are taken by the names in openpi's files. Nothing of the package is used.
"""

import math

import torch

P = "paligemma_with_expert."
VISION = f"{P}paligemma.model.vision_tower.vision_model."
STREAMS = (f"{P}paligemma.model.language_model.", f"{P}gemma_expert.model.")
MASKED = -2.3819763e38


def affine(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def layer_norm(w, name, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + torch.exp(-x))


def attention(q, k, v, allowed):
    scores = q @ k.T / math.sqrt(q.shape[-1])
    scores = torch.where(allowed, scores, MASKED)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True) @ v


def siglip(w, config, image):
    """[3, size, size] → [tokens, width of the language model]."""
    side, patch = config.vision.image_size // config.vision.patch_size, config.vision.patch_size
    kernel = w[f"{VISION}embeddings.patch_embedding.weight"].flatten(1)
    rows = [
        image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].flatten()
        for i in range(side)
        for j in range(side)
    ]
    x = torch.stack(rows) @ kernel.T + w[f"{VISION}embeddings.patch_embedding.bias"]
    x = x + w[f"{VISION}embeddings.position_embedding.weight"]
    size = config.vision.width // config.vision.num_heads
    everywhere = torch.ones(len(x), len(x), dtype=torch.bool)
    for n in range(config.vision.depth):
        layer = f"{VISION}encoder.layers.{n}."
        y = layer_norm(w, f"{layer}layer_norm1", x)
        q, k, v = (affine(w, f"{layer}self_attn.{name}_proj", y).split(size, -1) for name in "qkv")
        heads = [attention(*parts, everywhere) for parts in zip(q, k, v, strict=True)]
        x = x + affine(w, f"{layer}self_attn.out_proj", torch.cat(heads, -1))
        y = layer_norm(w, f"{layer}layer_norm2", x)
        x = x + affine(w, f"{layer}mlp.fc2", gelu(affine(w, f"{layer}mlp.fc1", y)))
    return affine(w, f"{P}paligemma.model.multi_modal_projector.linear", layer_norm(w, f"{VISION}post_layernorm", x))


def rms_norm(w, name, x, condition):
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if condition is None:
        return y * (1 + w[f"{name}.weight"]), 1.0
    scale, shift, gate = affine(w, f"{name}.dense", condition).chunk(3)
    return y * (1 + scale) + shift, gate


def rope(x, positions):
    """Every pair (x_i, x_{i + D/2}) turned by position / 10000^(2i/D)."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = positions.double() / 10_000 ** (2 * i / x.shape[-1])
        out[..., i] = x[..., i] * angle.cos() - x[..., i + half] * angle.sin()
        out[..., i + half] = x[..., i + half] * angle.cos() + x[..., i] * angle.sin()
    return out


def joint_transformer(w, config, tokens, valid, block, condition):
    """Both streams over one sequence: tokens (prefix [P, W], suffix [S, D]) → normed outputs of both."""
    allowed = (block[None] <= block[:, None]) & valid[None] & valid[:, None]
    positions = valid.long().cumsum(0) - 1
    conditions, (prefix, _) = (None, condition), map(len, tokens)
    shared, size = config.vlm.num_heads // config.vlm.num_kv_heads, config.vlm.head_dim
    xs = list(tokens)
    for n in range(config.vlm.depth):
        normed = [
            rms_norm(w, f"{s}layers.{n}.input_layernorm", x, c) for s, x, c in zip(STREAMS, xs, conditions, strict=True)
        ]
        q, k, v = (
            torch.cat(
                [
                    affine(w, f"{s}layers.{n}.self_attn.{name}_proj", y)
                    for s, (y, _) in zip(STREAMS, normed, strict=True)
                ]
            ).split(size, -1)
            for name in "qkv"
        )
        heads = [
            attention(rope(q[h], positions), rope(k[h // shared], positions), v[h // shared], allowed)
            for h in range(config.vlm.num_heads)
        ]
        attended = torch.cat(heads, -1)
        parts = attended[:prefix], attended[prefix:]
        for i, (s, part, (_, gate)) in enumerate(zip(STREAMS, parts, normed, strict=True)):
            layer = f"{s}layers.{n}."
            x = xs[i] + affine(w, f"{layer}self_attn.o_proj", part) * gate
            y, gate = rms_norm(w, f"{layer}post_attention_layernorm", x, conditions[i])
            y = gelu(affine(w, f"{layer}mlp.gate_proj", y)) * affine(w, f"{layer}mlp.up_proj", y)
            xs[i] = x + affine(w, f"{layer}mlp.down_proj", y) * gate
    return [rms_norm(w, f"{s}norm", x, c)[0] for s, x, c in zip(STREAMS, xs, conditions, strict=True)]


def time_features(t, width):
    periods = [4e-3 * 1000 ** (i / (width // 2 - 1)) for i in range(width // 2)]
    angles = torch.stack([2 * math.pi / period * t for period in periods])
    return torch.cat([angles.sin(), angles.cos()])


def forward(w, config, inputs, b, x, t):
    """(velocity [H, A], normed output of the prefix [P, W]) for observation b; x [H, A], t 0-d."""
    images = [siglip(w, config, image.double()) for image in inputs.images[b]]
    embedding = w[f"{STREAMS[0]}embed_tokens.weight"]
    text = embedding[inputs.tokens[b]] * math.sqrt(config.vlm.width)
    prefix = torch.cat([*images, text])
    seen = [torch.full((len(image),), bool(m)) for image, m in zip(images, inputs.image_mask[b], strict=True)]
    valid = torch.cat([*seen, inputs.token_mask[b]])
    actions, features, condition = affine(w, "action_in_proj", x), time_features(t, config.expert.width), None
    if config.pi05:
        condition = silu(affine(w, "time_mlp_out", silu(affine(w, "time_mlp_in", features))))
        suffix, blocks = actions, [1] * len(x)
    else:
        both = torch.cat([actions, features.expand(len(x), -1)], -1)
        timed = affine(w, "action_time_mlp_out", silu(affine(w, "action_time_mlp_in", both)))
        suffix = torch.cat([affine(w, "state_proj", inputs.state[b].double())[None], timed])
        blocks = [1] + [2] * len(x)
    block = torch.tensor([0] * len(prefix) + blocks)
    valid = torch.cat([valid, torch.ones(len(suffix), dtype=torch.bool)])
    out = joint_transformer(w, config, (prefix, suffix), valid, block, condition)
    return affine(w, "action_out_proj", out[1][-len(x) :]), out[0]


def velocity(w, config, inputs, b, x, t):
    return forward(w, config, inputs, b, x, t)[0]


def loss(w, config, inputs, actions, noise, time):
    """Squared errors [B, H, A]."""
    rows = []
    for b in range(len(actions)):
        action, e, t = actions[b].double(), noise[b].double(), time[b].double()
        x = t * e + (1 - t) * action
        rows.append((velocity(w, config, inputs, b, x, t) - (e - action)) ** 2)
    return torch.stack(rows)


def sample(w, config, inputs, noise, num_steps):
    """Euler's method from t = 1 to 0, [B, H, A]; t is counted down in float32, as it is published."""
    rows = []
    for b in range(len(noise)):
        x, t = noise[b].double(), torch.tensor(1.0)
        for _ in range(num_steps):
            x = x - velocity(w, config, inputs, b, x, t.double()) / num_steps
            t = t - 1.0 / num_steps
        rows.append(x)
    return torch.stack(rows)
