"""From a JPEG to a label map of its size, 171 words, against transformers and CLIP's encoder.

    OMP_NUM_THREADS=1 python benchmarks/speed/inference.py

A photograph of 640 x 480, SegFormer-B0. Transformers has a head of 171 classes in place of 512
channels and text features, and its processor normalises and brings the logits to full size. The
second row is what a method that needs CLIP at test time pays: ViT-B/16's dense tokens against text.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from loader import HEIGHT, WIDTH, write_photographs
from PIL import Image
from race import finish, race, report, start
from torch import Tensor
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from cliptteacher.clip.dense import DenseTokens
from cliptteacher.clip.model import CLIP, CLIPConfig
from cliptteacher.data.images import to_image
from cliptteacher.inference import Predictor
from cliptteacher.segmenters import build_segmenter

WORDS = 171


def measure(rounds: int) -> list[dict[str, object]]:
    clip = CLIP(CLIPConfig()).eval()
    student = build_segmenter("segformer_b0", clip.embed_dim).eval()
    text = F.normalize(torch.randn(WORDS, clip.embed_dim), dim=1)
    peer = SegformerForSemanticSegmentation(SegformerConfig(num_labels=WORDS)).eval()
    processor = SegformerImageProcessor(do_resize=False)
    predict, predict_by_clip = Predictor(student, text), Predictor(DenseTokens(clip).eval(), text)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_photographs(Path(folder), 1)
        (path,) = (Path(folder) / "images").iterdir()

        def pipeline() -> Tensor:
            image = Image.open(path).convert("RGB")
            output = peer(**processor(image, return_tensors="pt"))
            sizes = [(image.height, image.width)]
            labels: Tensor = processor.post_process_semantic_segmentation(output, sizes)[0]
            return labels

        ways = {
            "ours": lambda: predict(to_image(path)),
            "transformers": pipeline,
            "CLIP's dense tokens": lambda: predict_by_clip(to_image(path)),
        }
        assert {way().shape for way in ways.values()} == {(HEIGHT, WIDTH)}
        times = race(ways, rounds)
    clip_time = times.pop("CLIP's dense tokens")
    against_clip = {"ours": times["ours"], "CLIP's dense tokens": clip_time}
    return [
        report("photograph to labels, 171 words", times, 1.0),
        report("the same, CLIP at test time", against_clip, 1.0),
    ]


if __name__ == "__main__":
    finish(measure(start(__doc__)))
