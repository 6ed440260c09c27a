"""Laws of sampling: prompt weights, chunks of long prompts, and grids over two axes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training_bases import write_file

import cli
from lineage.errors import LineageError
from train import sample
from train.config import ModelConfig, NetworkConfig
from train.models import open_base
from train.networks import Network
from train.prompts import CHUNK, chunks, parse, weighted
from train.sample import Request, grid, labels

PLAIN = st.text("abc ,:.1", max_size=12)
WEIGHTS = st.sampled_from([0.5, 1.2, 2.0])


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a (b:1.2) c", [("a ", 1.0), ("b", 1.2), (" c", 1.0)]),
        ("((a))", [("a", 1.1**2)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("a (b", [("a ", 1.0), ("b", 1.1)]),
        ("(x, [y]:1.5)", [("x, ", 1.5), ("y", 1.5 / 1.1)]),
        (r"fate_\(series\)", [("fate_(series)", 1.0)]),
        ("a:b) 1.2)", [("a:b) 1.2)", 1.0)]),
        ("", []),
    ],
)
def test_weights_are_read_as_the_web_ui_does(prompt: str, pieces: list[tuple[str, float]]):
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@given(PLAIN, PLAIN, WEIGHTS, WEIGHTS)
def test_nested_weights_multiply_and_text_is_kept(a: str, b: str, outer: float, inner: float):
    found = parse(f"({a}(x{b}:{inner}):{outer})")
    assert "".join(text for text, _ in found) == f"{a}x{b}"
    weights = {round(weight, 9) for _, weight in found}
    assert weights <= {round(outer, 9), round(outer * inner, 9)}
    assert round(outer * inner, 9) in weights


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(tmp_path_factory.mktemp("bases") / "base.safetensors", "sd1")


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


def test_weight_one_is_no_weight_and_chunks_hold_all_tokens(base_file: Path):
    base = open_base(ModelConfig(base_file))
    with torch.no_grad():
        plain = base.encode_text(["red shirt, smile"]).states
        assert torch.equal(base.encode_prompts(["(red shirt:1.0), smile"]).states, plain)
        heavy = base.encode_prompts(["(red shirt:1.5), smile"]).states
    assert heavy.isfinite().all()
    assert not torch.equal(heavy, plain)
    tokenizer = base.tokenizers[0]
    ids, weights = chunks(tokenizer, ["smile " * 100, "short"])
    assert ids.shape == weights.shape == (2, 2, CHUNK + 2)
    inner = ids[:, 0, 1:-1].flatten()
    assert int((inner == tokenizer("smile", add_special_tokens=False).input_ids[0]).sum()) == 100


def test_weights_multiply_states_and_keep_each_prompts_mean():
    states = torch.rand(2, 5, 3) + 0.5
    weights = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.5], [1.0] * 5])
    found = weighted(states, weights)
    ratio = found[0] / states[0] / (found[0, 0] / states[0, 0])
    torch.testing.assert_close(ratio, weights[0][:, None].expand(5, 3))
    torch.testing.assert_close(found.mean((1, 2)), states.mean((1, 2)))
    torch.testing.assert_close(found[1], states[1])
    centred = states - states.mean((1, 2), keepdim=True)
    torch.testing.assert_close(weighted(centred, weights), centred * weights[..., None])


def cells(png: bytes, rows: int, columns: int) -> np.ndarray:
    """The pictures of a grid, (rows, columns, side, side, 3), found from the right lower corner."""
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    pitch = sample.CELL + sample.GAP
    body = sheet[sheet.shape[0] - rows * pitch :, sheet.shape[1] - columns * pitch :]
    body = body.reshape(rows, pitch, columns, pitch, 3).swapaxes(1, 2)
    return body[:, :, : sample.CELL, : sample.CELL]


def drawn(base_file: Path, **options) -> bytes:
    return sample.sample(Request((base_file,), ("smile", "red shirt"), steps=2, size=32, **options), device="cpu")


def test_weight_zero_draws_the_model_itself_and_rows_are_weights(base_file: Path, adapters: list[Path]):
    with_adapter = cells(drawn(base_file, adapters={adapters[0]: 1.0}, weights=(0.0, 1.0)), 2, 2)
    [without] = cells(drawn(base_file), 1, 2)
    assert (with_adapter[0] == without).all()
    assert (with_adapter[1] != without).any()


def test_adapters_add_up_in_any_order_or_stand_apart(base_file: Path, adapters: list[Path]):
    one, two = adapters
    both = [
        cells(drawn(base_file, adapters=dict(order)), 1, 2)
        for order in ([(one, 1.0), (two, 0.5)], [(two, 0.5), (one, 1.0)])
    ]
    assert np.abs(both[0].astype(int) - both[1]).max() <= 1
    apart = cells(drawn(base_file, adapters={one: 1.0, two: 0.5}, grid=("prompt", "adapter")), 2, 2)
    alone = [cells(drawn(base_file, adapters={f: w}), 1, 2)[0] for f, w in ((one, 1.0), (two, 0.5))]
    assert all((apart[:, n] == alone[n]).all() for n in range(2))


def test_steps_are_the_checkpoints_of_a_run(base_file: Path, adapters: list[Path]):
    found = cells(drawn(base_file, adapters={adapters[0]: 1.0}, grid=("step", "prompt")), 2, 2)
    final = cells(drawn(base_file, adapters={adapters[0]: 1.0}), 1, 2)[0]
    assert (found[1] == final).all()
    assert (found[0] != final).any()
    with pytest.raises(LineageError, match="no checkpoints"):
        drawn(base_file, adapters={adapters[1]: 1.0}, grid=("step", "prompt"))


def test_a_picture_tells_its_parameters(base_file: Path):
    told = json.loads(Image.open(io.BytesIO(drawn(base_file, seeds=(5,)))).text["parameters"])
    assert told["seeds"] == [5]
    assert told["prompts"] == ["smile", "red shirt"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": (0.0, 1.0), "seeds": (0, 1)}, "weight, prompt, seed vary"),
        ({"grid": ("weight", "hue")}, "give two of"),
        ({"grid": ("prompt", "prompt")}, "give two of"),
        ({"grid": ("model", "weight")}, "prompt has 2 values"),
    ],
)
def test_what_no_grid_can_show_is_refused(base_file: Path, options: dict, said: str):
    with pytest.raises(LineageError, match=said):
        drawn(base_file, **options)


def test_labels_tell_files_apart(tmp_path: Path):
    files = [tmp_path / "a" / "x.safetensors", tmp_path / "b" / "x.safetensors", tmp_path / "b" / "y.safetensors"]
    assert labels(files) == ["a/x", "b/x", "y"]


def test_long_labels_stay_inside_their_places():
    picture = Image.new("RGB", (8, 8), "red")
    sheet = np.asarray(grid(["a very long row label " * 20, "b"], ["column " * 30] * 2, [[picture] * 2] * 2))
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.sum() == 4 * sample.CELL**2
    rows = np.flatnonzero(red.any(1))
    ink = (sheet < 128).all(-1)
    assert not ink[:, sample.MARGIN :][rows[0] :].any()
    assert not ink[: rows[0], : sample.MARGIN].any()


def test_command_writes_once_and_names_what_is_wrong(base_file: Path, adapters: list[Path], tmp_path: Path, capsys):
    call = [
        "sample",
        str(base_file),
        "--prompt",
        "smile",
        "--steps",
        "1",
        "--size",
        "32",
        "-q",
        "-o",
        str(tmp_path / "a.png"),
    ]
    assert cli._exit_code([*call, "--adapter", f"{adapters[0]}:0.5"]) == 0
    before = (tmp_path / "a.png").read_bytes()
    assert cli._exit_code(call) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == before
    assert cli._exit_code([*call, "--force", "--weights", "1,heavy"]) == 2
    assert "heavy" in capsys.readouterr().err
    assert cli._exit_code([*call[:-1], str(tmp_path / "a.jpg")]) == 2
    assert ".png" in capsys.readouterr().err
