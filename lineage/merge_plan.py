"""A recipe bound to files: what is known of a merge before any tensor is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from lineage.adaptation import Adaptation
from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.plan import MARKERS, Label, Rules, StepPlan, Table, leaves, plan_steps, web_name, weight_at
from lineage.recipe import Operand, Recipe, Step, coefficients

BLOW_UP = 2.0


@dataclass(frozen=True)
class Plan:
    """index: operand text -> input; names: each input's first name; tables: each input's keys; labels: key -> place;
    steps: the planned steps. Adapter files are in `adapters`, by operand text."""

    recipe: Recipe
    inputs: tuple[Checkpoint, ...]
    index: Mapping[str, int]
    names: tuple[str, ...]
    adapters: Mapping[str, Path]
    tables: tuple[Table, ...]
    labels: Mapping[str, Label]
    steps: tuple[StepPlan, ...]

    def coefficients(self, i: int, block: str | None = None) -> dict[str, Fraction]:
        """Output of step `i` as original input -> factor, with the weights of `block`, or the default ones."""
        weight = (lambda s: s.weight) if block is None else (lambda s: weight_at(s, "", {"": Label("", block)}))
        return coefficients(self.recipe, weight, lambda o: self.names[self.index[o.text]])[i]

    def sources(self, i: int) -> list[int]:
        """Inputs that the output of step `i` is made of, in the order of their first use, donors included."""
        needed, steps = {i}, self.recipe.steps
        for k in range(i, -1, -1):
            if k in needed:
                needed |= {ref.step for ref in steps[k].references if ref.step is not None}
        used = (ref.text for k in sorted(needed) for ref in steps[k].references if ref.step is None)
        return list(dict.fromkeys(self.index[text] for text in used))

    @property
    def originals(self) -> list[Path]:
        """Every file that is read."""
        return [c.path for c in self.inputs] + list(self.adapters.values())


def make_plan(recipe: Recipe, paths: Mapping[str, Path], stack: ExitStack) -> Plan:
    """Open every input once (closed by `stack`) and plan every step; LineageError for all that headers can refuse."""
    originals = recipe.originals
    adapters = {o.text: paths[o.text] for s in recipe.steps for o, _ in s.adapters}
    unique = list(dict.fromkeys(paths[name].resolve() for name in originals))
    inputs = tuple(stack.enter_context(open_checkpoint(path)) for path in unique)
    index = {name: unique.index(paths[name].resolve()) for name in originals}
    names = _short(tuple(next(n for n in originals if index[n] == i) for i in range(len(unique))))
    tables = tuple(leaves(i, (c.raw.specs[name] for name in c.raw.order)) for i, c in enumerate(inputs))
    labels: dict[str, Label] = {}
    for checkpoint in reversed(inputs):
        labels |= {web_name(p.stored): Label(p.component, p.block) for p in checkpoint.specs.values()}
    webui = recipe.arithmetic == "webui"
    rules = Rules(webui, all_keys=not webui and all(c.layout != "ldm" for c in inputs))
    bases = [inputs[index[_first(recipe, step).text]] for step in recipe.steps]
    steps = plan_steps(
        recipe.steps,
        {n: tables[i] for n, i in index.items()},
        labels,
        rules,
        Adaptation(recipe, bases, adapters, rules),
    )
    return Plan(recipe, inputs, index, names, adapters, tables, labels, tuple(steps))


def _short(names: tuple[str, ...]) -> tuple[str, ...]:
    """Without their folders, which are nobody else's business, where that leaves them different."""
    short = tuple(Path(name).name for name in names)
    return short if len(set(short)) == len(short) else names


def _first(recipe: Recipe, step: Step) -> Operand:
    """The original model whose layout a step's output has: the first operand of the first operand ..."""
    while (earlier := step.operands[0].step) is not None:
        step = recipe.steps[earlier]
    return step.operands[0]


def warnings_of(plan: Plan) -> list[str]:
    """Plain sentences on what will work but may not be meant."""
    found = list(plan.recipe.warnings)
    for i, step in enumerate(plan.recipe.steps):
        found += _prediction_warnings(plan, i)
        found += _marker_warnings(plan, step)
        found += _key_warnings(step, plan.steps[i])
    for i in plan.recipe.results:
        found += _result_warnings(plan, i)
    return list(dict.fromkeys(found))


def _result_warnings(plan: Plan, i: int) -> Iterator[str]:
    name, unhalved = plan.recipe.steps[i].name, plan.steps[i].counts["unhalved"]
    total = float(sum(abs(c) for c in plan.coefficients(i).values()))
    if total > BLOW_UP:
        yield f"{name}: the |coefficients| sum to {total:g}: differences are amplified, a blow-up is likely."
    if unhalved:
        yield f"{name}: fp16 is asked, but keys that are not merged stay in single precision ({unhalved})."


def _prediction_warnings(plan: Plan, i: int) -> Iterator[str]:
    types = {plan.names[j]: plan.inputs[j].prediction_type for j in plan.sources(i)}
    epsilon, v = ([name for name, t in types.items() if t == kind] for kind in ("epsilon", "v"))
    if epsilon and v:
        yield f"{plan.recipe.steps[i].name}: {v[0]} predicts v, {epsilon[0]} predicts noise (epsilon)."


def _marker_warnings(plan: Plan, step: Step) -> Iterator[str]:
    first, *others = (_operand_table(plan, o) for o in step.operands)
    for operand, table in zip(step.operands[1:], others, strict=True):
        for marker in MARKERS:
            if marker in table and marker not in first:
                yield (
                    f"{step.name}: the marker key {marker} of {operand.text} is dropped, "
                    f"because {step.operands[0].text} has none."
                )


def _operand_table(plan: Plan, operand: Operand) -> Table:
    return plan.steps[operand.step].table if operand.step is not None else plan.tables[plan.index[operand.text]]


def _key_warnings(step: Step, planned: StepPlan) -> Iterator[str]:
    only_first = sum(e.reason == "only in the first model" for e in planned.table.values())
    if only_first:
        yield f"{step.name}: {only_first} keys are only in {step.operands[0].text} and stay as they are."
    if planned.counts["dropped"]:
        yield f"{step.name}: {planned.counts['dropped']} keys are not in {step.operands[0].text} and are dropped."


def step_names(recipe: Recipe, operands: Sequence[Operand]) -> tuple[str, ...]:
    """Names of operands: an original's as written, an output's as its step is called."""
    return tuple(recipe.steps[o.step].name if o.step is not None else o.text for o in operands)
