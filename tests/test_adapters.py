"""Adapter files against the forward passes of lycoris-lora and peft, and the laws of their factors."""

import hashlib
import json
import math
import warnings
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lineage.adapters import bind, is_adapter, open_adapter, save_adapter
from lineage.delta import svd
from lineage.errors import LineageError
from lineage.factors import factors
from lineage.keys import Param

LINEAR = (nn.Linear, (24, 40), {})
CONV = (nn.Conv2d, (6, 20), {"kernel_size": 3, "padding": 1})
POINT = (nn.Conv2d, (12, 20), {"kernel_size": 1})
CONV1 = (nn.Conv1d, (6, 20), {"kernel_size": 3})
NAME = "lora_unet_mid_block_attentions_0_proj_in"
WEIGHT = "unet.mid_block.attentions.0.proj_in.weight"


def layer(spec):
    kind, sizes, options = spec
    return kind(*sizes, **options)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


def effect(forward, module) -> torch.Tensor:
    """The matrix of an affine map less its value at 0, from its action on a batch: (inputs, outputs)."""
    if isinstance(module, nn.Linear):
        x = torch.eye(module.in_features)
    else:
        size = (5,) * (module.weight.ndim - 2)
        x = torch.randn(7, module.in_channels, *size, generator=torch.Generator().manual_seed(1))
    return forward(x)


LYCORIS = [
    pytest.param("LoConModule", spec, {"use_tucker": tucker}, id=f"lora-{name}{'-cp' * tucker}")
    for name, spec in (("linear", LINEAR), ("conv", CONV), ("point", POINT), ("conv1d", CONV1))
    for tucker in ((False, True) if name == "conv" else (False,))
]
LYCORIS += [
    pytest.param("LohaModule", spec, {"use_tucker": tucker}, id=f"loha-{name}{'-tucker' * tucker}")
    for name, spec in (("linear", LINEAR), ("conv", CONV), ("point", POINT), ("conv1d", CONV1))
    for tucker in ((False, True) if name.startswith("conv") else (False,))
]
LYCORIS += [
    pytest.param("LokrModule", spec, options, id=f"lokr-{name}-{'-'.join(options) or 'plain'}")
    for name, spec, options in (
        ("linear", (nn.Linear, (400, 900), {}), {}),
        ("linear", (nn.Linear, (400, 900), {}), {"decompose_both": True}),
        ("linear", (nn.Linear, (48, 64), {}), {"full_matrix": True}),
        ("conv", (nn.Conv2d, (64, 100), {"kernel_size": 3, "padding": 1}), {}),
        ("conv", (nn.Conv2d, (64, 100), {"kernel_size": 3, "padding": 1}), {"use_tucker": True}),
    )
]
DORA = [pytest.param(on_out, id="rows" if on_out else "columns") for on_out in (True, False)]


def lycoris_module(kind: str, spec, **options) -> tuple[Any, Any]:
    """(frozen layer, a lycoris module over it with random factors): dim 4, alpha 1.5."""
    modules = pytest.importorskip("lycoris.modules")
    torch.manual_seed(0)
    base = layer(spec).requires_grad_(False)
    network = getattr(modules, kind)(NAME, base, 1.0, 4, 1.5, **options)
    return base, randomised(network).requires_grad_(False).eval()


def saved(tmp_path, network, name: str = NAME):
    path = tmp_path / "adapter.safetensors"
    tensors = {f"{name}.{k}": v.clone().contiguous() for k, v in network.state_dict().items()}
    save_file(tensors, path)
    return path


def as_spec(weight: torch.Tensor, name: str = WEIGHT) -> dict[str, Param]:
    return {name: Param(name, name, tuple(weight.shape), weight.dtype, "unet", "M00", "other")}


def bound(path, weight: torch.Tensor, name: str = WEIGHT):
    found, unmatched = bind(open_adapter(path), as_spec(weight, name))
    assert unmatched == []
    return found[name]


