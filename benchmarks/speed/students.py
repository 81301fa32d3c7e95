"""SegFormer-B0 and B4 at 512 x 512, forward pass and train step, against two other implementations.

    OMP_NUM_THREADS=1 python benchmarks/speed/students.py

The weights are random and all give 512 channels at a quarter of the side; the arithmetic is equal,
the numbers are not: `tests/test_segformer.py` compares them with the weights of transformers.
"""

import segmentation_models_pytorch as smp
import torch
from race import finish, floor_ms, race, report, start
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from cliptteacher.segmenters import build_segmenter

C, SIDE = 512, 512
MULTIPLY_ADDS = {"b0": 7.0e9, "b4": 57.6e9}  # with those of attention


def build(size: str) -> dict[str, nn.Module]:
    more = {}
    if size == "b4":
        more = {"depths": [3, 8, 27, 3], "hidden_sizes": [64, 128, 320, 512]}
        more["decoder_hidden_size"] = 768
    return {
        "ours": build_segmenter(f"segformer_{size}", C),
        "transformers": SegformerForSemanticSegmentation(SegformerConfig(num_labels=C, **more)),
        "segmentation-models-pytorch": smp.Segformer(
            f"mit_{size}", encoder_weights=None, classes=C, upsampling=1
        ),
    }


def measure(size: str, rounds: int) -> list[dict[str, object]]:
    networks = build(size)
    images = torch.rand(1, 3, SIDE, SIDE)

    def forward(network: nn.Module) -> torch.Tensor:
        output = network(images)
        return getattr(output, "logits", output)

    def step(network: nn.Module) -> None:
        forward(network).square().mean().backward()

    def without_gradient(network: nn.Module) -> None:
        with torch.inference_mode():
            forward(network)

    assert {forward(network).shape for network in networks.values()} == {(1, C, 128, 128)}
    rows = []
    for what, work, share in (("forward pass", without_gradient, 1), ("both passes", step, 3)):
        for network in networks.values():
            network.train(work is step)
        ways = {name: lambda n=network, w=work: w(n) for name, network in networks.items()}
        times = race(ways, rounds)
        floor = floor_ms(share * MULTIPLY_ADDS[size])
        rows.append(report(f"SegFormer-{size.upper()}, {what}", times, 1.0, floor))
    return rows


if __name__ == "__main__":
    rounds = start(__doc__)
    finish([*measure("b0", rounds), *measure("b4", max(2, rounds // 3))])
