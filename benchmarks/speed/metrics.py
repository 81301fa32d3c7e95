"""The confusion matrix of one image against torchmetrics, without its checks of the values.

OMP_NUM_THREADS=1 python benchmarks/speed/metrics.py
"""

import torch
from race import finish, race, report, start
from torchmetrics.classification import MulticlassConfusionMatrix

from cliptteacher.metrics import SegmentationMetrics

A, SIDE = 171, 512


def measure(rounds: int) -> dict[str, object]:
    pred = torch.randint(A, (SIDE, SIDE))
    label = torch.randint(A, (8, 8)).repeat_interleave(64, 0).repeat_interleave(64, 1)
    label[:80] = 255
    ours = SegmentationMetrics(A)
    peer = MulticlassConfusionMatrix(A, ignore_index=255, validate_args=False)
    ours.update(pred, label)
    peer.update(pred, label)
    assert torch.equal(ours.matrix, peer.confmat)
    ways = {
        "ours, values checked": lambda: ours.update(pred, label),
        "torchmetrics": lambda: peer.update(pred, label),
    }
    return report("metrics, 512 x 512, 171 classes", race(ways, 5 * rounds), 3.0)


if __name__ == "__main__":
    finish([measure(start(__doc__))])