def adapted(base: Any, delta: torch.Tensor) -> Any:
    """The layer with `delta` added to its weight: what an adapter's forward pass must equal."""
    with torch.no_grad():
        base.weight += delta
    return base


def laws(f) -> None:
    """Factors multiply to the delta, within their rank bound, and the scale is linear in alpha."""
    delta = f.delta().flatten(1)
    assert delta.dtype is torch.float32
    assert torch.linalg.matrix_rank(delta.double(), rtol=1e-5) <= f.rank_bound
    if (thin := f.left_right()) is not None:
        u, v = thin
        assert u.shape[1] == v.shape[0] < min(delta.shape)
        torch.testing.assert_close(u @ v, delta, rtol=1e-4, atol=1e-5 * float(delta.abs().max()))
    if f.scale != 1:
        doubled = factors(f.tensors, 2 * f.alpha).shaped(f.shape)
        torch.testing.assert_close(doubled.delta().flatten(1), 2 * delta)


@pytest.mark.parametrize(("kind", "spec", "options"), LYCORIS)
def test_delta_is_what_lycoris_forward_adds(tmp_path, kind, spec, options):
    base, network = lycoris_module(kind, spec, **options)
    f = bound(saved(tmp_path, network), base.weight)
    laws(f)
    wanted = effect(network.forward, base)
    torch.testing.assert_close(effect(adapted(base, f.delta()), base), wanted, rtol=1e-4, atol=1e-5)
    assert f.scale == pytest.approx(network.scale)


@pytest.mark.parametrize("on_out", DORA)
@pytest.mark.parametrize("kind", ["LoConModule", "LohaModule", "LokrModule"])
@pytest.mark.parametrize("spec", [LINEAR, CONV], ids=["linear", "conv"])
def test_dora_needs_the_weight_and_then_equals_lycoris(tmp_path, kind, spec, on_out):
    base, network = lycoris_module(kind, spec, weight_decompose=True, wd_on_out=on_out)
    network.dora_scale.copy_(torch.rand(network.dora_scale.shape, generator=torch.Generator().manual_seed(2)) + 0.5)
    f = bound(saved(tmp_path, network), base.weight)
    assert f.needs_weight
    assert f.left_right() is None
    with pytest.raises(LineageError, match="base"):
        f.delta()
    delta = f.delta(base.weight)
    wanted = effect(network.forward, base)
    torch.testing.assert_close(effect(adapted(base, delta), base), wanted, rtol=1e-4, atol=1e-5)


PEFT = [
    pytest.param("LoraConfig", {"lora_alpha": 3}, id="lora"),
    pytest.param("LoraConfig", {"lora_alpha": 3, "use_rslora": True}, id="lora-rs"),
    pytest.param("LoraConfig", {"lora_alpha": 3, "use_dora": True}, id="lora-dora"),
    pytest.param(
        "LoraConfig", {"lora_alpha": 3, "alpha_pattern": {"conv": 1}, "rank_pattern": {"conv": 2}}, id="patterns"
    ),
    pytest.param("LoHaConfig", {"alpha": 3}, id="loha"),
    pytest.param("LoHaConfig", {"alpha": 3, "use_effective_conv2d": True}, id="loha-tucker"),
    pytest.param("LoKrConfig", {"alpha": 3}, id="lokr"),
    pytest.param("LoKrConfig", {"alpha": 3, "decompose_both": True, "use_effective_conv2d": True}, id="lokr-both"),
]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(100, 64)
        self.conv = nn.Conv2d(64, 36, 3, padding=1)

    def forward(self, x):
        return self.conv(self.to_q(x).mT.unflatten(-1, (4, 4)))


