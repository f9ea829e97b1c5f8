"""The distillation loss equals a direct computation of the paper's, and trains the linear modules only."""

import pytest
import torch
from torch import nn

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions, mount_modules
from linfusion_cli.training.distillation import (
    DistillationLoss,
    build_student_modules,
    compute_distillation_loss,
    compute_noise_loss,
)
from tests.support.small_models import build_small_sd_unet


class Recorder(nn.Module):
    """Wrap a module and record its output."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.output = inner, None

    def forward(self, *args, **named):
        self.output = self.inner(*args, **named)
        return self.output


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return build_small_sd_unet().eval()


@pytest.fixture
def batch(unet):
    torch.manual_seed(1)
    sample, noise = torch.randn(2, 2, 4, 8, 8)
    context = torch.randn(2, 5, unet.config.cross_attention_dim)
    return sample, torch.tensor([10, 700]), noise, context


def run_with(unet, modules, sample, timesteps, context):
    """Return the output of the UNet with these modules, and the outputs of the modules by path."""
    recorders = {path: Recorder(module) for path, module in modules.items()}
    with mount_modules(unet, recorders):
        output = unet(sample, timesteps, encoder_hidden_states=context).sample
    return output, {path: recorder.output for path, recorder in recorders.items()}


def test_the_loss_is_the_paper_s(unet, batch):
    sample, timesteps, noise, context = batch
    linear = build_student_modules(unet)
    teacher, teacher_layers = run_with(unet, find_self_attentions(unet), sample, timesteps, context)
    student, student_layers = run_with(unet, linear, sample, timesteps, context)
    mean = lambda a, b: ((a - b) ** 2).sum() / a.numel()  # noqa: E731
    layers = sum(mean(student_layers[path], teacher_layers[path]) for path in linear)
    loss = compute_distillation_loss(unet, linear, sample, timesteps, noise, encoder_hidden_states=context)
    torch.testing.assert_close(loss.noise, mean(student, noise))
    torch.testing.assert_close(loss.teacher, mean(student, teacher))
    torch.testing.assert_close(loss.layers, layers)
    torch.testing.assert_close(
        loss.total, mean(student, noise) + 0.5 * mean(student, teacher) + 0.5 * layers, rtol=1e-5, atol=1e-6
    )
    assert loss.teacher > 0 and loss.layers > 0


def test_the_unet_keeps_its_own_attention_and_modules_start_as_its_projections(unet):
    originals = find_self_attentions(unet)
    linear = build_student_modules(unet)
    assert linear.keys() == originals.keys() and len(linear) > 1
    for path, module in linear.items():
        assert torch.equal(module.to_v.weight, originals[path].to_v.weight)
        assert module.to_v.weight is not originals[path].to_v.weight
        x = torch.randn(1, 3, module.to_q.in_features)
        assert torch.equal(module.to_q_(x), torch.zeros_like(x)) and torch.equal(module.to_k_(x), torch.zeros_like(x))
    assert find_self_attentions(unet) == originals


@pytest.mark.slow
def test_learning_from_it_lowers_every_part(unet, batch):
    sample, timesteps, _, context = batch
    unet.requires_grad_(False)
    with torch.no_grad():
        noise = unet(sample, timesteps, encoder_hidden_states=context).sample  # a perfect teacher
    linear = build_student_modules(unet)
    student = nn.ModuleList(linear.values())
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses: list[DistillationLoss] = []
    for _ in range(60):
        losses.append(compute_distillation_loss(unet, linear, sample, timesteps, noise, encoder_hidden_states=context))
        optimizer.zero_grad()
        losses[-1].total.backward()
        optimizer.step()
    first, last = losses[0], losses[-1]
    assert last.noise < 0.5 * first.noise and last.teacher < 0.5 * first.teacher and last.layers < 0.5 * first.layers
    assert all(p.grad is None for p in unet.parameters())


def test_the_noise_alone_is_its_first_part(unet, batch):
    sample, timesteps, noise, context = batch
    unet.requires_grad_(False)
    originals, linear = find_self_attentions(unet), build_student_modules(unet)
    loss = compute_noise_loss(unet, linear, sample, timesteps, noise, encoder_hidden_states=context)
    whole = compute_distillation_loss(unet, linear, sample, timesteps, noise, encoder_hidden_states=context)
    torch.testing.assert_close(loss, whole.noise)
    loss.backward()
    assert all(module.to_v.weight.grad.abs().sum() > 0 for module in linear.values())
    assert find_self_attentions(unet) == originals


def test_it_leaves_no_hooks_and_the_unet_as_it_was(unet, batch):
    sample, timesteps, noise, context = batch
    originals, linear = find_self_attentions(unet), build_student_modules(unet)
    compute_distillation_loss(unet, linear, sample, timesteps, noise, encoder_hidden_states=context)
    hooks = [m._forward_hooks for m in (*linear.values(), *originals.values())]
    assert find_self_attentions(unet) == originals
    assert not any(hooks) and all(isinstance(m, LinearAttention) for m in linear.values())
