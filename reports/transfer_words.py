"""What a transfer experiment found, as sentences: their words are chosen by verdicts and figures, none is fixed."""

from __future__ import annotations

from collections.abc import Sequence

from lineage.transfer_records import (
    CONTRADICTED,
    NOT_TESTABLE,
    PREDICTED,
    SUPPORTED,
    UNDECIDED,
    VERDICTS,
    Comparison,
    Hypothesis,
    Score,
    TransferResult,
    rivals,
)
from reports.wording import count, percent

FEW = 4
MINIATURE = (
    "The models are miniatures made for this experiment: they say whether the method can work, not how far it carries "
    "over to Stable Diffusion."
)


def score(result: TransferResult, of: str, figure: str, predictor: str = PREDICTED) -> Score | None:
    """One score of the result; None where it was not measured."""
    return next((s for s in result.statistics.scores if (s.of, s.figure, s.predictor) == (of, figure, predictor)), None)


def answer(result: TransferResult) -> str:
    """One sentence: does the prediction rank the bases?"""
    found = score(result, "strength", "tau")
    if found is None:
        return "Nothing was measured that a prediction could be held against."
    worlds = count(len(found.worlds), "world")
    if found.p is None:
        return f"In {worlds} the prediction ranks the bases with tau {found.mean:.2f}: too few to judge."
    how = "ranks" if found.p <= 0.05 and found.mean > 0 else "does not rank"
    return f"The prediction {how} the bases of a model: tau {_with_interval(found)} over {worlds}."


def _with_interval(s: Score, digits: int = 2) -> str:
    span = "" if s.low is None or s.high is None else f" ({s.low:.{digits}f} to {s.high:.{digits}f})"
    return f"{s.mean:.{digits}f}{span}"


def findings(result: TransferResult) -> list[str]:
    """Two paragraphs of plain findings: the prediction, then the article's claims."""
    said = [_share(result), _rivals(result), _regret(result), _retention(result), _controls(result), _shuffles(result)]
    return [
        p for p in (" ".join(filter(None, said)), " ".join([*claims_words(result.hypotheses), *_note(result)])) if p
    ]


def _note(result: TransferResult) -> list[str]:
    own = result.config.get("files")
    return [MINIATURE] if not own and {"size", "world", "worlds"} & result.config.keys() else []


def _share(result: TransferResult) -> str | None:
    found = score(result, "strength", "tau")
    if found is None or found.strict_share is None:
        return (
            "How much a perfect prediction could reach is not known: the adapters were trained once." if found else None
        )
    return (
        f"That is {percent(found.strict_share)} of what a perfect prediction would reach, given how much seeds differ."
    )


def _rivals(result: TransferResult) -> str | None:
    """Against the strongest plain baseline; oracles have seen answers and are no rivals."""
    best = min(rivals(result.statistics.comparisons), key=lambda c: c.difference, default=None)
    return None if best is None else f"{_compared(best)}."


def _compared(c: Comparison) -> str:
    name = "The strongest simple baseline is " + c.baseline
    if c.low is None or c.high is None:
        return f"{name}; with so few worlds the difference ({c.difference:+.3f}) cannot be judged"
    span = f"{c.difference:+.3f} ({c.low:+.3f} to {c.high:+.3f})"
    if c.low > 0:
        return f"{name}, and the prediction is better: {span} in tau"
    if c.high < 0:
        return f"{name}, and it is better than the prediction: {span} in tau"
    return f"{name}; the two are tied: {span} in tau"


def _regret(result: TransferResult) -> str | None:
    found = score(result, "strength", "regret")
    if found is None:
        return None
    return f"Training on the recommended base costs {found.median:.3f} lift against the best one (median over worlds)."


def _retention(result: TransferResult) -> str | None:
    found, beyond = score(result, "retention", "tau"), result.statistics.partial
    if found is None:
        return None
    rest = (
        "" if beyond is None else f"; beyond what strength explains, a correlation of {_with_interval(beyond)} is left"
    )
    return f"How much of a model's look stays is ranked with tau {_with_interval(found)}{rest}."


def _controls(result: TransferResult) -> str | None:
    groups = {
        True: [c.name for c in result.statistics.controls if c.fails],
        False: [c.name for c in result.statistics.controls if c.fails is False],
    }
    said = [f"as it should, little comes of {_listed(groups[True], ',')}"] if groups[True] else []
    said += [f"against expectation, something comes of {_listed(groups[False], ',')}"] if groups[False] else []
    return _sentence("; ".join(said)) if said else None


def _shuffles(result: TransferResult) -> str | None:
    f = result.statistics.false_positives
    if f is None:
        return None
    return (
        f"On trees with shuffled labels the table of claims gave a verdict in {f.table} of {f.shuffles} cases, and the "
        f"prediction seemed to know something in {f.predictor}."
    )


def claims_words(found: Sequence[Hypothesis]) -> list[str]:
    """How the article's claims fared, the decided ones by name."""
    groups = {v: [h for h in found if h.verdict == v] for v in VERDICTS}
    if not found:
        return []
    counts = ", ".join(f"{len(groups[v])} {v}" for v in VERDICTS if groups[v])
    said = [f"Of {count(len(found), 'claim')} of the article: {counts}."]
    for verdict, how in ((SUPPORTED, "Held"), (CONTRADICTED, "Did not hold")):
        if groups[verdict]:
            said.append(f"{how}: {_listed([_lower(h.claim) for h in groups[verdict]])}.")
    torn = [h for h in groups[UNDECIDED] if "depends on the measure" in h.reason]
    if torn:
        said.append(f"{count(len(torn), 'claim')} would turn with the measure of strength, and so stay undecided.")
    if len(groups[NOT_TESTABLE]) == len(found):
        said.append("None of them had the cells that its test needs.")
    return said


def _listed(names: Sequence[str], between: str = ";") -> str:
    shown = list(names[:FEW]) + ([f"{len(names) - FEW} more"] if len(names) > FEW else [])
    return shown[0] if len(shown) == 1 else f"{f'{between} '.join(shown[:-1])}{between} and {shown[-1]}"


def _lower(text: str) -> str:
    """The first word in lower case, unless it is a name."""
    first = text.split(" ", 1)[0]
    return text if any(c.isupper() for c in first[1:]) or first in NAMES else text[0].lower() + text[1:]


NAMES = ("Counterfeit", "Alpha")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
