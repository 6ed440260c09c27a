"""The article's claims as data: what is said, where, and which readings must differ for it to hold.

Every claim is tested by one procedure (lineage.verdicts): `a` beyond `b` within matched groups, worlds as units. A new
claim is a new row. Roles are the models the article names; a world's truth says which of its models plays which. Small
worlds have sources and merges, but none of the article's other characters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lineage.contrasts import EARLY, FULL, Pick
from lineage.transfer_measures import RETENTION, STRENGTH
from lineage.transfer_records import CHARACTER, STYLE

SETUPS = {
    "default": "the article's settings; tags that belong to the subject are pruned from captions",
    "no tags": "captions hold nothing but the trigger",
    "all tags": "captions keep every tag",
    "regularisation": "pictures of other styles are among the training pictures",
    "photo regularisation": "photographs are among the training pictures",
    "higher resolution": "trained at a higher resolution",
    "large": "dim 32, convolutions 16, alpha 1",
    "large fast": "dim 32, convolutions 16, alpha 1, learning rate 5e-4",
    "large half alpha": "dim 32, convolutions 16, alpha half of each",
    "constant": "constant learning rate",
    "cosine": "cosine schedule of the learning rate",
    "dadaptation": "D-Adaptation sets the learning rate",
    "half text rate": "the text encoder learns at half the rate",
    "other clip skip": "trained and applied at clip skip 1 where the default is 2, else at 2",
    "mixed clip skip": "trained at that other clip skip, applied at the default",
}

SOURCES = ("NAI", "AC", "source-1", "source-2", "source", "other-source")
PASTEL = ("PastelMix", "RacyMix")
MERGED = ("tmp3", "AleaMix", "tmp3-ad", "AleaMix-ad")
MERGES = (*MERGED, "merge", "merge-1", "merge-2")
PARTS = ("NAI", "BP", "nep", "PastelMix", "Fantasy", "MFB", "AnyLora")  # of the seven-way merges
BP_FAMILY = ("AC", "BP", "NMFSAN")
VANILLA = ("vanilla",)
SELF = "the same model"
ANY = Pick()
ALIKE = 0.1  # lift; smaller differences count as none


@dataclass(frozen=True)
class Claim:
    """`a` is above `b` in every one of `measures`, groups matched `by`; or, with a `margin`, within that lift of it;
    or, with `beyond`, above `b` by more than beyond[0] is above beyond[1]. needs: why no cell can tell (no picks)."""

    key: str
    says: str
    article: str
    test: str
    a: Pick = ANY
    b: Pick = ANY
    by: tuple[str, ...] = ("target", "model")
    measures: tuple[str, ...] = STRENGTH
    margin: float | None = None
    beyond: tuple[Pick, Pick] | None = None
    needs: str = ""
    part: str = "transfer"

    @property
    def of_the_tree(self) -> bool:
        """Whether it is about places in the tree, so that dealing out the tree's labels anew leaves nothing of it."""
        a, b = ((p.bases, p.models, p.but_bases, p.but_models, p.relation) for p in (self.a, self.b))
        differ = a != b and self.b.relation != "other root" and (self.a.relation == SELF) == (self.b.relation == SELF)
        return differ and self.margin is None and not self.needs and self.beyond is None


_GROUPS = "Style Training; the groups of models"
_THEORY = "Why: style vectors"
_AC = "A Case Study on AC family"
_VANILLA = "A Case Study on Training on vanilla SD Model"
_MERGE = "A Case Study on Customized Merge Model"
_MYTHS = "Some Myths"
_SPEED = "Training Speed"
_COSPLAY = "Implication for Making Cosplay Images"
_USE = "What are some good base models for using style LoRas"
_CHARACTERS = "Character Training"

