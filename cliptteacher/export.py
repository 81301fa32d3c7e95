"""Write a trained student as one file that needs neither CLIP nor this package.

    bytes (B, 3, H, W)
      -> [0, 1], resized to the sides of training, mirrored to whole cells     `ExportableSegmenter`
      -> student -> logits against the text features, gamma on the unseen      (B, A, h, w)
      -> bilinear to the size of the picture, argmax                           labels (B, H, W)

`export_program` traces this for `torch.export`, and `export_onnx` turns the traced program into
ONNX; batch, height and width stay free in both. Cost: a minute or two of tracing.

A size that is computed from the size of the picture is read from a tensor, so that tracing takes it
for a number of its own and not for a formula that every layer below would have to reason about.
"""

import copy
import importlib.util
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .files import write_whole
from .inference import Predictor
from .logits import pixel_logits, upsampled_argmax

INPUT, OUTPUTS = "images", ("labels", "logits")
OPSET = 20  # of ONNX
_DEFER = "prefer_deferred_runtime_asserts_over_guards"  # an argument that older versions lack
_EXAMPLE = (2, 3, 107, 149)  # of tracing; no two sizes alike, none a multiple of a stride


class ExportableSegmenter(nn.Module):
    """Do what a `Predictor` does, in operations that can be traced for every size of picture.

    Args:
        predictor: of mode "whole"; its student is copied, to the CPU.

    Raises:
        ValueError: the predictor slides windows.
    """

    text_features: Tensor
    bonus: Tensor

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        if predictor.mode != "whole":
            raise ValueError(
                f'a predictor must have the mode "whole" to be exported, got {predictor.mode!r}; '
                "cut large pictures into windows outside of the program"
            )
        own = copy.deepcopy(predictor).cpu().eval()
        self.segmenter = own.segmenter.requires_grad_(False)
        self.resize, self.divisor = own.resize, own.size_divisor
        self.logit_scale, self.similarity = own.logit_scale, own.similarity
        self.register_buffer("text_features", own.text_features)
        self.register_buffer("bonus", own.bonus)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Segment pictures.

        Args:
            images: (B, 3, H, W) uint8, RGB.

        Returns:
            Labels, int64 (B, H, W), and the logits (B, A, h, w) of which they are the largest,
            bonus included, at the resolution of the student.
        """
        H, W = images.shape[2:]
        height, width = self._target_size(H, W)
        x = images.float() / 255
        if self.resize is not None:
            x = _resizing(H, height) @ x @ _resizing(W, width).T
        features = self._features(x, height, width)
        logits = pixel_logits(features, self.text_features, self.logit_scale, self.similarity)
        logits = logits + self.bonus[:, None, None]
        return upsampled_argmax(logits, (H, W)), logits

    def _target_size(self, H: int, W: int) -> tuple[int, int]:
        """`keep_ratio_size`, in the same double precision."""
        sides = torch.tensor([H, W], dtype=torch.float64)
        factor = torch.ones_like(sides[0])
        if self.resize is not None:
            long, short = max(self.resize), min(self.resize)
            factor = torch.minimum(long / sides.max(), short / sides.min())
        height, width = (sides * factor + 0.5).floor().clamp(min=1).long().tolist()
        torch._check(height >= 1)
        torch._check(width >= 1)
        return height, width

    def _features(self, x: Tensor, height: int, width: int) -> Tensor:
        """`features_of_multiple`, without asking whether there is anything to mirror."""
        d = self.divisor
        # Not `-(-side // d)`: where ONNX divides a negative number, it rounds towards zero.
        tall, wide = ((side + d - 1) // d * d for side in (height, width))
        x = x.index_select(2, _mirrored(height, tall)).index_select(3, _mirrored(width, wide))
        features: Tensor = self.segmenter(x)
        if d == 1:
            return features
        rows, columns = features.shape[2:]
        rows, columns = (height * rows + tall - 1) // tall, (width * columns + wide - 1) // wide
        return features[:, :, :rows, :columns]


def export_program(predictor: Predictor) -> ExportedProgram:
    """Trace a predictor with free batch, height and width.

    Args:
        predictor: of mode "whole".

    Returns:
        A program for the CPU; `torch.export.save` writes it.

    Raises:
        ValueError: the predictor slides windows, or this torch is too old to trace free sizes.
    """
    if _DEFER not in signature(torch.export.export).parameters:
        raise ValueError(
            "exporting needs a torch whose torch.export defers its assertions, got "
            f"{torch.__version__}; run `pip install --upgrade torch torchvision`"
        )
    model = ExportableSegmenter(predictor).eval()
    example = torch.zeros(_EXAMPLE, dtype=torch.uint8)
    free = {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}
    return torch.export.export(
        model,
        (example,),
        dynamic_shapes=(free,),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def save_program(program: ExportedProgram, path: str | Path, description: str) -> None:
    """Write a program with a description beside it, as ``description.json``, inside the file."""
    with write_whole(path) as file:
        torch.export.save(program, file, extra_files={"description.json": description})


def save_onnx(program: ExportedProgram, path: str | Path, description: str) -> None:
    """Write a program as ONNX, with a description in its metadata.

    Raises:
        ModuleNotFoundError: the packages onnx and onnxscript are not installed.
    """
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise ModuleNotFoundError(
            "ONNX needs the packages onnx and onnxscript; run `pip install 'cliptteacher[export]'`"
        )
    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        opset_version=OPSET,
        verbose=False,
    )
    assert written is not None
    written.model.metadata_props["description"] = description
    with write_whole(path) as file:
        file.write(written.model_proto.SerializeToString())


def _resizing(side: int, target: int) -> Tensor:
    """Weights (target, side) of bilinear interpolation, antialiased where it shrinks.

    A triangle around the centre of every new pixel, as wide as a pixel of the coarser side. The
    product of two such matrices is `F.interpolate(..., antialias=True)`, which ONNX has not.
    """
    scale = side / target
    reach = torch.sym_max(1.0, scale)
    centers = (torch.arange(target) + 0.5) * scale
    distance = (torch.arange(side) + 0.5 - centers[:, None]).abs()  # (target, side)
    weights: Tensor = torch.clamp(1 - distance / reach, min=0)  # type: ignore[arg-type]
    return weights / weights.sum(dim=1, keepdim=True)


def _mirrored(side: int, target: int) -> Tensor:
    """Indices (target,) of a side that is continued by reflection, to and fro."""
    last = side - 1
    there = torch.arange(target)
    folded = there % torch.tensor(2 * last).clamp(min=1)
    return torch.minimum(folded, 2 * last - folded)
