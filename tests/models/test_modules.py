import torch
import torch.nn.functional as F
from torch import nn

from rlinf.models.embodiment.state_critic import StateCritic
from rlinf.models.modules.batch_renorm import BatchRenorm
from rlinf.models.modules.mlp import Tanh
from rlinf.models.modules.q_ensemble import QEnsemble
from rlinf.models.modules.running_norm import RunningNorm
from rlinf.models.modules.transformer import SingleTokenAttention


def test_ensemble_equals_a_loop_over_its_heads():
    torch.manual_seed(0)
    q = QEnsemble(5, (8, 6), 3, activation="tanh", layer_norm=True)
    for p in q.parameters():
        p.data += 0.1 * torch.randn_like(p)
    features, action = torch.randn(11, 3), torch.randn(11, 2)
    linear1, norm1, _, linear2, norm2, _, head = q.net
    expected = []
    for e in range(3):
        x = torch.cat([features, action], -1)
        for linear, norm, width in ((linear1, norm1, 8), (linear2, norm2, 6)):
            x = x @ linear.weight[e] + linear.bias[e, 0]
            x = torch.tanh(F.layer_norm(x, (width,), norm.weight[e, 0], norm.bias[e, 0]))
        expected.append((x @ head.weight[e] + head.bias[e, 0]).squeeze(-1))
    torch.testing.assert_close(q(features, action), torch.stack(expected))


def test_tanh_and_its_gradient_are_torchs_within_1e_6():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-9, -90.0, 90.0])]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = Tanh()(x), torch.tanh(exact)
    torch.testing.assert_close(y.double(), expected, atol=2e-7, rtol=0)
    weight = torch.randn_like(x)
    (weight * y).sum().backward()
    (weight.double() * expected).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=2e-6, rtol=0)
    assert torch.equal(Tanh()(exact), torch.tanh(exact))


def test_heads_differ_at_the_start():
    values = QEnsemble(5, (8,), 10)(torch.randn(4, 3), torch.randn(4, 2))
    assert len(torch.unique(values[:, 0])) == 10


def test_single_token_attention_is_multi_head_attention_over_one_key():
    torch.manual_seed(0)
    oracle = nn.MultiheadAttention(8, 2, batch_first=True)
    ours = SingleTokenAttention(8)
    ours.load_state_dict(oracle.state_dict())
    query, memory = torch.randn(5, 1, 8), torch.randn(5, 1, 8)
    expected = oracle(query, memory, memory)[0][:, 0]
    torch.testing.assert_close(ours(memory[:, 0]), expected)
    weight, bias = ours.fused()
    torch.testing.assert_close(F.linear(memory[:, 0], weight, bias), expected, atol=1e-6, rtol=1e-5)


def test_running_norm_has_the_statistics_of_everything_seen():
    torch.manual_seed(0)
    data = torch.randn(1000, 4) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + torch.tensor([0.0, 3.0, -1.0, 100.0])
    norm = RunningNorm(4)
    for rows in data.split(77):
        norm.update(rows)
    torch.testing.assert_close(norm.mean, data.mean(0), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(norm.var, data.var(0, correction=0), atol=1e-3, rtol=1e-3)
    out = norm(data)
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    assert norm.count.item() == 1000


def test_running_norm_does_not_blow_up_on_a_constant_column():
    norm = RunningNorm(1)
    norm.update(torch.full((100, 1), 3.0))
    assert norm(torch.full((1, 1), 3.0)).abs().item() < 1e-3
    assert norm(torch.full((1, 1), 4.0)).item() == 10.0


def test_batch_renorm_by_hand():
    layer = BatchRenorm(1, momentum=0.9, epsilon=0.0)
    layer.running_mean.fill_(1.0)
    layer.running_var.fill_(4.0)
    x = torch.tensor([[0.0], [2.0], [4.0], [6.0]])  # mean 3, variance 5
    layer.train()
    y = layer(x)
    # r = √5/2 and d = (3 − 1)/2 are inside their bounds, so the result is the running normalisation.
    torch.testing.assert_close(y, (x - 1.0) / 2.0)
    torch.testing.assert_close(layer.running_mean, torch.tensor([1.2]))
    torch.testing.assert_close(layer.running_var, torch.tensor([4.1]))


def test_batch_renorm_clips_and_warms_up():
    x = torch.tensor([[100.0], [102.0]])
    layer = BatchRenorm(1, epsilon=0.0)
    # d = 101 is cut to 5, r = 1: normalised ±1, shifted by 5.
    torch.testing.assert_close(layer(x), torch.tensor([[4.0], [6.0]]))
    warm = BatchRenorm(1, epsilon=0.0, warmup_steps=1)
    torch.testing.assert_close(warm(x), torch.tensor([[-1.0], [1.0]]))


def test_batch_renorm_uses_running_statistics_without_gradients():
    layer = BatchRenorm(2)
    before = layer.running_mean.clone()
    with torch.no_grad():
        layer(torch.randn(8, 2) + 10)
    torch.testing.assert_close(layer.running_mean, before)


def test_target_critic_is_a_frozen_copy_that_shares_the_normaliser():
    norm = RunningNorm(3)
    critic = StateCritic(3, 2, hidden_dims=(8,), num_heads=2, activation="relu", layer_norm=True, normalizer=norm)
    target = critic.make_target()
    assert target.normalizer is norm
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in critic.parameters())
    assert not any(p is t for p, t in zip(critic.parameters(), target.parameters(), strict=True))
    obs, action = {"state": torch.randn(4, 3)}, torch.randn(4, 2)
    torch.testing.assert_close(target(obs, action), critic(obs, action))
