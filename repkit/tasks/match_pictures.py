"""Pictures of matches: two images with lines between their points, heat maps, and flow as colours with a legend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from matplotlib.colors import hsv_to_rgb
from PIL import Image
from torch import Tensor

from repkit.images import to_tensor, to_uint8
from repkit.tasks.match import Match

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT, GAP = 480, 12  # of the pair of pictures, and between them, in pixels
ACROSS = 4  # heat maps a row
WHEEL = 160


def side_by_side(
    source: Image.Image, target: Image.Image, height: int = HEIGHT
) -> tuple[Image.Image, tuple[float, float]]:
    """Both pictures at one height on one canvas, and how many times larger each is there.

    The source lies at the left edge, the target at the right one, `GAP` pixels of white between them.
    """
    scales = height / source.height, height / target.height
    widths = [max(1, round(one.width * scale)) for one, scale in zip((source, target), scales, strict=True)]
    canvas = Image.new("RGB", (widths[0] + GAP + widths[1], height), "white")
    canvas.paste(source.resize((widths[0], height)), (0, 0))
    canvas.paste(target.resize((widths[1], height)), (widths[0] + GAP, 0))
    return canvas, scales


def match_picture(
    source: Image.Image, target: Image.Image, matches: Sequence[Match], heats: Float[Tensor, "n H W"] | None = None
) -> "Figure":
    """Lines from the source's points to their places in the target; below, the heat maps of the first of them."""
    from matplotlib.figure import Figure

    canvas, scales = side_by_side(source, target)
    count = 0 if heats is None else len(heats)
    rows, across = -(-count // ACROSS), min(ACROSS, max(count, 1))
    aspect = canvas.height / canvas.width
    figure = Figure(figsize=(12, 12 * aspect + rows * 12 / across * target.height / target.width), layout="constrained")
    grid = figure.add_gridspec(
        1 + rows, across, height_ratios=[aspect * across, *[target.height / target.width] * rows]
    )
    _draw_lines(figure.add_subplot(grid[0, :]), canvas, scales, target.width, matches)
    for number in range(count):
        axes = figure.add_subplot(grid[1 + number // ACROSS, number % ACROSS])
        assert heats is not None
        _draw_heat(axes, target, heats[number], matches[number], number)
    return figure


def _draw_lines(
    axes: "Axes", canvas: Image.Image, scales: tuple[float, float], width: int, matches: Sequence[Match]
) -> None:
    axes.imshow(np.asarray(canvas))
    axes.set_axis_off()
    left = canvas.width - max(1, round(width * scales[1]))
    for number, match in enumerate(matches):
        x, y = (np.array(match.point) + 0.5) * scales[0] - 0.5
        to_x, to_y = (np.array(match.place) + 0.5) * scales[1] - 0.5
        color = hsv_to_rgb((number / len(matches), 1, 0.9))
        axes.plot([x, to_x + left], [y, to_y], "-" if match.mutual else ":", color=color, linewidth=1.2)
        axes.plot([x, to_x + left], [y, to_y], "o", color=color, markersize=5, markeredgecolor="white")
        box = {"boxstyle": "round,pad=0.15", "facecolor": color, "edgecolor": "none"}
        axes.annotate(str(number), (x, y), (5, 5), textcoords="offset points", fontsize=8, color="white", bbox=box)


def _draw_heat(axes: "Axes", target: Image.Image, heat: Float[Tensor, "H W"], match: Match, number: int) -> None:
    """The scores over the target in grey, from the lowest to the highest, and the match as a cross."""
    extent = (-0.5, target.width - 0.5, target.height - 0.5, -0.5)
    axes.imshow(np.asarray(target.convert("L")), cmap="gray", extent=extent)
    axes.imshow(heat.numpy(), cmap="inferno", alpha=0.65, extent=extent)
    axes.plot(*match.place, "x", color="cyan", markersize=8)
    axes.set_title(f"{number}: {match.score:.3f}", fontsize=9)
    axes.set_axis_off()


def flow_colors(flow: Float[Tensor, "h w 2"], longest: float) -> UInt8[np.ndarray, "h w 3"]:
    """Direction as hue, length as saturation: white stays, full colour is `longest` pixels or more.

    Red is to the right, and as the direction turns clockwise on the screen the hue goes on to yellow, green and blue.
    """
    dx, dy = flow.double().unbind(-1)
    hue = torch.atan2(dy, dx) / (2 * torch.pi) % 1
    saturation = (torch.hypot(dx, dy) / longest).clamp(0, 1) if longest > 0 else torch.zeros_like(dx)
    colors = hsv_to_rgb(torch.stack([hue, saturation, torch.ones_like(hue)], -1).numpy())
    return np.rint(255 * colors).astype(np.uint8)


def color_wheel(side: int = WHEEL) -> UInt8[np.ndarray, "h w 3"]:
    """The legend of `flow_colors`: each place of a disc has the colour of the way to it from the middle."""
    steps = torch.linspace(-1, 1, side)
    dy, dx = torch.meshgrid(steps, steps, indexing="ij")
    wheel = flow_colors(torch.stack([dx, dy], -1), 1.0)
    wheel[(torch.hypot(dx, dy) > 1).numpy()] = 255
    return wheel


def pulled(picture: Image.Image, flow: Float[Tensor, "H W 2"]) -> Image.Image:
    """The colours of `picture` at the places where the pixels of a flow go: the picture in the flow's frame.

    Between pixels colours are interpolated; beyond the edge they are the edge's.
    """
    y, x = torch.meshgrid(torch.arange(flow.shape[0]), torch.arange(flow.shape[1]), indexing="ij")
    places = flow.double() + torch.stack([x, y], -1)
    size = torch.tensor([picture.width, picture.height])
    values = to_tensor(np.array(picture)[None]).double()
    found = F.grid_sample(values, ((2 * places + 1) / size - 1)[None], padding_mode="border", align_corners=False)
    return Image.fromarray(to_uint8(found.float())[0])


def flow_picture(source: Image.Image, target: Image.Image, flow: Float[Tensor, "H W 2"]) -> "Figure":
    """The source, the target, the target's pixels put where the source's are, and the flow as colours."""
    from matplotlib.figure import Figure

    longest = float(flow.norm(dim=-1).max())
    height = 4.4 * max(source.height / source.width, target.height / target.width)
    figure = Figure(figsize=(16, height), layout="constrained")
    panels = {
        "source": source,
        "target": target,
        "target, pulled to the source": pulled(target, flow),
        f"flow, up to {longest:.0f} pixels": flow_colors(flow, longest),
    }
    for axes, (title, content) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        axes.imshow(np.asarray(content))
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    legend = axes.inset_axes((0.76, 0.02, 0.22, 0.22))
    legend.imshow(color_wheel())
    legend.set_axis_off()
    return figure
