"""The table of inner products: exact against float64 numpy, sketched against exact, and what is computed from it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lineage import exact
from lineage.errors import LineageError
from lineage.exact import choose, exact_gram
from lineage.fingerprint import fingerprint
from lineage.gram import MOST_SPLIT, Gram, shared, sketch_gram
from lineage.keys import to_ldm
from tests.stable_diffusion import flat, states, tiny

SHAPES = {f"layers.{i}.{n}.weight": s for i in range(3) for n, s in {"up": (48, 40), "down": (40, 48)}.items()}
SHAPES |= {f"layers.{i}.norm.weight": (40,) for i in range(3)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))


def weights(seed: int, near: dict | None = None, size: float = 1.0) -> dict[str, torch.Tensor]:
    """A model of SHAPES: Gaussian, or `size` of that away from the model `near`."""
    g = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    return drawn if near is None else {name: near[name].float() + size * w for name, w in drawn.items()}


def save(folder: Path, models: dict[str, dict]) -> dict[str, Path]:
    """Name -> file of each model."""
    for name, tensors in models.items():
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in models}


def vectors(models: dict[str, dict], keys=None) -> np.ndarray:
    return np.stack(
        [np.concatenate([m[k].double().numpy().ravel() for k in keys or sorted(m)]) for m in models.values()]
    )


def squared(v: np.ndarray) -> np.ndarray:
    return ((v[:, None] - v[None]) ** 2).sum(-1)


def family(size: float = 0.01) -> dict[str, dict]:
    base = weights(0)
    return {"base": base, **{f"m{i}": weights(i, base, size) for i in (1, 2, 3)}}


def test_exact_distances_are_those_of_the_entries(tmp_path):
    models = family()
    models["half"] = {k: t.half() for k, t in models["m1"].items()}
    models["brain"] = {k: t.bfloat16() for k, t in models["m2"].items()}
    models["double"] = {k: t.double() for k, t in weights(9).items()}
    gram = exact_gram(save(tmp_path, models))
    np.testing.assert_allclose(gram.distances(), squared(vectors(models)), rtol=1e-9)
    assert gram.exact
    assert gram.names == tuple(models)


@pytest.mark.parametrize("workers", [1, 3])
def test_blocks_sum_to_the_whole(tmp_path, workers):
    models = family()
    gram = exact_gram(save(tmp_path, models), workers=workers)
    assert gram.blocks == ("layers.0", "layers.1", "layers.2")
    for block in gram.blocks:
        own = squared(vectors(models, [k for k in sorted(SHAPES) if k.startswith(block)]))
        np.testing.assert_allclose(gram.distances(block), own, rtol=1e-9)
    np.testing.assert_allclose(sum(gram.distances(b) for b in gram.blocks), gram.distances(), rtol=1e-9)
    np.testing.assert_allclose((gram.norms**2).sum(1), (vectors(models) ** 2).sum(1), rtol=1e-6)
    assert gram.entries.sum() == sum(np.prod(s) for s in SHAPES.values())


def test_float32_products_lose_little_even_between_unrelated_families(tmp_path, monkeypatch):
    """The table refers to one model, yet distances in a family far from it are 1e-6 of what it holds."""
    monkeypatch.setattr(exact, "_WIDE", 0)
    monkeypatch.setattr(exact, "_CACHED", 1 << 12)
    models = family(1e-3)
    other = {k: 3 * t for k, t in weights(50).items()}
    models |= {"other": other, **{f"o{i}": weights(i, other, 1e-3) for i in (60, 61, 62)}}
    gram = exact_gram(save(tmp_path, models))
    np.testing.assert_allclose(gram.distances(), squared(vectors(models)), rtol=2e-5)


def test_order_and_names_of_files_change_nothing(tmp_path):
    paths = save(tmp_path, family() | {"far": weights(70)})
    gram = exact_gram(paths)
    for order in itertools.islice(itertools.permutations(paths), 1, 120, 17):
        again = exact_gram({f"x{name}": paths[name] for name in order})
        np.testing.assert_array_equal(again.total, gram.part(order).total)


def test_layouts_compare(tmp_path):
    """A single file and a diffusers folder of the same model differ nowhere; their fused and flattened weights too."""
    torch.manual_seed(0)
    for kind in ("sd1", "sd2", "sdxl"):
        parts = states(tiny(kind))
        folder = tmp_path / kind
        for component, state in parts.items():
            stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
            (folder / component).mkdir(parents=True)
            save_file({k: t.contiguous() for k, t in state.items()}, folder / component / f"{stem}.safetensors")
        tuned = {c: {k: t + 0.01 * torch.randn(t.shape) if t.is_floating_point() else t for k, t in s.items()}
                 for c, s in parts.items()}  # fmt: skip
        paths = {
            "folder": folder,
            **save(tmp_path, {f"{kind}-a": to_ldm(parts, kind), f"{kind}-b": to_ldm(tuned, kind)}),
        }
        gram = exact_gram(paths)
        distances = gram.distances()
        assert distances[0, 1] == 0
        a, b = ({k: t for k, t in flat(p).items() if t.is_floating_point()} for p in (parts, tuned))
        np.testing.assert_allclose(distances[0, 2], squared(vectors({"a": a, "b": b}))[0, 1], rtol=1e-5)
        sketched = sketch_gram({name: fingerprint(path) for name, path in paths.items()})
        assert sketched.distances()[0, 1] == 0
        assert sketched.blocks == gram.blocks


def test_what_only_some_models_have_is_left_out_and_named(tmp_path):
    models = family()
    del models["m1"]["layers.0.up.weight"]
    models["m2"]["layers.1.norm.weight"] = torch.zeros(7)
    models["m3"]["extra.weight"] = torch.zeros(5, 5)
    paths = save(tmp_path, models)
    gram = exact_gram(paths)
    common = sorted(set(SHAPES) - {"layers.0.up.weight", "layers.1.norm.weight"})
    np.testing.assert_allclose(gram.distances(), squared(vectors(models, common)), rtol=1e-9)
    assert gram.left_out["layers.0.up.weight"] == "not in m1"
    assert gram.left_out["extra.weight"] == "not in base, m1, m2"
    assert gram.left_out["layers.1.norm.weight"] == "of different shapes: (40,), (7,)"
    sketched = sketch_gram({name: fingerprint(path) for name, path in paths.items()})
    assert sketched.blocks == ("layers.2",)
    assert set(gram.left_out) < set(sketched.left_out)


def test_models_without_a_common_weight_are_refused(tmp_path):
    paths = save(tmp_path, {"a": {"x.weight": torch.ones(3, 3)}, "b": {"y.weight": torch.ones(3, 3)}})
    with pytest.raises(LineageError, match="no weight is in all"):
        exact_gram(paths)
    with pytest.raises(LineageError, match="no models"):
        exact_gram({})


def test_entries_that_are_not_finite_count_as_zero(tmp_path):
    models = family()
    first = models["m1"]["layers.0.up.weight"]
    first[0, :3] = 0
    (tmp_path / "tame").mkdir()
    plain = exact_gram(save(tmp_path / "tame", models)).distances()
    first[0, :3] = torch.tensor([float("nan"), float("inf"), 1e30])
    paths = save(tmp_path, models)
    np.testing.assert_allclose(exact_gram(paths).distances(), plain, rtol=1e-9)
    assert np.isfinite(sketch_gram({name: fingerprint(path) for name, path in paths.items()}).distances()).all()


def test_sketches_agree_with_the_exact_table_within_their_standard_error(tmp_path):
    paths = save(tmp_path, family() | {"far": weights(70)})
    gram, sketched = exact_gram(paths), sketch_gram({name: fingerprint(path) for name, path in paths.items()})
    assert sketched.blocks == gram.blocks
    assert not sketched.exact
    off = ~np.eye(len(paths), dtype=bool)
    error = (sketched.distances() - gram.distances())[off] / sketched.standard_error()[off]
    assert np.abs(error).max() < 5
    np.testing.assert_array_equal(gram.standard_error(), 0)
    np.testing.assert_allclose(sketched.norms, gram.norms)


def test_many_models_share_one_block(tmp_path, monkeypatch):
    assert MOST_SPLIT == 1000
    monkeypatch.setattr("lineage.gram.MOST_SPLIT", 2)
    paths = save(tmp_path, family(0.3))
    prints = {name: fingerprint(path) for name, path in paths.items()}
    whole = sketch_gram(prints)
    monkeypatch.setattr("lineage.gram.MOST_SPLIT", 1000)
    split = sketch_gram(prints)
    assert whole.table.shape == (1, 4, 4)
    np.testing.assert_allclose(whole.distances(), split.distances(), rtol=1e-4)
    np.testing.assert_allclose(whole.relative(), split.relative(), rtol=1e-4)


def test_relative_distance_of_unrelated_models_is_about_one(tmp_path):
    relative = exact_gram(save(tmp_path, family() | {"far": weights(70)})).relative()
    assert relative[0, 4] == pytest.approx(1, abs=0.05)
    assert relative[0, 1] == pytest.approx(0.01 / 2**0.5, rel=0.05)
    assert (np.diag(relative) == 0).all()


def test_cosines_are_those_of_the_differences(tmp_path):
    models = family()
    gram = exact_gram(save(tmp_path, models))
    for i, base in enumerate(models):
        d = vectors(models) - vectors(models)[i]
        length = np.linalg.norm(d, axis=1)
        scale = np.outer(length, length)
        expected = np.divide(d @ d.T, scale, out=np.zeros_like(scale), where=scale > 0)
        np.testing.assert_allclose(gram.cosines(base), expected, atol=1e-8)


def mixture(models: dict, by: dict[str, float]) -> dict[str, torch.Tensor]:
    return {k: sum(w * models[n][k].double() for n, w in by.items()) for k in SHAPES}  # type: ignore[reportReturnType]


@pytest.mark.parametrize(
    "by", [{"m1": 0.7, "m2": 0.3}, {"m1": 1.0, "m2": 0.5, "base": -0.5}, {"m1": 0.2, "m2": 0.3, "m3": 0.5}, {"m2": 1.0}]
)
def test_affine_finds_the_coefficients_of_a_merge(tmp_path, by):
    models = family()
    models["child"] = {k: t.float() for k, t in mixture(models, by).items()}
    found = exact_gram(save(tmp_path, models)).affine("child", list(by))
    np.testing.assert_allclose(found.weights, list(by.values()), atol=1e-6)
    assert found.weights.sum() == pytest.approx(1)
    assert (found.low <= found.weights).all()
    assert (found.weights <= found.high).all()


def test_affine_sees_the_coefficients_of_each_block(tmp_path):
    models = family()
    shares = {"layers.0": 0.1, "layers.1": 0.5, "layers.2": 0.9}
    models["child"] = {k: (1 - shares[k[:8]]) * models["m1"][k] + shares[k[:8]] * models["m2"][k] for k in SHAPES}
    gram = exact_gram(save(tmp_path, models))
    for block, share in shares.items():
        assert gram.affine("child", ["m1", "m2"], block).weights[1] == pytest.approx(share, abs=1e-5)


def test_the_residual_of_a_rounded_merge_is_its_rounding_energy(tmp_path):
    half = {n: {k: t.half() for k, t in m.items()} for n, m in family(0.05).items()}
    half["child"] = {k: t.half() for k, t in mixture(half, {"m1": 0.6, "m2": 0.4}).items()}
    half["tuned"] = {k: (t + 0.01 * torch.randn(t.shape)).half() for k, t in half["child"].items()}
    gram = exact_gram(save(tmp_path, half))
    found = gram.affine("child", ["m1", "m2"])
    assert found.residual_ratio == pytest.approx(1, abs=0.1)
    assert not found.lost
    assert gram.affine("tuned", ["m1", "m2"]).residual_ratio > 30


def test_attenuation_by_the_parents_rounding_is_taken_out(tmp_path):
    """Parents rounded coarsely after the merge was made of them: plain least squares falls short, the correction does
    not; where the merge was made of the rounded parents, nothing is corrected."""
    g = torch.Generator().manual_seed(3)
    base = torch.randn(1000, 2000, generator=g)
    whole = {"a": base} | {n: base + 0.08 * torch.randn(1000, 2000, generator=g) for n in "bc"}
    by = np.array([0.47, 1.0, -0.47])

    def mixed(parents: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([w * t.double() for w, t in zip(by, parents.values(), strict=True)]).sum(0).bfloat16()

    stored = {n: t.bfloat16() for n, t in whole.items()}
    stored |= {"before": mixed(whole), "after": mixed(stored)}
    gram = exact_gram(save(tmp_path, {n: {"layer.weight": t} for n, t in stored.items()}))
    v = {n: t.double().numpy().ravel() for n, t in stored.items()}
    columns = np.stack([v["b"] - v["a"], v["c"] - v["a"]], 1)
    plain = np.linalg.lstsq(columns, v["before"] - v["a"], rcond=None)[0]
    for child, lost in (("before", True), ("after", False)):
        found = gram.affine(child, list("abc"))
        assert found.lost == lost
        assert found.residual_ratio == pytest.approx(1, abs=0.15)
        assert (found.low <= by).all()
        assert (by <= found.high).all()
    assert np.abs(gram.affine("before", list("abc")).weights[1:] - by[1:]).max() < 0.5 * np.abs(plain - by[1:]).max()


def test_a_part_is_the_table_of_its_models(tmp_path):
    gram = exact_gram(save(tmp_path, family() | {"far": weights(70)}))
    part = gram.part(["m3", "base"])
    rows = [gram.index("m3"), gram.index("base")]
    np.testing.assert_array_equal(part.distances(), gram.distances()[np.ix_(rows, rows)])
    assert part.names == ("m3", "base")
    assert isinstance(part, Gram)


def test_the_choice_says_why():
    small, large = choose([2 * 10**9] * 12), choose([2 * 10**9] * 3000)
    assert small.exact
    assert not large.exact
    assert choose([10], sketch=True).exact is False
    assert choose([10**15], sketch=False).exact is True
    for choice in (small, large):
        assert "models of" in choice.reason
        assert choice.seconds > 0


def test_shared_weights_know_their_blocks(tmp_path):
    prints = {name: fingerprint(path) for name, path in save(tmp_path, family()).items()}
    assert set(shared(prints).blocks) == set(SHAPES)