@pytest.mark.parametrize(("config", "options"), PEFT)
def test_peft_folders_equal_peft_forward(tmp_path, config, options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Small().requires_grad_(False)
    specs = as_spec(model.to_q.weight, "unet.to_q.weight") | as_spec(model.conv.weight, "unet.conv.weight")
    weights = {"unet.to_q.weight": model.to_q.weight.clone(), "unet.conv.weight": model.conv.weight.clone()}
    x = torch.randn(3, 16, 100)
    wrapped = peft.get_peft_model(model, getattr(peft, config)(r=4, target_modules=["to_q", "conv"], **options))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad:
                p.copy_(torch.rand(p.shape) + 0.5 if "magnitude" in name else torch.randn(p.shape) * 0.3)
    wanted = wrapped.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft looks for a model card it cannot find
        wrapped.save_pretrained(tmp_path)
    assert is_adapter(tmp_path)
    found, unmatched = bind(open_adapter(tmp_path), specs)
    assert (set(found), unmatched) == (set(specs), [])
    plain = Small().requires_grad_(False)
    plain.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in wrapped.get_base_model().state_dict().items() if "base_layer" in k}
    )
    for name, f in found.items():
        adapted(plain.get_submodule(name.split(".")[1]), f.delta(weights[name]))
    torch.testing.assert_close(plain(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "names",
    [
        ("unet.mid_block.attentions.0.proj_in.lora_B.weight", "unet.mid_block.attentions.0.proj_in.lora_A.weight"),
        ("unet.mid_block.attentions.0.proj_in.lora.up.weight", "unet.mid_block.attentions.0.proj_in.lora.down.weight"),
        ("mid_block.attentions.0.proj_in.lora_B.weight", "mid_block.attentions.0.proj_in.lora_A.weight"),
        (f"{NAME}.lora_up.weight", f"{NAME}.lora_down.weight"),
    ],
)
def test_every_naming_scheme_reaches_the_same_weight(tmp_path, names):
    up, down = torch.randn(20, 3), torch.randn(3, 12)
    save_file(dict(zip(names, (up, down), strict=True)), tmp_path / "a.safetensors")
    f = bound(tmp_path / "a.safetensors", torch.empty(20, 12))
    assert f.scale == 1  # alpha is missing: it equals the rank
    torch.testing.assert_close(f.delta(), up @ down)


def test_diffusers_attention_processors_and_metadata(tmp_path):
    tensors = {
        "unet.a.attn1.processor.to_out_lora.up.weight": torch.randn(8, 2),
        "unet.a.attn1.processor.to_out_lora.down.weight": torch.randn(2, 6),
    }
    settings = json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": ["to_out.0"]})
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": settings})
    f = bound(tmp_path / "a.safetensors", torch.empty(8, 6), "unet.a.attn1.to_out.0.weight")
    assert (f.rank, f.scale) == (2, 3)


def test_a_fresh_loha_changes_nothing(tmp_path):
    modules = pytest.importorskip("lycoris.modules")
    base = layer(LINEAR)
    network = modules.LohaModule(NAME, base, 1.0, 4, 1.5)
    assert not bound(saved(tmp_path, network.requires_grad_(False)), base.weight).delta().any()


def test_whole_differences_of_weights_and_biases(tmp_path):
    weight, bias = torch.randn(20, 12), torch.randn(20)
    save_file({f"{NAME}.diff": weight, f"{NAME}.diff_b": bias}, tmp_path / "a.safetensors")
    specs = as_spec(weight) | as_spec(bias, WEIGHT.removesuffix("weight") + "bias")
    found, unmatched = bind(open_adapter(tmp_path / "a.safetensors"), specs)
    assert unmatched == []
    assert [tuple(f.delta().shape) for f in found.values()] == [(20, 12), (20,)]
    torch.testing.assert_close(found[WEIGHT].delta(), weight)


def test_svd_counts_the_differences_of_biases_as_vectors(tmp_path):
    save_file({f"{NAME}.diff": torch.randn(20, 12), f"{NAME}.diff_b": torch.ones(16)}, tmp_path / "a.safetensors")
    result = svd(None, tmp_path / "a.safetensors")
    assert [layer.shape for layer in result.layers] == [(20, 12)]
    assert [(v.shape, v.frobenius) for v in result.vectors] == [((16,), 4.0)]


@pytest.mark.parametrize(("kind", "spec", "options"), LYCORIS)
def test_save_then_load_is_the_identity(tmp_path, kind, spec, options):
    _, network = lycoris_module(kind, spec, **options)
    path = saved(tmp_path, network)
    first = open_adapter(path)
    save_adapter(tmp_path / "b.safetensors", first.modules, {"ss_network_dim": "4"})
    again = open_adapter(tmp_path / "b.safetensors")
    before, after = load_file(path), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before if not k.endswith("alpha"))
    assert {n: (f.alpha, f.scale, f.rank) for n, f in first.modules.items()} == {
        n: (f.alpha, f.scale, f.rank) for n, f in again.modules.items()
    }
    assert again.metadata["ss_network_dim"] == "4"
    assert again.kind == first.kind


