"""What was asked of a number and what came of it: the table that begins a page of results."""

from __future__ import annotations


def head(of: str = "") -> list[str]:
    """Return the head of the table; ``of`` names what all numbers are of."""
    return [f"| {of + ' ' * bool(of)}| asked | measured | |", "|---|--:|--:|---|"]


def row(what: str, asked: str, measured: str, met: bool | None) -> str:
    """Return a row.

    Args:
        what: Of what the number is.
        asked: The bound, such as "<= 1.5".
        measured: The number; empty if there is none.
        met: Whether it keeps the bound; None if it was not measured.
    """
    verdict = "not measured" if met is None else "met" if met else "**missed**"
    measured = f" {measured} " if measured else " "
    return f"| {what} | {asked} |{measured}| {verdict} |"
