from inspect import unwrap

import numpy as np
import pytest
import torch

from repkit.schedule import PREDICTIONS, Schedule
from repkit.zeroshot.levels import Levels, levels_at, levels_of_times, strata
from tests.oracles import SIGMA_DATA, alphas_cumprod, gaussian_schedule

SPACINGS = ("native", "shifted", "logsnr")
CONTINUOUS = {"flow": Schedule.flow(3.0), "edm": Schedule.edm(0.02, 20.0)}


def schedules(prediction):
    return [
        Schedule.discrete(alphas_cumprod().tolist(), prediction),
        Schedule.flow(3.0, prediction),
        Schedule.edm(0.02, 20.0, SIGMA_DATA, prediction),
        Schedule.edm(0.02, 20.0, SIGMA_DATA, prediction, edm_sign=-1),
    ]


def logsnr_of(schedule, t):
    alpha, sigma = schedule.coefficients(torch.from_numpy(t))
    return 2 * (alpha.log() - sigma.log()).numpy()


def test_native_levels_are_the_middles_of_equal_strata():
    assert levels_at(Schedule.flow(3.0), strata(4)).t.tolist() == [125, 375, 625, 875]
    assert levels_at(gaussian_schedule("eps"), strata(4)).t.tolist() == [125, 375, 625, 875]
    times = np.log(levels_at(gaussian_schedule("edm"), strata(4)).t)
    np.testing.assert_allclose(np.diff(times), np.log(1000) / 4)


def test_shifted_levels_follow_the_shift():
    u = strata(8)
    np.testing.assert_allclose(levels_at(Schedule.flow(3.0), u, "shifted").t, 1000 * 3 * u / (1 + 2 * u))
    for schedule in (gaussian_schedule("eps"), gaussian_schedule("edm"), Schedule.flow()):
        assert levels_at(schedule, u, "shifted").t.tolist() == levels_at(schedule, u).t.tolist()


@pytest.mark.parametrize("prediction", ["eps", "flow", "edm"])
def test_logsnr_levels_are_even_in_log_snr(prediction):
    schedule = gaussian_schedule(prediction)
    levels = levels_at(schedule, strata(50), "logsnr")
    table = np.log(alphas_cumprod() / (1 - alphas_cumprod()))
    high, low = {
        "eps": (table[0], table[-1]),
        "flow": (13.8, -13.8),
        "edm": (-2 * np.log(0.02), -2 * np.log(20.0)),
    }[prediction]
    wanted = high - strata(50) * (high - low)
    half_a_step = 0.51 * np.abs(np.diff(table)).max() if prediction == "eps" else 1e-9
    np.testing.assert_allclose(levels.logsnr, wanted, atol=half_a_step)
    np.testing.assert_allclose(levels.slope, high - low)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", CONTINUOUS)
def test_slope_and_density_equal_numerical_derivatives(kind, spacing):
    schedule, u, step = CONTINUOUS[kind], strata(40), 1e-6
    after, before = (levels_at(schedule, u + side * step, spacing).t for side in (1, -1))
    levels = levels_at(schedule, u, spacing)
    slope = -(logsnr_of(schedule, after) - logsnr_of(schedule, before)) / (2 * step)
    np.testing.assert_allclose(levels.slope, slope, rtol=1e-6)
    native = (np.log(after / before) / np.log(1000) if kind == "edm" else (after - before) / 1000) / (2 * step)
    np.testing.assert_allclose(levels.density, native, rtol=1e-6)
    assert levels.kind == kind and (np.diff(levels.t) > 0).all()


def test_slope_and_density_of_steps_equal_differences_over_the_table():
    schedule = gaussian_schedule("eps")
    table = np.log(alphas_cumprod() / (1 - alphas_cumprod()))
    central = (table[:-2] - table[2:]) / 2  # fall of log-SNR a step, at steps 1 .. 998
    levels = levels_at(schedule, strata(40))
    np.testing.assert_allclose(levels.slope, 1000 * central[levels.t.astype(int) - 1])
    assert (levels.density == 1).all()
    even = levels_at(schedule, strata(40), "logsnr")
    inside = (even.t > 0) & (even.t < 999)
    steps = (table[0] - table[-1]) / central[even.t[inside].astype(int) - 1]  # d step / du
    np.testing.assert_allclose(even.density[inside], steps / 1000, rtol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["eps", "flow", "edm"])
