"""Training data: every picture as often as it repeats, any step first, no trigger dropped, no bad file unnoticed."""

import io
import math
import random
import zlib
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lineage.errors import LineageError
from train import captions, data, images
from train.buckets import bucket, bucket_sizes, corner, covering
from train.config import Config, DataConfig, ModelConfig, TrainingConfig

ARTICLE = {
    "17_characters~fanart~OyamaMihari": 53,
    "19_characters~fanart~OyamaMahiro+OyamaMihari": 47,
    "1_artists~kantoku": 2190,
    "24_characters~fanart~Anisphia": 37,
    "28_characters~screenshots~Anisphia+Tilty": 24,
    "2_artists~ke-ta": 738,
    "2_artists~momoko": 762,
    "2_characters~screenshots~Euphyllia": 235,
    "3_characters~fanart~OyamaMahiro": 299,
    "3_characters~screenshots~Anisphia": 217,
    "3_characters~screenshots~OyamaMahiro": 210,
    "3_characters~screenshots~OyamaMahiro+OyamaMihari": 199,
    "3_characters~screenshots~OyamaMihari": 177,
    "4_characters~screenshots~Anisphia+Euphyllia": 165,
    "57_characters~fanart~Euphyllia": 16,
    "5_artists~mochizuki_kei": 426,
    "5_artists~onono_imoko": 373,
    "7_characters~screenshots~Tilty": 95,
    "9_characters~fanart~Anisphia+Euphyllia": 97,
}


