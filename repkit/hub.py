"""Where models are: names to folders, from the hub where need be; each id is tried once, a failure is one line."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repkit.catalog import alias_of, aliases, bundled, entry, folder_of
from repkit.checkpoints import SUFFIXES
from repkit.pipelinefolder import read_configs

logger = logging.getLogger("repkit")

# What no feature depends on, left where it is.
_UNUSED = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder", "image_processor"))
CONFIG_FILES = ("model_index.json", "*scheduler_config.json", "*config.json")
# Whole or in shards, and no variants of other precisions.
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-?????-of-?????.safetensors")
_NETWORK_FILES = ("config.json", *_WEIGHTS, f"{_WEIGHTS[0]}.index.json")
_KNOWN = "bundled models: {}; or give an alias (repkit models), a diffusers folder, or a hub id such as owner/name"


def find(model: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """The folder of a bundled name, an alias, a path or a hub id (downloaded to the hub's cache unless it is there).

    An alias is its hub id, else the first of its mirrors that can be had; with a revision, its hub id alone.
    """
    if model in (*bundled(), *aliases()) and Path(model).is_dir():
        logger.warning("%s is a name that repkit knows, not the folder of that name; write ./%s for that", model, model)
    if model in bundled():
        return folder_of(model)
    if model in aliases():
        return _find_alias(model, revision, offline)
    if Path(model).is_dir():
        return Path(model)
    if model.startswith("timm:"):
        raise ValueError(f"{model} is no diffusion model; repkit.DinoExtractor({model!r}) takes its features")
    if not _is_id(model):
        raise OSError(f"no model {model!r} here; {_KNOWN.format(', '.join(bundled()))}")
    try:
        return fetch_pipeline([model], revision=revision, offline=offline)
    except OSError as error:
        alias = alias_of(model)
        same = f"; {alias} has the same weights from {entry(alias)['hub']}" if alias else ""
        known = _KNOWN.format(", ".join(bundled()))
        raise OSError(f"{error}{same}; or download it elsewhere and give its folder; {known}") from error


def find_configs(model: str, *, offline: bool = False) -> tuple[str, Mapping[str, Any]]:
    """A model's name and its configs, as `read_configs` gives them, without anything being read that need not be."""
    alias = model if model in aliases() else alias_of(model)
    if alias is not None and model not in bundled():
        return alias, entry(alias)["configs"]
    if model in bundled() or Path(model).is_dir():
        folder = find(model)
        return model if model in bundled() else folder.resolve().name, read_configs(folder)
    if not _is_id(model):
        find(model)  # says what there is
    return model, read_configs(fetch_files(model, CONFIG_FILES, offline=offline))


def find_part(option: str, source: str | Path, parts: Sequence[str], *, offline: bool = False) -> Path:
    """Where one network is: a file or folder here, else on the hub as `owner/name` or `owner/name@revision`.

    option: which argument named it, for the error. parts: the folders that hold it in a pipeline.
    Raises OSError where there is none.
    """
    if Path(source).exists():
        return Path(source)
    hub_id, _, revision = str(source).partition("@")
    missing = f"no file or folder {str(source)!r} for {option}="
    if not _is_id(hub_id) or Path(hub_id).suffix in SUFFIXES:
        raise OSError(f"{missing}; give its path, or owner/name or owner/name@revision of the hub")
    names = [f"{folder}{name}" for folder in ("", *(f"{part}/" for part in parts)) for name in _NETWORK_FILES]
    try:
        return fetch_files(hub_id, names, needed=(), revision=revision or None, offline=offline)
    except OSError as error:
        raise OSError(f"{missing}, and {error}; give a path, or download it elsewhere") from error


def _is_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~", "timm:"))


def _find_alias(alias: str, revision: str | None, offline: bool) -> Path:
    known = entry(alias)
    if known["hub"] is None:
        raise OSError(
            f"{alias} is a file, {known['file']['name']}, that no hub has; get it at {known['file']['page']} and give "
            "its path"
        )
    ids = [known["hub"], *([] if revision else known["mirrors"])]
    try:
        return fetch_pipeline(ids, revision=revision, offline=offline, gated=known["gated"])
    except OSError as error:
        get = f"run `hf download {known['hub']}` where there is a network, or give its folder"
        raise OSError(f"no {alias}: {error}; {get}") from error


def fetch_pipeline(
    ids: Sequence[str], *, revision: str | None = None, offline: bool = False, gated: str | None = None
) -> Path:
    """The folder of the first of `ids` that can be had, from the hub's cache or downloaded; safetensors only.

    gated: the page where access is asked for, for the error. Raises OSError where none can be had.
    """
    from diffusers import DiffusionPipeline

    return _first(
        ids,
        lambda one: DiffusionPipeline.download(
            one, revision=revision, local_files_only=offline, use_safetensors=True, **_UNUSED
        ),
        gated,
    )


def fetch_files(
    hub_id: str,
    names: Sequence[str],
    *,
    needed: Sequence[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> Path:
    """The folder in the cache where these files of a repository lie; names may have `*` and `?`.

    needed: those that must be there; None is every one that is no pattern. Raises OSError where one cannot be had.
    """
    from huggingface_hub import snapshot_download

    # Not hf_hub_download, which tries six times where there is no network.
    asked: dict[str, Any] = {"allow_patterns": list(names), "revision": revision, "local_files_only": offline}
    folder = _first([hub_id], lambda one: snapshot_download(one, **asked))
    needed = [name for name in names if "*" not in name] if needed is None else needed
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise OSError(f"{hub_id} on the hub, or what the cache has of it, lacks {', '.join(missing)}")
    return folder


def _first(ids: Sequence[str], get: Callable[[str], str], gated: str | None = None) -> Path:
    failures: list[tuple[str, Exception]] = []
    for one in ids:
        try:
            return Path(get(one))
        except Exception as error:  # the hub's client raises a dozen classes from requests, httpx and its own
            failures.append((one, error))
            logger.info("cannot get %s: %s", one, error)
    told = "; ".join(f"cannot get {one!r} from the hub: {_reason(error)}" for one, error in failures)
    raise OSError(f"{told}{_access(failures, gated)}") from failures[0][1]


def _access(failures: Sequence[tuple[str, Exception]], gated: str | None) -> str:
    """How a gated model is had, where it is known or found to be one."""
    from huggingface_hub.errors import GatedRepoError

    shut = (one for one, error in failures if any(isinstance(link, GatedRepoError) for link in _chain(error)))
    page = gated or next((f"https://huggingface.co/{one}" for one in shut), None)
    if page is None:
        return ""
    return f"; it is gated: ask for access at {page}, then log in with `hf auth login`, or set HF_TOKEN"


def _reason(error: Exception) -> str:
    """What went wrong, in a few words that a user can do something about."""
    from huggingface_hub import errors

    told = {
        errors.GatedRepoError: "access has not been granted",
        errors.RevisionNotFoundError: "it has no such revision",
        errors.RepositoryNotFoundError: "there is no such id, or it is private",
        errors.EntryNotFoundError: "it has no such file",
    }
    links = list(_chain(error))
    answers = [link for link in links if not isinstance(link, errors.LocalEntryNotFoundError)]
    for kind, words in told.items():  # a gated repository is also one that was not found
        if any(isinstance(link, kind) for link in answers):
            return words
    if any("safetensors" in str(link) for link in links):
        return "it has no safetensors; load it with diffusers where you trust it, save_pretrained, and give that folder"
    if any(isinstance(link, errors.LocalEntryNotFoundError) for link in links):
        return "it is not in the cache and the hub was not reached"
    return (str(links[-1]).strip() or type(links[-1]).__name__).splitlines()[0]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, to the first: the hub's client wraps a lost network in several layers."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
