import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import integrate, stats

from repkit.schedule import Schedule
from repkit.zeroshot.levels import levels_at, strata
from repkit.zeroshot.weightings import OF_ANY_LOSS, WEIGHTINGS, weigh
from tests.oracles import PREDICTIONS, SIGMA_DATA, alphas_cumprod, gain, gaussian_schedule

VARIANCE = 0.1


def score_gap(weighting, schedule, spacing, count=4000):
    """What a unit of ||x0 - mean||^2 adds to the score of a perfect denoiser."""
    levels = levels_at(schedule, strata(count), spacing)
    gains = gain(schedule.prediction, levels.alpha, levels.sigma, VARIANCE)
    return (weigh(weighting, levels) * gains**2).mean()


@pytest.mark.parametrize("spacing", ["native", "shifted", "logsnr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_elbo_is_the_likelihood_of_the_signal_that_the_schedule_lets_through(prediction, spacing):
    schedule = gaussian_schedule(prediction)
    snr = alphas_cumprod() / (1 - alphas_cumprod())
    high, low = {"edm": (0.02**-2, 20.0**-2), "flow": (np.inf, 0)}.get(prediction, (snr[0], snr[-1]))
    share = 1 / (1 + 1 / (VARIANCE * high)) - VARIANCE * low / (1 + VARIANCE * low)
    assert score_gap("elbo", schedule, spacing) == pytest.approx(share / (2 * VARIANCE), rel=1e-3)


@pytest.mark.parametrize("weighting", ["train", "min-snr", "sigmoid"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_score_does_not_depend_on_the_spacing(prediction, weighting):
    schedule = Schedule.flow(3.0) if prediction == "flow" else gaussian_schedule(prediction)
    native = score_gap(weighting, schedule, "native")
    assert score_gap(weighting, schedule, "shifted") == pytest.approx(native, rel=1e-4)
    assert score_gap(weighting, schedule, "logsnr") == pytest.approx(native, rel=4e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("weighting", ["train", "logit-normal", "cosmap"])
def test_a_shifted_flow_is_weighed_by_uniform_time(weighting, shift):
    densities = {
        "train": lambda t: 1.0,
        "logit-normal": lambda t: stats.norm.pdf(np.log(t / (1 - t))) / (t * (1 - t)),
        "cosmap": lambda t: 2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t**2),
    }

    def integrand(t):
        return densities[weighting](t) * (t / ((1 - t) ** 2 * VARIANCE + t**2)) ** 2

    expected = integrate.quad(integrand, 1e-12, 1 - 1e-12)[0]
    for spacing in ("native", "shifted"):
        assert score_gap(weighting, Schedule.flow(shift), spacing) == pytest.approx(expected, rel=1e-4)


def test_the_densities_of_flow_times_integrate_to_one():
    levels = levels_at(Schedule.flow(3.0), strata(20_000), "shifted")
    for weighting in ("train", "logit-normal", "mode", "cosmap"):
        assert weigh(weighting, levels).mean() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("weighting", "scheme"), [("mode", "mode"), ("logit-normal", "logit_normal")])
def test_the_densities_are_those_that_training_draws_from(weighting, scheme):
    generator = torch.Generator().manual_seed(0)
    drawn = compute_density_for_timestep_sampling(
        scheme, 400_000, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=generator
    )
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1), density=True)
    levels = levels_at(Schedule.flow(), strata(2000))
    np.testing.assert_allclose(weigh(weighting, levels).reshape(20, 100).mean(1), counts, atol=0.03)


def test_min_snr_is_that_of_the_paper():
    snr = alphas_cumprod()[levels_at(gaussian_schedule("eps"), strata(50)).t.astype(int)]
    snr = snr / (1 - snr)
    for prediction, expected in {  # Hang et al.: min(SNR, 5) for x0, over SNR for eps, over SNR + 1 for v
        "x0": np.minimum(snr, 5),
        "eps": np.minimum(snr, 5) / snr,
        "v": np.minimum(snr, 5) / (snr + 1),
    }.items():
        levels = levels_at(gaussian_schedule(prediction), strata(50))
        np.testing.assert_allclose(weigh("min-snr", levels), expected, rtol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sigmoid_is_the_elbo_at_low_snr_and_fades_above(prediction):
    levels = levels_at(gaussian_schedule(prediction), strata(50))
    fade = 1 / (1 + np.exp(-(2 - levels.logsnr)))
    np.testing.assert_allclose(weigh("sigmoid", levels), weigh("elbo", levels) * fade)


def test_elbo_of_a_flow_and_of_edm():
    flow = levels_at(Schedule.flow(), strata(50))
    s = flow.t / 1000
    np.testing.assert_allclose(weigh("elbo", flow), (1 - s) / s)
    edm = levels_at(gaussian_schedule("edm"), strata(50))
    c_out = edm.sigma * SIGMA_DATA / np.sqrt(edm.sigma**2 + SIGMA_DATA**2)
    per_log_sigma = c_out**2 / edm.sigma**2  # of ||x0 - D||^2 / sigma^3 d sigma
    np.testing.assert_allclose(weigh("elbo", edm), per_log_sigma * np.log(1000))


def test_elbo_of_steps_is_the_discrete_bound():
    levels = levels_at(gaussian_schedule("eps"), strata(1000))
    snr = alphas_cumprod() / (1 - alphas_cumprod())
    exact = 0.5 * (snr[:-1] / snr[1:] - 1) * 1000  # Ho et al. with the posterior's variance, steps 1 .. 999
    inside = slice(50, 950)  # a step is not infinitesimal: a percent or so
    np.testing.assert_allclose(weigh("elbo", levels)[1:][inside], exact[inside], rtol=0.03)


def test_lognormal_is_the_density_of_edm_training():
    levels = levels_at(gaussian_schedule("edm"), strata(50))
    expected = stats.norm.pdf(np.log(levels.sigma), -1.2, 1.2)
    found = weigh("lognormal", levels)
    np.testing.assert_allclose(found / found.max(), expected / expected.max())


def test_sigma_sqrt_divides_by_sigma_squared():
    levels = levels_at(Schedule.flow(), strata(50))
    np.testing.assert_allclose(weigh("sigma-sqrt", levels), levels.sigma**-2)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_positive_where_they_are_defined(weighting):
    for prediction in PREDICTIONS:
        levels = levels_at(gaussian_schedule(prediction), strata(64))
        wanted = {"lognormal": "edm"} | dict.fromkeys(["logit-normal", "mode", "cosmap", "sigma-sqrt"], "flow")
        if wanted.get(weighting, levels.kind) == levels.kind:
            weights = weigh(weighting, levels)
            assert np.isfinite(weights).all() and (weights > 0).all()
        else:
            with pytest.raises(ValueError, match=f"is for {wanted[weighting]} schedules, not {levels.kind}"):
                weigh(weighting, levels)


def test_bad_weightings_are_told():
    levels = levels_at(Schedule.flow(), strata(4))
    with pytest.raises(ValueError, match="no weighting 'vlb'; have train, elbo, min-snr"):
        weigh("vlb", levels)
    for weighting in set(WEIGHTINGS) - set(OF_ANY_LOSS):
        with pytest.raises(ValueError, match="defined for l2 errors, not l1"):
            weigh(weighting, levels, "l1")
    assert (weigh("train", levels, "huber") == 1).all()


def test_a_level_without_signal_is_told():
    schedule = Schedule.from_betas("linear", "v", zero_terminal_snr=True)
    levels = levels_at(schedule, strata(1000))
    with pytest.raises(ValueError, match="'elbo' is not finite at t=999, a level without signal"):
        weigh("elbo", levels)
    assert (weigh("train", levels) == 1).all()
