"""What a prediction says, in sentences."""

from __future__ import annotations

from collections import Counter

from lineage.predict_result import Advice, PredictResult
from reports.wording import count, number

COUNTED = {
    "works": "works on {}",
    "loses this model's style": "replaces the style of {}",
    "weak": "weak on {}",
    "permuted": "fails on {}, permuted",
    "other root": "fails on {} of another root",
    "other architecture": "does not fit {} of another architecture",
    "base unknown": "cannot be foretold for {}",
}
MEANING = {
    "works": "the trained style arrives, and enough of the model's own is left",
    "loses this model's style": "the trained style arrives and replaces the model's own",
    "weak": "too far from the base: little of the trained style arrives",
    "permuted": "the same training, with units in another order: nothing arrives",
    "other root": "no common training: nothing arrives",
    "other architecture": "the adapter's layers do not fit",
    "base unknown": "the adapter does not say on what it was trained",
}


def answer(result: PredictResult) -> str:
    """ "style.safetensors, trained on AC, on 8 models: works on 5, weak on 2, fails on 1 of another root." """
    if result.adapter is None or result.base is None:
        return _advised(result)
    found = Counter(f.verdict for f in result.forecasts)
    said = ", ".join(words.format(number(found[v])) for v, words in COUNTED.items() if found[v])
    return f"{result.adapter.file}, {trained_on(result)}, on {count(len(result.forecasts), 'model')}: {said}."


def trained_on(result: PredictResult) -> str:
    """The base in a few words, with how sure that is where it is not certain."""
    base = result.base
    if base is None or (base.model is None and not base.said and not base.hash):
        return "trained on an unknown base"
    if base.model is None or base.stands_in:
        return f"trained on {base.said or base.hash}, which is not here"
    return f"trained on {base.model}" + ("" if base.sure == "certain" else f" ({base.sure})")


def _advised(result: PredictResult) -> str:
    if not result.advice:
        return f"No model of {result.folder} reaches {_together(result.targets)}."
    stays, through = result.advice[0], for_own_style(result)[0]
    return (
        f"For {_together(result.targets)}: train on {stays.base} if the trained style should stay, "
        f"on {through.base} if the {'target’s' if len(result.targets) == 1 else 'targets’'} own should come through."
    )


def for_own_style(result: PredictResult) -> list[Advice]:
    """Advice, best first for who wants the targets' own style to come through."""
    return sorted(result.advice, key=lambda a: (-a.through, a.base))


def _together(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def constants_words(result: PredictResult) -> str:
    """Where the predictor's constants come from."""
    c = result.constants
    return (
        f"Constants: {c.source}. Strength falls to 37 % at a relative distance of {number(c.scale)}; weak is below "
        f"{number(c.weak)}, and a style counts as lost where less than {number(c.loses)} of it is left."
    )


def warnings(result: PredictResult) -> list[str]:
    """What should be known before anything is believed; models of one fault share a sentence."""
    base = result.base
    faults: dict[str, list[str]] = {}
    for f in result.forecasts:
        for fault in f.warnings:
            faults.setdefault(fault, []).append(f.model)
    unsure = [f"Training base: {base.words}."] if base is not None and base.sure != "certain" else []
    return unsure + [f"{', '.join(_some(names))}: {fault}." for fault, names in faults.items()]


def _some(names: list[str], most: int = 6) -> list[str]:
    return names if len(names) <= most else [*names[:most], f"and {len(names) - most} more"]
