"""Schedules against diffusers' own noising and against the closed form of Gaussian data."""

import dataclasses
import inspect
import itertools
import json
import math
import warnings

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repkit.schedule import Schedule

KINDS = ("eps", "v", "x0", "flow", "edm")
CURVES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SCHEDULES = {
    "linear": Schedule.from_betas("linear"),
    "scaled_linear": Schedule.from_betas("scaled_linear", "v", start=0.00085, end=0.012),
    "cosine": Schedule.from_betas("squaredcos_cap_v2", "x0"),
    "zero-snr": Schedule.from_betas("scaled_linear", "v", start=0.00085, end=0.012, zero_terminal_snr=True),
    "edm": Schedule.edm(),
    "edm-negated": Schedule.edm(sigma_data=1.0, edm_sign=-1),
    "flow": Schedule.flow(shift=3.0),
}
# from the least to the most noise at which alpha and sigma are at least 1e-3
TIMES = {"discrete": (0, 500, 990), "edm": (0.001, 1.0, 80.0), "flow": (1.0, 300.0, 999.0)}
CASES = [(name, t) for name, schedule in SCHEDULES.items() for t in TIMES[schedule.kind]]


def predicting(schedule, prediction):
    return dataclasses.replace(schedule, prediction=prediction)


def theirs_of(name, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own deprecations
        return getattr(diffusers, f"{name}Scheduler")(*args, **options)


def randn(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def target(kind, x0, eps, alpha, sigma, sigma_data, sign=1):
    """What a perfect network would return, by the definitions in Karras et al. for edm."""
    if kind == "edm":
        s, x = sigma / alpha, x0 + sigma / alpha * eps
        c_skip = sigma_data**2 / (s**2 + sigma_data**2)
        c_out = s * sigma_data / math.sqrt(s**2 + sigma_data**2)
        return sign * (x0 - c_skip * x) / c_out
    return {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0, "flow": eps - x0}[kind]


# --- against diffusers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("curve", [*CURVES, "sigmoid", "laplace"])
def test_add_noise_equals_ddpm(curve, zero_snr, generator):
    try:
        theirs = theirs_of("DDPM", beta_schedule=curve, rescale_betas_zero_snr=zero_snr)
    except NotImplementedError:
        pytest.skip(f"this diffusers has no {curve}")
    t = torch.tensor([0, 1, 37, 500, 998, 999])
    x0, eps = randn(generator, 2, 6, 3, 4, 4, dtype=torch.float32)
    ours = Schedule.from_diffusers(theirs).add_noise(x0, eps, t)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.add_noise(x0, eps, t), atol=5e-5, rtol=0)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("curve", CURVES)
def test_add_noise_equals_ddim(curve, zero_snr, generator):
    theirs = theirs_of("DDIM", 250, 0.001, 0.03, curve, rescale_betas_zero_snr=zero_snr)
    x0, eps = randn(generator, 2, 250, 5, dtype=torch.float32)
    t = torch.arange(250)
    ours = Schedule.from_diffusers(dict(theirs.config) | {"_class_name": "DDIMScheduler"}).add_noise(x0, eps, t)
    torch.testing.assert_close(ours, theirs.add_noise(x0, eps, t), atol=5e-5, rtol=0)


def test_add_noise_of_given_table_equals_ddim_to_rounding(generator):
    theirs = theirs_of("DDIM", trained_betas=[0.01, 0.3, 0.02, 0.5])
    x0, eps = randn(generator, 2, 4, 5, dtype=torch.float32)
    ours = Schedule.discrete(theirs.alphas_cumprod, "eps").add_noise(x0, eps, torch.arange(4))
    torch.testing.assert_close(ours, theirs.add_noise(x0, eps, torch.arange(4)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_add_noise_equals_flow_match_scale_noise(shift, generator):
    theirs = theirs_of("FlowMatchEulerDiscrete", shift=shift)
    t = theirs.timesteps[::97]  # scale_noise takes only timesteps of its table
    x0, eps = randn(generator, 2, len(t), 3, 4, dtype=torch.float32)
    ours = Schedule.from_diffusers(theirs)
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.scale_noise(x0, t, eps), atol=1e-6, rtol=0)
    u = (1000 - torch.arange(0, 1000, 97, dtype=torch.float64)) / 1000
    torch.testing.assert_close(ours.time_at(u[1:]), t[1:].double(), atol=1e-3, rtol=0)


def test_add_noise_and_preconditioning_equal_edm_euler(generator):
    theirs = theirs_of("EDMEuler", sigma_data=0.7)
    theirs.set_timesteps(8)
    x0, eps, prediction = randn(generator, 3, 8, 3, 4, dtype=torch.float32)
    sigma = theirs.sigmas[:8]
    ours = Schedule.from_diffusers(theirs)
    x_t = ours.add_noise(x0, eps, sigma)
    torch.testing.assert_close(x_t, theirs.add_noise(x0, eps, theirs.timesteps))
    scaled, c_noise = ours.edm_input(x_t, sigma)
    torch.testing.assert_close(scaled, theirs.precondition_inputs(x_t, sigma[:, None, None]))
    torch.testing.assert_close(c_noise, theirs.timesteps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_denoised_equals_diffusers(prediction_type, generator):
    theirs = theirs_of("EDMDPMSolverMultistep", sigma_data=0.7, prediction_type=prediction_type)
    x_t, prediction = randn(generator, 2, 3, 4)
    sigma = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    ours = Schedule.from_diffusers(theirs).convert(prediction, x_t, sigma, to="x0")
    torch.testing.assert_close(ours, theirs.precondition_outputs(x_t, prediction, sigma[:, None]))


def exported_schedulers():
    found = {n: getattr(diffusers, n) for n in dir(diffusers) if n.endswith("Scheduler")}
    return sorted(n for n, c in found.items() if inspect.isclass(c))


BUILT = {
    *"CogVideoXDDIM CogVideoXDPM DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep".split(),
    *"DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSDE DPMSolverSinglestep EDMDPMSolverMultistep".split(),
    *"EDMEuler EulerAncestralDiscrete EulerDiscrete FlowMatchEulerDiscrete FlowMatchHeunDiscrete".split(),
    *"FlowMatchLCM HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete LTXEulerAncestralRF".split(),
    *"PNDM RePaint SASolver TCD UnCLIP UniPCMultistep".split(),
}


@pytest.mark.parametrize("name", exported_schedulers())
def test_every_diffusers_scheduler_is_matched_or_refused(name):
    short = name.removesuffix("Scheduler")
    try:
        theirs = theirs_of(short)
    except (TypeError, ValueError, ImportError):  # it needs arguments or a package that is not here
        theirs = None
    config = {"_class_name": name} if theirs is None else theirs
    if short not in BUILT:
        with pytest.raises(ValueError, match=f"no schedule for diffusers' {short} .*have.*DDPM, .*EDMEuler"):
            Schedule.from_diffusers(config)
        return
    ours = Schedule.from_diffusers(config)
    assert ours == Schedule.from_diffusers({"_class_name": name})  # the class's defaults are ours too
    if ours.kind == "discrete" and theirs is not None:
        np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), atol=2e-6)
        assert ours.prediction == "eps"
    elif ours.kind == "edm":
        assert (ours.sigma_min, ours.sigma_max, ours.sigma_data) == (0.002, 80.0, 0.5)
    elif ours.kind == "flow" and getattr(theirs, "timesteps", None) is not None:
        torch.testing.assert_close(
            ours.coefficients(theirs.timesteps)[1].float(), theirs.sigmas[: len(theirs.timesteps)]
        )


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", ["CogVideoXDDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "TCD"])
def test_zero_terminal_snr_of_other_classes(name, zero_snr):
    theirs = theirs_of(name, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction")
    ours = Schedule.from_diffusers(theirs)
    # some put 2^-24 at the last step, where a model trained so has seen 0
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), atol=2e-6)
    assert ours.prediction == "v" and (ours.alphas_cumprod[-1] == 0) == zero_snr


