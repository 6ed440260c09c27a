"""Laws of sampling: prompt weights, chunks of long prompts, grids over two axes, and where their labels stand."""

import io
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from training_bases import KINDS, write_file

import cli
from lineage.errors import LineageError
from train import prompts, sheet
from train.config import ModelConfig, NetworkConfig
from train.embeddings import wear
from train.models import Base, open_base
from train.networks import Network
from train.prompts import CHUNK, chunks, parse, weighted
from train.sample import Drawn, Request, draw_grid, grid, names

# --- prompts


def oracle(prompt: str) -> tuple[str, list[float]]:
    """Text and the weight of each letter, letter by letter: one stack for each kind of bracket."""
    text, weights, stacks, i = "", [], {"(": [], "[": []}, 0
    while i < len(prompt):
        c = prompt[i]
        number = re.match(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)", prompt[i:])
        if c == "\\":
            i += 1
            if i < len(prompt) and prompt[i] in "()[]\\":
                text, weights, i = text + prompt[i], [*weights, 1.0], i + 1
            continue
        if c in stacks:
            stacks[c].append(len(text))
        elif number and stacks["("]:
            start = stacks["("].pop()
            weights[start:] = [w * float(number[1]) for w in weights[start:]]
            i += len(number[0]) - 1
        elif c in ")]" and stacks["(" if c == ")" else "["]:
            start = stacks["(" if c == ")" else "["].pop()
            weights[start:] = [w * (1.1 if c == ")" else 1 / 1.1) for w in weights[start:]]
        else:
            text, weights = text + c, [*weights, 1.0]
        i += 1
    for bracket, start in ((b, s) for b, starts in stacks.items() for s in starts):
        weights[start:] = [w * (1.1 if bracket == "(" else 1 / 1.1) for w in weights[start:]]
    return text, weights


@given(st.text(r"ab ,:.1()[]\+", max_size=24) | st.text(max_size=12))
def test_weights_are_those_of_each_letter(prompt: str):
    found = parse(prompt)
    text, weights = oracle(prompt)
    assert "".join(piece for piece, _ in found) == text
    assert [w for piece, w in found for _ in piece] == pytest.approx(weights)
    assert all(piece for piece, _ in found)


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("plain", [("plain", 1.0)]),
        ("a (b:1.2) c", [("a ", 1.0), ("b", 1.2), (" c", 1.0)]),
        ("((a))", [("a", 1.1**2)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("a (b", [("a ", 1.0), ("b", 1.1)]),
        ("(x, [y]:1.5)", [("x, ", 1.5), ("y", 1.5 / 1.1)]),
        ("(a:1.0)", [("a", 1.0)]),
        (r"fate_\(series\)", [("fate_(series)", 1.0)]),
        (r"\m/", [("m/", 1.0)]),
        ("a:b) 1.2)", [("a:b) 1.2)", 1.0)]),
        ("", []),
    ],
)
def test_weights_are_read_as_the_web_ui_does(prompt: str, pieces: list[tuple[str, float]]):
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