def test_density_has_mean_one(prediction, spacing):
    levels = levels_at(gaussian_schedule(prediction), strata(4000), spacing)
    assert levels.density.mean() == pytest.approx(1, abs=5e-3)  # flows and steps are cut at both ends


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_error_scales_follow_their_formulas(prediction):
    for schedule in schedules(prediction):
        levels = levels_at(schedule, strata(16))
        alpha, sigma = levels.alpha, levels.sigma
        s = sigma / alpha
        expected = {
            "eps": np.ones(16),
            "x0": 1 / s,  # alpha*x0 + sigma*eps is known, so sigma * d eps = alpha * d x0
            "v": alpha / (alpha**2 + sigma**2),
            "flow": alpha / (alpha + sigma),
            "edm": SIGMA_DATA / np.sqrt(s**2 + SIGMA_DATA**2),  # c_out, of x0, over s
        }
        np.testing.assert_allclose(levels.eps_scale, expected[prediction], rtol=1e-9)


def test_vp_and_flow_scales_are_the_ones_of_the_literature():
    vp = levels_at(gaussian_schedule("v"), strata(16))
    np.testing.assert_allclose(vp.eps_scale**2, vp.alpha**2)
    x0 = levels_at(gaussian_schedule("x0"), strata(16))
    np.testing.assert_allclose(x0.eps_scale**2, np.exp(x0.logsnr))
    flow = levels_at(gaussian_schedule("flow"), strata(16))
    np.testing.assert_allclose(flow.eps_scale, 1 - flow.t / 1000)


@pytest.mark.parametrize("to", PREDICTIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_error_scale_equals_a_perturbed_conversion(prediction, to):
    for schedule in schedules(prediction):
        t = torch.from_numpy(levels_at(schedule, strata(8)).t)
        x_t, told = torch.linspace(-1, 1, 8).double(), torch.linspace(2, -1, 8).double()
        moved = schedule.convert(told + 0.5, x_t, t, to=to) - schedule.convert(told, x_t, t, to=to)
        torch.testing.assert_close(schedule.error_scale(t, to=to), moved.abs() / 0.5, rtol=1e-9, atol=1e-12)


def test_draws_count_visits_of_a_step():
    levels = levels_at(gaussian_schedule("eps"), strata(2500))
    assert levels.t[:5].tolist() == [0, 0, 1, 1, 1] and levels.draw[:5].tolist() == [0, 1, 0, 1, 2]
    assert len(set(zip(levels.t.tolist(), levels.draw.tolist(), strict=True))) == 2500


def test_levels_of_times_are_those_steps():
    schedule = gaussian_schedule("eps")
    levels, all_steps = levels_of_times(schedule, [7, 300, 7]), levels_at(schedule, strata(1000))
    for name in ("alpha", "sigma", "logsnr", "slope", "density", "eps_scale", "u"):
        np.testing.assert_allclose(getattr(levels, name), getattr(all_steps, name)[[7, 300, 7]])
    assert levels.draw.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="are for discrete schedules, and this one is flow"):
        levels_of_times(Schedule.flow(), [7])


def test_json_gives_the_same_levels():
    levels = levels_at(Schedule.flow(3.0), strata(7), "shifted")
    again = Levels.from_json(levels.to_json())
    for name, value in vars(levels).items():
        np.testing.assert_array_equal(getattr(again, name), value)


def test_unknown_spacing_is_told():
    with pytest.raises(ValueError, match="no spacing 'cosine'; have native, shifted, logsnr"):
        unwrap(levels_at)(Schedule.flow(), strata(4), "cosine")
