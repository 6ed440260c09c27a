"""What is true of a folder of the zoo, in the terms answers are judged by.

Identical files are one node. Of a file that was taken out, its children hang from its nearest ancestor that is there;
what such an ancestor has to do with a merge of the missing file is judged neither right nor wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from zoo_plan import LINEAR

Pair = frozenset[str]


@dataclass(frozen=True)
class Truth:
    """rows: name -> what truth.json says of each network of the folder, hidden ones included."""

    rows: Mapping[str, Mapping[str, Any]]

    @cached_property
    def node(self) -> dict[str, str]:
        """Name -> the name that stands for all its identical copies (of those in the folder, the first made)."""
        found, seen = {}, {}
        for name, row in self.rows.items():
            first = found.get(row["parents"][0], row["parents"][0]) if row["kind"] == "duplicate" else name
            found[name] = first
            if not row["hidden"]:
                seen.setdefault(first, name)
        return {name: seen.get(first, first) for name, first in found.items()}

    @cached_property
    def visible(self) -> list[str]:
        """Nodes that the folder holds, sorted."""
        return sorted({self.node[n] for n, row in self.rows.items() if not row["hidden"]})

    @cached_property
    def edges(self) -> dict[tuple[str, str], str]:
        """(parent, child) -> relation."""
        found = {}
        for name in self.visible:
            row = self._made(name)
            for parent in row["parents"]:
                above = self._above(parent) if row["kind"] != "merge" else self._here(parent)
                found |= {(p, name): row["relation"] for p in above}
        return found

    @cached_property
    def neutral(self) -> set[Pair]:
        """Pairs of a merge and the visible ancestors of its missing parents."""
        rows = ((n, self._made(n)) for n in self.visible if self._made(n)["kind"] == "merge")
        return {
            frozenset((n, a)) for n, row in rows for p in row["parents"] if not self._here(p) for a in self._above(p)
        }

    def _made(self, node: str) -> Mapping[str, Any]:
        """The row that tells how a node was made: that of the first of its copies."""
        row = self.rows[node]
        return self._made(row["parents"][0]) if row["kind"] == "duplicate" else row

    def of(self, node: str) -> Mapping[str, Any]:
        return self._made(node)

    def _here(self, name: str) -> list[str]:
        node = self.node[name]
        return [node] if not self.rows[node]["hidden"] else []

    def _above(self, name: str) -> list[str]:
        """The node of `name`, or where it is missing its nearest ancestors that are not."""
        return self._here(name) or [a for p in self.rows[name]["parents"] for a in self._above(p)]

    def merges(self) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
        """(node, row, whether a parent is missing) of every merge."""
        for n in self.visible:
            row = self.of(n)
            if row["kind"] == "merge":
                yield n, row, any(not self._here(p) for p in row["parents"])

    def linear(self) -> Iterator[tuple[str, dict[str, float]]]:
        """(node, parent -> coefficient) of merges that have such, all of whose parents are there."""
        for n, row, missing in self.merges():
            if row["settings"]["method"] in LINEAR and not missing:
                weights: dict[str, float] = {}
                for p, w in zip(row["parents"], row["weights"], strict=True):
                    weights[self.node[p]] = weights.get(self.node[p], 0.0) + w
                yield n, weights

    def roots(self) -> dict[int, str]:
        """Tree -> its root's node, where that is there."""
        return {self.of(n)["tree"]: n for n in self.visible if self.of(n)["kind"] == "root"}


def read(zoo: Path, half: str) -> Truth:
    """The truth of one half. SystemExit where nothing has been made."""
    file = zoo / "truth.json"
    if not file.exists():
        raise SystemExit(f"{file} is not there. First: python benchmarks/zoo.py make")
    rows = json.loads(file.read_text(encoding="utf-8"))
    return Truth({r["name"]: r for r in rows if r["half"] == half})