def test_heun_exp_betas():
    theirs = theirs_of("HeunDiscrete", beta_schedule="exp")
    ours = Schedule.from_diffusers(theirs)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), atol=2e-6)


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver"])
def test_flow_through_a_beta_class(name):
    flow = theirs_of(name, use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    assert Schedule.from_diffusers(flow) == Schedule.flow(shift=3.0)
    eps = dict(flow.config) | {"prediction_type": "epsilon", "_class_name": f"{name}Scheduler"}
    assert Schedule.from_diffusers(eps) == Schedule.flow(shift=3.0, prediction="eps")


def test_dynamic_shift_is_that_of_the_largest_resolution():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "max_shift": 0.9}
    theirs = theirs_of("FlowMatchEulerDiscrete", use_dynamic_shifting=True, max_shift=0.9)
    theirs.set_timesteps(sigmas=[0.75, 0.5, 0.25], mu=0.9)
    ours = [Schedule.from_diffusers(config).time_at(u) for u in (0.75, 0.5, 0.25)]
    np.testing.assert_allclose(ours, theirs.timesteps.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "epsilon"}, "config without _class_name"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "score"}, "no prediction_type 'score'; have epsilon"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "cubic"}, "no beta schedule 'cubic'; have linear"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "no EDM prediction_type 'sample'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas=True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 40}, "num_train_timesteps=40"),
    ],
)
def test_configs_of_no_schedule(config, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_diffusers(config)


def test_from_diffusers_of_something_else():
    with pytest.raises(TypeError, match="got str; give a diffusers scheduler"):
        Schedule.from_diffusers("ddpm")


# --- predictions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "t"), CASES)
def test_gaussian_data_converts_to_the_same_x0_and_eps(name, t, generator):
    """For x0 ~ N(mu, s^2), E[x0|x_t] is linear in x_t; every network that knows it must agree."""
    schedule, mu, s = SCHEDULES[name], 0.7, 1.3
    alpha, sigma = (c.item() for c in schedule.coefficients(t))
    x_t = alpha * (mu + s * randn(generator, 64)) + sigma * randn(generator, 64)
    x0 = mu + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * mu)
    eps = sigma / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * mu)
    for kind in KINDS:
        network = target(kind, x0, eps, alpha, sigma, schedule.sigma_data, schedule.edm_sign)
        ours = predicting(schedule, kind)
        torch.testing.assert_close(ours.convert(network, x_t, t, to="x0"), x0, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.convert(network, x_t, t, to="eps"), eps, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "t"), CASES)
