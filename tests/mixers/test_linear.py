import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion_cli.mixers.linear import linear
from linfusion_cli.mixers.linear.linear import KeyValueSums, LinearAttention, attend, linear_attention


def attention_by_pairs(module: LinearAttention, x: Tensor) -> Tensor:
    """Compute the paper's formula over all pairs of tokens in fp64: [N, C] -> [N, C]."""

    def perceptron(layers, x):
        if isinstance(layers, torch.nn.Identity):
            return x
        hidden = x @ layers[0].weight.T + layers[0].bias
        mean, variance = hidden.mean(-1, keepdim=True), hidden.var(-1, keepdim=True, unbiased=False)
        normal = (hidden - mean) / torch.sqrt(variance + 1e-5) * layers[1].weight + layers[1].bias
        return torch.where(normal > 0, normal, 0.01 * normal) @ layers[3].weight.T + layers[3].bias

    def phi(x):
        return torch.where(x > 0, x + 1, torch.exp(x))

    count, channels = x.shape
    width = channels // module.heads
    q = phi((x + perceptron(module.to_q_, x)) @ module.to_q.weight.T)
    k = phi((x + perceptron(module.to_k_, x)) @ module.to_k.weight.T)
    v = x @ module.to_v.weight.T
    out = torch.zeros_like(x)
    for head in range(module.heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(count):
            similar = torch.stack([q[i, part] @ k[j, part] / count for j in range(count)])
            mixed = sum(similar[j] * v[j, part] for j in range(count))
            out[i, part] = mixed / (similar.sum() + 1e-4)
    return out @ module.to_out[0].weight.T + module.to_out[0].bias


@pytest.mark.parametrize("mid_dim", [None, 6, -1])
def test_equals_the_formula_over_all_pairs(mid_dim):
    torch.manual_seed(1)
    module = LinearAttention(12, 3, mid_dim).double()
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    expected = torch.stack([attention_by_pairs(module, one) for one in x])
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_identity_projection_doubles_the_input():
    module = LinearAttention(8, 2, -1)
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(module.queries(x), module._split(F.elu(module.to_q(2 * x)) + 1))


def test_sums_of_pieces_are_the_sums_of_the_whole():
    torch.manual_seed(2)
    k, v = torch.rand(1, 2, 100, 4, dtype=torch.float64), torch.randn(1, 2, 100, 4, dtype=torch.float64)
    whole = KeyValueSums.of(k, v)
    parts = KeyValueSums.of(k[:, :, :33], v[:, :, :33]) + KeyValueSums.of(k[:, :, 33:], v[:, :, 33:])
    assert parts.tokens == whole.tokens == 100
    torch.testing.assert_close(parts.kv, whole.kv)
    torch.testing.assert_close(parts.k, whole.k)


def test_pieces_do_not_change_the_result(monkeypatch):
    torch.manual_seed(3)
    q, k = torch.rand(2, 1, 3, 50, 4, dtype=torch.float64)
    v = torch.randn(1, 3, 50, 4, dtype=torch.float64)
    whole = linear_attention(q, k, v)
    monkeypatch.setattr(linear, "PIECE_TOKENS", 7)
    torch.testing.assert_close(linear_attention(q, k, v), whole, rtol=1e-12, atol=1e-12)


def test_half_precision_sums_are_kept_wide():
    """A million tokens of about 1 overflow fp16 and exceed the precision of bf16: the sums are wider."""
    k = torch.ones(1, 1, 1 << 17, 2, dtype=torch.bfloat16)
    sums = KeyValueSums.of(k, k)
    assert sums.kv.dtype == sums.k.dtype == torch.float32
    assert (sums.kv == 1 << 17).all() and (sums.k == 1 << 17).all()
    assert attend(k, sums).dtype == torch.bfloat16


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match="self-attention"):
        LinearAttention(8, 2)(torch.randn(1, 4, 8), encoder_hidden_states=torch.randn(1, 4, 8))
