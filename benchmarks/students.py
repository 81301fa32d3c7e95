"""Print the table of the students: size, arithmetic, weights, licence, time on this machine.

    python benchmarks/students.py                                    # counts, all students, seconds
    python benchmarks/students.py --time                             # and times of the small ones
    python benchmarks/students.py --students swin_t segnext_b --time --size 512 --repetitions 10

Parameters are counted with C = 512, the width of CLIP ViT-B/16. Arithmetic is that of one image of
512 x 512, counted by torch's FlopCounterMode, in multiply-adds: half of what the counter returns,
and what most papers print as FLOPs. Norms, activations and interpolations are not in it. Published
parameter counts belong to other classifiers or to a part of the network, so ours are counted again
in the form of the publication and printed beside them.

Times are of the student alone, without teacher and losses, in float32: the median of a few
repetitions after one that does not count. A train step is forward, backward and AdamW. On a busy
machine `--cpu-time` with OMP_NUM_THREADS=1 counts what the processor spends, not what the clock
shows: about the time that an idle core would take. The last line is one JSON object with every
figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation.fcn import FCNHead

from cliptteacher.segmenters import build_segmenter, list_segmenters
from cliptteacher.segmenters.segnext_weights import SEGNEXT_IMAGENET
from cliptteacher.segmenters.swin_weights import SWIN_IMAGENET
from cliptteacher.segmenters.weights import SEGFORMER_IMAGENET
from cliptteacher.segmenters.zoo import TORCHVISION_NETWORKS

CHANNELS = 512
SIZE = 512
TIMES = ("train step, ms", "inference, ms")
SMALL = ("fpn_small", "segformer_nano", "segnext_nano", "swin_nano", "segformer_b0", "segnext_t")

# Millions of parameters. SegFormer: the encoder alone, as released. SegNeXt and Swin: with 150
# classes, Swin with its auxiliary head. torchvision: with 21 classes, the two ResNets with an
# auxiliary head, which `adapt_segmenter` leaves out; ConvNeXt with its ImageNet classifier.
PUBLISHED = {
    "segformer_b0": 3.32,
    "segformer_b1": 13.15,
    "segformer_b2": 24.20,
    "segformer_b3": 44.07,
    "segformer_b4": 60.84,
    "segformer_b5": 81.44,
    "segnext_t": 4.3,
    "segnext_s": 13.9,
    "segnext_b": 27.6,
    "segnext_l": 48.9,
    "swin_t": 60.0,
    "swin_s": 81.0,
    "swin_b": 121.0,
    "torchvision/lraspp_mobilenet_v3_large": 3.22,
    "torchvision/fcn_resnet50": 35.32,
    "torchvision/deeplabv3_resnet50": 42.00,
    "torchvision/convnext_tiny": 28.59,
}
LICENCES = {
    **dict.fromkeys(SEGFORMER_IMAGENET, ("ImageNet", "NVIDIA, research and evaluation only")),
    **dict.fromkeys(SEGNEXT_IMAGENET, ("ImageNet", "Apache-2.0, contact before commercial use")),
    **dict.fromkeys(SWIN_IMAGENET, ("ImageNet", "BSD-3-Clause (torchvision)")),
    **dict.fromkeys(TORCHVISION_NETWORKS, ("ImageNet", "BSD-3-Clause (torchvision)")),
}


def count_parameters(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def count_as_published(name: str) -> float:
    """Our parameters, in millions, in the form in which the publication counts them."""
    if name == "torchvision/convnext_tiny":  # a norm and 1000 classes on 768 channels
        backbone = build_segmenter(name, CHANNELS).network
        total = count_parameters(backbone) + (2 * 768 + 769 * 1000) / 1e6
    elif name in TORCHVISION_NETWORKS:
        auxiliary = nn.Identity() if "lraspp" in name else FCNHead(1024, 21)
        total = count_parameters(build_segmenter(name, 21)) + count_parameters(auxiliary)
    else:
        options = {"auxiliary": True} if name.startswith("swin") else {}
        with torch.device("meta"):  # no memory, no random numbers
            model = build_segmenter(name, 150, **options)
        total = count_parameters(model.backbone if name.startswith("segformer") else model)
    return round(total, 2)


def count_multiply_adds(model: nn.Module, *shape: int) -> float:
    """Billions of multiply-adds of one evaluation, counted on tensors without content.

    Fused attention on the CPU is an operation that the counter does not know and leaves out; the
    literal one is two matrix products.
    """
    model.eval()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):
        model(torch.empty(shape))
    return counter.get_total_flops() / 2 / 1e9


def median_ms(run: Callable[[], None], options: argparse.Namespace) -> float:
    """Median time of a call in milliseconds; the first call warms up and does not count."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    device, times = torch.device(options.device), []
    for _ in range(options.repetitions + 1):
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (clock() - start))
    return statistics.median(times[1:])


def measure_times(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Time of a train step on a batch, and of inference on one image, in whole milliseconds."""
    device, size = torch.device(options.device), options.size
    train_size = options.train_size or size
    torch.manual_seed(0)
    model = build_segmenter(name, CHANNELS).to(device, memory_format=torch.channels_last)
    batch = torch.rand(options.batch_size, 3, train_size, train_size)
    batch = batch.to(device, memory_format=torch.channels_last)
    image = torch.rand(1, 3, size, size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def train() -> None:
        loss = model(batch).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def infer() -> None:
        model(image)

    train_ms = median_ms(train, options)
    model.eval()
    inference_ms = median_ms(infer, options)
    return dict(zip(TIMES, (round(train_ms), round(inference_ms)), strict=True))


def describe(name: str) -> dict[str, str | float]:
    """One row of the table without times: counts in millions and billions."""
    model = build_segmenter(name, CHANNELS)
    weights, licence = LICENCES.get(name, ("none, trained from scratch", "-"))
    multiply_adds = count_multiply_adds(model, 1, 3, SIZE, SIZE)
    return {
        "student": f"`{name}`",
        "parameters, M": round(count_parameters(model), 2),
        "published, M": PUBLISHED.get(name, "-"),
        "ours counted alike, M": count_as_published(name) if name in PUBLISHED else "-",
        "G multiply-adds": round(multiply_adds, 1),
        "stride": int(model.stride),
        "weights": weights,
        "licence of the weights": licence,
    }


def format_table(rows: list[dict[str, str | float]]) -> str:
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list_segmenters()
    parser.add_argument("--students", nargs="+", choices=known, metavar="NAME", help="default: all")
    parser.add_argument("--time", action="store_true", help="time --students, by default the small")
    parser.add_argument("--size", type=int, default=128, help="side of the timed images, pixels")
    parser.add_argument("--train-size", type=int, help="the same in a train step; default: --size")
    parser.add_argument("--batch-size", type=int, default=2, help="images of a timed train step")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that is not idle")
    parser.add_argument("--device", default="cpu", help="of the times")
    options = parser.parse_args(argv)

    rows = [describe(name) for name in options.students or known]
    if options.time:
        timed = options.students or SMALL
        for name, row in zip(options.students or known, rows, strict=True):
            row |= measure_times(name, options) if name in timed else dict.fromkeys(TIMES, "-")
    print(format_table(rows))
    settings = {**vars(options), "threads": torch.get_num_threads()}
    print(json.dumps({"options": settings, "rows": rows}))


if __name__ == "__main__":
    main()
