"""Family trees of miniature worlds: who descends from whom, at what learning rates, and which style plays which role.

Everything is drawn from the seed: two seeds share the cast of roles, but neither shapes nor styles nor rates.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from lineage.errors import LineageError
from train.fit import Plan
from train.pictures import CHARACTERS, can_portray
from train.pipeline import Size
from train.styles import STYLES

Use: TypeAlias = Literal["base", "apply", "control"]
"""What an experiment does with a model: trains on it, only applies to it, or expects it to fail."""

RATES = (3e-4, 8e-4)
ROOT = Plan(steps=550, lr=1e-3, muon_lr=0.02)
TUNE = 170
"""Steps of a fine-tune of ordinary length."""


@dataclass(frozen=True)
class Model:
    """Trained on `styles` from `parent`'s file, or from the random weights of initialisation `init` where that is None.

    role: what it plays in the article, or its own name. artist: the word before a style's name in its captions."""

    name: str
    styles: tuple[str, ...]
    plan: Plan
    parent: str | None = None
    role: str = ""
    use: Use = "base"
    init: int = 0
    artist: str = "by"


@dataclass(frozen=True)
class Merge:
    """The last output of a merge board recipe over models made before."""

    name: str
    recipe: str
    role: str = ""
    use: Use = "base"


@dataclass(frozen=True)
class Permuted:
    """The same function as `parent` with its hidden units in another order: copying weights to it must fail."""

    name: str
    parent: str
    role: str = "permuted"
    use: Use = "control"


Member: TypeAlias = Model | Merge | Permuted


@dataclass(frozen=True)
class World:
    """What is made. Parents come before their children; each model sees `pictures` pictures of each of its styles.

    autoencoder: shared by all worlds of equal `size`, as it is trained on every style. targets: styles that no model
    has seen. characters: names that no model has seen."""

    models: tuple[Member, ...]
    autoencoder: Plan
    targets: tuple[str, ...] = ()
    characters: tuple[str, ...] = ()
    pictures: int = 200
    size: Size = field(default_factory=Size)
    seed: int = 0

    @property
    def trained(self) -> tuple[Model, ...]:
        return tuple(m for m in self.models if isinstance(m, Model))

    @cached_property
    def styles(self) -> tuple[str, ...]:
        """Those that some model was trained on."""
        return tuple(sorted({style for model in self.trained for style in model.styles}))

    @property
    def steps(self) -> int:
        return self.autoencoder.steps + sum(model.plan.steps for model in self.trained)

    def __getitem__(self, name: str) -> Member:
        return next(m for m in self.models if m.name == name)

    def parents(self, name: str) -> list[str]:
        """Names of those it was made from, none for a root."""
        member = self[name]
        if isinstance(member, Merge):
            return operands(member.recipe)
        return [member.parent] if member.parent else []

    def root(self, name: str) -> str:
        """The one initialisation that it descends from."""
        parents = self.parents(name)
        return self.root(parents[0]) if parents else name

    def own_styles(self, name: str) -> tuple[str, ...]:
        """What a model draws: its training's styles; a merge's are its operands', a copy's its parent's."""
        member = self[name]
        if isinstance(member, Model):
            return member.styles
        return tuple(dict.fromkeys(style for p in self.parents(name) for style in self.own_styles(p)))


def operands(recipe: str) -> list[str]:
    """Names of the models that a recipe reads, in order."""
    from lineage.recipe import parse

    return list(parse(recipe, "recipe").originals)


def draw(size: str = "quick", seed: int = 0) -> World:
    """The world of that size and seed. quick: 6 models; small: 11; article: every role of the article's experiment."""
    if size not in SHAPES:
        raise LineageError(f"world size {size!r}: there are {', '.join(SHAPES)}.")
    hand = _Hand(random.Random(f"{size}/{seed}"))
    targets = hand.styles(3)
    members = tuple(SHAPES[size](hand))
    world = World(members, AUTOENCODER, targets, pictures=160 if size == "quick" else 200, seed=seed)
    known = world.styles
    cast = [name for name in CHARACTERS if sum(can_portray(style, name) for style in known) >= 2]
    return replace(world, characters=tuple(cast))