@pytest.mark.parametrize(("source", "to"), list(itertools.product(KINDS, KINDS)))
def test_convert_equals_the_definitions(source, to, name, t, generator):
    schedule = predicting(SCHEDULES[name], source)
    x0, eps = randn(generator, 2, 3, 5)
    alpha, sigma = (c.item() for c in schedule.coefficients(t))
    known = (x0, eps, alpha, sigma, schedule.sigma_data, schedule.edm_sign)
    converted = schedule.convert(target(source, *known), alpha * x0 + sigma * eps, t, to=to)
    torch.testing.assert_close(converted, target(to, *known), atol=1e-6, rtol=0)


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    u=st.floats(0, 1, exclude_max=True),
    pair=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    seed=st.integers(0, 99),
)
def test_round_trip(name, u, pair, seed):
    source, to = (predicting(SCHEDULES[name], kind) for kind in pair)
    t = source.time_at(u)
    if min(c.item() for c in source.coefficients(t)) < 1e-3:
        return
    prediction, x_t = randn(torch.Generator().manual_seed(seed), 2, 7)
    there = source.convert(prediction, x_t, t, to=to.prediction)
    torch.testing.assert_close(to.convert(there, x_t, t, to=source.prediction), prediction, atol=1e-6, rtol=1e-6)


def test_one_time_per_row_equals_row_by_row(generator):
    schedule = SCHEDULES["scaled_linear"]
    x0, eps, t = randn(generator, 3, 2, 4, 4), randn(generator, 3, 2, 4, 4), torch.tensor([3, 500, 999])
    x_t = schedule.add_noise(x0, eps, t)
    converted = schedule.convert(eps, x_t, t, to="x0")
    for i, step in enumerate(t.tolist()):
        torch.testing.assert_close(x_t[i], schedule.add_noise(x0[i], eps[i], step))
        torch.testing.assert_close(converted[i], schedule.convert(eps[i], x_t[i], step, to="x0"))


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_dtypes(given_dtype, dtype, generator):
    schedule = SCHEDULES["edm"]
    x = randn(generator, 2, 3).to(given_dtype)
    results = [schedule.add_noise(x, x, 1.0), *schedule.edm_input(x, 1.0)]
    results += [schedule.convert(x, x, 1.0, to=kind) for kind in KINDS]
    assert {r.dtype for r in results} == {dtype}
    assert {c.dtype for c in schedule.coefficients(torch.ones(2))} == {torch.float64}


