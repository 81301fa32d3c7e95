from typing import Any
from pathlib import Path
import torch, numpy as np
from PIL import Image
from .folder import read_image
ImageLike = Any
def to_image(x):
    if isinstance(x, (str, Path)): return read_image(Path(x))
    if isinstance(x, torch.Tensor): return x
    return torch.from_numpy(np.array(x.convert("RGB") if isinstance(x, Image.Image) else x)).permute(2,0,1)
