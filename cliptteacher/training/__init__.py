"""What any training loop needs; the loop itself is ``examples/train.py``."""

from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .schedule import learning_rate_factor

__all__ = ["TrainConfig", "learning_rate_factor", "load_checkpoint", "save_checkpoint"]
