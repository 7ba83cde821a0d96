"""What the figures say, in words: an answer to each variant's question, and all of them in short.

An answer begins with what the variant itself holds a better, a worse or an equal outcome to mean, then names both sides
and the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sentence_vipyloqwen.ablation.results import AVERAGE, MEAN, Difference, Spread, VariantResult
from sentence_vipyloqwen.ablation.variants import FULL

DEPENDS = "It depends on the task"
ONE_SEED = "A hint, of one seed"
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def answer(result: VariantResult) -> str:
    """What the runs of a variant say to its question, in a sentence."""
    variant, what = result.variant, result.main
    if what not in result.figures:
        return "Every run failed."
    if variant.against is None:
        return f"An average of {cell(result.figures[what])}, with which the others are compared."
    subject = _subject(result)
    if what not in result.differences:
        named = subject.capitalize() if what == MEAN else subject
        return f"{named} is {cell(result.figures[what])}; {variant.against} has no run of the same seed yet."
    found = result.differences[what]
    others = {name: other for name, other in result.differences.items() if other.counts and name != what}
    if found.interval is None:
        lead, outcome = ONE_SEED, _moves(found, variant.other_side)
    elif found.counts:
        lead = variant.if_better if found.by_seed.mean > 0 else variant.if_worse
        told = _tasks(found, others) if what == MEAN else f"; elsewhere, {_all(others)}" if others else ""
        outcome = _moves(found, variant.other_side) + told
    else:
        lead = DEPENDS if others and what == MEAN else variant.if_equal
        told = f", but {_all(others)}" if others else ", nor does any task" if what == MEAN else ""
        outcome = f"does not differ significantly ({_ways(found, variant.other_side)}){told}"
    return f"{lead}: {variant.side}, {subject} {outcome}."


def cell(figure: Spread | None) -> str:
    """A figure and its spread.

    >>> cell(Spread({0: 0.5, 1: 0.75})), cell(None)
    ('0.625 ± 0.177', '')
    """
    if figure is None:
        return ""
    return f"{figure.mean:.3f}" if figure.deviation is None else f"{figure.mean:.3f} ± {figure.deviation:.3f}"


def signed(difference: Difference) -> str:
    """A difference with its sign; one that rounds to nothing has none that means anything.

    >>> signed(Difference.of(Spread({0: 0.25}), Spread({0: 0.5})))
    '-0.250'
    >>> signed(Difference.of(Spread({0: 0.4999}), Spread({0: 0.5})))
    '+0.000'
    """
    return f"{round(difference.by_seed.mean, 3) + 0.0:+.3f}"


def shown(figure: str) -> str:
    """The name of a figure, as a reader sees it."""
    return AVERAGE if figure == MEAN else figure


def _subject(result: VariantResult) -> str:
    if result.main != MEAN:
        return result.main
    tasks = len(result.figures) - 1
    return f"the average of the {_number(tasks)} tasks" if tasks > 1 else "the average"


def _moves(found: Difference, other_side: str = "") -> str:
    """How far a figure moves; with the other side's name, also from where to where.

    >>> found = Difference.of(Spread({0: 0.5}), Spread({0: 0.75}))
    >>> _moves(found), _moves(found, "as published")
    ('falls by 0.250', 'falls by 0.250 (from 0.750 as published to 0.500)')
    >>> _moves(Difference.of(Spread({0: 0.5003}), Spread({0: 0.5})))
    'stays as it is'
    """
    change = round(found.by_seed.mean, 3)
    moves = f"rises by {change:.3f}" if change > 0 else f"falls by {-change:.3f}" if change < 0 else "stays as it is"
    return f"{moves} ({_ways(found, other_side)})" if other_side else moves


def _all(counted: Mapping[str, Difference]) -> str:
    """How far each of some figures moves."""
    return _joined(
        [f"{'the ' if name == MEAN else ''}{shown(name)} {_moves(found)}" for name, found in counted.items()]
    )


def _ways(found: Difference, other_side: str) -> str:
    return f"from {found.other.mean:.3f} {other_side} to {found.own.mean:.3f}"


def _tasks(average: Difference, counted: dict[str, Difference]) -> str:
    """Which tasks move significantly as the average does, and which the other way."""
    sign = 1 if average.by_seed.mean > 0 else -1
    moves = {name: sign * found.by_seed.mean for name, found in counted.items()}
    along = sorted((name for name in moves if moves[name] > 0), key=lambda name: -moves[name])
    opposite = [f"{name} {_moves(counted[name])}" for name in moves if moves[name] < 0]
    most = f"{along[0]}, by {moves[along[0]]:.3f}" if along else ""
    if len(along) > 1:
        told = f"; significantly in {_number(len(along))} tasks, most in {most}"
    else:
        told = f"; significantly in {most}" if along else "; in no task by itself significantly"
    return told + (f"; but {_joined(opposite)}" if opposite else "")


def _number(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def _joined(parts: Sequence[str]) -> str:
    """Parts of a sentence, one after the other.

    >>> _joined(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


# --- In short ---


@dataclass(frozen=True)
class Line:
    """A variant in a summary.

    Attributes:
        name: Its name.
        change: What is changed.
        difference: By how much, and in what, if there is something to say.
    """

    name: str
    change: str
    difference: str


def in_short(results: Sequence[VariantResult]) -> list[tuple[str, list[Line]]]:
    """Which variants are worse and which better, largest first, which are neither, and of which that cannot be said."""
    groups: dict[str, list[VariantResult]] = {
        "Worse, largest difference first": [],
        "Better, largest difference first": [],
        "No significant difference": [],
        "One seed, so hints and no more": [],
        "Failed, or without a run to be compared with": [],
    }
    worse, better, equal, single, open_ = groups.values()
    for result in (result for result in results if result.variant.against):
        found = result.differences.get(result.main)
        if found is None:
            open_.append(result)
        elif found.interval is None:
            single.append(result)
        elif not found.counts:
            equal.append(result)
        else:
            (better if found.by_seed.mean > 0 else worse).append(result)
    for group in (worse, better):
        group.sort(key=lambda result: -abs(result.differences[result.main].by_seed.mean))
    return [(heading, [_line(result) for result in group]) for heading, group in groups.items() if group]


def _line(result: VariantResult) -> Line:
    variant, what = result.variant, result.main
    found = result.differences.get(what)
    if found is None:
        return Line(variant.name, variant.change, "")
    told = signed(found) + (f" in {what}" if what != MEAN else "")
    if variant.against != FULL:
        told += f" against {variant.against}"
    others = [f"{signed(other)} in {shown(name)}" for name, other in result.differences.items() if other.counts]
    if others and not found.counts:
        told += f", but {_joined(others)}"
    return Line(variant.name, variant.change, told)
