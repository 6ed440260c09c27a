"""Results as the engine would write them, made without it: for pages, whose input is only JSON."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from lineage.claim import summarise
from lineage.results import (
    BlockChange,
    Interval,
    LayerSpectrum,
    MergeInput,
    MergeOutput,
    MergeResult,
    MergeStep,
    SvdResult,
    VectorDelta,
    provenance,
)

KS = [1, 2, 4, 8, 16, 32, 64]
HOSTILE = [
    "unet.</script><script>window.__pwned=1</script>.weight",
    "unet.<img src=x onerror=window.__pwned=2>.weight",
    "unet.<b>bold</b><a href='javascript:window.__pwned=3'>click</a>.weight",
    "unet.<!--<script>\u2028\u2029\u202egnp.\x00\x1b[31m\ud800.weight",
    "unet.%{x}${window.__pwned=4}{{7*7}}\"'`&lt;b&gt;.weight",
    "unet." + "very_long_name_" * 40 + ".weight",
    "@ink",
    "__proto__",
]
CHANNELS = (320, 640, 1280, 1280)


def unet_names() -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """(name, block, role, shape) of the attention and convolution weights of an SD1.5-like UNet."""
    for level, width in enumerate(CHANNELS):
        for i in range(2):
            block = f"IN{3 * level + i + 1:02d}"
            path = f"unet.down_blocks.{level}"
            yield from resnet(f"{path}.resnets.{i}", block, width)
            if level < 3:
                yield from attention(f"{path}.attentions.{i}", block, width)
    yield from resnet("unet.mid_block.resnets.0", "M00", 1280)
    yield from attention("unet.mid_block.attentions.0", "M00", 1280)
    for level, width in enumerate(reversed(CHANNELS)):
        for i in range(3):
            block = f"OUT{3 * level + i:02d}"
            yield from resnet(f"unet.up_blocks.{level}.resnets.{i}", block, width)
            if level > 0:
                yield from attention(f"unet.up_blocks.{level}.attentions.{i}", block, width)


def resnet(path: str, block: str, width: int) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    yield f"{path}.conv1.weight", block, "conv", (width, width, 3, 3)
    yield f"{path}.conv2.weight", block, "conv", (width, width, 3, 3)
    yield f"{path}.time_emb_proj.weight", block, "time", (width, 1280)


def attention(path: str, block: str, width: int) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    inner = f"{path}.transformer_blocks.0"
    for a, context in (("attn1", width), ("attn2", 768)):
        for part in ("q", "k", "v"):
            columns = width if part == "q" else context
            yield f"{inner}.{a}.to_{part}.weight", block, f"{a}.{part}", (width, columns)
        yield f"{inner}.{a}.to_out.0.weight", block, f"{a}.out", (width, width)
    yield f"{inner}.ff.net.0.proj.weight", block, "ff.in", (8 * width, width)


def encoder_names() -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    for i in range(12):
        path = f"text_encoder.text_model.encoder.layers.{i}"
        for part in ("q", "k", "v", "out"):
            yield f"{path}.self_attn.{part}_proj.weight", f"TE.{i:02d}", f"attn.{part}", (768, 768)
        yield f"{path}.mlp.fc1.weight", f"TE.{i:02d}", "mlp.fc1", (3072, 768)
        yield f"{path}.mlp.fc2.weight", f"TE.{i:02d}", "mlp.fc2", (768, 3072)


def vae_names() -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    for i in range(4):
        yield f"vae.encoder.down_blocks.{i}.resnets.0.conv1.weight", f"VAE.encoder.down.{i}", "conv", (128, 128, 3, 3)
    yield "vae.encoder.conv_in.weight", "VAE.encoder.in", "conv", (128, 3, 3, 3)


def spectrum(rng: random.Random, kind: str, short: int, long: int) -> tuple[list[float], int]:
    """Singular values with rounding noise below, and how many stand above it."""
    edge = 0.02 * (math.sqrt(short) + math.sqrt(long)) / math.sqrt(1280)
    if kind == "hidden":
        signal = []
    elif kind == "low":
        signal = [rng.uniform(0.6, 2) * 0.8**i for i in range(rng.randint(3, 24))]
    elif kind == "power":
        signal = [1.5 / math.sqrt(i + 1) for i in range(short)]
    else:
        signal = [0.9 * (1 - 0.8 * i / short) for i in range(short)]
    values = [math.hypot(s, edge * (1 - 0.9 * i / short)) for i, s in enumerate(signal + [0.0] * (short - len(signal)))]
    return sorted(values, reverse=True), sum(s > edge for s in signal)


def layer(rng: random.Random, name: str, block: str, role: str, shape: tuple[int, ...], kind: str) -> LayerSpectrum:
    """A record of one layer; kind: identical, hidden, low, power or flat."""
    out, entries = shape[0], math.prod(shape)
    short, long = min(out, entries // out), max(out, entries // out)
    values, count = ([], 0) if kind == "identical" else spectrum(rng, kind, short, long)
    squares = [v * v for v in values]
    total = sum(squares)
    edge = 0.02 * (math.sqrt(short) + math.sqrt(long)) / math.sqrt(1280) if values else 0.0
    noise = sum((edge * (1 - 0.9 * i / short)) ** 2 for i in range(short)) if values else 0.0
    energy = {str(k): interval(sum(squares[:k]) / total if total else 0.0) for k in KS}
    clean = [max(0.0, s - edge**2) for s in squares[:count]]
    signal = {str(k): sum(clean[:k]) / sum(clean) for k in KS} if clean else None
    randomized = kind == "low"
    k_99 = next((i + 1 for i in range(len(squares)) if sum(squares[: i + 1]) >= 0.99 * total), None) if total else 0
    return LayerSpectrum(
        name=name, component=name.split(".")[0] if "." in name else "unet", block=block, role=role, shape=shape,
        frobenius=math.sqrt(total), relative=math.sqrt(total) / (0.9 * math.sqrt(entries) ** 0.7),
        entries=entries, identical_entries=entries if not values else rng.randint(0, entries // 20),
        noise_energy=noise, noise_edge=edge, signal_rank=None if kind == "hidden" else count,
        signal_rank_at_least=count, below_storage_precision=kind == "hidden", numerical_rank=None,
        stable_rank=total / squares[0] if values else 0.0,
        effective_rank=None if randomized else 0.7 * short if values else 0.0,
        participation_ratio=None if randomized else total**2 / sum(s * s for s in squares) if values else 0.0,
        k_90=next((i + 1 for i in range(len(squares)) if sum(squares[: i + 1]) >= 0.9 * total), 0),
        k_99=None if randomized else k_99, k_90_at_least=None, k_99_at_least=80 if randomized else None,
        signal_k_90=max(1, count // 2) if clean else 0 if not values else None,
        signal_k_99=max(1, count - 1) if clean else None,
        energy=energy, signal_energy=signal,
        gaussian_energy={str(k): min(1.0, 4 * k / (short + k)) * min(1.0, (k + 20) / (short + 20)) ** 0.3 for k in KS},
        singular_values=tuple(values[: 80 if randomized else 256]),
        solver="identical" if not values else "randomized" if randomized else "gram32",
    )  # fmt: skip


def interval(value: float) -> Interval:
    return Interval(max(0.0, value - 4e-4), value, min(1.0, value + 4e-4))


def svd_result(*, hostile: bool = True, limit: int | None = None) -> SvdResult:
    """A fine-tune of an SD1.5-like model: mostly low rank, some long tails, some identical, some below precision."""
    rng = random.Random(0)
    names = [*unet_names(), *encoder_names(), *vae_names()][:limit]
    layers = [layer(rng, *place, kind_of(rng, *place[:3])) for place in names]
    if hostile:
        layers += [layer(rng, n, f"<i>{n[:12]}", "<u>role</u>", (640, 640), "low") for n in HOSTILE]
    vectors = [
        VectorDelta(n.replace("weight", "bias"), n.split(".")[0], b, "bias", (s[0],), 0.01, rng.random() * 0.02, 3)
        for n, b, _, s in names[::3]
    ]
    weights = {x.name: (x.frobenius / x.relative) ** 2 for x in layers if x.relative}
    summary = summarise(layers, vectors, weights, 64)
    inputs = {
        "base": {"path": "v1-5-pruned.safetensors", "bytes": 2132625432, "sha256": "6ce0161689" * 6 + "abcd"},
        "tuned": {"path": "my <b>style</b>.safetensors", "bytes": 2132625612, "sha256": "e1441589a6" * 6 + "abcd"},
    }
    made = provenance("lineage svd v1-5-pruned.safetensors 'my <b>style</b>.safetensors' -o out", inputs, seconds=21.4)
    return SvdResult(
        made, "v1-5-pruned", "my <b>style</b>", 64, 1e-3, summary, tuple(layers), tuple(vectors),
        ({"name": "model_ema.<script>window.__pwned=5</script>", "side": "tuned", "reason": "not in the base"},),
        ("The noise edge is conservative by up to √2 where the tuned model was trained from the stored base.",),
    )  # fmt: skip


def kind_of(rng: random.Random, name: str, block: str, role: str) -> str:
    if name.startswith("vae"):
        return "identical"
    if role == "time" or rng.random() < 0.04:
        return "hidden"
    if role in ("ff.in", "conv") and block.startswith("OUT"):
        return "power" if rng.random() < 0.6 else "flat"
    return "low"


def merge_result(*, dry_run: bool = False, models: int = 7) -> MergeResult:
    """A chain of weighted sums, then an add-difference with a blow-up; one step with block weights and adapters."""
    names = ["nai", "bp", "nep", "Pastel-Mix", "fantasyBackground", "Myne<b>Factory</b>Base", "anylora"][:models]
    steps = [
        MergeStep(
            f"__O{i}__", "weighted_sum", round(1 / (i + 1), 5), (f"__O{i - 1}__" if i > 1 else names[0], names[i]),
            (i - 2 if i > 1 else None, None), True, {"merged": 1124, "kept": 4 + i, "unhalved": 2}, {}, {}, {},
            ({"name": "<script>window.__pwned=6</script>", "policy": "kept", "reason": "only in the first"},),
        )
        for i in range(1, models)
    ]  # fmt: skip
    steps.append(
        MergeStep(
            "AleaMix-ad", "add_difference", 3.0, (names[0], f"__O{models - 1}__", names[0]), (None, models - 2, None),
            False, {"merged": 1130, "dropped": 3}, {"IN0*": 0.5}, {"vae": names[1]}, {"style<i>.safetensors": 0.65},
        )
    )  # fmt: skip
    blocks = [
        *(f"IN{i:02d}" for i in range(12)),
        "M00",
        *(f"OUT{i:02d}" for i in range(12)),
        *(f"TE.{i:02d}" for i in range(12)),
    ]
    rng = random.Random(1)
    outputs = [
        merge_output("AleaMix", models - 2, dict.fromkeys(names, 1 / models), blocks, rng, dry_run),
        merge_output(
            "AleaMix-ad", models - 1, {n: -2.0 if n == "nai" else 3 / (models - 1) for n in names}, blocks, rng, dry_run
        ),
    ]
    inputs = [MergeInput(n, f"{n}.safetensors", "ab" * 32, 2132625432, 1130, "sd1", "epsilon") for n in names]
    made = provenance("lineage merge aleamix.txt --models models -o out", {}, seconds=12.5)
    text = "A = nai + bp @ 0.5\n<script>window.__pwned=7</script>\n"
    warned = ("nep carries v_pred, which the merge drops: the output would be read as an epsilon model.",)
    return MergeResult(made, text, "aleamix.txt", "webui", dry_run, tuple(inputs), tuple(steps), tuple(outputs), warned)


def merge_output(
    name: str, step: int, parts: dict[str, float], blocks: list[str], rng: random.Random, dry_run: bool
) -> MergeOutput:
    changes = [BlockChange(n, 0.05, {b: rng.random() * 0.1 if b != "M00" else None for b in blocks}) for n in parts]
    total = sum(map(abs, parts.values()))
    return MergeOutput(
        name, step, None if dry_run else f"{name}.safetensors", 2132625432,
        "safetensors", 1130, {"float16": 1128, "float32": 2}, parts, {"IN01": parts} if total > 2 else {},
        total, total > 2,
        () if dry_run else tuple(changes),
    )  # fmt: skip
