"""The distillation loss is the paper's, computed here the long way, and only the linear modules learn from it."""

import pytest
import torch
from torch import nn

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import mounted, self_attentions
from linfusion_cli.training.distillation import DistillationLoss, distillation_loss, noise_loss, start_from_originals
from tests.support.small_models import small_sd_unet


class Recorder(nn.Module):
    """Stands before a module and keeps what it gives."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.given = inner, None

    def forward(self, *args, **named):
        self.given = self.inner(*args, **named)
        return self.given


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return small_sd_unet().eval()


@pytest.fixture
def batch(unet):
    torch.manual_seed(1)
    sample, noise = torch.randn(2, 2, 4, 8, 8)
    context = torch.randn(2, 5, unet.config.cross_attention_dim)
    return sample, torch.tensor([10, 700]), noise, context


def recorded(unet, modules, sample, timesteps, context):
    """What the UNet says with these modules, and what each of them gives."""
    recorders = {path: Recorder(module) for path, module in modules.items()}
    with mounted(unet, recorders):
        said = unet(sample, timesteps, encoder_hidden_states=context).sample
    return said, {path: recorder.given for path, recorder in recorders.items()}


def test_the_loss_is_the_paper_s(unet, batch):
    sample, timesteps, noise, context = batch
    linear = start_from_originals(unet)
    taught, wanted = recorded(unet, self_attentions(unet), sample, timesteps, context)
    said, given = recorded(unet, linear, sample, timesteps, context)
    mean = lambda a, b: ((a - b) ** 2).sum() / a.numel()  # noqa: E731
    layers = sum(mean(given[path], wanted[path]) for path in linear)
    loss = distillation_loss(unet, linear, sample, timesteps, noise, encoder_hidden_states=context)
    torch.testing.assert_close(loss.noise, mean(said, noise))
    torch.testing.assert_close(loss.teacher, mean(said, taught))
    torch.testing.assert_close(loss.layers, layers)
    torch.testing.assert_close(
        loss.total, mean(said, noise) + 0.5 * mean(said, taught) + 0.5 * layers, rtol=1e-5, atol=1e-6
    )
    assert loss.teacher > 0 and loss.layers > 0


def test_the_unet_keeps_its_own_attention_and_modules_start_as_its_projections(unet):
    originals = self_attentions(unet)
    linear = start_from_originals(unet)
    assert linear.keys() == originals.keys() and len(linear) > 1
    for path, module in linear.items():
        assert torch.equal(module.to_v.weight, originals[path].to_v.weight)
        assert module.to_v.weight is not originals[path].to_v.weight
        x = torch.randn(1, 3, module.to_q.in_features)
        assert torch.equal(module.to_q_(x), torch.zeros_like(x)) and torch.equal(module.to_k_(x), torch.zeros_like(x))
    assert self_attentions(unet) == originals


@pytest.mark.slow
def test_learning_from_it_lowers_every_part(unet, batch):
    sample, timesteps, _, context = batch
    unet.requires_grad_(False)
    with torch.no_grad():
        noise = unet(sample, timesteps, encoder_hidden_states=context).sample  # a teacher that is right
    linear = start_from_originals(unet)
    student = nn.ModuleList(linear.values())
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses: list[DistillationLoss] = []
    for _ in range(60):
        losses.append(distillation_loss(unet, linear, sample, timesteps, noise, encoder_hidden_states=context))
        optimizer.zero_grad()
        losses[-1].total.backward()
        optimizer.step()
    first, last = losses[0], losses[-1]
    assert last.noise < 0.5 * first.noise and last.teacher < 0.5 * first.teacher and last.layers < 0.5 * first.layers
    assert all(p.grad is None for p in unet.parameters())


def test_the_noise_alone_is_its_first_part(unet, batch):
    sample, timesteps, noise, context = batch
    unet.requires_grad_(False)
    originals, linear = self_attentions(unet), start_from_originals(unet)
    loss = noise_loss(unet, linear, sample, timesteps, noise, encoder_hidden_states=context)
    whole = distillation_loss(unet, linear, sample, timesteps, noise, encoder_hidden_states=context)
    torch.testing.assert_close(loss, whole.noise)
    loss.backward()
    assert all(module.to_v.weight.grad.abs().sum() > 0 for module in linear.values())
    assert self_attentions(unet) == originals


def test_it_leaves_no_hooks_and_the_unet_as_it_was(unet, batch):
    sample, timesteps, noise, context = batch
    originals, linear = self_attentions(unet), start_from_originals(unet)
    distillation_loss(unet, linear, sample, timesteps, noise, encoder_hidden_states=context)
    hooks = [m._forward_hooks for m in (*linear.values(), *originals.values())]
    assert self_attentions(unet) == originals
    assert not any(hooks) and all(isinstance(m, LinearAttention) for m in linear.values())
