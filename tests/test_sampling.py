"""Sampling against the exact solution for Gaussian data and diffusers' schedulers; decoding against the plain VAE."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from repkit.backbones.latents import encode_pixels
from repkit.sampling import predictor, sample, sampling_times
from repkit.schedule import Schedule
from repkit.zoo import load
from tests import tiny, tiny_sd, tiny_sit
from tests.oracles import PREDICTIONS, class_means, gaussian_backbone, gaussian_schedule, noise_levels

VARIANCE = 0.04


def exact(prediction: str, mean: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Where the probability-flow ODE ends for data N(mean, variance): x keeps its number of standard deviations."""
    alpha, sigma = noise_levels(prediction, t)
    deviations = (x_t.double() - alpha * mean) / (alpha**2 * VARIANCE + sigma**2).sqrt()
    return mean + VARIANCE**0.5 * deviations


def errors(prediction: str, generator: torch.Generator, *counts: int) -> list[float]:
    """How far from the exact end so many steps land, root mean square, in standard deviations of the data."""
    means = class_means(2)
    backbone, schedule = gaussian_backbone(prediction, means, VARIANCE), gaussian_schedule(prediction)
    noise = torch.randn(64, *means.shape[1:], generator=generator)
    predict = predictor(backbone, backbone.condition(1, len(noise)))
    found = []
    for count in counts:
        times = sampling_times(schedule, count, strength=0.9)
        x_t = schedule.add_noise(means[1].expand_as(noise), noise, times[0])
        landed = sample(schedule, predict, x_t, times)
        off = landed - exact(prediction, means[1], x_t, times[0])
        found.append(float(off.square().mean().sqrt()) / VARIANCE**0.5)
    return found


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_steps_go_to_the_exact_solution_at_first_order(prediction, generator):
    few, more, many = errors(prediction, generator, 25, 50, 100)
    assert few / more == pytest.approx(2, rel=0.25) and more / many == pytest.approx(2, rel=0.25)
    assert many < 0.1


@pytest.mark.parametrize("prediction", ["v", "flow", "edm"])
def test_noise_becomes_data_of_its_class(prediction, generator):
    """The mean of samples is that of the class to within four standard errors, their variance to a tenth."""
    means = class_means(2)
    backbone = gaussian_backbone(prediction, means, VARIANCE)
    times = sampling_times(backbone.schedule, 200)
    sigma = backbone.schedule.coefficients(times[0])[1].float()
    noise = sigma * torch.randn(512, *means.shape[1:], generator=generator)
    found = sample(backbone.schedule, predictor(backbone, backbone.condition(0, 512)), noise, times)
    assert ((found.mean(0) - means[0]).abs() < 4 * (VARIANCE / 512) ** 0.5).all()
    assert float(found.var(0).mean()) == pytest.approx(VARIANCE, rel=0.1)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_discrete_schedule_steps_as_ddim(prediction, generator):
    model = tiny.unet_model()
    backbone = tiny.UNet(model, tiny.linear(prediction))
    kinds = {"eps": "epsilon", "v": "v_prediction"}
    scheduler = DDIMScheduler(prediction_type=kinds[prediction], clip_sample=False)
    scheduler.set_timesteps(8)
    x_t = expected = torch.randn(2, 3, 16, 16, generator=generator)
    seen = []

    def keep(x, t):
        seen.append((int(t), x))
        return x

    found = sample(
        backbone.schedule,
        predictor(backbone, backbone.condition(None, 2)),
        x_t,
        scheduler.timesteps,
        keep=keep,
    )
    with torch.no_grad():
        for number, t in enumerate(scheduler.timesteps):
            expected = scheduler.step(model(expected, t).sample, t, expected).prev_sample
            if number < len(seen):
                torch.testing.assert_close(seen[number][1], expected, rtol=1e-4, atol=1e-4)
    assert [t for t, _ in seen] == scheduler.timesteps[1:].tolist()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_flow_steps_as_flow_match_euler(generator):
    model = tiny.dit_model(in_channels=3, out_channels=3, sample_size=8)
    backbone = tiny.DiT(model, Schedule.flow(3.0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = np.linspace(1, 0, 7)[:-1]
    scheduler.set_timesteps(sigmas=u)
    times = sampling_times(backbone.schedule, 6)
    np.testing.assert_allclose(times, scheduler.timesteps, rtol=1e-5)
    x_t = expected = torch.randn(2, 3, 8, 8, generator=generator)
    found = sample(backbone.schedule, predictor(backbone, backbone.condition(1, 2)), x_t, times)
    labels = torch.tensor([1, 1])
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = model(expected, t.expand(2), class_labels=labels).sample
            expected = scheduler.step(velocity, t, expected).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_edm_steps_as_edm_euler(generator):
    model = tiny.unet_model()
    backbone = tiny.UNet(model, Schedule.edm(0.01, 20.0))
    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=20.0)
    scheduler.set_timesteps(6)
    times = scheduler.sigmas[:-1]
    x_t = expected = 20 * torch.randn(1, 3, 16, 16, generator=generator)
    found = sample(backbone.schedule, predictor(backbone, backbone.condition(None, 1)), x_t, times)
    with torch.no_grad():
        for t in scheduler.timesteps:
            raw = model(scheduler.scale_model_input(expected, t), t).sample
            expected = scheduler.step(raw, t, expected).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_guidance_goes_on_from_the_null_condition(generator):
    """With Gaussian classes, E[x0 | x_t] is linear in the mean, so guidance samples from a shifted mean."""
    means = class_means(1)
    backbone = gaussian_backbone("eps", torch.cat([means, -means, 3 * means]), VARIANCE)
    conditions = [backbone.condition(label, 4) for label in range(3)]
    x_t = torch.randn(4, *means.shape[1:], generator=generator)
    times = sampling_times(backbone.schedule, 10)
    guided = predictor(backbone, conditions[0], null=conditions[1], guidance=2.0)  # -m + 2 (m + m) = 3 m
    found = sample(backbone.schedule, guided, x_t, times)
    plain = sample(backbone.schedule, predictor(backbone, conditions[2]), x_t, times)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="guidance=2.0 needs"):
        predictor(backbone, conditions[0], guidance=2.0)


