"""What a benchmark of correspondence came to, as text."""

from collections.abc import Sequence
from typing import Any

import typer

from repkit.cli.mistakes import NONE_SUCCEEDED, SOME_FAILED
from repkit.cli.printing import say

FIRST_LEFT_OUT = 3


def print_results(results: dict[str, Any]) -> None:
    protocol, threshold, average = (results[name] for name in ("protocol", "threshold", "average"))
    most = f", at most {results['most']} a category" if results["most"] else ""
    print(
        f"{results['preset']} on {results['benchmark']}{' ' if results['split'] else ''}{results['split'] or ''}: ",
        end="",
    )
    print(f"{results['pairs']} pairs{most}, {results['points']} points; protocol {protocol}, of the {threshold}\n")
    heads = [f"@{alpha:g}" for alpha in results["alphas"]]
    print(f"{'PCK in %':28}{''.join(f'{head:>8}' for head in heads)}")
    for name, values in results["pck"][threshold][protocol].items():
        _print_row(f"by {name}", values)
    _print_row(f"position only, by {average}", results["position_only"][threshold][protocol][average])
    if len(results["categories"]) > 1:
        print()
        own = average if average in ("image", "point") else "point"
        for name, category in results["categories"].items():
            _print_row(f"{name}, by {own}", category["pck"][threshold][protocol][own])
    stayed, truly = (f"{results[name]:.1%}" for name in ("stayed", "true_stayed"))
    print(f"\n{stayed} of matches lie within a cell of their point's own place, {truly} truly do")
    for one in results.get("searched_weights", []):
        print(f"weights {', '.join(f'{weight:g}' for weight in one['weights'])}: {one['pck']:.2%} on val")
    print(_cost(results["cost"]))
    if results["differs"]:
        print(f"not all is as in the paper: repkit presets {results['preset']}")


def _print_row(name: str, values: Sequence[float]) -> None:
    print(f"{name:28}{''.join(f'{100 * value:8.2f}' for value in values)}")


def _cost(cost: dict[str, Any]) -> str:
    flops = "" if cost["flops_an_image"] is None else f"{cost['flops_an_image'] / 1e12:.3g} TFLOP"
    seconds = {"an image": cost["seconds_an_image"], "a pair": cost["seconds_a_pair"]}
    told = [f"{value:.3g} s {what}" for what, value in seconds.items() if value is not None]
    return f"cost: {', '.join(filter(None, [flops and f'{flops} an image', *told]))}"


def tell_left_out(results: dict[str, Any]) -> None:
    """Name what is left out, and end with the code for it."""
    if results.get("clamped"):
        say(f"{results['clamped']} points are not on their image, and were looked for from its edge")
    left = results["left_out"]
    if not left:
        return
    say(f"{len(left)} of {results['pairs'] + len(left)} pairs are left out; the first:")
    for name, why in list(left.items())[:FIRST_LEFT_OUT]:
        say(f"  {name}: {why}")
    say("The same command with --retry tries their images again.")
    raise typer.Exit(SOME_FAILED if results["pairs"] else NONE_SUCCEEDED)
