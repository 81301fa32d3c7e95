"""SegFormer-B0, B4 and Swin-B with UPerNet at 512 x 512, both passes, against other packages.

    OMP_NUM_THREADS=1 python benchmarks/speed/students.py

The weights are random and all give 512 channels at a quarter of the side; the arithmetic is equal
within 1 %, the numbers are not: `tests/test_segformer.py` and `tests/test_swin.py` compare them
with the weights of the peers.
"""

import segmentation_models_pytorch as smp
import torch
from race import finish, floor_ms, race, report, start
from torch import nn
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from cliptteacher.segmenters import build_segmenter

C, SIDE = 512, 512
# multiply-adds, with those of attention
STUDENTS = {"segformer_b0": 7.0e9, "segformer_b4": 57.6e9, "swin_b": 302e9}
OF_B4 = {"depths": [3, 8, 27, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}


class UperNet(nn.Module):
    """Without the last step of transformers, which brings all channels to the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        stages = [f"stage{i}" for i in (1, 2, 3, 4)]
        sizes = {"depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "embed_dim": 128}
        swin = SwinConfig(image_size=SIDE, window_size=7, out_features=stages, **sizes)
        options = {"hidden_size": 512, "num_labels": C, "use_auxiliary_head": False}
        self.network = UperNetForSemanticSegmentation(
            UperNetConfig(backbone_config=swin, **options)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.decode_head(self.network.backbone(images).feature_maps)


def build(name: str) -> dict[str, nn.Module]:
    ours = {"ours": build_segmenter(name, C)}
    if name == "swin_b":
        return {**ours, "transformers": UperNet()}
    config = SegformerConfig(num_labels=C, **(OF_B4 if name == "segformer_b4" else {}))
    encoder = name.replace("segformer", "mit")
    other = smp.Segformer(encoder, encoder_weights=None, classes=C, upsampling=1)
    return {
        **ours,
        "transformers": SegformerForSemanticSegmentation(config),
        "segmentation-models-pytorch": other,
    }


def measure(name: str, rounds: int) -> list[dict[str, object]]:
    networks = build(name)
    images = torch.rand(1, 3, SIDE, SIDE)

    def forward(network: nn.Module) -> torch.Tensor:
        output = network(images)
        return getattr(output, "logits", output)

    def step(network: nn.Module) -> None:
        forward(network).square().mean().backward()

    def without_gradient(network: nn.Module) -> None:
        with torch.inference_mode():
            forward(network)

    assert {forward(network.eval()).shape for network in networks.values()} == {(1, C, 128, 128)}
    rows = []
    for what, work, share in (("forward pass", without_gradient, 1), ("both passes", step, 3)):
        for network in networks.values():
            # UPerNet's BatchNorm of one position cannot train on one image
            network.train(work is step and name != "swin_b")
        ways = {name: lambda n=network, w=work: w(n) for name, network in networks.items()}
        times = race(ways, rounds)
        rows.append(report(f"{name}, {what}", times, 1.0, floor_ms(share * STUDENTS[name])))
    return rows


if __name__ == "__main__":
    rounds = start(__doc__)
    few = max(2, rounds // 4)
    turns = {"segformer_b0": rounds, "segformer_b4": few, "swin_b": few}
    finish([row for name in STUDENTS for row in measure(name, turns[name])])
