"""SegFormer-B0 at 512 x 512, forward pass and train step, against two other implementations.

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

C, SIDE, MULTIPLY_ADDS = 512, 512, 5.6e9  # counted by benchmarks/students.py


def measure(rounds: int) -> list[dict[str, object]]:
    config = SegformerConfig(num_labels=C)  # the sizes of B0
    networks: dict[str, nn.Module] = {
        "ours": build_segmenter("segformer_b0", C),
        "transformers": SegformerForSemanticSegmentation(config),
        "segmentation-models-pytorch": smp.Segformer(
            "mit_b0", encoder_weights=None, classes=C, upsampling=1
        ),
    }
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
        rows.append(report(f"SegFormer-B0, {what}", times, 1.0, floor_ms(share * MULTIPLY_ADDS)))
    return rows


if __name__ == "__main__":
    finish(measure(start(__doc__)))