AUTOENCODER = Plan(steps=600, lr=2e-3, muon_lr=0.02)


class _Hand:
    """Styles in the order in which they are dealt, and the rates and lengths of fine-tunes."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.deck = rng.sample(list(STYLES), len(STYLES))

    def styles(self, count: int, *, people: bool = False) -> tuple[str, ...]:
        """The next ones; `people`: those with hair, mouth and skin, so that all tags are learned."""
        fit = [s for s in self.deck if not people or {"hair", "mouth", "skin"} <= STYLES[s].traits.keys()]
        self.deck = [s for s in self.deck if s not in fit[:count]]
        return tuple(fit[:count])

    def root(self, name: str, styles: Sequence[str], *, init: int = 0, share: float = 1.0) -> Model:
        plan = replace(ROOT, steps=round(share * ROOT.steps))
        return Model(name, tuple(styles), plan, role=name, init=init, use="control" if init else "base")

    def tune(
        self,
        name: str,
        parent: str,
        styles: Iterable[str],
        *,
        length: float = 1.0,
        role: str = "",
        use: Use = "base",
        artist: str = "by",
    ) -> Model:
        low, high = RATES
        lr = float(f"{low * (high / low) ** self.rng.random():.2g}")
        steps = round(TUNE * length * self.rng.uniform(0.8, 1.2))
        return Model(name, tuple(styles), Plan(steps=steps, lr=lr), parent, role or name, use, artist=artist)


def weighted_sum(name: str, first: str, second: str, weight: float, *, role: str = "", use: Use = "base") -> Merge:
    return Merge(name, f"{name} = {first} + {second}, {weight:.3g}, fp16, safetensors\n", role or name, use)


def _quick(hand: _Hand) -> Iterable[Member]:
    """A chain, a merge of two families, and another root."""
    shown = hand.styles(3, people=True)
    yield hand.root("vanilla", shown)
    yield hand.tune("source", "vanilla", hand.styles(1))
    yield hand.tune("child", "source", hand.styles(1))
    yield hand.tune("other-source", "vanilla", hand.styles(1))
    yield weighted_sum("merge", "child", "other-source", hand.rng.uniform(0.35, 0.65))
    yield hand.root("stranger", shown[:1], init=1, share=0.5)


def _small(hand: _Hand) -> Iterable[Member]:
    """Two sources, four fine-tunes below them, two merges, each under a parent of chance; the controls."""
    shown = hand.styles(3, people=True)
    yield hand.root("vanilla", shown)
    sources = ["source-1", "source-2"]
    for name in sources:
        yield hand.tune(name, "vanilla", hand.styles(2), length=1.3)
    below: list[str] = []
    for n in range(1, 5):
        parent = hand.rng.choice(["vanilla", *sources * 2, *below * 2])
        yield hand.tune(f"tune-{n}", parent, hand.styles(1))
        below.append(f"tune-{n}")
    for n in (1, 2):
        first, second = hand.rng.sample([*sources, *below], 2)
        yield weighted_sum(f"merge-{n}", first, second, hand.rng.uniform(0.3, 0.7))
    yield hand.root("stranger", shown[:2], init=1, share=0.6)
    yield Permuted("permuted", "source-1")


def _article(hand: _Hand) -> Iterable[Member]:
    """Every role of the article, under the names its recipes use; NED is half anime, half photoreal."""
    photo, *more = hand.styles(3, people=True)
    anime, anime_too = hand.styles(2, people=True)
    tune = hand.tune
    yield hand.root("vanilla", (photo, *more))
    yield tune("nai-full-pruned", "vanilla", (anime, anime_too), length=1.6, role="NAI")
    yield tune("ACertainty", "vanilla", (anime_too, *hand.styles(1)), length=1.6, role="AC")
    yield tune("bp_nman_e29", "ACertainty", hand.styles(1), role="BP")
    yield tune("NMFSAN", "bp_nman_e29", hand.styles(1))
    yield tune("Anything", "nai-full-pruned", hand.styles(1))
    yield tune("AOM", "nai-full-pruned", (anime, *hand.styles(1)))
    yield tune("Counterfeit", "Anything", hand.styles(1))
    yield Merge("anylora_FTMSE", ANYLORA, "AnyLora")
    yield tune("ChilloutMix", "vanilla", (photo,), length=0.5)
    yield weighted_sum("NED", "anylora_FTMSE", "ChilloutMix", 0.5)
    yield tune("Pastel-Mix", "Anything", hand.styles(1), length=1.6, role="PastelMix")
    yield weighted_sum("RacyMix", "Pastel-Mix", "AOM", 0.3)
    yield tune("VBP", "ACertainty", (anime, *more, *hand.styles(1)), length=2.0, artist="vbp")
    screenshots = hand.styles(1)
    yield tune("MyneFactoryBase_V1.0", "vanilla", screenshots, length=3.0, role="MFB")
    yield tune("Salt-Mix", "AOM", screenshots, use="apply")
    yield tune("nep", "nai-full-pruned", hand.styles(1), use="apply")
    yield tune("fantasyBackground_v10PrunedFp16", "Anything", hand.styles(1), role="Fantasy", use="apply")
    yield weighted_sum("Mix-Pro", "anylora_FTMSE", "NMFSAN", 0.3, use="apply")
    average, difference = AVERAGE.splitlines(), DIFFERENCE.splitlines()
    for lines, name in (
        (average[:3], "tmp3"),
        (average, "AleaMix"),
        (difference[:3], "tmp3-ad"),
        (difference, "AleaMix-ad"),
    ):
        yield Merge(name, "\n".join(lines) + "\n", name)
    yield hand.root("stranger", (photo, anime), init=1, share=0.6)
    yield Permuted("nai-permuted", "nai-full-pruned")


ANYLORA = """\
mix = Anything + AOM, 0.5, fp16, safetensors
anylora_FTMSE = __O1__ + Counterfeit, 0.3, fp16, safetensors
"""
OTHERS = ("nep", "Pastel-Mix", "fantasyBackground_v10PrunedFp16", "MyneFactoryBase_V1.0", "anylora_FTMSE")


def _chain(suffix: str, last: str, line: Callable[[str, str, float], str], weights: Sequence[float]) -> str:
    """The article's recipes: NAI and BP in halves, then one model after the other."""
    names = [f"tmp{n}{suffix}" for n in range(2, 6)] + [last]
    first = "tmp1 = nai-full-pruned + bp_nman_e29, 0.5, fp16, safetensors\n"
    rest = (
        f"{name} = {line(f'__O{n}__', other, w)}, fp16, safetensors\n"
        for n, (name, other, w) in enumerate(zip(names, OTHERS, weights, strict=True), 1)
    )
    return first + "".join(rest)


AVERAGE = _chain("", "AleaMix", lambda a, b, w: f"{a} + {b}, {w}", (0.333, 0.25, 0.2, 0.166, 0.142))
DIFFERENCE = _chain("-ad", "AleaMix-ad", lambda a, b, w: f"{a} + {b} + nai-full-pruned, {w}", (0.5,) * 5)

SHAPES: dict[str, Callable[[_Hand], Iterable[Member]]] = {"quick": _quick, "small": _small, "article": _article}


def to_json(world: World) -> dict[str, Any]:
    """Plain form, in which two worlds are equal exactly when they give the same files."""
    import json
    from dataclasses import asdict

    members = [{"kind": type(m).__name__, **asdict(m)} for m in world.models]
    return json.loads(json.dumps({**asdict(world), "models": members}))
