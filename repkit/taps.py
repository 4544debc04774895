"""Taps: the address of an activation, block and time, written `up.1@261`."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

TimeKind = Literal["t", "sigma", "logsnr", "clean"]


@dataclass(frozen=True)
class Time:
    """A noise level as it was asked for; the backbone's schedule resolves it to a native time.

    `t`: the model's own training timestep. `sigma`: the coefficient of the noise. `logsnr`: log(alpha^2 / sigma^2).
    `clean`: no noise at all, the network told `value`, or the backbone's declared time where that is None.
    """

    kind: TimeKind
    value: float | int | None = None

    def __str__(self) -> str:
        number = None if self.value is None else repr(float(self.value)).removesuffix(".0")
        if self.kind == "t":
            return str(number)
        if self.kind == "clean":
            return "clean" if number is None else f"clean:{number}"
        return f"{self.kind}={number}"


@dataclass(frozen=True)
class Tap:
    """One block at one time; `str(tap)` is its canonical key. `time` is None for networks that know none (DINO)."""

    block: str
    time: Time | None = None

    def __str__(self) -> str:
        return self.block if self.time is None else f"{self.block}@{self.time}"


def parse_time(text: str) -> Time:
    """Read one entry of TIMES: `261`, `sigma=0.26`, `logsnr=-1.5`, `clean` or `clean:1`."""
    text = text.strip()
    if re.fullmatch(r"\d+", text):
        return Time("t", int(text))
    if text == "clean":
        return Time("clean")
    number = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    if match := re.fullmatch(r"clean:" + number, text):
        return Time("clean", float(match[1]))
    if match := re.fullmatch(r"(sigma|logsnr)=" + number, text):
        return Time("sigma" if match[1] == "sigma" else "logsnr", float(match[2]))
    raise ValueError(
        f"no time {text!r}; write a training timestep (261), sigma=0.26, logsnr=-1.5, clean or clean:1, commas between"
        + "; blocks at the same times go before the one @: up.1,up.2@50" * ("@" in text)
    )


def parse_taps(groups: str | Iterable[str], names: Sequence[str], *, model: str = "the model") -> list[Tap]:
    """Expand groups `BLOCKS@TIMES` over the block `names` of a diffusion model, in order, each tap once.

    Raises ValueError for an unknown block or time and for a group without a time.
    """
    taps: dict[Tap, None] = {}
    for group in _listed(groups):
        blocks, at, times = group.partition("@")
        if not at or not times.strip():
            raise ValueError(
                f"tap {group!r} has no time; write BLOCKS@TIMES, for example {blocks.strip() or 'mid'}@100"
            )
        found = parse_blocks(blocks, names, model=model)
        taps |= {Tap(block, parse_time(time)): None for time in times.split(",") for block in found}
    return list(taps)


def parse_blocks(blocks: str, names: Sequence[str], *, model: str = "the model") -> list[str]:
    """Expand a comma list of block names over `names`; `*` matches one dotted component, `/a.b` is a module path."""
    found: dict[str, None] = {}
    for name in (part.strip() for part in blocks.split(",")):
        if name.startswith("/"):
            found[name] = None
            continue
        pattern = re.compile(re.escape(name).replace(r"\*", r"[^.]+"))
        matches = [known for known in names if pattern.fullmatch(known)]
        if not matches:
            raise ValueError(_unknown(name, names, model))
        found |= dict.fromkeys(matches)
    return list(found)


def _listed(groups: str | Iterable[str]) -> list[str]:
    groups = [groups] if isinstance(groups, str) else list(groups)
    if not groups:
        raise ValueError("no taps given; write at least one, for example mid@100")
    return groups


def _unknown(name: str, names: Sequence[str], model: str) -> str:
    stages = [known for known in names if known.count(".") < 2]
    near = get_close_matches(name, names, n=3)
    hint = f"; close to it: {', '.join(near)}" if near else ""
    return f"no block {name!r} in {model}; have {', '.join(stages)}{hint} (inner blocks: repkit blocks --all)"