NOISELESS = [(Schedule.flow(), 0), (Schedule.edm(), 0.0)]
SIGNALLESS = [(Schedule.flow(), 1000), (SCHEDULES["zero-snr"], 999)]


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize(("schedule", "t", "lost"), [(*c, "x0") for c in NOISELESS] + [(*c, "eps") for c in SIGNALLESS])
def test_lost_information_is_refused(schedule, t, lost, to):
    schedule = predicting(schedule, lost)
    x = torch.ones(2, 3)
    if to == lost:
        torch.testing.assert_close(schedule.convert(x, 2 * x, t, to=to), x)
    else:
        with pytest.raises(ValueError, match=rf"{to} cannot be had from {lost} at t={t:g} \(alpha=.*, sigma="):
            schedule.convert(x, 2 * x, torch.tensor([t, t]), to=to)


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("source", ["v", "flow", "edm"])
@pytest.mark.parametrize(("schedule", "t"), NOISELESS + SIGNALLESS)
def test_other_predictions_are_defined_without_noise_or_signal(schedule, t, source, to, generator):
    x0, eps = randn(generator, 2, 5)
    alpha, sigma = (c.item() for c in schedule.coefficients(t))
    # the edm target's limits: all of it is -eps without noise, x0 / sigma_data without signal
    edm = -eps if sigma == 0 else x0 / schedule.sigma_data
    targets = {k: target(k, x0, eps, alpha, sigma, 0.5) for k in KINDS if k != "edm"} | {"edm": edm}
    converted = predicting(schedule, source).convert(targets[source], alpha * x0 + sigma * eps, t, to=to)
    torch.testing.assert_close(converted, targets[to])


def test_bad_conversions():
    schedule = SCHEDULES["linear"]
    with pytest.raises(ValueError, match="no prediction 'score'; have eps, v, x0, flow, edm"):
        schedule.convert(torch.ones(2, 3), torch.ones(2, 3), 5, to="score")
    with pytest.raises(ValueError, match="no prediction 'score'"):
        Schedule.flow(prediction="score")
    with pytest.raises(ValueError, match=r"t of shape \(3,\) for x of shape \(2, 3\)"):
        schedule.add_noise(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="no EDM input for kind 'discrete'"):
        schedule.edm_input(torch.ones(2, 3), 5)
    with pytest.raises(ValueError, match="with sigma > 0"):
        SCHEDULES["edm"].edm_input(torch.ones(2, 3), 0.0)


# --- time --------------------------------------------------------------------------------------------------------


def test_zero_terminal_snr_has_no_signal():
    schedule = SCHEDULES["zero-snr"]
    assert [c.item() for c in schedule.coefficients(999)] == [0.0, 1.0]
    assert schedule.logsnr(999).item() == -math.inf == schedule.logsnr_derivative(999).item()
    assert schedule.logsnr_derivative(torch.arange(999)).isfinite().all()
    assert schedule.time(logsnr=-math.inf) == 999 == schedule.time(sigma=1.0)
    assert schedule.time(logsnr=-100.0) == 998


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_derivative_equals_autograd(name):
    schedule = SCHEDULES[name]
    t = torch.tensor([0.5, 3.0, 60.0], dtype=torch.float64, requires_grad=True)
    logsnr = -2 * t.log() if name == "edm" else 2 * (torch.log1p(-t / 1000) - (t / 1000).log())
    (slope,) = torch.autograd.grad(logsnr.sum(), t)
    torch.testing.assert_close(schedule.logsnr(t.detach()), logsnr.detach())
    torch.testing.assert_close(schedule.logsnr_derivative(t.detach()), slope)


def test_derivative_of_cosine_equals_the_closed_form():
    """Without its cap the cosine's alpha is cos(a)/cos(a0) with a linear in t."""
    t = torch.arange(100, 901, dtype=torch.float64, requires_grad=True)
    angle = ((t + 1) / 1000 + 0.008) / 1.008 * math.pi / 2
    alpha_bar = torch.cos(angle) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    (slope,) = torch.autograd.grad(torch.logit(alpha_bar).sum(), t)
    ours = SCHEDULES["cosine"].logsnr_derivative(t.detach().long())
    torch.testing.assert_close(ours, slope, rtol=1e-3, atol=0)


def test_derivative_at_the_ends_is_one_sided():
    schedule = SCHEDULES["linear"]
    table = schedule.logsnr(torch.arange(1000))
    ours = schedule.logsnr_derivative(torch.tensor([0, 1, 999]))
    torch.testing.assert_close(
        ours, torch.stack([table[1] - table[0], (table[2] - table[0]) / 2, table[-1] - table[-2]])
    )


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_time_inverts_sigma_and_logsnr(name):
    schedule = SCHEDULES[name]
    span = {"discrete": torch.arange(1000), "edm": torch.tensor([0.002, 0.3, 80.0]), "flow": torch.arange(0, 1001, 50)}
    t = span[schedule.kind].to(torch.int64 if schedule.kind == "discrete" else torch.float64)
    torch.testing.assert_close(schedule.time(logsnr=schedule.logsnr(t)), t)
    torch.testing.assert_close(schedule.time(sigma=schedule.coefficients(t)[1]), t)
    one = schedule.time(sigma=0.26)
    assert type(one) is (int if schedule.kind == "discrete" else float)
    assert schedule.coefficients(one)[1].item() == pytest.approx(0.26, abs=2e-3)


