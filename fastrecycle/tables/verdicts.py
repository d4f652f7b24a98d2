"""Whether what a table is to show is so, in sentences with the figures."""

from __future__ import annotations

from collections.abc import Mapping

from fastrecycle.eval import Result
from fastrecycle.tables.layout import Claim, Published


def signed(difference: Result) -> str:
    """A paired difference with its interval."""
    rounded = round(difference.accuracy, 2) + 0.0  # no -0.00
    return f"{rounded:+.2f} ± {difference.ci95:.2f}"


def verdict(
    claim: Claim,
    scores: Mapping[str, Result | None],
    dataset: str,
    shots: int,
    paper: Published | None,
) -> tuple[bool, str] | None:
    """Whether a claim holds in a column, and why; None where a score of it is missing.

    Args:
        claim: see there.
        scores: label of a row -> its result in this column.
        dataset, shots: of the column.
        paper: its figures, for "cheaper".

    """
    left = scores[claim.left]
    right = {label: found for label in claim.right if (found := scores[label]) is not None}
    if left is None or len(right) < len(claim.right):
        return None
    if claim.test == "ahead of the best":
        best = max(right, key=lambda label: right[label].accuracy)
        right = {best: right[best]}
    differences = {label: left.minus(other) for label, other in right.items()}
    closest = min(differences, key=lambda label: differences[label].accuracy)
    worst = differences[closest]
    told = f"{signed(worst)} over {closest}"
    if claim.test in ("ahead", "ahead of the best"):
        lacking = [label for label, d in differences.items() if not d.accuracy - d.ci95 > 0]
        if lacking and len(right) > 1:
            told += f"; not ahead of {', '.join(lacking)}"
        return not lacking, told
    if claim.test == "not behind":
        return worst.accuracy + worst.ci95 >= 0, told
    if claim.test == "within":
        return worst.accuracy >= -claim.margin, told
    figures = [
        None if paper is None else paper.figure(label.split(";")[0], dataset, shots)
        for label in (claim.left, closest)
    ]
    if figures[0] is None or figures[1] is None:
        return None
    theirs = figures[0] - figures[1]
    return worst.accuracy - worst.ci95 > theirs, f"{told}, in the paper {theirs:+.2f}"