def test_times_begin_at_the_strength():
    discrete, flow, edm = gaussian_schedule("eps"), Schedule.flow(3.0), Schedule.edm(0.02, 20.0)
    assert sampling_times(discrete, 4, strength=0.4).tolist() == [400, 300, 200, 100]
    assert sampling_times(discrete, 10, strength=0.004).tolist() == [4, 3, 2, 1, 0]
    assert sampling_times(discrete, 2).tolist() == [999, 500]
    assert sampling_times(flow, 2, strength=0.5).tolist() == pytest.approx([750, 500])  # u = 1/2, 1/4
    assert sampling_times(edm, 2, strength=0.5).tolist() == pytest.approx([0.02 * 1000**0.5, 0.02 * 1000**0.25])
    for schedule in (discrete, flow, edm):
        assert len(sampling_times(schedule, 5, strength=0.0)) == 0


@pytest.mark.parametrize(("steps", "strength"), [(0, 0.5), (5, -0.1), (5, 1.1), (5, float("nan"))])
def test_other_times_are_refused(steps, strength):
    with pytest.raises(ValueError, match="from 0 to 1"):
        sampling_times(Schedule.flow(), steps, strength=strength)


def test_without_times_nothing_happens(generator):
    x_t = torch.randn(1, 3, 4, 4, generator=generator)
    schedule = Schedule.flow()
    assert sample(schedule, lambda *_: 1 / 0, x_t, sampling_times(schedule, 5, strength=0.0)) is x_t


# --- back to pixels


@pytest.mark.parametrize("name", ["unet", "grey", "edm", "pixel-dit"])
def test_pixels_come_back(name):
    backbone = tiny.OURS[name]()
    images = tiny.images(2, backbone.size, backbone.size)
    images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1) if name == "grey" else images
    torch.testing.assert_close(backbone.decode(backbone.encode(images)), images, rtol=0, atol=1e-6)


def test_pixels_beyond_the_range_are_clipped():
    backbone = tiny.grey_unet()
    x0 = torch.tensor([-3.0, -1, 0, 1, 3]).reshape(5, 1, 1, 1)
    assert backbone.decode(x0)[:, :, 0, 0].tolist() == [[v] * 3 for v in (0, 0, 0.5, 1, 1)]
    assert backbone.encode(torch.ones(1, 3, 1, 1)).shape == encode_pixels(torch.ones(1, 3, 1, 1), 1).shape


@pytest.mark.parametrize("family", ["dit", "sd", "sit"])
def test_latents_are_decoded_by_the_autoencoder(family, generator):
    backbone: Any = {"dit": tiny.dit, "sd": lambda: load(tiny_sd.sd_pipeline()), "sit": tiny_sit.repa}[family]()
    vae = backbone.vae
    latents = torch.randn(2, 4, 4, 4, generator=generator)
    with torch.no_grad():
        plain = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        found = backbone.decode(latents)
    torch.testing.assert_close(found, (plain / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


def test_features_have_no_way_back_to_pixels():
    with pytest.raises(ValueError, match="svg.pt cannot generate images.*take a model on pixels"):
        tiny_sit.svg().decode(torch.zeros(1, 4, 16, 16))
