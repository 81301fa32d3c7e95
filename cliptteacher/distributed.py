"""One process or many: what torchrun sets up, found from its environment variables."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

Value = TypeVar("Value")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class Process:
    """This process among all that train together."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0


def start_process(device: str = "auto") -> Process:
    """Join the process group that torchrun describes, or run alone without it.

    NCCL on CUDA, gloo elsewhere.

    Args:
        device: one of ``DEVICES``; "auto" takes CUDA where there is one, else the CPU.

    Raises:
        ValueError: the device that is asked for does not exist, or there are fewer devices than
            processes.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps needs an Apple GPU and a PyTorch built for it; use cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if torch.cuda.device_count() <= local_rank:
            raise ValueError(
                f"process {local_rank} needs a CUDA device of its own, found "
                f"{torch.cuda.device_count()}; use --device cpu or a smaller --nproc_per_node"
            )
        torch.cuda.set_device(local_rank)
    if "WORLD_SIZE" not in os.environ:
        return Process(0, 0, 1, torch.device(device))
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    _join_group(chosen)
    return Process(dist.get_rank(), local_rank, dist.get_world_size(), chosen)


def _join_group(device: torch.device) -> None:
    """Join the group; after a restart not by the addresses of the attempt before.

    torchrun keeps one store over all attempts, so a process could read where a dead one listened,
    and be refused or wait for ever. On one machine the attempts are counted alike everywhere. On
    several they are not: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each a store of its own.
    """
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":  # NCCL would guess the device of a process otherwise
        options = {"backend": "nccl", "device_id": device}
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt == 0 or int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        dist.init_process_group(**options)
        return
    store, rank, world_size = next(iter(rendezvous("env://")))
    store = dist.PrefixStore(f"attempt_{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(**options, store=store, rank=rank, world_size=world_size)


def set_precision(precision: str, process: Process) -> None:
    """Prepare CUDA for training in a precision; says where the GPU has no units for it.

    Args:
        precision: "fp32", "tf32", "bf16" or "fp16".
        process: this process.
    """
    tf32 = precision == "tf32"  # PyTorch's own choice differs: products exact, convolutions not
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if process.device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = True  # batches have one size
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not native and process.is_main:
        warnings.warn(
            "this GPU has no units for bf16 and emulates them; --precision fp16 is fast",
            stacklevel=2,
        )


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 products in float32, whatever ``set_precision`` allows."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def stop_process() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def sum_over_processes(values: Tensor) -> Tensor:
    """Add a tensor over all processes; the gradient of each is that of the sum of all losses.

    DistributedDataParallel averages gradients, so a loss that is the mean over processes of what
    each computes from the sum has the gradient of one process that holds everything.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    summed: Tensor = _Sum.apply(values)
    return summed


class _Sum(torch.autograd.Function):
    """All-reduce in both directions."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient


def gather_rows(values: Tensor) -> tuple[Tensor, int]:
    """Join the rows of all processes, in rank order and without gradient.

    Args:
        values: (B, ...) of this process; every process holds as many rows.

    Returns:
        (world * B, ...) on the device of ``values``, and the first row of this process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values.detach(), 0
    B = values.shape[0]
    gathered = values.new_empty(dist.get_world_size() * B, *values.shape[1:])
    # Its new name, and the one that versions before have alone.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, values.detach().contiguous())
    return gathered, dist.get_rank() * B


def from_main(value: Value) -> Value:
    """Give every process what the main process holds."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def share_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the main one.

    Each process counts the statistics of BatchNorm on its own images; checkpoints hold those of
    the main process, and so must the students that are evaluated.
    """
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def launch_id() -> str | None:
    """Name what torchrun started; a restarted attempt has the name of the first one."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def was_restarted() -> bool:
    """Whether torchrun started these processes again after a failure (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def gather_from_processes(value: Tensor, device: torch.device) -> list[Tensor]:
    """Collect one tensor of equal shape from every process, on the CPU, in rank order."""
    if not dist.is_initialized():
        return [value.cpu()]
    own = value.to(device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return [item.cpu() for item in gathered]
