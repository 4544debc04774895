"""Warps: pairs of a picture and itself deformed by a known map, whose true correspondences nobody had to type."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image
from scipy.interpolate import RBFInterpolator
from scipy.ndimage import map_coordinates

from repkit.datasets.pairs import COLUMNS
from repkit.images import Resize, decode

Points = Float64[np.ndarray, "n 2"]  # (x, y) in pixels, integers at their centres
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Warp:
    """A deformed picture of `size`, and `backward`, which says where in the original each of its points comes from."""

    size: Size
    backward: Callable[[Points], Points]

    def __call__(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The deformed picture: cubic splines between pixels, the edge's colours beyond it."""
        width, height = self.size
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        places = self.backward(np.stack([x.ravel(), y.ravel()], 1).astype(np.float64))
        rows_columns = places[:, ::-1].T
        channels = [map_coordinates(image[..., c].astype(np.float64), rows_columns, mode="nearest") for c in range(3)]
        return np.stack(channels, 1).reshape(height, width, 3).clip(0, 255).round().astype(np.uint8)


def identity(size: Size, rng: np.random.Generator) -> Warp:
    """The picture itself."""
    return Warp(size, lambda points: points)


def flip(size: Size, rng: np.random.Generator) -> Warp:
    """Left and right changed."""
    return Warp(size, lambda points: points * [-1, 1] + [size[0] - 1, 0])


def crop(size: Size, rng: np.random.Generator, share: float = 0.6) -> Warp:
    """A random part, `share` of each side, enlarged to the whole picture."""
    extent = np.array(size, np.float64)
    corner = rng.uniform(0, 1 - share, 2) * extent
    return Warp(size, lambda points: (points + 0.5) * share + corner - 0.5)


def homography(size: Size, rng: np.random.Generator, jitter: float = 0.2) -> Warp:
    """A plane seen from elsewhere: each corner comes from up to `jitter` of a side further inside the picture."""
    extent = np.array(size, np.float64)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float64)
    moved = corners + (1 - 2 * corners) * rng.uniform(0, jitter, (4, 2))
    matrix = four_point_homography(corners * extent - 0.5, moved * extent - 0.5)
    return Warp(size, lambda points: apply_homography(matrix, points))


def thin_plate(size: Size, rng: np.random.Generator, jitter: float = 0.06, controls: int = 4) -> Warp:
    """A rubber sheet: a grid of controls x controls points, each moved by a normal of deviation `jitter` of a side."""
    extent = np.array(size, np.float64)
    steps = np.linspace(0, 1, controls)
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    moved = 0.5 + (grid - 0.5) * 0.85 + rng.normal(0, jitter, grid.shape)  # drawn in, so that less comes from beyond
    spline = RBFInterpolator(grid, moved, kernel="thin_plate_spline")
    return Warp(size, lambda points: spline((points + 0.5) / extent) * extent - 0.5)


KINDS: Mapping[str, Callable[[Size, np.random.Generator], Warp]] = {
    "identity": identity,
    "homography": homography,
    "thin-plate": thin_plate,
    "crop": crop,
    "flip": flip,
}


def four_point_homography(points: Points, images: Points) -> Float64[np.ndarray, "3 3"]:
    """The homography that takes four points, no three of them on a line, to their images."""
    rows = []
    for (x, y), (u, v) in zip(points, images, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    found = np.linalg.solve(np.array(rows), images.reshape(-1))
    return np.append(found, 1.0).reshape(3, 3)


def apply_homography(matrix: Float64[np.ndarray, "3 3"], points: Points) -> Points:
    """The images of points under a homography."""
    found = np.concatenate([points, np.ones((len(points), 1))], 1) @ matrix.T
    return found[:, :2] / found[:, 2:]


def write_warps(
    images: Sequence[str | Path | Image.Image],
    folder: str | Path,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    repeats: int = 1,
    points: int = 10,
    seed: int = 0,
    size: int | None = None,
) -> Path:
    """Write pictures, their deformed copies, and `pairs.csv` of true points, as `read_pairs` reads it; the folder.

    A pair for each image, kind (its category) and repeat: source is the picture, target the deformed one. points: on a
    regular grid of points x points over the target; those that come from beyond the picture are left out. size: of the
    longer side to which pictures are shrunk first. Equal arguments give equal files.
    Raises ValueError for an unknown kind and for no images.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"no kind of warp {unknown[0]!r}; have {', '.join(KINDS)}")
    if not images or not kinds:
        raise ValueError(f"{len(images)} images, {len(kinds)} kinds of warp; give at least one of each")
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[list[object]] = []
    for number, image in enumerate(images):
        picture = _shrunk(decode(image), size)
        picture.save(out / f"{number:03d}.png")
        for order, kind in enumerate(KINDS):
            for repeat in range(repeats if kind in kinds else 0):
                warp = KINDS[kind](picture.size, np.random.default_rng([seed, number, order, repeat]))
                name = f"{number:03d}-{kind}-{repeat}.png"
                Image.fromarray(warp(np.asarray(picture))).save(out / name)
                rows += [[f"{number:03d}.png", name, *place, kind] for place in _truth(warp, picture.size, points)]
    with (out / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[*COLUMNS, "category"], *rows])
    return out


def _truth(warp: Warp, size: Size, points: int) -> list[list[float]]:
    """x1, y1, x2, y2 of the grid's points that come from inside the original."""
    steps = (np.arange(points) + 0.5) / points
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    targets = (grid * warp.size - 0.5).round()
    sources = warp.backward(targets)
    inside = ((sources >= 0) & (sources <= np.array(size) - 1)).all(1)
    return np.concatenate([sources, targets], 1)[inside].tolist()


def _shrunk(picture: Image.Image, size: int | None) -> Image.Image:
    if size is None or max(picture.size) <= size:
        return picture
    width, height = (max(1, round(side * size / max(picture.size))) for side in picture.size)
    return Image.fromarray(Resize((height, width), "squash")(picture)[0])
