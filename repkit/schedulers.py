"""Reading diffusers' scheduler configs: which constructor of Schedule they ask for, and with what."""

import math
from collections.abc import Mapping
from typing import Any

# diffusers' classes by the (beta_start, beta_end, beta_schedule) that they take where a config leaves them out
_BETA_CLASSES: Mapping[str, tuple[float, float, str]] = {
    **dict.fromkeys("DDPM DDPMParallel DDIM DDIMParallel DDIMInverse RePaint PNDM".split(), (1e-4, 0.02, "linear")),
    **dict.fromkeys("DPMSolverMultistep DPMSolverMultistepInverse".split(), (1e-4, 0.02, "linear")),
    **dict.fromkeys("DPMSolverSinglestep UniPCMultistep DEISMultistep SASolver".split(), (1e-4, 0.02, "linear")),
    **dict.fromkeys("EulerDiscrete EulerAncestralDiscrete LMSDiscrete".split(), (1e-4, 0.02, "linear")),
    **dict.fromkeys("HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete".split(), (0.00085, 0.012, "linear")),
    "DPMSolverSDE": (0.00085, 0.012, "linear"),
    **dict.fromkeys("LCM TCD CogVideoXDDIM CogVideoXDPM".split(), (0.00085, 0.012, "scaled_linear")),
    "UnCLIP": (1e-4, 0.02, "squaredcos_cap_v2"),
}
_EDM_CLASSES = ("EDMEuler", "EDMDPMSolverMultistep")
_FLOW_CLASSES = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "LTXEulerAncestralRF")
_PREDICTION_TYPES: Mapping[str, str] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}


def read_scheduler(config: object) -> tuple[str, dict[str, Any]]:
    """The name of a constructor of Schedule, and its arguments, for a scheduler or its config with `_class_name`.

    Raises ValueError for a scheduler that is none of ours, TypeError for what is no scheduler.
    """
    options = _read_config(config)
    name = str(options.get("_class_name", "")).removesuffix("Scheduler")
    if name in _EDM_CLASSES:
        return "edm", _read_edm(options)
    if name in _FLOW_CLASSES:
        return "flow", {"shift": _read_shift(options, "shift")}
    if name not in _BETA_CLASSES or options.get("timestep_type") == "continuous":
        raise ValueError(
            f"no schedule for diffusers' {name or 'config without _class_name'} "
            f"(timestep_type={options.get('timestep_type', 'discrete')!r}); have, with discrete timesteps, "
            f"{', '.join((*_BETA_CLASSES, *_EDM_CLASSES, *_FLOW_CLASSES))}; or use Schedule.discrete, .edm, .flow"
        )
    prediction = _read_prediction(options)
    if prediction == "flow" or options.get("use_flow_sigmas"):
        return "flow", {"shift": _read_shift(options, "flow_shift"), "prediction": prediction}
    return "from_betas", {"prediction": prediction, **_read_betas(options, *_BETA_CLASSES[name])}


def _read_config(config: object) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    options = getattr(config, "config", None)
    if not isinstance(options, Mapping):
        raise TypeError(f"got {type(config).__name__}; give a diffusers scheduler or its config, with _class_name")
    return {**options, "_class_name": type(config).__name__}


def _read_prediction(options: Mapping[str, Any]) -> str:
    name = options.get("prediction_type", "epsilon")
    if name not in _PREDICTION_TYPES:
        raise ValueError(f"no prediction_type {name!r}; have {', '.join(_PREDICTION_TYPES)}")
    return _PREDICTION_TYPES[name]


def _read_betas(options: Mapping[str, Any], start: float, end: float, name: str) -> dict[str, Any]:
    cogvideo = options["_class_name"].startswith("CogVideoX")
    trained = options.get("trained_betas")
    return {
        "betas": options.get("beta_schedule", name) if trained is None else trained,
        "start": options.get("beta_start", start),
        "end": options.get("beta_end", end),
        "steps": options.get("num_train_timesteps", 1000),
        "snr_shift": options.get("snr_shift_scale", 3.0 if cogvideo else 1.0),
        "zero_terminal_snr": bool(options.get("rescale_betas_zero_snr", False)),
    }


def _read_edm(options: Mapping[str, Any]) -> dict[str, Any]:
    name = options.get("prediction_type", "epsilon")
    if name not in ("epsilon", "v_prediction"):
        raise ValueError(f"no EDM prediction_type {name!r}; have epsilon (F) and v_prediction (-F)")
    sigmas = {key: options[key] for key in ("sigma_min", "sigma_max", "sigma_data") if key in options}
    return {**sigmas, "edm_sign": 1 if name == "epsilon" else -1}


def _read_shift(options: Mapping[str, Any], key: str) -> float:
    if options.get("invert_sigmas") or options.get("num_train_timesteps", 1000) != 1000:
        raise ValueError(
            f"invert_sigmas={options.get('invert_sigmas', False)}, num_train_timesteps="
            f"{options.get('num_train_timesteps', 1000)}: a flow must have 0 as data and 1000 as noise"
        )
    if not options.get("use_dynamic_shifting"):
        return float(options.get(key) or 1.0)
    mu = float(options.get("max_shift") or 1.15)
    return mu if options.get("time_shift_type") == "linear" else math.exp(mu)
