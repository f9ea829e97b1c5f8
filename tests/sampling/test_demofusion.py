"""Compare each formula to its direct evaluation, and a phase to the published algorithm with two scheduler steps."""

import math

import pytest
import torch
import torch.nn.functional as F

from linfusion_cli.sampling.noise import draw_phase_noise
from linfusion_cli.sampling.schedulers.schedule import SCHEDULER_SPECS, build_schedule
from linfusion_cli.sampling.upscalers.demofusion import ChannelStatistics, DemoFusion, blur_latents, cosines, demofusion
from linfusion_cli.strips.dilation import dilate
from tests.support.small_models import build_scheduler_config

CONFIG = build_scheduler_config()
STEPS, COUNT = 20, 7


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error in the L2 norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def naive_kernel(size: int, sigma: float) -> torch.Tensor:
    """Return a two-dimensional Gaussian kernel."""
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    kernel = torch.exp(-(places[:, None] ** 2 + places[None, :] ** 2) / (2 * sigma**2))
    return kernel / kernel.sum()


def naive_blur(x: torch.Tensor, r: int, sigma: float) -> torch.Tensor:
    """Blur with a two-dimensional convolution."""
    size, channels = 2 * r - 1, x.shape[1]
    kernel = naive_kernel(size, sigma).to(x.dtype).expand(channels, 1, size, size)
    return F.conv2d(x, kernel, padding=size // 2, groups=channels)


@pytest.mark.parametrize("r", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("sigma", [0.008, 0.3, 0.8, 3.0])
def test_the_blur_is_a_gaussian_with_zero_padding(r, sigma):
    x = torch.randn(1, 4, 21, 34, dtype=torch.float64)
    torch.testing.assert_close(blur_latents(x, 2 * r - 1, sigma), naive_blur(x, r, sigma))


@pytest.mark.parametrize("t", [1, 60, 321, 999])
def test_the_weights_are_powers_of_a_cosine(t):
    cf = 0.5 * (1 + math.cos(math.pi * (1000 - t) / 1000))
    assert cosines(t, 1000, (3, 1, 1)) == pytest.approx([cf**3, cf, 0.99 * cf + 0.01])
    assert cosines(t, 1000, (1, 2, 3)) == pytest.approx([cf, cf**2, 0.99 * cf**3 + 0.01])


def test_at_16k_the_weight_of_the_dilated_pass_is_negligible():
    """The weights of the four steps of the last phase, which the default of --dilated-min is based on."""
    schedule = build_schedule("euler", CONFIG, 50, None, count=4)
    weights = [cosines(float(timestep), 1000, (3, 1, 1))[1] for timestep in schedule.timesteps]
    assert weights == pytest.approx([0.0092, 0.0041, 0.0011, 0.0000], abs=1e-4)
    assert not any(DemoFusion(16).is_dilated(float(timestep), 1000) for timestep in schedule.timesteps)
    assert all(DemoFusion(16, dilated_min=0).is_dilated(float(timestep), 1000) for timestep in schedule.timesteps)


def test_channels_get_the_mean_and_deviation():
    like, x = torch.randn(2, 1, 4, 9, 7, dtype=torch.float64)
    result = ChannelStatistics.from_latents(3 * like + 1).apply_to(x)
    for channel in range(4):
        assert result[0, channel].mean() == pytest.approx(float((3 * like + 1)[0, channel].mean()))
        assert result[0, channel].std() == pytest.approx(float((3 * like + 1)[0, channel].std()))


def test_a_constant_channel_stays_constant():
    result = ChannelStatistics.from_latents(torch.randn(1, 4, 8, 8)).apply_to(torch.ones(1, 4, 8, 8))
    assert result.isfinite().all() and result.std(dim=(2, 3)).max() == 0


class Network(torch.nn.Module):
    """A small network of dilatable convolutions, used as a model: scaled latents and timestep -> prediction."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.Conv2d(6, 4, 3, padding=1)

    @torch.inference_mode()
    def forward(self, latents, timestep):
        return self.second(torch.tanh(self.first(latents) + timestep / 1000))


def run_published_phase(network, z, noise, base, name, config, r):
    """Run a phase as the published code does, without its two bugs: the results of two scheduler steps are mixed."""
    spec = SCHEDULER_SPECS[name]
    schedulers = [spec.scheduler_class.from_config(config, **spec.options) for _ in range(2)]
    for scheduler in schedulers:
        scheduler.set_timesteps(STEPS)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(STEPS - COUNT)
    one, two = schedulers
    timesteps = one.timesteps[STEPS - COUNT :]
    x = one.add_noise(z, noise, timesteps[:1])
    for t in timesteps:
        c1, c2, c3 = cosines(float(t), 1000, (3, 1, 1))
        x = (1 - c1) * x + c1 * one.add_noise(z, noise, t[None])
        local = one.step(network(one.scale_model_input(x, t), t), t, x).prev_sample
        smooth = naive_blur(x, r, 0.8 * c3)
        mean, std = smooth.mean((0, 2, 3), keepdim=True), smooth.std((0, 2, 3), keepdim=True)
        smooth = (smooth - mean) / std * x.std((0, 2, 3), keepdim=True) + x.mean((0, 2, 3), keepdim=True)
        with dilate(network, r):
            prediction_dilated = network(two.scale_model_input(smooth, t), t)
        x = (1 - c2) * local + c2 * two.step(prediction_dilated, t, x).prev_sample
        if hasattr(two, "model_outputs"):  # multistep solvers must store the mixed outputs in both copies
            mixed = [(1 - c2) * a + c2 * b for a, b in zip(one.model_outputs[-1:], two.model_outputs[-1:], strict=True)]
            one.model_outputs[-1:], two.model_outputs[-1:] = mixed, mixed
        if getattr(two, "last_sample", None) is not None:
            one.last_sample = two.last_sample = (1 - c2) * one.last_sample + c2 * two.last_sample
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return (x - mean) / std * base.std((0, 2, 3), keepdim=True) + base.mean((0, 2, 3), keepdim=True)


@pytest.mark.parametrize("r", [2, 4, 8])
@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp-2m", "dpmpp-2m-karras", "unipc"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_phase_equals_the_published_algorithm(r, name, prediction):
    config = CONFIG | {"prediction_type": prediction}
    network, base = Network(), 0.7 * torch.randn(1, 4, 8, 8) + 0.2
    z, noise = torch.randn(1, 4, 8 * r, 6 * r), draw_phase_noise(3, 1, 4, 8 * r, 6 * r)
    schedule = build_schedule(name, config, STEPS, None, COUNT)

    def predict_dilated(latents, timestep):
        with dilate(network, r):
            return network(latents, timestep)

    method = DemoFusion(r, dilated_min=0)
    steps = list(demofusion(z, noise, ChannelStatistics.from_latents(base), schedule, network, predict_dilated, method))
    assert len(steps) == COUNT
    assert relative_error(steps[-1], run_published_phase(network, z, noise, base, name, config, r)) < 1e-4


@pytest.mark.parametrize("r", [1, 4])
def test_the_dilated_pass_is_skipped_below_its_minimum_weight_and_at_dilation_1(r):
    timesteps = []

    def predict_dilated(latents, timestep):
        timesteps.append(float(timestep))
        return latents

    z, noise = torch.randn(2, 1, 4, 16, 16)
    schedule = build_schedule("euler", CONFIG, STEPS, None, COUNT)
    method, network = DemoFusion(r, dilated_min=0.05), Network()
    list(demofusion(z, noise, ChannelStatistics.from_latents(z), schedule, network, predict_dilated, method))
    heavy = [float(t) for t in schedule.timesteps if cosines(float(t), 1000, method.exponents)[1] >= 0.05]
    assert timesteps == (heavy if r > 1 else []) and 0 < len(heavy) < COUNT


def test_the_dilated_pass_runs_at_exactly_its_least_weight():
    schedule = build_schedule("euler", CONFIG, STEPS, None, COUNT)
    timestep = float(schedule.timesteps[2])
    weight = cosines(timestep, 1000, (3, 1, 1))[1]
    assert DemoFusion(4, dilated_min=weight).is_dilated(timestep, 1000)
    assert not DemoFusion(4, dilated_min=math.nextafter(weight, 1)).is_dilated(timestep, 1000)


def test_a_phase_draws_no_noise_and_does_not_modify_its_inputs():
    network, (z, noise) = Network(), torch.randn(2, 1, 4, 16, 16)
    before, state = (z.clone(), noise.clone()), torch.get_rng_state()
    schedule = build_schedule("euler", CONFIG, STEPS, None, COUNT)
    list(demofusion(z, noise, ChannelStatistics.from_latents(z), schedule, network, network, DemoFusion(2)))
    assert torch.equal(z, before[0]) and torch.equal(noise, before[1]) and torch.equal(torch.get_rng_state(), state)
