"""Adapters in a merge: W + weight * delta, in float32, on the parameters an adapter's modules belong to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lineage.adapters import Factors, bind, open_adapter
from lineage.arithmetic import Function, wide
from lineage.checkpoint import Checkpoint
from lineage.errors import LineageError
from lineage.keys import Param
from lineage.plan import Call, Entry, Rules, Table, web_name
from lineage.recipe import Recipe, Step


@dataclass(frozen=True)
class Adaptation:
    """Applies each step's adapters to its table. `bases`: per step, the model whose names its output has."""

    recipe: Recipe
    bases: Sequence[Checkpoint]
    paths: Mapping[str, Path]
    rules: Rules

    def __call__(self, step: Step, table: Table) -> Table:
        base = self.bases[self.recipe.steps.index(step)]
        deltas: dict[str, list[_Delta]] = defaultdict(list)
        for operand, weight in step.adapters:
            path = self.paths[operand.text]
            bound, unmatched = bind(open_adapter(path), base.specs)
            if unmatched:
                names = ", ".join(u["name"] for u in unmatched[:3])
                raise LineageError(
                    f"{path}: {len(unmatched)} of its modules are not in {base.path.name} ({names}). "
                    "It was made for another architecture."
                )
            for name, factors in bound.items():
                param = base.specs[name]
                deltas[web_name(param.stored)].append(_Delta(param, factors, weight))
        return {name: self._adapted(e, deltas[name], step.half) if name in deltas else e for name, e in table.items()}

    def _adapted(self, entry: Entry, deltas: Sequence[_Delta], half: bool) -> Entry:
        node = entry.node
        dtype = self.rules.stored(entry.dtype, half)
        call = Call(_adder(deltas), (node,), wide([node.dtype]), node.shape, whole=True)
        return Entry(call, dtype, "adapted", "adapter applied")


@dataclass(frozen=True)
class _Delta:
    param: Param
    factors: Factors
    weight: float


def _adder(deltas: Sequence[_Delta]) -> Function:
    def add(stored: Tensor) -> Tensor:
        result = stored.to(wide([stored.dtype]), copy=True)
        for d in deltas:
            view = d.param.view(result)
            added = d.factors.delta(view.float() if d.factors.needs_weight else None)
            view += d.weight * added.reshape(view.shape)
        return result

    return add
