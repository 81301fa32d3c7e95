"""The paper's size on a CUDA device that does not exist: devices, dtypes and shapes, no numbers.

A tensor that is left on the CPU, or an operation without a CUDA kernel, is an error here as it is
on a GPU. There is no backward pass: autograd asks for the real device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cliptteacher as ct
from cliptteacher.clip.model import CLIP, CLIPConfig

NAMES = [f"class {number}" for number in range(15)]


@contextmanager
def on_cuda(model: ct.CLIPTeacher) -> Iterator[None]:
    with FakeTensorMode():
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        yield


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """What torch.autocast does; it refuses CUDA where there is none."""
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or torch.float16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def build(student: str, **options: Any) -> ct.CLIPTeacher:
    auxiliary = student.startswith("swin")
    with torch.device("meta"):
        clip = CLIP(CLIPConfig())
        segmenter = ct.build_segmenter(
            student, clip.embed_dim, **({"auxiliary": True} if auxiliary else {})
        )
    method = ct.CLIPTeacherConfig(**options, auxiliary_weight=0.4 if auxiliary else 0.0)
    return ct.CLIPTeacher(clip, segmenter, NAMES, method).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.empty(2, 3, 512, 512, dtype=torch.uint8, device="cuda")
    return images, torch.empty(2, 512, 512, dtype=torch.uint8, device="cuda")


CASES: list[tuple[str, dict[str, Any]]] = [
    ("segformer_b0", {}),
    ("segnext_t", {"loss_size": "features", "glm_query": "unit", "potential_scope": "image"}),
    ("swin_t", {"seeding": "window", "adapter": "mlp", "generate_loss": "bce"}),
    ("torchvision/deeplabv3_resnet50", {"ce": "seen", "tokens": "final"}),
    ("fpn_small", {"glm_windows": (1, 2), "similarity": "cosine", "distill_weight": 1.0}),
]


@pytest.mark.parametrize(("student", "options"), CASES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_step_and_a_prediction(
    student: str, options: dict[str, Any], dtype: torch.dtype | None
) -> None:
    model = build(student, **options)
    with on_cuda(model):
        with autocast(dtype):
            losses = model(*batch())
        for name, value in losses.items():
            assert (value.device.type, value.dtype) == ("cuda", torch.float32), name
        text = torch.empty(20, 512, device="cuda")
        for mode in ("whole", "slide"):
            predictor = ct.Predictor(model.segmenter, text, unseen=[19], mode=mode)
            label_map = predictor(torch.zeros(3, 375, 500, dtype=torch.uint8))
            assert label_map.shape == (375, 500) and label_map.device.type == "cuda"


@pytest.mark.parametrize("fault", ["seen_text", "bank"])
def test_a_tensor_left_behind_is_noticed(fault: str) -> None:
    model = build("fpn_small")
    with on_cuda(model):
        if fault == "seen_text":
            model.seen_text = torch.empty(len(NAMES), 512)
        else:
            model.glm[0].bank.tokens = torch.empty(48, 512)
        with pytest.raises(RuntimeError, match="device"):
            model(*batch())