class Letters:
    """A tokenizer whose tokens are letters."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 3

    def __call__(self, texts, **options):
        return SimpleNamespace(input_ids=[[ord(c) for c in text] for text in texts])


@given(st.lists(st.text("ab,", max_size=200) | st.text("ab,", min_size=76, max_size=200), min_size=1, max_size=3))
def test_chunks_hold_every_token_in_order_and_end_at_commas(texts: list[str]):
    ids, weights = chunks(Letters(), texts)
    assert ids.shape == weights.shape == (len(ids), len(texts), CHUNK + 2)
    assert (ids[..., 0] == 1).all()
    assert (weights == 1).all()
    for n, text in enumerate(texts):
        rows = ["".join(chr(i) for i in row if i > 3) for row in ids[:, n].tolist()]
        assert "".join(rows) == text
        for row, after in itertools.pairwise(rows):
            if after and after[0] != ",":
                assert row.endswith(",") or "," not in row[-prompts.BACK :]
                assert len(row) > CHUNK - prompts.BACK


@pytest.mark.parametrize(
    ("text", "first"), [("a" * 60 + "," + "b" * 40, 61), ("a" * 50 + "," + "b" * 40, CHUNK), ("a" * 75 + ",b", CHUNK)]
)
def test_a_chunk_looks_back_for_a_comma(text: str, first: int):
    ids, _ = chunks(Letters(), [text])
    assert ["".join(chr(i) for i in row if i > 3) for row in ids[:, 0].tolist()] == [text[:first], text[first:]]


def test_break_ends_a_chunk():
    ids, _ = chunks(Letters(), ["aa BREAK b", "BREAKS"])
    assert ["".join(chr(i) for i in row if i > 3) for row in ids[:, 0].tolist()] == ["aa", "b"]
    assert ids[0, 1, 1:7].tolist() == [ord(c) for c in "BREAKS"]
    assert ids[1, 1].tolist() == [1, 2, *[3] * CHUNK]


def test_weights_multiply_states_and_keep_each_prompts_mean():
    states = torch.rand(2, 5, 3) + 0.5
    weights = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.5], [1.0] * 5])
    found = weighted(states, weights)
    ratio = found[0] / states[0] / (found[0, 0] / states[0, 0])
    torch.testing.assert_close(ratio, weights[0][:, None].expand(5, 3))
    torch.testing.assert_close(found.mean((1, 2)), states.mean((1, 2)))
    assert torch.equal(found[1], states[1])
    centred = states - states.mean((1, 2), keepdim=True)
    torch.testing.assert_close(weighted(centred, weights), centred * weights[..., None])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def opened(folders: Path, kind: str) -> Base:
    file = folders / kind / "base.safetensors"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_file(file, kind)
    return open_base(ModelConfig(file, prediction="epsilon"))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_one_is_no_weight_and_chunks_stand_side_by_side(kind: str, folders: Path):
    base = opened(folders, kind)
    with torch.no_grad():
        plain = base.encode_text(["red shirt, smile", "smile"])
        found = base.encode_prompts(["(red shirt:1.0), smile", "smile"])
        heavy = base.encode_prompts(["(red shirt:1.5), smile"])
        both = base.encode_prompts(["red shirt, smile BREAK smile"])
    assert torch.equal(found.states, plain.states)
    assert (heavy.states[0] != plain.states[0]).any()
    torch.testing.assert_close(both.states[0], torch.cat(list(plain.states)))
    if kind == "sdxl":
        assert plain.pooled is not None
        assert found.pooled is not None
        assert both.pooled is not None
        assert torch.equal(found.pooled, plain.pooled)
        torch.testing.assert_close(both.pooled, plain.pooled[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_a_file_are_read_as_its_vectors(kind: str, folders: Path, tmp_path: Path):
    base, file = opened(folders, kind), tmp_path / "OyamaMahiro.safetensors"
    before = base.encode_text(["smile"]).states
    count = len(base.text_encoders)
    keys = ("clip_l", "clip_g") if count > 1 else ("emb_params",)
    vectors = {key: torch.randn(3, 16) for key in keys}
    save_file(vectors, file)
    wear(base, [file])
    for encoder, tokenizer, own in zip(base.text_encoders, base.tokenizers, vectors.values(), strict=True):
        ids, _ = chunks(tokenizer, ["(oyamamahiro:1.1)"])
        assert torch.equal(encoder.get_input_embeddings()(ids[0, 0, 1:4]), own)
    assert torch.equal(base.encode_text(["smile"]).states, before)
    save_file({key: torch.randn(3, 17) for key in keys}, file)
    with pytest.raises(LineageError, match=r"no embedding for this model"):
        wear(opened(folders, kind), [file])


# --- grids of pictures


@pytest.fixture(scope="module")
def base_file(folders: Path) -> Path:
    return opened(folders, "sd1").path


@pytest.fixture(scope="module")
def adapters(base_file: Path) -> list[Path]:
    """Two LoHas of random factors, and a checkpoint of the first."""
    base, made = open_base(ModelConfig(base_file)), []
    for seed, name in enumerate(("one", "two", "one-000100")):
        network = Network(base.unet, base.text_encoders, NetworkConfig(), seed)
        generator = torch.Generator().manual_seed(seed)
        network.load(
            {
                k: t if "alpha" in k else 0.3 * torch.randn(t.shape, generator=generator)
                for k, t in network.tensors().items()
            }
        )
        made.append(base_file.with_name(f"{name}.safetensors"))
        network.save(made[-1], {})
        network.remove()
    return made[:2]


def request(base_file: Path, **options) -> Request:
    common = {"models": [base_file], "prompts": ["smile", "red shirt"], "steps": 2, "width": 32, "height": 32}
    return Request(**{**common, **options})


def drawn(base_file: Path, **options) -> Drawn:
    return draw_grid(request(base_file, **options), device="cpu")


def pixels(found: Drawn) -> np.ndarray:
    """(rows, columns, height, width, 3)"""
    return np.array([[np.asarray(picture, int) for picture in row] for row in found.cells])


def test_weight_zero_draws_the_model_itself_and_rows_are_weights(base_file: Path, adapters: list[Path]):
    found = drawn(base_file, adapters=[(adapters[0], 1.0)], weights=[0.0, 1.0])
    assert (found.rows, found.columns) == (["weight 0", "weight 1"], ["smile", "red shirt"])
    assert found.title == "base | one | seed 0"
    [without] = pixels(drawn(base_file))
    assert (pixels(found)[0] == without).all()
    assert (pixels(found)[1] != without).any()


def test_adapters_add_up_in_any_order_or_stand_apart(base_file: Path, adapters: list[Path]):
    one, two = adapters
    order = [(one, 1.0), (two, 0.5)]
    both = [pixels(drawn(base_file, adapters=put)) for put in (order, order[::-1])]
    assert np.abs(both[0] - both[1]).max() <= 1
    apart = drawn(base_file, adapters=order, grid=("prompt", "adapter"))
    assert apart.columns == ["one", "two at 0.5"]
    alone = [pixels(drawn(base_file, adapters=[put]))[0] for put in order]
    assert all((pixels(apart)[:, n] == alone[n]).all() for n in range(2))
    assert all((both[0][0] != one_alone).any() for one_alone in alone)


def test_steps_are_the_checkpoints_of_a_run(base_file: Path, adapters: list[Path]):
    found = drawn(base_file, adapters=[(adapters[0], 1.0)], grid=("step", "prompt"))
    final = pixels(drawn(base_file, adapters=[(adapters[0], 1.0)]))[0]
    assert found.rows == ["step 100", "final"]
    assert (pixels(found)[1] == final).all()
    assert (pixels(found)[0] != final).any()
    with pytest.raises(LineageError, match=r"no checkpoints.*two-001000"):
        drawn(base_file, adapters=[(adapters[1], 1.0)], grid=("step", "prompt"))


def test_new_words_are_drawn_under_adapters_too(base_file: Path, adapters: list[Path], tmp_path: Path):
    save_file({"emb_params": torch.randn(2, 16)}, tmp_path / "OyamaMahiro.safetensors")
    asked = {"adapters": [(adapters[0], 1.0)], "prompts": ["smile", "OyamaMahiro, smile"]}
    plain = pixels(drawn(base_file, **asked))
    found = pixels(drawn(base_file, embeddings=[tmp_path / "OyamaMahiro.safetensors"], **asked))
    assert (found[0, 0] == plain[0, 0]).all()
    assert (found[0, 1] != plain[0, 1]).any()


def test_noise_is_of_the_seed_alone(base_file: Path, tmp_path: Path):
    copy = tmp_path / "copy" / base_file.name
    shutil.copytree(base_file.parent, copy.parent)
    models = drawn(base_file, models=[base_file, copy], seeds=[3])
    assert models.rows == [f"{path.parent.name}/base.safetensors" for path in (base_file, copy)]
    assert (pixels(models)[0] == pixels(models)[1]).all()
    seeds = drawn(base_file, prompts=["smile"], seeds=[2, 3])
    assert (seeds.rows, seeds.columns) == (["smile"], ["seed 2", "seed 3"])
    assert (pixels(seeds)[0, 1] == pixels(models)[0, 0]).all()
    assert (pixels(seeds)[0, 0] != pixels(seeds)[0, 1]).any()


def test_every_step_of_every_picture_is_counted(base_file: Path):
    told = []
    draw_grid(request(base_file, seeds=[0, 1]), device="cpu", progress=lambda *now: told.append(now))
    assert told == [(n, 8, "base") for n in range(1, 9)]


def test_a_picture_tells_its_parameters_and_sizes(base_file: Path):
    found = drawn(base_file, seeds=[5], prompts=["目"], height=48)
    assert found.cells[0][0].size == (32, 48)
    told = json.loads(Image.open(io.BytesIO(found.png())).info["parameters"])
    assert (told["seeds"], told["prompts"], told["models"]) == ([5], ["目"], [str(base_file)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"models": ["base"] * 2, "seeds": [0, 1]}, "model, prompt, seed vary"),
        ({"grid": ("seed", "hue")}, r"'hue' is no axis\. There are model, adapter"),
        ({"grid": ("prompt", "prompt")}, "are the same"),
        ({"grid": ("model", "seed")}, "prompt varies too"),
        ({"weights": [0, 1]}, "with an --adapter"),
        ({"grid": ("step", "prompt")}, "with an --adapter"),
        ({"prompts": []}, "at least one"),
        ({"width": 33}, "multiples of 4"),
    ],
)
def test_what_no_grid_can_show_is_refused(base_file: Path, options: dict, said: str):
    options = {**options, **({"models": [base_file, base_file]} if "models" in options else {})}
    with pytest.raises(LineageError, match=said):
        drawn(base_file, **options)


def test_an_adapter_of_another_architecture_is_refused_before_anything_is_drawn(
    base_file: Path, adapters: list[Path], folders: Path
):
    models, told = [base_file, opened(folders, "sdxl").path], []
    asked = request(base_file, models=models, adapters=[(adapters[0], 1.0)])
    with pytest.raises(LineageError, match="another architecture"):
        draw_grid(asked, device="cpu", progress=lambda *now: told.append(now))
    with pytest.raises(LineageError, match="can be trained on"):
        draw_grid(request(base_file, models=[base_file, adapters[0]]), progress=lambda *now: told.append(now))
    assert told == []


# --- labels


def test_labels_tell_files_apart(tmp_path: Path):
    def named(*files: str) -> list[str]:
        return names([tmp_path / file for file in files])

    assert named("a/x.ckpt", "a/y.ckpt") == ["x", "y"]
    assert named("a/x.ckpt", "a/x.safetensors") == ["x.ckpt", "x.safetensors"]
    assert named("a/x.ckpt", "b/x.ckpt", "b/y.ckpt") == ["a/x.ckpt", "b/x.ckpt", "b/y.ckpt"]
    assert named("a/x.ckpt", "a/x.ckpt") == ["x", "x"]
    (tmp_path / "sd-v1.5").mkdir()
    assert named("sd-v1.5", "sd-v1.4.ckpt") == ["sd-v1.5", "sd-v1.4"]


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[float, ...], str | None]]:
    """Where text and pictures (None) are put, as they are put there."""
    found: list[tuple[tuple[float, ...], str | None]] = []
    write, paste = ImageDraw.ImageDraw.multiline_text, Image.Image.paste

    def written(self, xy, text, fill, font):
        if text:
            found.append((self.multiline_textbbox(xy, text, font), text))
        write(self, xy, text, fill, font)

    def pasted(self, picture, box):
        found.append(((*box, box[0] + picture.width, box[1] + picture.height), None))
        paste(self, picture, box)

    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", written)
    monkeypatch.setattr(Image.Image, "paste", pasted)
    return found


def overlapping(boxes: list[tuple[tuple[float, ...], str | None]]) -> Iterator[tuple]:
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]:
            yield first, second


LONG = "a_very-long.name/" * 9 + "W" * 60


@pytest.mark.parametrize("side", [8, 64, 200, 640])
@pytest.mark.parametrize("label", ["a", "", LONG, "by me, 1girl, " * 12, "a\nb\x1b[31m"])
def test_labels_are_whole_and_overlap_nothing(side: int, label: str, boxes: list):
    rows, columns = [label, "b " + label], [label, "x", label]
    picture = Image.new("RGB", (side, side * 3 // 4), "red")
    found = grid(rows, columns, [[picture, None, picture]] * 2, label)
    assert list(overlapping(boxes)) == []
    assert all(min(b) >= 0 and b[2] <= found.width and b[3] <= found.height for b, _ in boxes)
    shown = ["".join(text.split()) for _, text in boxes if text]
    escaped = "".join(label.split()).replace("\x1b", "\\x1b")
    assert sorted(shown) == sorted(filter(None, [escaped, escaped, "x", escaped, escaped, "b" + escaped]))
    sizes = {(b[2] - b[0], b[3] - b[1]) for b, text in boxes if text is None}
    assert len(sizes) == 1
    [(width, height)] = sizes
    assert width >= sheet.CELL or height >= sheet.CELL
    assert width % side == 0


def test_small_pictures_are_enlarged_unsmoothed():
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    found = np.asarray(grid(["r"], ["c"], [[picture]]))
    body = found[-sheet.CELL - sheet.GAP : -sheet.GAP, -sheet.CELL - sheet.GAP : -sheet.GAP]
    assert (body == np.kron(np.asarray(picture), np.ones((32, 32, 1), np.uint8))).all()


# --- the command


def test_command_writes_once_and_names_what_is_wrong(base_file: Path, adapters: list[Path], tmp_path: Path, capsys):
    def call(*more: str, file: str = "a.png") -> int:
        fixed = "--prompt smile --steps 1 --width 32 --height 32 -q -o"
        return cli._exit_code(["sample", str(base_file), *fixed.split(), str(tmp_path / file), *more])

    def refused(said: str, *more: str, file: str = "b.png") -> None:
        assert call(*more, file=file) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "b.png").exists()

    assert call("--adapter", f"{adapters[0]}:0.5", "--weights", "0,1", "--grid", "weightxprompt") == 0
    before = (tmp_path / "a.png").read_bytes()
    refused("--force", file="a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert call("--force") == 0
    assert (tmp_path / "a.png").read_bytes() != before
    refused("heavy", "--weights", "1,heavy")
    refused(".png", file="b.jpg")
    refused("modelxprompt", "--grid", "model")
    refused("hue", "--grid", "huexprompt")
