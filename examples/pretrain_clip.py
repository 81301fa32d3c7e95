"""Train a small CLIP on captioned crops: the teacher of miniworld, or one for your own folder.

    python examples/pretrain_clip.py --output runs/clip                       # miniworld
    python examples/pretrain_clip.py --data folder --root DIR --output runs/clip

A caption names the classes that a crop shows ("a photo of sand, star and ring."), seen and unseen
alike: the teacher has read of everything, as the real CLIP has, but never saw a mask. The model
is the package's own ``CLIP`` with the real tokenizer; only its sizes are small. Writes
``clip.pt`` (for ``load_clip``), ``config.json`` and ``metrics.jsonl`` to the output folder.

It reads the words of its captions and no others: the class names and "a photo of a". Every other
row of the token table is zero, so a word that it never read adds nothing to a prompt instead of
noise, and the file stays small. Hence prompts should be the single template "a photo of a {}.";
the ensemble works, but its further words ("small", "scene", ...) say nothing to this CLIP.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torchvision.transforms.v2 import functional as TF

from cliptteacher.clip import CLIP, CLIPConfig, class_text_features, save_clip, tokenize
from cliptteacher.command_line import number, one_sentence_errors
from cliptteacher.data.captions import (
    Captions,
    FolderCaptions,
    MiniWorldCaptions,
    caption_batches,
)
from cliptteacher.data.folder import FolderDataset
from cliptteacher.data.miniworld import MiniWorld, draw_single_class
from cliptteacher.data.splits import SegmentationDataset
from cliptteacher.distributed import DEVICES, start_process
from cliptteacher.files import write_json
from cliptteacher.training.records import MetricsLog, hold

_FRESH_SEED = (3 << 30) + (1 << 29)  # seeds count 32 bits; no split of miniworld reaches here


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("miniworld", "folder"), default="miniworld")
    parser.add_argument("--root", type=Path, help="folder data set: images, labels, dataset.json")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=number(float, 0), default=40.0, help="stop after this training time"
    )
    parser.add_argument("--iterations", type=number(int, 1), help="instead of --minutes")
    parser.add_argument("--batch-size", type=number(int, 2), default=192)
    parser.add_argument(
        "--pool", type=number(int, 1), default=24000, help="miniworld scenes to draw"
    )
    parser.add_argument("--image-size", type=number(int, 1), default=64)
    parser.add_argument("--patch-size", type=number(int, 1), default=8)
    parser.add_argument("--embed-dim", type=number(int, 1), default=128)
    parser.add_argument("--vision-width", type=number(int, 1), default=128)
    parser.add_argument("--vision-layers", type=number(int, 1), default=4)
    parser.add_argument("--text-width", type=number(int, 1), default=128)
    parser.add_argument("--text-layers", type=number(int, 1), default=2)
    parser.add_argument("--learning-rate", type=number(float, 0), default=1.5e-3)
    parser.add_argument("--weight-decay", type=number(float, 0), default=0.05)
    parser.add_argument(
        "--max-scale", type=number(float, 1), default=100.0, help="limit of exp(logit_scale)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--threads", type=number(int, 0), help="CPU threads of torch")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--log-interval", type=number(int, 1), default=100)
    args = parser.parse_args(argv)
    if args.data == "folder" and args.root is None:
        parser.error("--data folder needs --root, the folder of the data set")
    return args


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """CLIP's symmetric InfoNCE, in which every caption that is true of an image is a positive.

    A small world has few captions: without this, most negatives of a batch would be false.

    Args:
        image, text: (B, C) unit rows.
        scale: scalar exp(logit_scale).
        true: (B, B) bool, caption j is true of image i.
    """
    logits = scale * image @ text.T  # (B, B)
    positive = true.float()
    to_text = positive / positive.sum(1, keepdim=True)
    to_image = positive.T / positive.T.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, to_text) + F.cross_entropy(logits.T, to_image))


class CompactVocabulary:
    """Trains only the token rows that captions can use, among CLIP's 49,408.

    Ids keep their order, so the end-of-text token stays the largest and is found as before.
    """

    def __init__(self, clip: CLIP, class_names: tuple[str, ...]) -> None:
        captions = [f"a photo of a {name}, {name} and {name}." for name in class_names]
        self.used = tokenize([*captions, "a picture of"]).unique()
        self.full_size = clip.token_embedding.num_embeddings
        self.clip = clip
        rows = clip.token_embedding.weight[self.used.to(clip.token_embedding.weight.device)]
        self.initial = rows.detach().clone()
        clip.token_embedding = nn.Embedding.from_pretrained(rows.detach(), freeze=False)

    def encode(self, texts: list[str]) -> Tensor:
        """Tokenize to compact ids, cut behind the longest text."""
        ids = tokenize(texts)
        longest = int(ids.argmax(1).max()) + 1
        ids = ids[:, :longest].contiguous()
        compact = torch.searchsorted(self.used, ids)
        if not torch.equal(self.used[compact.clamp(max=len(self.used) - 1)], ids):
            raise ValueError("a caption uses a token outside the vocabulary of the class names")
        return compact

    def expand(self) -> CLIP:
        """A copy of the CLIP with the full table, zero where nothing was trained.

        A class that no caption named has kept its random row, which would be noise: zero as well.
        """
        weights = self.clip.state_dict()
        rows = weights["token_embedding.weight"]
        trained = (rows != self.initial).any(dim=1)
        table = torch.zeros(self.full_size, rows.shape[1], device=rows.device)
        table[self.used.to(rows.device)[trained]] = rows[trained]
        clip = CLIP(self.clip.config)
        clip.load_state_dict({**weights, "token_embedding.weight": table})
        return clip.eval().requires_grad_(False).to(rows.device)


def make_optimizer(clip: CLIP, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [p for n, p in clip.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    others = [p for n, p in clip.named_parameters() if p.ndim < 2 or "embedding" in n]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6)


def train(
    clip: CLIP,
    vocabulary: CompactVocabulary,
    captions: Captions,
    args: argparse.Namespace,
    log: MetricsLog,
) -> int:
    """Train until the time or the iterations are used up; returns the iterations."""
    optimizer = make_optimizer(clip, args.learning_rate, args.weight_decay)
    batches = caption_batches(captions, args.batch_size, args.seed)
    started, step = time.monotonic(), 0
    loss_sum = torch.zeros((), device=args.device)
    while True:
        elapsed = time.monotonic() - started
        progress = step / args.iterations if args.iterations else elapsed / (60 * args.minutes)
        if progress >= 1:
            return step
        rate = learning_rate(args.learning_rate, step, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, texts, true = next(batches)
        pixels = images.to(args.device).float().div(255)
        ids = vocabulary.encode(texts).to(args.device)
        loss_sum += train_step(clip, optimizer, pixels, ids, true.to(args.device), args)
        step += 1
        if step % args.log_interval == 0:
            row = {"step": step, "loss": float(loss_sum) / args.log_interval, "lr": rate}
            row |= {"progress": progress, "scale": float(clip.logit_scale.detach().exp())}
            seconds = time.monotonic() - started
            row["images_per_second"] = step * args.batch_size / seconds
            log.write(row)
            print(progress_line(row, seconds), flush=True)
            loss_sum.zero_()


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Warm up over 300 iterations, then follow half a cosine down to 0 at progress 1."""
    return peak * min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(
    clip: CLIP,
    optimizer: torch.optim.Optimizer,
    pixels: Tensor,
    ids: Tensor,
    true: Tensor,
    args: argparse.Namespace,
) -> Tensor:
    """Update the CLIP once; returns the loss, detached and still on the device."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        image, text = clip.encode_image(pixels).cls, clip.encode_text(ids)
    image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
    loss = contrastive_loss(image, text, clip.logit_scale.exp(), true)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        # OpenAI's limit is 100. A low one pushes the features of the classes apart.
        clip.logit_scale.clamp_(max=math.log(args.max_scale))
    return loss.detach()


def progress_line(row: dict[str, float], seconds: float) -> str:
    left = seconds * (1 / max(row["progress"], 1e-9) - 1) / 60
    numbers = f"loss {row['loss']:.3f}  lr {row['lr']:.1e}  scale {row['scale']:.1f}"
    speed = f"{row['images_per_second']:.0f} images/s  {left:.1f} min left"
    return f"step {row['step']}  {numbers}  {speed}"


@torch.inference_mode()
def dense_accuracy(clip: CLIP, text: Tensor, dataset: SegmentationDataset, num: int) -> float:
    """Share of labelled pixels whose dense token is nearest to the right class name."""
    right = total = 0
    for i in range(min(num, len(dataset))):
        image, labels = dataset[i]
        sides = [max(1, side // clip.patch_size) * clip.patch_size for side in image.shape[1:]]
        pixels = TF.resize(image[None].float().div(255), sides, antialias=True)
        dense = clip.encode_image(pixels.to(text.device)).dense
        scores = torch.einsum("bchw,kc->bkhw", F.normalize(dense, dim=1), text)
        scores = F.interpolate(scores, image.shape[1:], mode="bilinear")
        labelled = labels != dataset.ignore_index
        right += int((scores[0].argmax(0).cpu() == labels)[labelled].sum())
        total += int(labelled.sum())
    return right / total


@torch.inference_mode()
def single_class_accuracy(clip: CLIP, text: Tensor, size: int, per_class: int = 25) -> float:
    """Zero-shot accuracy of the CLS token on fresh miniworld images of one class each."""
    right = 0
    for label in range(len(text)):
        generators = [
            Generator().manual_seed(_FRESH_SEED + 100 * label + k) for k in range(per_class)
        ]
        images = torch.stack([draw_single_class(g, size, label)[0] for g in generators])
        cls = clip.encode_image(images.to(text.device).float().div(255)).cls
        right += int((F.normalize(cls, dim=1) @ text.T).argmax(1).eq(label).sum())
    return right / (per_class * len(text))


def measure(
    clip: CLIP, held_out: SegmentationDataset, args: argparse.Namespace
) -> dict[str, float]:
    """Measure the teacher on data that it was not trained on, at the size it will be applied."""
    text = class_text_features(clip, held_out.class_names)
    if args.data == "folder":
        return {"dense_accuracy_val": dense_accuracy(clip, text, held_out, 60)}
    size = args.image_size
    return {
        f"single_class_accuracy_{size}": single_class_accuracy(clip, text, size),
        f"single_class_accuracy_{2 * size}": single_class_accuracy(clip, text, 2 * size),
        "dense_accuracy_val_128": dense_accuracy(clip, text, held_out, 192),
    }


def open_data(args: argparse.Namespace) -> tuple[Captions, SegmentationDataset]:
    """Images with captions to train on, and the validation split to measure on."""
    if args.data == "miniworld":
        captions = MiniWorldCaptions(args.pool, args.image_size, print_drawn)
        return captions, MiniWorld("val")
    held_out = FolderDataset(args.root, "val")
    return FolderCaptions(FolderDataset(args.root, "train"), args.image_size), held_out


def print_drawn(done: int, total: int) -> None:
    print(f"drew {done} of {total} scenes", flush=True)


def build_clip(args: argparse.Namespace) -> CLIP:
    config = CLIPConfig(
        embed_dim=args.embed_dim,
        image_size=args.image_size,
        patch_size=args.patch_size,
        vision_width=args.vision_width,
        vision_layers=args.vision_layers,
        text_width=args.text_width,
        text_layers=args.text_layers,
    )
    return CLIP(config).to(args.device)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    with one_sentence_errors("pretrain_clip.py"):
        args.device = str(start_process(args.device).device)
        pretrain(args)


def pretrain(args: argparse.Namespace) -> None:
    """Train, save and measure."""
    captions, held_out = open_data(args)
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    lock = hold(args.output)
    write_json(options, args.output / "config.json")
    clip = build_clip(args)
    vocabulary = CompactVocabulary(clip, captions.class_names)
    trained = sum(p.numel() for p in clip.parameters())
    print(f"training {trained / 1e6:.2f} M parameters, {len(vocabulary.used)} tokens in use")
    log = MetricsLog(args.output / "metrics.jsonl")
    started = time.monotonic()
    iterations = train(clip, vocabulary, captions, args, log)
    minutes = (time.monotonic() - started) / 60
    teacher = vocabulary.expand()
    extra = {**options, "iterations": iterations, "minutes": round(minutes, 1)}
    save_clip(teacher, args.output / "clip.pt", extra=extra)
    scores = measure(teacher, held_out, args)
    log.write({"step": iterations, "minutes": minutes, **scores})
    log.close()
    lock.close()
    for name, value in scores.items():
        print(f"{name}: {100 * value:.1f} %")
    print(f"wrote {args.output / 'clip.pt'} after {iterations} iterations, {minutes:.1f} min")


if __name__ == "__main__":
    main()
