"""One read of a file: statistics against numpy, hashes, the sketch's laws, and the cache."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lineage import fingerprint as module
from lineage.cache import Cache, cached_sha256, default_folder
from lineage.errors import LineageError
from lineage.fingerprint import fingerprint, fingerprints
from lineage.hashing import sha256
from lineage.keys import to_ldm
from lineage.moments import FEW, PART, moments
from lineage.sketch import LEAST, ROW, SLOTS, Hash, allocate, fold
from tests.stable_diffusion import states, tiny

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
OTHERS = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def draw(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (10 * torch.randn(n, generator=g) + 3).to(dtype) if dtype != torch.bool else torch.rand(n, generator=g) > 0.3


def save(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({k.replace("__", "."): t.contiguous() for k, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=str)
@pytest.mark.parametrize("n", [7, FEW + 1, 2 * PART + 5])
def test_moments_are_those_of_the_values(dtype, n):
    x = draw(n, dtype)
    x[0] = 0
    found, v = moments(x), x.double().numpy()
    assert found.norm == pytest.approx(np.linalg.norm(v))
    assert found.mean == pytest.approx(v.mean(), rel=1e-6)
    assert found.std == pytest.approx(v.std(), rel=1e-6)
    assert found.skewness == pytest.approx(scipy.stats.skew(v), rel=1e-5, abs=1e-7)
    assert found.kurtosis == pytest.approx(scipy.stats.kurtosis(v, fisher=False), rel=1e-5)
    assert found.largest == np.abs(v).max()
    assert found.zeros == (v == 0).sum()
    assert found.wild == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("n", [9, 70_000])
def test_rounding_energy_is_that_of_numpys_spacing(dtype, n):
    x = (np.random.default_rng(1).standard_normal(n) * 0.02).astype(dtype)
    expected = (np.spacing(np.abs(x)).astype(np.float64) ** 2).sum() / 12
    assert moments(torch.from_numpy(x)).rounding_energy == pytest.approx(expected, rel=1e-6, abs=0)


def test_rounding_energy_is_what_rounding_costs():
    whole = draw(200_000)
    for dtype, near in ((torch.float16, 0.01), (torch.bfloat16, 0.01), (torch.float8_e4m3fn, 0.1)):
        lost = float((whole.double() - whole.to(dtype).double()).square().sum())
        assert moments(whole.to(dtype)).rounding_energy == pytest.approx(lost, rel=near)


@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=str)
@pytest.mark.parametrize("n", [50, FEW + 1, PART + 5])
def test_the_values_hash_knows_no_order_but_every_value(dtype, n):
    x = draw(n, dtype)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[n // 2] = x[n // 2] == 0
    assert moments(x[order]).values_hash == moments(x).values_hash
    assert moments(other).values_hash != moments(x).values_hash


def test_the_hash_of_a_tensor_knows_the_order(tmp_path):
    x = draw(PART + 50)
    prints = [fingerprint(save(tmp_path / f"{i}.safetensors", w=t)).tensors[0] for i, t in enumerate((x, x.flip(0), x))]
    assert prints[0].hash == prints[2].hash != prints[1].hash
    assert prints[0].values_hash == prints[1].values_hash


def test_constant_tensors_have_no_shape():
    for value in (0.0, 0.3):
        found = moments(torch.full((1000,), value))
        assert (found.std, found.skewness, found.kurtosis) == pytest.approx((0, 0, 0), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [100, ROW + 100, PART + 100])
def test_entries_that_are_not_finite_poison_nothing(tmp_path, dtype, n):
    x = draw(n, dtype)
    x[3:6] = 0
    tame = fingerprint(save(tmp_path / "tame.safetensors", a__weight=x, b__weight=draw(40)))
    x[3:6] = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=dtype)
    wild = fingerprint(save(tmp_path / "wild.safetensors", a__weight=x, b__weight=draw(40)))
    a, b = tame.tensors[0], wild.tensors[0]
    assert b.wild == 3
    assert (b.norm, b.largest) == (pytest.approx(a.norm), a.largest)
    assert np.isfinite([b.mean, b.std, b.skewness, b.kurtosis, b.rounding_energy]).all()
    np.testing.assert_array_equal(wild.sketch, tame.sketch)
    assert wild.tensors[1] == tame.tensors[1]


def model(seed: int = 0, near: dict | None = None, size: float = 0.01) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {f"layers.{i}.{n}": s for i in range(4) for n, s in (("w", (130, 260)), ("v", (300, 40)), ("b", (300,)))}
    drawn = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return drawn if near is None else {k: near[k] + size * t for k, t in drawn.items()}


def test_the_sketch_is_linear(tmp_path):
    """The merge of two models has the merge of their sketches."""
    a, b = model(1), model(2)
    merged = {k: 0.7 * a[k] + 0.3 * b[k] for k in a}
    sketches = [fingerprint(save(tmp_path / f"{i}.safetensors", **m)).sketch for i, m in enumerate((a, b, merged))]
    np.testing.assert_allclose(sketches[2], 0.7 * sketches[0] + 0.3 * sketches[1], atol=2e-5)
    assert np.abs(sketches[2] - sketches[0]).max() > 0.1


def test_order_and_dtype_of_a_file_change_no_sketch(tmp_path):
    half = {k: t.half() for k, t in model(1).items()}
    prints = [
        fingerprint(save(tmp_path / "a.safetensors", **half)),
        fingerprint(
            save(tmp_path / "b.safetensors", **dict(reversed({k: t.float() for k, t in half.items()}.items())))
        ),
        fingerprint(save(tmp_path / "c.safetensors", zeros=torch.zeros(3, dtype=torch.int64), **half)),
    ]
    torch.save(dict(reversed(half.items())), tmp_path / "d.ckpt")
    prints.append(fingerprint(tmp_path / "d.ckpt"))
    for other in prints[1:]:
        np.testing.assert_array_equal(other.sketch, prints[0].sketch)
    assert prints[3].tensors == prints[0].tensors
    assert len({p.sha256 for p in prints}) == 4


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_single_file_and_folder_have_one_fingerprint(tmp_path, kind):
    parts = states(tiny(kind))
    for component, state in parts.items():
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        (tmp_path / kind / component).mkdir(parents=True)
        save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / kind / component / f"{stem}.safetensors")
    save_file(to_ldm(parts, kind), tmp_path / "one.safetensors")
    one, folder = fingerprint(tmp_path / "one.safetensors"), fingerprint(tmp_path / kind)
    weights = [t for t in folder.tensors if t.compared]
    assert [t for t in one.tensors if t.compared] == weights
    assert (one.slots, one.architecture) == (folder.slots, folder.architecture)
    np.testing.assert_array_equal(one.sketch, folder.sketch)
    assert folder.sha256 == sha256(tmp_path / kind)
    assert one.sha256 == sha256(tmp_path / "one.safetensors")


def structured() -> dict[str, torch.Tensor]:
    """Differences of models as they come: Gaussian, low-rank, sparse, with row scales, one-sided."""
    g = torch.Generator().manual_seed(5)
    m, n = 640, 1280
    return {
        "gaussian": torch.randn(m, n, generator=g),
        "rank 1": torch.randn(m, 1, generator=g) @ torch.randn(1, n, generator=g),
        "rank 8": torch.randn(m, 8, generator=g) @ torch.randn(8, n, generator=g),
        "sparse": torch.randn(m, n, generator=g) * (torch.rand(m, n, generator=g) < 0.01),
        "row-scaled": torch.randn(m, n, generator=g) * torch.randn(m, 1, generator=g).exp(),
        "equal rows": torch.randn(1, n, generator=g).expand(m, n),
        "constant": torch.ones(m, n),
    }


@pytest.mark.parametrize("kind", structured())
@pytest.mark.parametrize("slots", [1 << 12, SLOTS])
def test_squared_lengths_survive_sketching(kind, slots):
    """On average exactly, with the deviation of a CountSketch, sqrt(2 / slots)."""
    x = structured()[kind].reshape(-1)
    errors = []
    for seed in range(500, 540):
        h = Hash("layer.weight", len(x), slots, seed)
        h.take(x)
        errors.append((h.sketch() ** 2).sum() / float(x.double().square().sum()) - 1)
    ideal = (2 / slots) ** 0.5
    assert np.std(errors) < 1.5 * ideal
    assert abs(np.mean(errors)) < 4 * ideal / 40**0.5


def test_entries_taken_in_parts_or_at_once_have_one_sketch():
    x = draw(3 * ROW + 17)
    whole, parts = Hash("w", len(x), 256), Hash("w", len(x), 256)
    whole.take(x)
    for part in x.split(ROW):
        parts.take(part)
    np.testing.assert_array_equal(whole.sketch(), parts.sketch())


def test_parameters_meet_different_slots_and_seeds_are_different_hashes():
    x = draw(500)
    sketches = {}
    for name, seed in (("a", 0), ("b", 0), ("a", 1)):
        h = Hash(name, 500, 64, seed)
        h.take(x)
        sketches[name, seed] = tuple(h.sketch())
    assert len(set(sketches.values())) == 3


def test_equal_rows_do_not_meet_with_equal_signs():
    """With few sequences of signs, some of these hashes would add two whole rows up: errors of 3 %."""
    x = torch.ones(64 * ROW)
    for seed in range(900, 940):
        h = Hash("w", len(x), SLOTS, seed)
        h.take(x)
        assert (h.sketch() ** 2).sum() == pytest.approx(len(x), rel=5 * (2 / SLOTS) ** 0.5)


def test_small_parameters_are_spread_over_the_slots_and_sum_exactly():
    sketches = []
    for i in range(300):
        h = Hash(f"layers.{i}.scale", 1, 512)
        h.take(torch.tensor([0.1 * 10.0 ** -(i % 15)], dtype=torch.float64))
        sketches.append(h.sketch())
    assert np.count_nonzero(sum(sketches)) > 150
    np.testing.assert_array_equal(sum(sketches), sum(reversed(sketches)))


@pytest.mark.parametrize("n", [100, 2 * ROW])
def test_a_folded_sketch_is_the_sketch_with_fewer_slots(n):
    x = draw(n)
    wide, narrow = Hash("w", n, 1024), Hash("w", n, 128)
    wide.take(x)
    narrow.take(x)
    np.testing.assert_allclose(fold(wide.sketch(), 128), narrow.sketch(), atol=1e-4)


@given(st.dictionaries(st.text(max_size=4), st.integers(1, 10**9), min_size=1, max_size=300))
@settings(max_examples=60, deadline=None)
def test_slots_follow_the_entries(entries):
    given_slots = allocate(entries)
    assert set(given_slots) == set(entries)
    assert sum(given_slots.values()) <= SLOTS
    assert all(n >= LEAST and n & (n - 1) == 0 for n in given_slots.values())
    ranked = sorted(entries, key=lambda b: entries[b])
    assert all(given_slots[a] <= given_slots[b] or entries[a] == entries[b]
               for a, b in pairwise(ranked))  # fmt: skip


def test_a_model_of_very_many_modules_is_split_by_component(tmp_path):
    tensors = {f"m{i}.weight": torch.ones(2) for i in range(module.MOST_BLOCKS + 1)}
    assert fingerprint(save(tmp_path / "many.safetensors", **tensors)).blocks == ("model",)


def test_the_second_run_reads_no_file(tmp_path, monkeypatch):
    path = save(tmp_path / "m.safetensors", **model())
    first = fingerprint(path)
    monkeypatch.setattr(module, "open_checkpoint", None)
    second = fingerprint(path)
    assert vars(second) | {"sketch": 0} == vars(first) | {"sketch": 0}
    np.testing.assert_array_equal(second.sketch, first.sketch)
    monkeypatch.setattr("lineage.hashing.sha256", None)
    assert cached_sha256(path) == first.sha256


def test_a_changed_file_is_read_again(tmp_path):
    path = save(tmp_path / "m.safetensors", **model(1))
    first = fingerprint(path)
    when = path.stat()
    save(path, **model(2))
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert fingerprint(path).sha256 != first.sha256
    assert cached_sha256(path) == sha256(path)


def test_a_copy_of_a_known_file_is_hashed_but_not_measured(tmp_path, monkeypatch):
    path = save(tmp_path / "m.safetensors", **model(1))
    first = fingerprint(path)
    (tmp_path / "copy.safetensors").write_bytes(path.read_bytes())
    cached_sha256(tmp_path / "copy.safetensors")
    monkeypatch.setattr(module, "open_checkpoint", None)
    assert fingerprint(tmp_path / "copy.safetensors").sha256 == first.sha256


def test_shards_count_not_their_index_alone(tmp_path):
    """Two models with one and the same index of shards are two models."""
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        whole = model(seed)
        for i, name in enumerate(whole):
            save(tmp_path / folder / f"{i}.safetensors", **{name: whole[name]})
        index = json.dumps({"weight_map": {name: f"{i}.safetensors" for i, name in enumerate(whole)}})
        (tmp_path / folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    a, b = (fingerprint(tmp_path / f / "model.safetensors.index.json") for f in "ab")
    assert a.sha256 != b.sha256
    assert a.bytes > sum(t.nbytes for t in model().values())
    assert fingerprint(save(tmp_path / "one.safetensors", **model(2))).tensors == b.tensors
    assert fingerprint(tmp_path / "b" / "model.safetensors.index.json").sha256 == b.sha256


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:]])
def test_damaged_entries_are_made_anew(tmp_path, own_cache, damage):
    path = save(tmp_path / "m.safetensors", **model())
    first = fingerprint(path)
    entries = [e for e in own_cache.rglob("*") if e.is_file()]
    assert len(entries) == 2
    for entry in entries:
        entry.write_bytes(damage(entry.read_bytes()))
        second = fingerprint(path)
        assert (second.sha256, second.tensors) == (first.sha256, first.tensors)
        assert Cache._read(entry) is not None


def test_an_entry_is_small(tmp_path, own_cache):
    tensors = {f"layers.{i // 20}.module{i % 20}.weight": torch.randn(8, 8) for i in range(1130)}
    fingerprint(save(tmp_path / "m.safetensors", **tensors))
    assert sum(e.stat().st_size for e in own_cache.rglob("*") if e.is_file()) < 600_000


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "occupied").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "occupied"))
    path = save(tmp_path / "m.safetensors", **model())
    assert fingerprint(path).sha256 == fingerprint(path).sha256


def test_concurrent_writers_leave_whole_entries(tmp_path):
    path = save(tmp_path / "m.safetensors", **model())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: fingerprint(path), range(16)))
    assert len({f.sha256 for f in found}) == 1
    assert fingerprint(path).tensors == found[0].tensors
    assert not list(Path(default_folder()).rglob("*lineage-part"))


def test_a_killed_writer_leaves_whole_entries(tmp_path):
    code = (
        "import sys\nfrom lineage.cache import Cache\ncache = Cache(sys.argv[1])\nprint('on', flush=True)\n"
        "while True:\n  for i in range(5): cache.store('k', f'aa{i}', bytes([i]) * 500_000)"
    )
    for wait in (0.01, 0.03):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout
        writer.stdout.readline()
        try:
            writer.wait(wait)
        except subprocess.TimeoutExpired:
            writer.kill()
        writer.communicate()
        cache = Cache(tmp_path)
        assert all(cache.load("k", f"aa{i}") in (None, bytes([i]) * 500_000) for i in range(5))
        cache.store("k", "aa0", bytes([0]) * 500_000)
        assert cache.load("k", "aa0") == bytes([0]) * 500_000


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "m.safetensors", **model())
    whole = module._print

    def slow(*arguments):
        os.utime(path, ns=(1, 1))
        return whole(*arguments)

    monkeypatch.setattr(module, "_print", slow)
    with pytest.raises(LineageError, match="changed while it was read"):
        fingerprint(path)


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "xdg"}, Path("xdg/lineage")),
        ("linux", {}, Path.home() / ".cache" / "lineage"),
        ("darwin", {}, Path.home() / "Library" / "Caches" / "lineage"),
        ("darwin", {"LINEAGE_CACHE": "own"}, Path("own")),
    ],
)
def test_the_cache_lies_where_the_system_has_it(monkeypatch, system, variables, expected):
    for name in ("LINEAGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert default_folder() == expected


def test_many_files_at_once_and_what_cannot_be_read(tmp_path):
    good = [save(tmp_path / f"{i}.safetensors", **model(i)) for i in range(2)]
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x10" + bytes(100))
    told = []
    found, failed = fingerprints([*good, bad], progress=lambda *step: told.append(step))
    assert list(found) == good
    assert "bad.safetensors" in failed[bad]
    assert [done for done, _, _ in told] == [1, 2, 3]