@given(logsnr=st.floats(-9, 9))
def test_nearest_step_by_brute_force(logsnr):
    schedule = SCHEDULES["linear"]
    table = schedule.logsnr(torch.arange(1000)).numpy()
    assert schedule.time(logsnr=logsnr) == np.abs(table - logsnr).argmin()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("wrong", [{"sigma": -0.1}, {"sigma": 90.0}, {"sigma": math.nan}, {"logsnr": math.nan}])
def test_times_out_of_reach(name, wrong):
    with pytest.raises(ValueError, match="out of reach: this .* schedule has sigma from .* to .*, log-SNR from"):
        SCHEDULES[name].time(**{key: torch.tensor([0.5, value]) for key, value in wrong.items()})


def test_discrete_reaches_half_a_step_beyond_its_table():
    schedule = SCHEDULES["linear"]
    first, second, *_ = schedule.logsnr(torch.arange(1000)).tolist()
    assert schedule.time(logsnr=first + 0.49 * (first - second)) == 0
    with pytest.raises(ValueError, match="out of reach"):
        schedule.time(logsnr=first + 0.51 * (first - second))
    with pytest.raises(ValueError, match="sigma=0 is out of reach"):
        schedule.time(sigma=0.0)


@pytest.mark.parametrize("wrong", [{}, {"sigma": 0.5, "logsnr": 0.0}])
def test_time_takes_exactly_one(wrong):
    with pytest.raises(ValueError, match="give exactly one"):
        SCHEDULES["flow"].time(**wrong)


@pytest.mark.parametrize(
    ("name", "t", "message"),
    [
        ("linear", 1000, "t=1000 is no time .* a whole step from 0 to 999"),
        ("linear", 2.5, "t=2.5 is no time"),
        ("linear", torch.tensor([0, -1]), "t=-1 is no time"),
        ("linear", math.nan, "t=nan is no time"),
        ("edm", -1.0, "sigma >= 0"),
        ("flow", 1000.5, "from 0 to 1000"),
    ],
)
def test_bad_times(name, t, message):
    for function in (SCHEDULES[name].coefficients, SCHEDULES[name].logsnr, SCHEDULES[name].logsnr_derivative):
        with pytest.raises(ValueError, match=message):
            function(t)


def test_time_at_spreads_uniformly():
    u = torch.arange(0, 1, 0.125, dtype=torch.float64)
    assert SCHEDULES["linear"].time_at(u).tolist() == [125 * i for i in range(8)]
    torch.testing.assert_close(Schedule.flow().time_at(u), 1000 * u)
    edm = SCHEDULES["edm"].time_at(u)
    torch.testing.assert_close(edm[1:] / edm[:-1], torch.full((7,), 40000**0.125, dtype=torch.float64))
    assert SCHEDULES["linear"].time_at(0.9999) == 999 and Schedule.flow(shift=3.0).time_at(0.5) == 750.0
    with pytest.raises(ValueError, match="0 <= u < 1"):
        SCHEDULES["linear"].time_at(1.0)


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Schedule.discrete([0.9, 0.95], "eps"), "never increasing"),
        (lambda: Schedule.discrete([0.9], "eps"), "of 1 steps is no schedule"),
        (lambda: Schedule.discrete([1.0, 0.5], "eps"), "both excluded"),
        (lambda: Schedule.discrete([0.9, 0.0, 0.0], "eps"), "only the last may be 0"),
        (lambda: Schedule.discrete([0.9, math.nan], "eps"), "is no schedule"),
        (lambda: Schedule.edm(2.0, 1.0), "sigma_min < sigma_max"),
        (lambda: Schedule.edm(sigma_data=0.0), "must be positive"),
        (lambda: Schedule.flow(shift=-1.0), "must be positive"),
    ],
)
def test_values_of_no_schedule(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_identity_tells_schedules_apart():
    variants = [*SCHEDULES.values(), Schedule.edm(sigma_max=70.0), Schedule.flow(), Schedule.flow(prediction="x0")]
    identities = {json.dumps(schedule.identity, sort_keys=True) for schedule in variants}
    assert len(identities) == len(variants)
    assert Schedule.from_betas("linear").identity == SCHEDULES["linear"].identity


def test_equal_schedules_are_equal_values():
    assert Schedule.from_betas("linear") == SCHEDULES["linear"] != SCHEDULES["cosine"]
    assert len({Schedule.from_betas("linear"), SCHEDULES["linear"]}) == 1
