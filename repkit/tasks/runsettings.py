"""What a run of the classifier is: for people, and as the identity that decides its results."""

from dataclasses import asdict
from hashlib import sha256
from typing import Any

import pyarrow as pa

from repkit.features import identity_hash
from repkit.images import decoder_identity
from repkit.noise import NOISE_VERSION
from repkit.planning import provenance
from repkit.tasks.classified import FORMAT
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.errortable import ErrorTable
from repkit.zeroshot.posterior import Rule
from repkit.zeroshot.shortlist import Retriever
from repkit.zeroshot.strategies import Strategy

MANY = 20  # classes above which an identity has only their hash


def live_settings(classifier: DiffusionClassifier, listing: pa.Table) -> dict[str, Any]:
    """What a run is, for people, and under `identity` what decides its results, which gates going on with it."""
    backbone, rule = classifier.backbone, classifier.rule
    told = rule_settings(rule, classifier.strategy, classifier)
    images = listing.select(["id", "path", "label"]).to_pylist()
    identity = {
        **_rule_identity(rule, told),
        "prompts": _some(list(classifier.prompts)),
        **({} if classifier.shortlist is None else {"shortlist": _shortlist_identity(classifier.shortlist)}),
        **{name: value for name, value in classifier.info.items() if name != "model"},
        "schedule": backbone.schedule.identity,
        "decoder": decoder_identity(),
        "noise_version": NOISE_VERSION,
        **({} if backbone.prompts is None else {"text": backbone.prompts.hash}),
        **backbone.options,
        "images": {"count": len(images), "sha256": identity_hash({"images": images})},
    }
    made_with = provenance(backbone, classifier.batch_size)
    return {**told, "identity": identity, "provenance": made_with}


def replay_settings(rule: Rule, strategy: Strategy, table: ErrorTable) -> dict[str, Any]:
    """What a replay of saved errors is; its identity has the errors themselves, by their hash."""
    told = rule_settings(rule, strategy, table)
    errors = sha256(table.errors.tobytes() + "\n".join(table.ids).encode()).hexdigest()
    return {**told, "identity": {**_rule_identity(rule, told), "replay of": errors}, "provenance": {}}


def rule_settings(rule: Rule, strategy: Strategy, of: ErrorTable | DiffusionClassifier) -> dict[str, Any]:
    """How errors are measured and made a posterior, for people."""
    prompts = of.conditions if isinstance(of, ErrorTable) else of.prompts
    return {
        "format": FORMAT,
        "model": of.info["model"],
        "classes": list(of.classes),
        "strategy": {"name": type(strategy).__name__.lower(), **asdict(strategy)},  # type: ignore[call-overload]
        "full_budget": len(prompts) * len(of.levels) * (2 if of.info.get("antithetic") else 1),
        "weighting": rule.weighting,
        "loss": rule.loss,
        "mixture": rule.mixture,
        "temperature": rule.temperature,
        "prior": [float(f"{one:.6g}") for one in rule.log_prior.exp()],
        "calibrated": rule.calibrated,
    }


def _rule_identity(rule: Rule, told: dict[str, Any]) -> dict[str, Any]:
    """What decides a posterior, given errors."""
    return {
        **{name: value for name, value in told.items() if name not in ("format", "model", "calibrated")},
        "classes": _some(told["classes"]),
        "weights": identity_hash({"weights": [float(f"{one:.6g}") for one in rule.weights]}),
        **({"bias": _some([float(f"{one:.6g}") for one in rule.bias])} if rule.bias.any() else {}),
    }


def _shortlist_identity(shortlist: Retriever) -> Any:
    if (identity := getattr(shortlist, "identity", None)) is None:
        raise ValueError(
            "results in files are kept by what made them, and the shortlist does not say what it lists by; "
            "set its attribute `identity`, to a name for example, or call the classifier's own classify"
        )
    return identity


def _some(names: list[Any]) -> Any:
    """Names in full where they are few."""
    return names if len(names) <= MANY else {"count": len(names), "sha256": identity_hash({"names": names})}