TRANSFER = (
    Claim(
        "family", "A style comes through better within a family than across families", _GROUPS,
        "X of Y's family against X of another family of the same root, per Y",
        Pick(relation="same family", kind=STYLE), Pick(relation="other family", kind=STYLE),
    ),
    Claim(
        "root", "Across roots an adapter fails", _VANILLA,
        "X of Y's root against X of another root, per Y",
        Pick(relation="same root"), Pick(relation="other root"),
    ),
    Claim(
        "up-strength", "Upstream to downstream works better than downstream to upstream", _AC,
        "ancestor on descendant against the same two the other way round",
        Pick(relation="ancestor", kind=STYLE), Pick(relation="descendant", kind=STYLE), by=("target", "pair"),
    ),
    Claim(
        "up-retention", "An adapter from an ancestor lets the model's own style through", _THEORY,
        "X an ancestor of Y against X of the same family that is its descendant, per Y or pair",
        Pick(relation="ancestor"), Pick(relation="descendant"), by=("target", "pair"), measures=RETENTION,
    ),
    Claim(
        "chain-retention", "On NMFSAN, AC's adapter brings out more of NMFSAN's style than BP's", _AC,
        "AC against BP, both on NMFSAN",
        Pick(("AC",), ("NMFSAN",)), Pick(("BP",), ("NMFSAN",)), measures=RETENTION,
    ),
    Claim(
        "chain-strength", "Along AC, BP, NMFSAN an adapter is weaker upwards than downwards", _AC,
        "AC and BP on NMFSAN or BP against the same pairs upwards",
        Pick(("AC", "BP"), ("BP", "NMFSAN"), relation="ancestor"),
        Pick(("BP", "NMFSAN"), ("AC", "BP"), relation="descendant"), by=("target", "pair"),
    ),
    Claim(
        "source-characters", "Characters trained on a source model take on the style of the model they are used on",
        _CHARACTERS, "NAI, AC or a small world's sources against all other bases, per Y, characters",
        Pick(SOURCES, kind=CHARACTER), Pick(but_bases=SOURCES, kind=CHARACTER), measures=RETENTION,
    ),
    Claim(
        "characters", "Characters survive the change of model better than styles", _CHARACTERS,
        "characters against styles, per pair of X and Y",
        Pick(kind=CHARACTER), Pick(kind=STYLE), by=("base", "model"),
    ),
    Claim(
        "vanilla-fails", "Trained on the vanilla model, an adapter does little on anime models", _VANILLA,
        "any other base against vanilla, per Y; ChilloutMix and NED left out as Y",
        Pick(but_bases=VANILLA, but_models=("vanilla", "ChilloutMix", "NED")),
        Pick(VANILLA, but_models=("ChilloutMix", "NED")),
    ),
    Claim(
        "vanilla-chillout", "Only the photoreal model with much of vanilla in it takes vanilla's adapter", _VANILLA,
        "vanilla on ChilloutMix against vanilla on all others",
        Pick(VANILLA, ("ChilloutMix",)), Pick(VANILLA, but_models=("ChilloutMix",)), by=("target",),
    ),
    Claim(
        "vanilla-realism", "There it costs the photoreal model its realism", _VANILLA,
        "vanilla on all others against vanilla on ChilloutMix: what stays of Y's look",
        Pick(VANILLA, but_models=("ChilloutMix",)), Pick(VANILLA, ("ChilloutMix",)), by=("target",), measures=RETENTION,
    ),
    Claim(
        "to-vanilla", "Trained on an anime source, an adapter is diluted on vanilla", _VANILLA,
        "a source on all others against the same on vanilla",
        Pick(SOURCES, but_models=VANILLA), Pick(SOURCES, VANILLA), by=("target", "base"),
    ),
    Claim(
        "pastel", "PastelMix and RacyMix carry a style to each other, and badly to others", _GROUPS,
        "one on the other against the same on all other models",
        Pick(PASTEL, PASTEL), Pick(PASTEL, but_models=PASTEL), by=("target", "base"),
    ),
    Claim(
        "photo", "ChilloutMix's adapter costs NED its photographic look, and the reverse", _GROUPS,
        "all other bases against the pair on each other: what stays of Y's look",
        Pick(but_bases=("NED", "ChilloutMix"), models=("NED", "ChilloutMix")),
        Pick(("NED", "ChilloutMix"), ("NED", "ChilloutMix")), measures=RETENTION,
    ),
    Claim(
        "far-characters", "Bases that are far away, MFB and PastelMix, hurt characters too", _CHARACTERS,
        "all other bases against MFB and PastelMix, per Y, characters",
        Pick(but_bases=("MFB", "PastelMix"), kind=CHARACTER), Pick(("MFB", "PastelMix"), kind=CHARACTER),
    ),
    Claim(
        "versatile-base", "A model that knows many styles is no good base: VBP's adapters carry badly", _MYTHS,
        "all other bases against VBP, per Y, styles",
        Pick(but_bases=("VBP",), kind=STYLE), Pick(("VBP",), kind=STYLE),
    ),
    Claim(
        "versatile-speed", "It fits styles faster", _SPEED,
        "VBP's early checkpoint on itself against the other bases' on themselves",
        Pick(("VBP",), relation=SELF, kind=STYLE, weight=FULL, moment=EARLY),
        Pick(but_bases=("VBP",), relation=SELF, kind=STYLE, weight=FULL, moment=EARLY), by=("target",),
    ),
    Claim(
        "look-alike", "Looking alike is not transferring: MFB's adapter does badly on Salt-Mix", _MYTHS,
        "all other bases against MFB, on Salt-Mix, styles",
        Pick(but_bases=("MFB",), models=("Salt-Mix",), kind=STYLE), Pick(("MFB",), ("Salt-Mix",), kind=STYLE),
    ),
    Claim(
        "good-to-use", "VBP, Mix-Pro and Counterfeit show a style well, whatever base it was trained on", _USE,
        "these three as Y against all other models, per X, styles",
        Pick(models=("VBP", "Mix-Pro", "Counterfeit"), kind=STYLE),
        Pick(but_models=("VBP", "Mix-Pro", "Counterfeit"), kind=STYLE), by=("target", "base"),
    ),
    Claim(
        "counterfeit-base", "Counterfeit is a poor base to train on", "A Certain Theory on Lora Transfer",
        "all other bases against Counterfeit, per Y",
        Pick(but_bases=("Counterfeit",)), Pick(("Counterfeit",)),
    ),
    Claim(
        "cosplay-source", "For cosplay, training on the source keeps NED more photographic than other bases do",
        _COSPLAY, "NAI against all other bases, on NED: what stays of its look",
        Pick(("NAI",), ("NED",)), Pick(models=("NED",), but_bases=("NAI",)), measures=RETENTION,
    ),
    Claim(
        "cosplay-photos", "So does training on NED with photographs as regularisation", _COSPLAY,
        "NED on itself, with against without photographs: what stays of its look",
        Pick(("NED",), ("NED",), relation=SELF, weight=FULL, setup="photo regularisation"),
        Pick(("NED",), ("NED",), relation=SELF, weight=FULL), measures=RETENTION,
    ),
    Claim(
        "merge-parents", "Trained on a merge, an adapter keeps its style on what was merged", _THEORY,
        "X a merge that holds Y against all other bases, per Y, styles",
        Pick(relation="merge of it", kind=STYLE), Pick(relation="no merge of it", kind=STYLE),
    ),
    Claim(
        "merge-source", "Trained on a merge, an adapter does badly on the source", _MERGE,
        "all other bases against the merges, on NAI and other sources",
        Pick(models=SOURCES, but_bases=MERGES), Pick(MERGES, SOURCES),
    ),
    Claim(
        "merge-nmfsan", "It does better on NMFSAN than what was not trained on BP's family", _MERGE,
        "the merges against bases outside BP's family, on NMFSAN",
        Pick(MERGED, ("NMFSAN",)), Pick(models=("NMFSAN",), but_bases=(*MERGED, *BP_FAMILY)),
    ),
    Claim(
        "add-difference", "Trained on the four-way add-difference, an adapter cancels the styles of nep and PastelMix",
        _MERGE, "tmp3 against tmp3-ad, on nep and PastelMix: what stays of their look",
        Pick(("tmp3",), ("nep", "PastelMix")), Pick(("tmp3-ad",), ("nep", "PastelMix")), measures=RETENTION,
    ),
    Claim(
        "blow-up", "Trained on the seven-way add-difference, an adapter does not carry to the parts", _MERGE,
        "AleaMix against AleaMix-ad, on the parts of both",
        Pick(("AleaMix",), PARTS), Pick(("AleaMix-ad",), PARTS),
    ),
    Claim(
        "blow-up-style", "Yet that adapter draws the strongest style", _MERGE,
        "AleaMix-ad against all other bases, on the merges",
        Pick(("AleaMix-ad",), MERGED), Pick(models=MERGED, but_bases=("AleaMix-ad",)),
    ),
    Claim(
        "larger", "Larger dim with half alpha carries style better", "Network dimension and alpha; Style Transfer",
        "dim 32 with half alpha against the default, per X and Y, styles",
        Pick(setup="large half alpha", kind=STYLE), Pick(kind=STYLE), by=("target", "base", "model"),
    ),
    Claim(
        "weight", "At the design's lower weight more of the model's look stays than at full weight", _SPEED,
        "the same adapter on its own model at both weights", Pick(relation=SELF), Pick(relation=SELF, weight=FULL),
        by=("target", "base"), measures=RETENTION,
    ),
    Claim(
        "speed", "Training is no faster on AnyLora than on its kin", _SPEED,
        "AnyLora's early checkpoint on itself against its family's on themselves",
        Pick(("AnyLora",), relation=SELF, weight=FULL, moment=EARLY),
        Pick(but_bases=("AnyLora",), relation=SELF, weight=FULL, moment=EARLY), by=("target", "family"),
        measures=("lift",), margin=ALIKE,
    ),
    Claim(
        "networks", "LoHa and LoCon carry alike", "LoRa, LoCon, LoHa",
        "LoHa against LoCon of equal size, per X and Y",
        Pick(network="loha"), Pick(network="locon"), by=("target", "base", "model"), measures=("lift",), margin=ALIKE,
    ),
)  # fmt: skip


