"""Networks on Stable Diffusion: laws of their forward and backward pass, and their names against who loads them."""

import copy
import functools
import math
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import stable_diffusion
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import lineage
from lineage.errors import LineageError
from lineage.keys import canonical, kohya_modules, to_ldm
from train import factored
from train.applied import Applied
from train.config import Config, DataConfig, ModelConfig, NetworkConfig, TrainingConfig
from train.factored import Form, adapted, costs, op_of
from train.networks import Network, targets

KINDS = {
    "loha": NetworkConfig(dim=3, conv_dim=2, alpha=1.5, conv_alpha=0.7),
    "loha-tucker": NetworkConfig(dim=3, conv_dim=2, alpha=1.5, conv_alpha=0.7, tucker=True),
    "locon": NetworkConfig("locon", dim=3, conv_dim=2, alpha=1.5, conv_alpha=0.7),
    "locon-tucker": NetworkConfig("locon", dim=3, conv_dim=2, alpha=1.5, conv_alpha=0.7, tucker=True),
    "lora": NetworkConfig("lora", dim=3, alpha=1.5),
}
FORMS: tuple[Form, ...] = ("apart", "merged", "built")
LAYERS = {
    "linear": lambda: nn.Linear(11, 7),
    "no-bias": lambda: nn.Linear(6, 9, bias=False),
    "conv": lambda: nn.Conv2d(5, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(5, 6, 3, stride=2),
    "point": lambda: nn.Conv2d(5, 6, 1),
}


def randomised(network: Network, seed: int = 0, deviation: float = 0.3) -> Network:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(deviation * torch.randn(p.shape, generator=generator))
    return network


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    torch.manual_seed(0)
    made = stable_diffusion.tiny("sd1")
    return {c: made[c].eval() for c in ("unet", "text_encoder")}


@pytest.fixture
def parts(built) -> dict[str, Any]:
    return copy.deepcopy(built)


def network(parts, config=KINDS["loha"], seed=0) -> Network:
    return Network(parts["unet"], [parts["text_encoder"]], config, seed)


def run(parts) -> torch.Tensor:
    """What the pair answers to fixed latents and words, with gradient."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    words = parts["text_encoder"](torch.arange(20).view(2, 10))[0]
    return parts["unet"](latents, torch.tensor([10, 500]), words).sample


def bits(parts) -> dict[str, torch.Tensor]:
    return {f"{c}.{n}": t.clone() for c, m in parts.items() for n, t in m.state_dict().items()}


def specs(parts):
    return canonical(stable_diffusion.specs(stable_diffusion.flat(stable_diffusion.states(parts))))


# the function


def arguments(layer, pairs: int, rank: int = 2, seed: int = 0):
    """Random (x, factors) for a layer, in its dtype."""
    weight = layer.weight
    generator = torch.Generator().manual_seed(seed)
    columns = weight[0].numel()
    shapes = [(len(weight), rank), (rank, columns)] * pairs
    made = [torch.randn(s, generator=generator, dtype=weight.dtype) for s in shapes]
    size = (2, 3, weight.shape[1]) if weight.ndim == 2 else (2, weight.shape[1], 5, 6)
    return torch.randn(size, generator=generator, dtype=weight.dtype), made


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def plainly(layer, x, made, scale, alone=False):
    """The same by plain autograd: the delta, added to the weight."""
    delta = made[0] @ made[1]
    delta = scale * (delta * (made[2] @ made[3]) if len(made) == 4 else delta).view(layer.weight.shape)
    weight, bias = (delta, None) if alone else (layer.weight + delta, layer.bias)
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, bias)
    return functional.conv2d(x, weight, bias, layer.stride, layer.padding)


@pytest.mark.parametrize("alone", [False, True], ids=["with-base", "alone"])
@pytest.mark.parametrize("pairs", [1, 2], ids=["lora", "loha"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_form_is_the_plain_function_with_its_gradients(kind, form, pairs, alone):
    torch.manual_seed(0)
    layer = LAYERS[kind]().double().requires_grad_(False)
    x, made = arguments(layer, pairs)
    inputs = [t.requires_grad_() for t in (x, *made)]

    def ours(x, *made):
        return adapted(x, layer.weight, layer.bias, made, 0.7, op_of(layer), alone=alone, form=form)

    wanted = plainly(layer, x, made, 0.7, alone)
    torch.testing.assert_close(ours(*inputs), wanted)
    assert torch.autograd.gradcheck(ours, inputs)
    g = torch.randn(wanted.shape, dtype=wanted.dtype)
    torch.testing.assert_close(
        torch.autograd.grad(ours(*inputs), inputs, g), torch.autograd.grad(wanted, inputs, g), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_inputs_that_need_no_gradient_get_none(kind, form):
    layer = LAYERS[kind]().requires_grad_(False)
    x, made = arguments(layer, 2)
    adapted(
        x, layer.weight, layer.bias, [t.requires_grad_() for t in made], 1.0, op_of(layer), form=form
    ).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is None
    assert all(t.grad is not None and t.grad.shape == t.shape for t in made)


@pytest.mark.parametrize("pairs", [1, 2], ids=["lora", "loha"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_small_delta_survives_a_half_precision_base(kind, form, dtype, pairs):
    """W + delta rounded to the base's dtype would lose it: each entry is below half an ulp of its weight."""
    torch.manual_seed(0)
    layer = LAYERS[kind]().requires_grad_(False).to(dtype)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    x, made = arguments(nn.Linear(11, 7) if kind == "linear" else nn.Conv2d(5, 6, 3), pairs)
    x = (x - x.mean(-1 if kind == "linear" else (1, 2, 3), keepdim=True)).to(dtype)  # so that W x is small
    made[-2] *= torch.finfo(dtype).eps / 30  # a young network's left factor
    made = [t.requires_grad_() for t in made]
    found, alone = (
        adapted(x, layer.weight, layer.bias, made, 0.125, op_of(layer), form=form, alone=a) for a in (False, True)
    )
    wanted = plainly(layer.float(), x.float(), made, 0.125, alone=True)
    tolerance = 8 * torch.finfo(dtype).eps
    assert found.dtype == alone.dtype == dtype
    assert relative(alone, wanted) < tolerance
    torch.testing.assert_close(found, layer.to(dtype)(x) + alone, rtol=tolerance, atol=tolerance)
    g = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    ours, theirs = (torch.autograd.grad(y, made, g.to(y.dtype)) for y in (alone, wanted))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("form", FORMS)
def test_autocast_decides_the_dtype_and_factors_stay_exact(form):
    layer = LAYERS["linear"]().requires_grad_(False)
    x, made = arguments(layer, 2)
    made = [t.requires_grad_() for t in made]
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x, layer.weight, layer.bias, made, 0.5, op_of(layer), form=form)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    wanted = plainly(layer, x, made, 0.5)
    assert relative(y, wanted) < 0.05
    exact = torch.autograd.grad(wanted.sum(), made)
    for p, grad in zip(made, exact, strict=True):
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert relative(p.grad, grad) < 0.05


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_large_layers_are_as_exact_as_float32_can_be(form, onednn, monkeypatch):
    """Large enough for every product to go through oneDNN, where there is one; the oracle is float64."""
    monkeypatch.setattr(factored, "ONEDNN", factored.ONEDNN and onednn)
    monkeypatch.setattr(factored, "ONEDNN_FROM", 0)
    torch.manual_seed(0)
    layer = nn.Linear(160, 144).requires_grad_(False)
    made = [t.requires_grad_() for t in arguments(layer, 2, rank=4)[1]]
    x, g = torch.randn(3, 70, 160, requires_grad=True), torch.randn(3, 70, 144)
    found = adapted(x, layer.weight, layer.bias, made, 0.3, op_of(layer), form=form)
    inputs = [t.detach().double().requires_grad_() for t in (x, *made)]
    wanted = plainly(layer.double(), inputs[0], inputs[1:], 0.3)
    assert relative(found, wanted) < 1e-6
    for a, b in zip(
        torch.autograd.grad(found, (x, *made), g), torch.autograd.grad(wanted, inputs, g.double()), strict=True
    ):
        assert relative(a, b) < 2e-6