def png(size=(64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def config(folder: Path, **more) -> Config:
    """Settings by the names of their keys in [data] and [training]."""
    training = {k: more.pop(k) for k in ("batch", "epochs", "accumulation", "seed") if k in more}
    steps: dict[str, Any] = {} if "epochs" in training else {"steps": 10}
    settings: dict[str, Any] = {"resolution": 64, **more}
    data = DataConfig(folder=folder, **settings)
    return Config(ModelConfig(base=Path("base.safetensors")), data, training=TrainingConfig(**steps, **training))


TINY = png((2, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three folders of noise in three shapes; some have captions."""
    root = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for name, many in {"2_tilty": 5, "1_by kantoku": 4, "3_mahiro, 1girl": 2}.items():
        (root / name).mkdir()
        for i in range(many):
            size = draw.choice([(64, 64), (128, 40), (40, 128)])
            Image.effect_noise(size, 90).save(root / name / f"{i}.png")
            if name == "2_tilty":
                (root / name / f"{i}.txt").write_text("1girl, Tilty, white_hair, smile, dress\n", encoding="utf-8")
    return root


LOW: dict[str, Any] = {"bucket_min": 64, "bucket_max": 256, "bucket_step": 8, "resolution": 96}
VARIED: dict[str, Any] = LOW | {
    "shuffle": True,
    "tag_dropout": 0.4,
    "caption_dropout": 0.2,
    "flip": True,
    "trigger_words": ("tilty",),
}


def told(batch: data.Batch):
    return batch.keys, batch.captions, batch.weights.tolist(), batch.sizes.tolist()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_any_step_can_be_the_first(folder, batch, accumulation):
    c = config(folder, batch=batch, accumulation=accumulation, **VARIED)
    plan = data.plan(c)
    whole = [told(b) for b in islice(data.batches(plan, c, 0), 60)]
    for start in (1, 5, 13):
        tail = [told(b) for b in islice(data.batches(plan, c, start), 60 - start * accumulation)]
        assert tail == whole[start * accumulation :]
    other = replace(c, training=replace(c.training, seed=1))
    assert [told(b) for b in islice(data.batches(plan, other), 60)] != whole


def test_every_epoch_and_seed_shows_another_caption(tmp_path):
    (tmp_path / "1_a, b, c, d, e, f, g, h").mkdir()
    (tmp_path / "1_a, b, c, d, e, f, g, h" / "x.png").write_bytes(TINY)
    shown = []
    for seed in range(5):
        c = config(tmp_path, shuffle=True, seed=seed)
        shown += [batch.captions for batch in islice(data.batches(data.plan(c), c), 5)]
    assert len(set(shown)) > 20


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_epoch_shows_every_picture_as_often_as_it_repeats(folder, batch):
    c = config(folder, batch=batch, epochs=3, **LOW)
    plan = data.plan(c)
    assert plan.steps == 3 * plan.batches_per_epoch == 3 * plan.steps_per_epoch
    stream = data.batches(plan, c)
    orders = []
    for _ in range(3):
        epoch = list(islice(stream, plan.batches_per_epoch))
        assert Counter(p for b in epoch for p in b.pictures) == {p: p.repeats for p in plan.pictures}
        assert all(len({p.bucket for p in b.pictures}) == 1 and 1 <= len(b) <= batch for b in epoch)
        orders.append([b.keys for b in epoch])
    assert orders[0] != orders[1] != orders[2]


def test_the_articles_folders(tmp_path):
    for name, many in ARTICLE.items():
        (tmp_path / name).mkdir()
        for i in range(many):
            (tmp_path / name / f"{i}.png").write_bytes(TINY)
    plan = data.plan(config(tmp_path, epochs=1))
    assert len(plan.pictures) == 6360
    assert plan.steps == plan.steps_per_epoch == plan.shown(False) == 19425
    assert plan.metadata["ss_dataset_dirs"] == {
        name: {"n_repeats": int(name.split("_")[0]), "img_count": many} for name, many in ARTICLE.items()
    }


def test_regularisation_is_weighted_and_counted_apart(folder, tmp_path):
    (tmp_path / "2_girl").mkdir()
    (tmp_path / "2_girl" / "a.png").write_bytes(png())
    c = config(folder, reg=tmp_path, reg_weight=0.25, batch=3)
    plan = data.plan(c)
    assert (plan.shown(False), plan.shown(True)) == (20, 2)
    for batch in islice(data.batches(plan, c), plan.batches_per_epoch):
        assert batch.weights.tolist() == [0.25 if p.regularisation else 1.0 for p in batch.pictures]


def test_a_plan_is_named_by_what_decides_its_batches(folder):
    plan = data.plan(config(folder))
    assert plan.fingerprint == data.plan(config(folder, batch=4)).fingerprint
    assert plan.fingerprint != data.plan(config(folder, prune={"tilty": ("smile",)})).fingerprint


# Captions

words = st.text("abc _", min_size=1).filter(lambda w: w.strip())


@given(
    tags=st.lists(words, min_size=1, max_size=8, unique_by=captions.plain),
    keep=st.integers(0, 3),
    seed=st.integers(0, 99),
    dropout=st.floats(0, 1),
    chosen=st.data(),
)
def test_what_is_kept_stands_first_and_is_never_dropped(tags, keep, seed, dropout, chosen):
    triggers = tuple(chosen.draw(st.lists(st.sampled_from(tags), unique=True)))
    settings = DataConfig(Path(), keep_tokens=keep, trigger_words=triggers, tag_dropout=dropout, shuffle=True)
    caption = captions.parse(",".join(tags), settings)
    clean = [t.strip() for t in tags]
    kept = [t for i, t in enumerate(clean) if i < keep or t in {w.strip() for w in triggers}]
    drawn = caption.drawn(settings, random.Random(seed)).split(", ")
    assert drawn[: len(kept)] == kept or not kept
    rest = [t for t in drawn[len(kept) :] if t]
    assert set(rest) <= set(clean) - set(kept)
    assert len(rest) == len(set(rest))


def test_dropped_tags_come_as_often_as_asked():
    settings = DataConfig(Path(), tag_dropout=0.3, caption_dropout=0.2)
    caption = captions.parse("a, b, c, d", settings)
    drawn = [caption.drawn(settings, random.Random(i)) for i in range(4000)]
    assert sum(not d for d in drawn) / 4000 == pytest.approx(0.2 + 0.8 * 0.3**4, abs=0.03)
    assert sum("b" in d for d in drawn) / 4000 == pytest.approx(0.8 * 0.7, abs=0.03)
    assert all(list(d) == sorted(d) for d in (d.replace(", ", "") for d in drawn))


def test_what_should_attach_to_the_trigger_is_pruned_where_the_trigger_is():
    settings = DataConfig(Path(), prune={"Oyama_Mahiro": ("white_hair",), "*": ("solo",)})
    assert captions.parse("oyama mahiro, white hair, smile, solo", settings).tags == ("oyama mahiro", "smile")
    assert captions.parse("tilty, white hair, solo", settings).tags == ("tilty", "white hair")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "class tokens"),
        ({".txt": b"a, b\nsecond line"}, "a, b"),
        ({".caption": b"c"}, "c"),
        ({".txt": b"a", ".caption": b"c"}, "a"),
        ({".txt": b"\xef\xbb\xbf\n a \n"}, "a"),
        ({".txt": b""}, ""),
    ],
)
def test_where_a_caption_comes_from(tmp_path, files, expected):
    for suffix, text in files.items():
        (tmp_path / f"x{suffix}").write_bytes(text)
    assert captions.read_caption(tmp_path / "x.png", "class tokens") == expected


@pytest.mark.parametrize(("text", "why"), [(b"\xff\xfe", "UTF-8"), (b"a" * 70000, "too long")])
def test_a_bad_caption_is_an_error(tmp_path, text, why):
    (tmp_path / "x.txt").write_bytes(text)
    with pytest.raises(LineageError, match=why):
        captions.read_caption(tmp_path / "x.png", "")


# Buckets

sides = st.integers(1, 5000)


@given(
    resolution=st.sampled_from([64, 256, 512, 640, 768, 1024]),
    low=st.sampled_from([64, 128, 256]),
    high=st.sampled_from([512, 1024, 2048]),
)
def test_buckets_share_one_area(resolution, low, high):
    found = bucket_sizes(resolution, low, high, 64)
    assert (resolution, resolution) in found
    for width, height in found:
        assert (height, width) in found
        assert width % 64 == height % 64 == 0
        assert width * height <= resolution**2
        # less than one more step fits, unless the largest side forbids it
        assert max(width, height) == high or (min(width, height) + 64) * max(width, height) > resolution**2


def test_buckets_of_512_are_the_well_known_ones():
    assert bucket_sizes(512) == sorted(
        {(512, 512)}
        | {s for a in [(256, 1024), (320, 768), (384, 640), (448, 576)] for s in (a, a[::-1])}
        | {(832, 256), (896, 256), (960, 256), (256, 832), (256, 896), (256, 960), (704, 320), (320, 704), (512, 512)}
        | {(640, 384), (576, 448)}
    )


@given(width=sides, height=sides, upscale=st.booleans())
@settings(deadline=None)
def test_a_picture_covers_its_bucket_and_turns_with_it(width, height, upscale):
    chosen = DataConfig(Path(), upscale=upscale)
    target = bucket((width, height), chosen)
    assert bucket((height, width), chosen) == target[::-1]
    covered = covering((width, height), target)
    assert all(c >= t for c, t in zip(covered, target, strict=True))
    assert any(c == t for c, t in zip(covered, target, strict=True))
    left, top = corner(covered, target)
    assert 0 <= left <= covered[0] - target[0]
    assert 0 <= top <= covered[1] - target[1]
    if upscale:
        assert all(
            abs(math.log(target[0] / target[1] * height / width)) <= abs(math.log(w / h * height / width)) + 1e-12
            for w, h in bucket_sizes(512)
        )
    elif width >= 64 and height >= 64:
        assert target[0] <= width
        assert target[1] <= height


# Pictures


def read(path: Path, size=(8, 8), flip=False) -> torch.Tensor:
    """0 to 255, (3, height, width)."""
    return ((images.read_pixels(path, size, flip) + 1) * 127.5).round()


def save(path: Path, image: Image.Image, **more) -> Path:
    image.save(path, **more)
    return path


CLEAR = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
MODES = {
    "rgb": (Image.new("RGB", (8, 8), (10, 20, 30)), (10, 20, 30)),
    "clear": (CLEAR, (255, 255, 255)),
    "half clear": (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), (127, 127, 127)),
    "palette": (Image.new("RGB", (8, 8), (10, 20, 30)).quantize(4), (10, 20, 30)),
    "grey": (Image.new("L", (8, 8), 77), (77, 77, 77)),
    "grey and clear": (Image.new("LA", (8, 8), (77, 0)), (255, 255, 255)),
    "one bit": (Image.new("1", (8, 8), 1), (255, 255, 255)),
    "16 bits": (Image.fromarray(np.full((8, 8), 0x4D4D, np.uint16)), (77, 77, 77)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(tmp_path, mode):
    image, colour = MODES[mode]
    file = save(tmp_path / "x.png", image)
    images.check(file)
    assert torch.equal(read(file), torch.tensor(colour).float()[:, None, None].expand(3, 8, 8))


def test_a_transparent_palette_lies_on_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    assert read(save(tmp_path / "x.png", image, transparency=0)).eq(255).all()


def test_cmyk(tmp_path):
    file = save(tmp_path / "x.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 0)))
    images.check(file)
    assert read(file).eq(255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_held_otherwise(tmp_path, orientation):
    """The dark corner is where the viewer sees it, and the size is the one that is seen."""
    pixels = np.full((8, 16, 3), 255, np.uint8)
    pixels[:4, :4] = 0
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    file = save(tmp_path / "x.png", Image.fromarray(pixels), exif=exif)
    assert images.read_size(file) == ((8, 16) if orientation > 4 else (16, 8))
    turned = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"} | {
        5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"
    }  # fmt: skip
    shown = read(file, images.read_size(file))[0]
    rows, columns = turned[orientation].split()
    dark = shown[0 if rows == "top" else -1, 0 if columns == "left" else -1]
    assert dark == 0
    assert shown.eq(0).sum() == 16


def test_the_middle_is_cut_out_and_mirrored(tmp_path):
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None], (8, 32, 3)).copy()
    file = save(tmp_path / "x.png", Image.fromarray(ramp))
    assert torch.equal(read(file)[0, 0], torch.arange(12, 20).float())
    assert torch.equal(read(file, flip=True), read(file).flip(2))


@pytest.mark.parametrize(("flip", "left"), [(False, 2), (True, 3)])
def test_sizes_say_what_was_cut(folder, flip, left):
    picture = replace(data.plan(config(folder)).pictures[0], size=(133, 64), bucket=(128, 64))
    batch = data.Batch((picture,), (flip,), ("",), torch.ones(1))
    assert batch.sizes.tolist() == [[64, 133, 0, left, 64, 128]]


def whole(kind: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, kind)
    return file.getvalue()


def claiming(side: int) -> bytes:
    """A PNG whose header claims `side` x `side` pixels."""
    tiny = bytearray(TINY)
    tiny[16:24] = side.to_bytes(4, "big") * 2
    tiny[29:33] = zlib.crc32(tiny[12:29]).to_bytes(4, "big")
    return bytes(tiny)


BAD = {
    "text": (b"no picture", "not a picture"),
    "empty": (b"", "not a picture"),
    "cut png": (whole("PNG")[:-700], "damaged"),
    "cut jpeg": (whole("JPEG")[:-700], "damaged"),
    "cut webp": (whole("WEBP")[:-700], "damaged|not a picture"),
    "flipped bit": (b"".join((whole("PNG")[:900], b"\x00\xff\x11", whole("PNG")[903:])), "damaged"),
    "bomb": (claiming(40000), "too large"),
    "small bomb": (claiming(9400), "is 9400 x 9400 pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_found_before_training(tmp_path, kind):
    content, why = BAD[kind]
    (tmp_path / "1_x").mkdir()
    (tmp_path / "1_x" / "good.png").write_bytes(TINY)
    bad = tmp_path / "1_x" / "z.png"
    bad.write_bytes(content)
    with pytest.raises(LineageError, match=why) as error:
        data.plan(config(tmp_path))
    assert str(bad) in str(error.value)


def test_empty_folders_are_errors(tmp_path):
    with pytest.raises(LineageError, match="holds no pictures"):
        data.plan(config(tmp_path))
    (tmp_path / "1_x").mkdir()
    with pytest.raises(LineageError, match=r"1_x.*holds no pictures"):
        data.plan(config(tmp_path))
    with pytest.raises(LineageError, match="cannot be read as a folder"):
        data.plan(config(tmp_path / "missing"))


def test_what_lies_beside_the_folders_is_named(tmp_path):
    for name in ("loose", "0_off", "1_on"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(TINY)
    (tmp_path / "a.png").write_bytes(TINY)
    (tmp_path / "notes.md").write_text("", encoding="utf-8")
    plan = data.plan(config(tmp_path))
    assert [p.folder for p in plan.pictures] == ["1_on"]
    assert [note.split(":")[0] for note in plan.notes] == ["0_off", "a.png", "loose"]


def test_links_in_circles_end(tmp_path):
    (tmp_path / "1_x").mkdir()
    (tmp_path / "1_x" / "a.png").write_bytes(TINY)
    try:
        (tmp_path / "1_x" / "1_again").symlink_to(tmp_path, target_is_directory=True)
        (tmp_path / "1_x" / "b.png").symlink_to(tmp_path / "1_x" / "b.png")
    except OSError:
        pytest.skip("no links here")
    with pytest.raises(LineageError, match=r"b\.png"):
        data.plan(config(tmp_path))
    (tmp_path / "1_x" / "b.png").unlink()
    assert len(data.plan(config(tmp_path)).pictures) == 1


# Latents


def test_kept_latents_are_the_latents(folder):
    c = config(folder, batch=4, **VARIED)
    plan = data.plan(c)
    kept: dict = {}
    asked = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        asked.append(len(pixels))
        return encode(pixels)

    for batch in islice(data.batches(plan, c), 3 * plan.batches_per_epoch):
        assert torch.equal(data.latents(batch, counted, kept), encode(batch.pixels))
    assert asked == [1] * len(kept)
    assert len(plan.pictures) < len(kept) <= 2 * len(plan.pictures)
