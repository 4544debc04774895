"""Self-Bench: images that diffusion models made of GenEval's prompts, each with the prompts it is to be told from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repkit.datasets.captions import Example, checked

TASKS = ("single_object", "two_object", "colors", "color_attr", "position", "counting")
# What the files of human labels call the folders of the models that made the images.
VERSIONS = {
    "stable-diffusion-v1-5": "1.5",
    "stable-diffusion-2-base": "2.0",
    "stable-diffusion-3-medium-diffusers": "3-m",
    "FLUX.1-dev": "flux",
}
GOOD = "original_good"
# The one file in which not every annotator labelled every image: one who called it good is enough.
ONE_IS_ENOUGH = "SD-3-m-CFG=9.json"
DISTRACTORS = 50  # of a two_object prompt, for each of its objects: all 6,400 pairs would be too many


def read_selfbench(
    root: str | Path, *, generator: str | None = None, cfg: str | None = None, correct: bool = False
) -> list[Example]:
    """The images of one generator at one guidance scale, each with its task's candidate prompts; the task is its tag.

    root: with folders <cfg>/<generator>/<id>/{metadata.jsonl, samples/*.png}, prompts/ and filter/; the last two may
    also lie beside it. generator, cfg: names of folders, needed where there are several. correct: only the images that
    people found true to their prompt. two_object prompts are told from 100 others that share their first or second
    object. Raises FileNotFoundError and ValueError for trees that are not so.
    """
    folder = Path(root)
    scale = _only(folder, cfg, "guidance scale", [path.name for path in folder.glob("*") if _is_number(path.name)])
    at_scale = sorted(path.name for path in (folder / scale).glob("*") if path.is_dir())
    maker = _only(folder / scale, generator, "generator", at_scale)
    candidates = _read_json(_beside(folder, "prompts/zero_shot_prompts.json"))
    kept = _correct(folder, maker, scale) if correct else None
    examples = []
    for path in sorted((folder / scale / maker).glob("*/metadata.jsonl")):
        told = _read_json(path)
        for sample in sorted((path.parent / "samples").glob("*.png")):
            name = f"{path.parent.name}/samples/{sample.name}"
            if kept is None or name in kept:
                prompts, right = _choices(candidates, told, path)
                examples.append(Example(name, (sample,), prompts, (right,), (told["tag"],)))
    return checked(examples, folder / scale / maker)


def _choices(candidates: Any, told: Any, path: Path) -> tuple[tuple[str, ...], int]:
    """The candidate prompts of an image, and the place of its own."""
    try:
        task, prompt, named = told["tag"], told["prompt"], [one["class"] for one in told["include"]]
        found = candidates["photo"][task]
        if task in ("counting", "colors"):
            found = found[named[0]]
        elif task == "color_attr":
            found = found[named[0]][named[1]]
        elif task == "position":  # GenEval includes the place first that the other is relative to
            found = found[named[1]][named[0]]
        elif task == "two_object":
            found = _near(found, prompt)
        return tuple(found), found.index(prompt)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} and zero_shot_prompts.json do not go together ({reason}); take both from one download, with the "
            f"tasks {', '.join(TASKS)}"
        ) from error


def _near(candidates: Sequence[str], prompt: str) -> list[str]:
    """The prompt among the first 50 that share its first object only and the first 50 that share its second only."""
    first, _, second = prompt.partition(" and ")
    # The published subset looks for the second object's name anywhere, so "cat" rules out "cattle".
    name = second.split(" ", 1)[-1]
    same_first = [one for one in candidates if one.startswith(f"{first} and ") and name not in one]
    same_second = [one for one in candidates if one.endswith(f"and {second}") and not one.startswith(f"{first} and ")]
    near = {prompt, *same_first[:DISTRACTORS], *same_second[:DISTRACTORS]}
    return [one for one in candidates if one in near]


def _correct(root: Path, generator: str, cfg: str) -> set[str]:
    """The images, as <id>/samples/<file>, whose labels say that they show what the prompt says."""
    if generator not in VERSIONS:
        raise ValueError(f"no labels for images of {generator!r}; have those of {', '.join(VERSIONS)}")
    path = _beside(root, f"filter/SD-{VERSIONS[generator]}-CFG={int(float(cfg))}.json")
    entries = _read_json(path)
    try:
        good = [entry["sample_path"] for entry in entries if _is_good(entry, path.name == ONE_IS_ENOUGH)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: an entry has no {error}; get the file again") from error
    return {"/".join(Path(name).parts[-3:]) for name in good}


def _is_good(entry: Any, one_is_enough: bool) -> bool:
    """Whether the annotators agree that an image is good; some files have one label for each image instead."""
    if "labels" not in entry:
        return entry["human_label"] == GOOD
    said = [label["label"] == GOOD for label in entry["labels"]]
    return any(said) if one_is_enough else bool(said) and all(said)


def _only(folder: Path, name: str | None, what: str, have: list[str]) -> str:
    """The folder that was asked for, or the only one there is."""
    if not have:
        raise FileNotFoundError(f"no {what} in {folder}; it should hold folders <cfg>/<generator>/<id>, as published")
    if name is None and len(have) == 1:
        return have[0]
    if name not in have:
        asked = "several" if name is None else f"no {name!r}"
        raise ValueError(f"{asked} of the kind {what} in {folder}; choose one of {', '.join(sorted(have))}")
    return name


def _is_number(name: str) -> bool:
    return name.replace(".", "", 1).isdigit()


def _beside(root: Path, name: str) -> Path:
    """A file below the root, or below its parent."""
    for folder in (root, root.resolve().parent):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {name} in {root} or beside it; download it with the images")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