def test_the_form_follows_the_count():
    """Wide layers are factored, narrow ones built; half precision never merges."""

    def best(positions, shape, rank, mergeable=True):
        found = costs(positions, shape, rank, 2, mergeable)
        return min(found, key=lambda form: found[form])

    assert best(4096, (48, 48), 8) == "built"
    assert best(64, (1280, 1280), 8) == "apart"
    assert best(64, (1280, 1280, 3, 3), 4) == "apart"
    assert best(4096, (2560, 320), 8) == "merged"
    assert best(4096, (320, 320), 64) == "built"
    assert "merged" not in costs(4096, (2560, 320), 8, 2, mergeable=False)


# the network


@pytest.mark.parametrize("init", ["lycoris", "lycoris-0.1.4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_network_changes_nothing_yet_learns(parts, kind, init):
    before = run(parts)
    fresh = network(parts, replace(KINDS[kind], init=init))
    after = run(parts)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    after.square().sum().backward()
    assert any(bool(p.grad.any()) for p in fresh.parameters() if p.grad is not None)
    assert all(p.grad is None for m in parts.values() for p in m.parameters())
    for f in fresh.factors().values():
        assert not f.delta().any()


def test_the_first_factors_have_the_deviations_of_lycoris(parts):
    for init, wanted in {"lycoris": (0.1, 1, 0, 1), "lycoris-0.1.4": (1, 1, 0, 0.01)}.items():
        made = network(parts, NetworkConfig(dim=64, conv_dim=16, init=init)).tensors()
        for slot, deviation in zip(("w1_a", "w1_b", "w2_a", "w2_b"), wanted, strict=True):
            found = torch.cat([t.flatten() for n, t in made.items() if n.endswith(f"hada_{slot}")])
            assert float(found.std()) == pytest.approx(deviation, rel=0.02)
            assert abs(float(found.mean())) <= 0.02 * deviation


def test_the_seed_alone_decides_the_first_factors(parts):
    first, again, other = (network(parts, seed=seed).tensors() for seed in (3, 3, 4))
    assert all(torch.equal(t, again[n]) for n, t in first.items())
    assert not all(torch.equal(t, other[n]) for n, t in first.items())


@pytest.mark.parametrize("multiplier", [1.0, -0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_file_added_to_the_weights_gives_the_same_output(parts, kind, multiplier, tmp_path):
    trained = randomised(network(parts, KINDS[kind]))
    trained.multiplier = multiplier
    wanted = run(parts)
    trained.save(tmp_path / "a.safetensors", {})
    trained.remove()
    with Applied(parts["unet"], [parts["text_encoder"]], [(tmp_path / "a.safetensors", multiplier)]):
        torch.testing.assert_close(run(parts), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_several_files_on_a_model_are_bit_for_bit_what_lineage_apply_writes(parts, dtype, tmp_path, no_sync):
    adapters: dict[Any, float] = {}
    for i, kind in enumerate(("loha", "locon-tucker")):
        trained = randomised(network(parts, KINDS[kind], i), i)
        trained.save(tmp_path / f"{kind}.safetensors", {})
        trained.remove()
        adapters[tmp_path / f"{kind}.safetensors"] = 0.65 - i
    for m in parts.values():
        m.to(dtype)
    before = bits(parts)
    save_file(to_ldm(stable_diffusion.states(parts), "sd1"), tmp_path / "base.safetensors")
    lineage.apply(tmp_path / "base.safetensors", adapters, tmp_path / "out.safetensors")
    with Applied(parts["unet"], [parts["text_encoder"]], list(adapters.items())) as applied:
        found = {n: t.clone() for n, t in to_ldm(stable_diffusion.states(parts), "sd1").items()}
    wanted = load_file(tmp_path / "out.safetensors")
    assert {n for n, t in found.items() if not torch.equal(t, wanted[n])} == set()
    unchanged = load_file(tmp_path / "base.safetensors")
    assert sum(not torch.equal(t, unchanged[n]) for n, t in found.items()) == len(network(parts)._layers)
    applied.remove()
    assert all(torch.equal(t, before[n]) for n, t in bits(parts).items())


def test_a_lokr_is_added_too_and_other_architectures_are_refused(parts, tmp_path):
    layer = parts["unet"].down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    halves = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(4, 4)}
    save_file({f"{name}.{k}": t for k, t in halves.items()}, tmp_path / "a.safetensors")
    before = layer.weight.clone()
    with Applied(parts["unet"], [parts["text_encoder"]], [(tmp_path / "a.safetensors", 0.5)]):
        torch.testing.assert_close(layer.weight - before, 0.5 * torch.kron(*halves.values()))
    assert torch.equal(layer.weight, before)
    save_file({f"{name}_x.{k}": t for k, t in halves.items()}, tmp_path / "b.safetensors")
    with pytest.raises(LineageError, match=r"b\.safetensors.*attn1_to_q_x.*another architecture"):
        Applied(parts["unet"], [], [(tmp_path / "a.safetensors", 1.0), (tmp_path / "b.safetensors", 1.0)])
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_keep_within_their_rank_and_alpha_is_linear(parts, kind):
    config = KINDS[kind]
    found = randomised(network(parts, config)).factors()
    for f in found.values():
        rank = config.dim if math.prod(f.shape[2:]) == 1 else config.conv_dim
        assert f.rank == rank
        bound = rank**2 if config.algo == "loha" else rank
        assert int(torch.linalg.matrix_rank(f.delta().flatten(1).double(), rtol=1e-5)) <= bound
        assert f.scale == pytest.approx(config.scale if math.prod(f.shape[2:]) == 1 else config.conv_scale)


def test_a_lora_is_linear_in_its_multiplier():
    """On one layer, where nothing between the weights and the output bends."""
    layer = LAYERS["conv"]().requires_grad_(False)
    x, made = arguments(layer, 1)
    zero, one, three = (adapted(x, layer.weight, layer.bias, made, s, op_of(layer)) for s in (0.0, 1.0, 3.0))
    torch.testing.assert_close(three - zero, 3 * (one - zero), rtol=1e-4, atol=1e-4)


def test_multiplier_zero_and_removal_give_the_model_back_bit_by_bit(parts):
    parts["unet"].requires_grad_(True)
    weights, before, modes = bits(parts), run(parts), [p.requires_grad for p in parts["unet"].parameters()]
    trained = randomised(network(parts))
    assert not torch.equal(run(parts), before)
    assert not any(p.requires_grad for m in (parts["unet"], parts["text_encoder"]) for p in m.parameters())
    trained.multiplier = 0.0
    assert torch.equal(run(parts), before)
    trained.remove()
    trained.remove()
    assert torch.equal(run(parts), before)
    assert [p.requires_grad for p in parts["unet"].parameters()] == modes
    assert not any("forward" in m.__dict__ for part in parts.values() for m in part.modules())
    after = bits(parts)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[n], t) for n, t in weights.items())


@pytest.mark.parametrize("first", [0, 1])
def test_networks_on_one_model_add_up_and_leave_in_any_order(parts, first):
    config = NetworkConfig("lora", dim=2)
    before = run(parts)
    both = [randomised(network(parts, config, seed), seed) for seed in (1, 2)]
    together = run(parts)
    joined = {
        name: {
            slot: torch.cat([n.factors()[name].tensors[slot] for n in both], axis)
            for slot, axis in (("lora_up.weight", 1), ("lora_down.weight", 0))
        }
        for name in both[0].factors()
    }
    both[first].remove()
    alone = run(parts)
    both[1 - first].remove()
    assert torch.equal(run(parts), before)
    single = network(parts, NetworkConfig("lora", dim=4, alpha=2.0))
    single.load(single.tensors() | {f"{n}.{s}": t for n, slots in joined.items() for s, t in slots.items()})
    torch.testing.assert_close(run(parts), together, rtol=1e-4, atol=1e-4)
    single.remove()
    kept = randomised(network(parts, config, 2 - first), 2 - first)
    torch.testing.assert_close(run(parts), alone, rtol=1e-4, atol=1e-4)
    kept.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_again_exactly(parts, kind, tmp_path):
    trained = randomised(network(parts, KINDS[kind]))
    wanted, output = trained.tensors(), run(parts)
    trained.save(tmp_path / "a.safetensors", {"ss_network_dim": "3"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        saved = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        assert file.metadata()["ss_network_dim"] == "3"
        assert len(file.metadata()["sshs_model_hash"]) == 64
    assert saved.keys() == wanted.keys()
    trained.remove()
    again = network(parts, KINDS[kind], seed=5)
    again.load(saved)
    assert all(torch.equal(t, wanted[n]) for n, t in again.tensors().items())
    assert torch.equal(run(parts), output)


def test_a_state_of_another_network_is_refused(parts):
    first = network(parts)
    state = {n: t.clone() for n, t in first.tensors().items()}
    first.remove()
    for config, message in (
        (KINDS["lora"], "only in the saved one"),
        (replace(KINDS["loha"], text_encoder=False), "only in the saved one"),
        (replace(KINDS["loha"], dim=4), r"\(16, 3\), not"),
        (replace(KINDS["loha"], alpha=2.0), "1.5, not 2.0"),
    ):
        other = network(parts, config)
        with pytest.raises(LineageError, match=message):
            other.load(state)
        other.remove()


def test_factors_that_no_file_can_hold_are_refused(parts, tmp_path):
    trained = network(parts)
    with torch.no_grad():
        trained.parameters()[0].fill_(1e6)
    trained.save(tmp_path / "wide.safetensors", {})
    with pytest.raises(LineageError, match="save fp32"):
        trained.save(tmp_path / "half.safetensors", {}, torch.float16)


def test_each_side_can_be_left_out_and_has_its_own_rate(parts):
    config = Config(ModelConfig("a"), DataConfig("b"), training=TrainingConfig(steps=1, lr=1e-4, unet_lr=3e-4))  # type: ignore[arg-type]
    both = network(parts)
    groups = {g["name"]: g for g in both.parameter_groups(config)}
    assert {name: g["lr"] for name, g in groups.items()} == {"unet": 3e-4, "text_encoder": 1e-4}
    assert sum(len(g["params"]) for g in groups.values()) == len(both.parameters())
    both.remove()
    for side, other in (("unet", "text_encoder"), ("text_encoder", "unet")):
        one = network(parts, replace(KINDS["loha"], **{other: False}))
        assert [g["name"] for g in one.parameter_groups(config)] == [side]
        one.remove()


def test_kernels_are_left_alone_without_a_conv_dim(parts):
    found = network(parts, replace(KINDS["locon"], conv_dim=0)).factors()
    assert found
    assert all(math.prod(f.shape[2:]) == 1 for f in found.values())


def test_gradient_checkpointing_gives_the_same_gradients(parts):
    trained = randomised(network(parts), deviation=0.1)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            parts["unet"].train().enable_gradient_checkpointing()
        run(parts).square().sum().backward()
        grads.append([p.grad for p in trained.parameters()])
        for p in trained.parameters():
            p.grad = None
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_train_under_autocast(parts, dtype):
    for m in parts.values():
        m.to(dtype)
    trained = randomised(network(parts), deviation=0.1)
    with torch.autocast("cpu", dtype):
        loss = run(parts).float().square().mean()
    loss.backward()
    assert all(
        p.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in trained.parameters() if p.grad is not None
    )
    assert any(bool(p.grad.any()) for p in trained.parameters() if p.grad is not None)


# peers


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_computes_the_same_from_our_tensors(parts, kind):
    modules = pytest.importorskip("lycoris.modules")
    trained = randomised(network(parts, KINDS[kind]))
    state = trained.tensors()
    wrap = modules.LohaModule if kind.startswith("loha") else modules.LoConModule
    for target in targets(parts["unet"], [parts["text_encoder"]]):
        own = {n.removeprefix(f"{target.name}."): t for n, t in state.items() if n.startswith(f"{target.name}.")}
        if not own:
            continue
        module: Any = target.module
        x = torch.randn(2, *((3, module.in_features) if isinstance(module, nn.Linear) else (module.in_channels, 6, 6)))
        ours = module(x)
        injected = module.__dict__.pop("forward")
        rank = len(next(t for n, t in own.items() if n.endswith(("w1_b", "lora_down.weight"))))
        peer = wrap(target.name, module, 1.0, rank, float(own["alpha"]), use_tucker=KINDS[kind].tucker)
        peer.load_state_dict(own)
        torch.testing.assert_close(ours, peer.eval()(x), rtol=1e-4, atol=1e-4)
        module.forward = injected


@pytest.mark.parametrize(("kind", "config"), [("loha", "LoHaConfig"), ("locon", "LoraConfig")])
def test_peft_computes_the_same_after_renaming(parts, kind, config):
    peft = pytest.importorskip("peft")
    trained = randomised(network(parts, replace(KINDS[kind], conv_dim=3, conv_alpha=1.5, text_encoder=False)))
    wanted, state = run(parts), trained.tensors()
    found = {t.name: t.canonical.removeprefix("unet.").removesuffix(".weight") for t in targets(parts["unet"], [])}
    trained.remove()
    alpha = {"alpha": 1.5} if kind == "loha" else {"lora_alpha": 1.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            parts["unet"], getattr(peft, config)(r=3, target_modules=list(found.values()), **alpha)
        )
    renamed = {}
    for name, tensor in state.items():
        module, slot = name.split(".", 1)
        slot = {"lora_up.weight": "lora_B.default.weight", "lora_down.weight": "lora_A.default.weight"}.get(
            slot, f"{slot}.default"
        )
        if not slot.startswith("alpha"):
            renamed[f"base_model.model.{found[module]}.{slot}"] = tensor
    missing, unexpected = wrapped.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert not [n for n in missing if "hada_" in n or "lora_" in n]
    torch.testing.assert_close(run(parts), wanted, rtol=1e-4, atol=1e-4)


# names


@functools.cache
def names(kind: str) -> tuple[list, dict]:
    parts = stable_diffusion.full(kind)
    encoders = [parts[c] for c in ("text_encoder", "text_encoder_2") if c in parts]
    return targets(parts["unet"], encoders), specs(parts)


@pytest.mark.parametrize(("kind", "unet", "text"), [("sd1", 278, 72), ("sd2", 278, 138), ("sdxl", 788, 264)])
def test_every_target_of_the_published_models_is_found(kind, unet, text):
    """Counted from the parameters: all matrices and kernels but embeddings, the first and last convolution."""
    found, known = names(kind)
    outside = r"^unet\.(conv_in|conv_out|time_embedding|add_embedding)\.|embedding|projection|^vae\.|bias$"
    wanted = {n for n, p in known.items() if len(p.shape) > 1 and not re.search(outside, n)}
    assert {t.canonical for t in found} == wanted
    assert (sum(t.component == "unet" for t in found), sum(t.component != "unet" for t in found)) == (unet, text)
    assert len({t.name for t in found}) == len(found)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_names_are_those_by_which_adapters_are_matched_to_models(kind):
    found, known = names(kind)
    table = kohya_modules(known)
    assert {t.name: table.get(t.name) for t in found} == {t.name: t.canonical for t in found}


def test_other_convolutions_than_stable_diffusions_are_refused(parts):
    parts["unet"].down_blocks[0].resnets[0].conv1 = nn.Conv2d(16, 16, 3, padding=1, groups=2)
    with pytest.raises(LineageError, match=r"unet\.down_blocks\.0\.resnets\.0\.conv1\.weight"):
        targets(parts["unet"], [])


def comfy_keys(kind: str, single_file: set[str]) -> set[str]:
    """Every module name ComfyUI looks up: flattened LDM names of the UNet for any model, diffusers' names for it, and
    the six Linear of each of 32 possible text layers under the encoder's prefix."""
    inner = {k.removeprefix("model.diffusion_model.") for k in single_file if k.startswith("model.diffusion_model.")}
    found = {f"lora_unet_{k.removesuffix('.weight').replace('.', '_')}" for k in inner if k.endswith(".weight")}
    if kind != "sdxl":
        found |= {f"lora_unet_{k}" for k in comfy_diffusers_names()}
    leaves = [f"self_attn_{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    for te in ("te1", "te2") if kind == "sdxl" else ("te",):
        found |= {f"lora_{te}_text_model_encoder_layers_{i}_{leaf}" for i in range(32) for leaf in leaves}
    return found


def comfy_diffusers_names() -> set[str]:
    """The UNet of SD1 and SD2 as ComfyUI writes it down: four levels of two residual blocks, attention on three."""
    resnet = ["conv1", "conv2", "time_emb_proj", "conv_shortcut"]
    attention = ["proj_in", "proj_out"] + [
        f"transformer_blocks_0_{x}"
        for x in [f"attn{n}_to_{y}" for n in (1, 2) for y in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    ]
    blocks = [f"down_blocks_{i}_resnets_{j}" for i in range(4) for j in range(2)]
    blocks += [f"up_blocks_{i}_resnets_{j}" for i in range(4) for j in range(3)]
    blocks += [f"mid_block_resnets_{j}" for j in range(2)]
    attended = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)]
    attended += [f"up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)] + ["mid_block_attentions_0"]
    found = {f"{b}_{leaf}" for b in blocks for leaf in resnet} | {f"{b}_{leaf}" for b in attended for leaf in attention}
    found |= {f"down_blocks_{i}_downsamplers_0_conv" for i in range(3)}
    return found | {f"up_blocks_{i}_upsamplers_0_conv" for i in range(3)}


RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def web_ui_key(name: str, second: bool) -> str:
    """The web UI's rule: an adapter's module name -> its flattened name of a module of the single-file model."""
    side = re.match(r"lora_unet_(down|up|mid)_blocks?_?(\d*)_(attentions|resnets)_(\d+)_(.+)", name)
    if side:
        part, level, kind, layer, leaf = side[1], int(side[2] or 0), side[3], int(side[4]), side[5]
        leaf = RESNET[leaf] if kind == "resnets" else leaf
        at = 1 if kind == "attentions" else 0
        if part == "mid":
            return f"diffusion_model_middle_block_{1 if at else 2 * layer}_{leaf}"
        block = f"input_blocks_{1 + 3 * level + layer}" if part == "down" else f"output_blocks_{3 * level + layer}"
        return f"diffusion_model_{block}_{at}_{leaf}"
    if found := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"diffusion_model_input_blocks_{3 + 3 * int(found[1])}_0_op"
    if found := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
        level = int(found[1])
        return f"diffusion_model_output_blocks_{2 + 3 * level}_{2 if level > 0 else 1}_conv"
    if found := re.match(r"lora_te(2?)_text_model_encoder_layers_(\d+)_(.+)", name):
        if found[1] or second:
            leaf = found[3].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
            return f"{'1_' if found[1] else ''}model_transformer_resblocks_{found[2]}_{leaf}"
        return f"transformer_text_model_encoder_layers_{found[2]}_{found[3]}"
    return name.replace("lora_te1_text_model", "0_transformer_text_model").replace("lora_unet", "diffusion_model")


WEB_UI_TEXT = {
    "sd1": {"cond_stage_model.": ""},
    "sd2": {"cond_stage_model.": ""},
    "sdxl": {"conditioner.embedders.": ""},
}


def web_ui_modules(kind: str, single_file: set[str]) -> set[str]:
    """Flattened module names of the single-file model, text encoders from their embedder on; OpenCLIP's fused attention
    stands for its three projections, which the web UI splits."""
    found = set()
    for key in single_file:
        if key.startswith("model.diffusion_model."):
            short = key.removeprefix("model.")
        elif key.startswith(prefix := "conditioner.embedders." if kind == "sdxl" else "cond_stage_model."):
            short = key.removeprefix(prefix)
        else:
            continue
        if key.endswith("in_proj_weight"):
            found |= {short.removesuffix("in_proj_weight").replace(".", "_") + f"{x}_proj" for x in "qkv"}
        elif key.endswith(".weight"):
            found.add(short.removesuffix(".weight").replace(".", "_"))
    return found


@pytest.fixture(scope="module")
def single_files() -> dict[str, set[str]]:
    def keys(kind):
        states = stable_diffusion.states(stable_diffusion.full(kind))
        return set(to_ldm({c: s for c, s in states.items() if c != "vae"}, kind))

    return {kind: keys(kind) for kind in ("sd1", "sd2", "sdxl")}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_comfyui_and_the_web_ui_know_every_name(kind, single_files):
    found, _ = names(kind)
    ours = {t.name for t in found}
    assert not ours - comfy_keys(kind, single_files[kind])
    modules = web_ui_modules(kind, single_files[kind])
    reached = {n: web_ui_key(n, kind == "sd2") for n in ours}
    assert not {n: key for n, key in reached.items() if key not in modules}
    assert len(set(reached.values())) == len(ours)
