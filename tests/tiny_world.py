"""A world whose models are trained for two or three steps: everything is there, nothing is learned."""

from train import pipeline, topology
from train.fit import Plan

SMALL = pipeline.Size(unet=(16, 24), vae=(8, 8, 8), text=16, text_layers=1, heads=2)
BASE = Plan(steps=3, lr=1e-3, muon_lr=0.02, batch=2)
TINY = topology.World(
    models=(
        topology.Model("base", ("micah", "dylan"), BASE),
        topology.Model("tuned", ("pixel-art",), Plan(steps=2, lr=1e-4, batch=2), parent="base"),
        topology.Merge("mixed", "half = base + tuned, 0.5, fp16\nmixed = __O1__ + tuned, 0.5, fp16, safetensors\n"),
        topology.Permuted("shuffled", "tuned"),
    ),
    autoencoder=BASE,
    targets=("personas",),
    characters=("hina",),
    pictures=4,
    size=SMALL,
)