def _trained(kind: str = "", setup: str = "default", moment: str = "final", network: str = "") -> Pick:
    """An adapter on the model it was trained on."""
    return Pick(relation=SELF, kind=kind, setup=setup, moment=moment, network=network, weight=FULL)


_BY = ("target", "base")
_SELF_BY = ("base",)

TRAINING = (
    Claim(
        "no-tags", "Without tags training is worst", "Captioning", "pruned tags against none",
        _trained(), _trained(setup="no tags"), _BY,
    ),
    Claim(
        "no-tags-style", "Most of all for styles", "Captioning", "the loss from it, styles against characters",
        _trained(STYLE), _trained(STYLE, "no tags"), _SELF_BY,
        beyond=(_trained(CHARACTER), _trained(CHARACTER, "no tags")),
    ),
    Claim(
        "pruned", "Pruned tags bind the subject better than all tags", "Captioning",
        "pruned tags against all, characters", _trained(CHARACTER), _trained(CHARACTER, "all tags"), _BY,
    ),
    Claim(
        "regularisation", "Pictures of other styles keep the model's look from being baked over",
        "The effect of style images on characters", "with against without: what stays of the model's look",
        _trained(CHARACTER, "regularisation"), _trained(CHARACTER), _BY, measures=RETENTION,
    ),
    Claim(
        "outfits", "Default outfits come out better without them", "The effect of style images on characters",
        "pictures of the outfit", needs="no judge here tells a default outfit from another",
    ),
    Claim(
        "resolution", "Higher resolution gives more detail", "Training resolution", "higher against the default",
        _trained(setup="higher resolution"), _trained(), _BY,
    ),
    Claim(
        "alpha", "Half alpha trains further than alpha 1", "Network dimension and alpha",
        "dim 32, half alpha against alpha 1",
        _trained(setup="large half alpha"), _trained(setup="large"), _BY,
    ),
    Claim(
        "rate", "So does a higher learning rate", "Network dimension and alpha", "dim 32, 5e-4 against 2e-4",
        _trained(setup="large fast"), _trained(setup="large"), _BY,
    ),
    Claim(
        "alpha-rate", "Alpha acts like the learning rate", "Network dimension and alpha",
        "dim 32, half alpha against 5e-4",
        _trained(setup="large half alpha"), _trained(setup="large fast"), _BY, measures=("lift",), margin=ALIKE,
    ),
    Claim(
        "cosine", "A cosine schedule learns slower", "Optimizer, scheduler, learning rate",
        "constant against cosine, at the end",
        _trained(setup="constant"), _trained(setup="cosine"), _BY,
    ),
    Claim(
        "dadaptation", "D-Adaptation is fast on styles, slow on characters", "Optimizer, scheduler, learning rate",
        "its gain over the default, styles against characters",
        _trained(STYLE, "dadaptation"), _trained(STYLE), _SELF_BY,
        beyond=(_trained(CHARACTER, "dadaptation"), _trained(CHARACTER)),
    ),
    Claim(
        "text-rate", "Half the text encoder's rate slows styles more than characters", "Text encoder learning rate",
        "the loss from it, styles against characters",
        _trained(STYLE), _trained(STYLE, "half text rate"), _SELF_BY,
        beyond=(_trained(CHARACTER), _trained(CHARACTER, "half text rate")),
    ),
    Claim(
        "blend", "Characters that share a token blend", "Text encoder learning rate", "two characters, one token",
        needs="no cell trains two characters with a shared trigger token",
    ),
    Claim(
        "negative", "A style in the negative prompt is better survived at a low text encoder rate",
        "Text encoder learning rate", "pictures with the style in the negative prompt",
        needs="no cell is sampled with a negative prompt",
    ),
    Claim(
        "texture", "LoHa takes on texture faster, LoCon traits", "LoRa, LoCon, LoHa", "judges of texture and of traits",
        needs="no judge here tells texture from traits",
    ),
    Claim(
        "clip-skip", "Clip skip does not matter", "Clip skip 1 versus 2", "1 against 2, each applied as trained",
        _trained(setup="other clip skip"), _trained(), _BY, measures=("lift",), margin=ALIKE,
    ),
    Claim(
        "clip-skip-mixed", "As long as it is the same in training and use", "Clip skip 1 versus 2",
        "applied as trained against mixed", _trained(), _trained(setup="mixed clip skip"), _BY,
    ),
)  # fmt: skip

CLAIMS = (*TRANSFER, *(replace(claim, part="training") for claim in TRAINING))
