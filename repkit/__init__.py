"""Diffusion models as feature backbones: address an activation, export it, put heads, matchers and search on it."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repkit.backbones.base import Backbone as Backbone
    from repkit.backbones.base import Block as Block
    from repkit.backbones.base import Condition as Condition
    from repkit.dino import DinoExtractor as DinoExtractor
    from repkit.exporting import export as export
    from repkit.extractors import DiffusionExtractor as DiffusionExtractor
    from repkit.features import Features as Features
    from repkit.fusion import Fused as Fused
    from repkit.fusion import Part as Part
    from repkit.images import Resize as Resize
    from repkit.pooling import pool as pool
    from repkit.retrieval import Index as Index
    from repkit.schedule import Schedule as Schedule
    from repkit.store import FeatureStore as FeatureStore
    from repkit.taps import Tap as Tap
    from repkit.zeroshot.classifier import DiffusionClassifier as DiffusionClassifier
    from repkit.zeroshot.posterior import Posterior as Posterior
    from repkit.zoo import load as load

    __version__: str

_here = Path(__file__).parent
if not (_here / "heads").is_dir():  # source checkout: heads/, datasets/ and recipes/ sit beside this package
    __path__.append(str(_here.parent))

_MODULE_OF = {
    "Backbone": "backbones.base",
    "Block": "backbones.base",
    "Condition": "backbones.base",
    "DiffusionClassifier": "zeroshot.classifier",
    "DiffusionExtractor": "extractors",
    "DinoExtractor": "dino",
    "FeatureStore": "store",
    "Features": "features",
    "Fused": "fusion",
    "Index": "retrieval",
    "Part": "fusion",
    "Posterior": "zeroshot.posterior",
    "Resize": "images",
    "Schedule": "schedule",
    "Tap": "taps",
    "export": "exporting",
    "load": "zoo",
    "pool": "pooling",
}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import repkit` does not pay for torch."""
    if name == "__version__":
        return _version()
    if name not in _MODULE_OF:
        raise AttributeError(f"no name {name!r} in repkit; it has {', '.join(__all__)}")
    return getattr(import_module(f"repkit.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("repkit")
    except PackageNotFoundError:  # a checkout on the path that was never installed
        return "0+uninstalled"
