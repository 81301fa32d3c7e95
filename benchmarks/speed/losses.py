"""CE + focal + dice, forward and backward pass, against the composition that one writes first.

    OMP_NUM_THREADS=1 python benchmarks/speed/losses.py

2 crops, 156 seen and 40 potential classes, logits of 128 x 128, labels of 512 x 512: labels
resized, one-hot masks, PyTorch's cross entropy, torchvision's focal loss, dice. Memory is what
PyTorch allocates, without the logits that both are given.
"""

import torch
import torch.nn.functional as F
from race import finish, peak_mib, race, report, start
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from cliptteacher.logits import pixel_logits
from cliptteacher.losses import nel
from cliptteacher.plm import pixel_cross_entropy, resize_nearest

B, S, P, C, SIDE = 2, 156, 40, 512, 128


def composition(seen: Tensor, potential: Tensor, labels: Tensor, groups: Tensor) -> list[Tensor]:
    near = F.interpolate(labels[:, None].float(), (SIDE, SIDE), mode="nearest-exact")[:, 0].long()
    targets = torch.where(near == 255, S + groups, near)
    ce = F.cross_entropy(torch.cat((seen, potential), dim=1), targets)
    masks = F.one_hot(near.clamp(max=S), S + 1)[..., :S].permute(0, 3, 1, 2).float()
    present = masks.sum(dim=(2, 3)) > 0
    focal = sigmoid_focal_loss(seen, masks).mean(dim=(2, 3)).sum() / present.sum()
    p = seen.sigmoid()
    shared, both = (p * masks).sum(dim=(2, 3)), p.sum(dim=(2, 3)) + masks.sum(dim=(2, 3))
    dice = ((1 - (2 * shared + 1) / (both + 1)) * present).sum() / present.sum()
    return [ce, 100 * focal, dice]


def ours(seen: Tensor, potential: Tensor, labels: Tensor, groups: Tensor) -> list[Tensor]:
    near = resize_nearest(labels, (SIDE, SIDE))
    targets = torch.where(near == 255, S + groups, near)
    return [pixel_cross_entropy(seen, potential, targets), *nel(seen, near)]


def measure(rounds: int) -> list[dict[str, object]]:
    features = 0.3 * torch.randn(B, C, SIDE, SIDE)
    logits = [pixel_logits(features, 3 * F.normalize(torch.randn(n, C))) for n in (S, P)]
    labels = torch.randint(S, (B, 8, 8)).repeat_interleave(64, 1).repeat_interleave(64, 2)
    labels[:, :200] = 255
    groups = torch.randint(P, (B, SIDE, SIDE))

    def both_passes(way) -> tuple[Tensor, Tensor]:
        leaves = [values.detach().requires_grad_() for values in logits]
        losses = torch.stack(way(*leaves, labels, groups))
        losses.sum().backward()
        return losses.detach(), torch.cat([leaf.grad for leaf in leaves], dim=1)

    ways = {
        "ours": lambda: both_passes(ours),
        "composition": lambda: both_passes(composition),
    }
    for mine, other in zip(*(way() for way in ways.values()), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-9)
    peaks = {name: peak_mib(way) for name, way in ways.items()}
    return [
        report("CE + focal + dice, time", race(ways, rounds), 1 / 0.6),
        report("CE + focal + dice, peak memory", peaks, 1 / 0.4, unit="MiB"),
    ]


if __name__ == "__main__":
    finish(measure(start(__doc__)))
