"""Say what is here: `python -m cliptteacher`.

Versions, devices, the CLIP models and students by name, where their weights are kept, and which of
them are there. Nothing is downloaded.
"""

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision

from . import __version__
from .clip.download import OPENAI_WEIGHTS, cached_weights
from .clip.weights import BUNDLED
from .segmenters import imagenet_file, list_segmenters


def describe() -> Iterator[str]:
    """Yield the lines of the description."""
    yield f"cliptteacher {__version__} in {Path(__file__).parent}"
    yield (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}"
    )
    yield ""
    yield f"devices: cpu, {torch.get_num_threads()} of {os.cpu_count()} threads"
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield f"         cuda:{index}, {torch.cuda.get_device_name(index)}, {memory:.0f} GiB"
    if not torch.cuda.is_available():
        yield f"         no GPU that torch can use (built for CUDA {torch.version.cuda})"
    yield ""
    yield "teachers, for ct.load_clip and --clip (or the path of a file or folder):"
    yield f"  {'miniworld':<40} bundled, {_size(BUNDLED)}"
    for name, published in OPENAI_WEIGHTS.items():
        yield f"  {name:<40} {_state(cached_weights(published))}"
    yield ""
    yield "students, for ct.build_segmenter and --segmenter, and their ImageNet weights:"
    for name in list_segmenters():
        file = imagenet_file(name)
        yield f"  {name:<40} {'none published' if file is None else _state(file)}"


def _state(path: Path) -> str:
    return f"{path}, {_size(path)}" if path.is_file() else f"not there: {path}"


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"


def main() -> None:
    """Write the description."""
    sys.stdout.write("\n".join([*describe(), ""]))


if __name__ == "__main__":
    main()