def test_hashes_are_those_that_web_uis_compute(tmp_path):
    save_adapter(tmp_path / "a.safetensors", {NAME: factors(lora(300, 2, 500))}, {})
    content = (tmp_path / "a.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        metadata = f.metadata()
    start = 8 + int.from_bytes(content[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    assert len(metadata["sshs_legacy_hash"]) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    modules, metadata = {NAME: factors(lora(30, 2, 50))}, {f"ss_{i}": str(i) for i in range(20)}
    for name in ("a", "b"):
        save_adapter(tmp_path / f"{name}.safetensors", modules, metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def lora(out: int, rank: int, columns: int) -> dict[str, torch.Tensor]:
    return {"lora_up.weight": torch.randn(out, rank), "lora_down.weight": torch.randn(rank, columns)}


def loha(out: int = 6, rank: int = 2, columns: int = 5) -> dict[str, torch.Tensor]:
    return {f"hada_w{i}_{s}": torch.randn(*((out, rank) if s == "a" else (rank, columns))) for i in "12" for s in "ab"}


MALFORMED = {
    "half is missing": ({"lora_up.weight": torch.ones(4, 2)}, "lacks lora_down.weight"),
    "other half": ({k: v for k, v in loha().items() if k != "hada_w2_b"}, "lacks hada_w2_b"),
    "one core": (loha() | {"hada_t1": torch.ones(2, 2, 3, 3)}, "lacks hada_t2"),
    "inner ranks": ({"lora_up.weight": torch.ones(4, 2), "lora_down.weight": torch.ones(3, 4)}, "inner ranks"),
    "unlike halves": (loha() | {"hada_w2_a": torch.ones(7, 2)}, "hada_w1 is"),
    "zero rank": (lora(4, 0, 5), "rank 1 or more"),
    "scalar factor": ({"lora_up.weight": torch.tensor(1.0), "lora_down.weight": torch.ones(1, 4)}, "rank 1 or more"),
    "core of another rank": (loha() | {"hada_t1": torch.ones(3, 3, 1, 1), "hada_t2": torch.ones(3, 3, 1, 1)}, "inner"),
    "infinite alpha": (lora(4, 2, 5) | {"alpha": torch.tensor(math.inf)}, "alpha inf"),
    "alpha is a vector": (lora(4, 2, 5) | {"alpha": torch.ones(3)}, "alpha of shape"),
    "nan": ({"lora_up.weight": torch.full((4, 2), math.nan), "lora_down.weight": torch.ones(2, 4)}, "NaN"),
    "integers": ({"lora_up.weight": torch.ones(4, 2).long(), "lora_down.weight": torch.ones(2, 4)}, "int64"),
    "two families": (lora(4, 2, 5) | loha(4, 2, 5), "do not go together"),
    "immense": (lora(2**18, 1, 2**17), "which no model has"),
    "kronecker half": ({"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(3, 2)}, "lacks lokr_w2_b"),
    "dora of another width": (lora(4, 2, 5) | {"dora_scale": torch.ones(3, 1)}, "dora_scale"),
}


@pytest.mark.parametrize("problem", MALFORMED)
def test_malformed_modules_are_named_with_their_file(tmp_path, problem):
    tensors, message = MALFORMED[problem]
    path = tmp_path / "bad.safetensors"
    save_file({f"{NAME}.{k}": v for k, v in tensors.items()}, path)
    assert is_adapter(path)
    with pytest.raises(LineageError, match=message) as error:
        open_adapter(path)
    assert str(path) in str(error.value)
    assert NAME in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[1]", "JSON object"),
        ("{", "not JSON"),
        ('{"r": 4, "lora_alpha": "a"}', "rank or alpha"),
        ('{"r": 4, "lora_alpha": NaN}', "rank or alpha"),
        ('{"r": 4, "fan_in_fan_out": true}', "transposed"),
        ('{"r": 4, "alpha_pattern": {"(a+)+": 3}}', "alpha_pattern"),
    ],
)
def test_bad_peft_settings_are_refused(tmp_path, settings, message):
    save_file(
        {f"base_model.model.to_q.{k}": v for k, v in lora(4, 2, 5).items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(LineageError, match=message):
        open_adapter(tmp_path)


def test_only_adapters_are_adapters(tmp_path):
    save_file(
        {"model.diffusion_model.out.2.weight": torch.ones(2, 2), "alpha": torch.ones(1)}, tmp_path / "m.safetensors"
    )
    assert not is_adapter(tmp_path / "m.safetensors")
    with pytest.raises(LineageError, match="no LoRA"):
        open_adapter(tmp_path / "m.safetensors")
    assert not is_adapter(tmp_path)


def test_what_fits_nothing_is_listed_with_its_reason(tmp_path):
    tensors = {f"{n}.{k}": v for n in (NAME, "lora_unet_nowhere") for k, v in lora(4, 2, 5).items()}
    save_file(tensors | {"bundle_emb.x.string_to_param.*": torch.ones(2)}, tmp_path / "a.safetensors")
    found, unmatched = bind(open_adapter(tmp_path / "a.safetensors"), as_spec(torch.empty(4, 6)))
    assert not found
    assert {u["name"]: u["reason"] for u in unmatched} == {
        "bundle_emb.x.string_to_param.*": "no part of an adapter",
        NAME: "fits a weight of shape (4, 5), not (4, 6)",
        "lora_unet_nowhere": "the model has no such module",
    }


@pytest.mark.parametrize(
    ("modules", "kind"),
    [
        ({"a": lora(4, 2, 5)}, "lora"),
        (
            {
                "a": lora(4, 2, 5),
                "b": {"lora_up.weight": torch.ones(4, 2, 1, 1), "lora_down.weight": torch.ones(2, 3, 3, 3)},
            },
            "locon",
        ),
        ({"a": loha()}, "loha"),
        ({"a": loha(), "b": lora(4, 2, 5)}, "mixed"),
        ({"a": {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)}, "b": {"diff": torch.ones(3)}}, "lokr"),
        ({"b": {"diff": torch.ones(3)}}, "diff"),
    ],
)
def test_kind_of_a_file(tmp_path, modules, kind):
    save_adapter(tmp_path / "a.safetensors", {n: factors(t) for n, t in modules.items()}, {})
    assert open_adapter(tmp_path / "a.safetensors").kind == kind


def test_a_trained_scalar_is_multiplied_in(tmp_path):
    tensors = lora(4, 2, 5)
    save_file(
        {f"{NAME}.{k}": v for k, v in {**tensors, "scalar": torch.tensor(0.25)}.items()}, tmp_path / "a.safetensors"
    )
    delta = open_adapter(tmp_path / "a.safetensors").modules[NAME].delta()
    torch.testing.assert_close(delta, 0.25 * tensors["lora_up.weight"] @ tensors["lora_down.weight"])
