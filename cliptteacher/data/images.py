"""Read pictures: every one upright and RGB in 8 bits, or refused in a sentence that names the file.

mode                         becomes
RGB, 1, L, P, CMYK, YCbCr    8 bits a channel, as Pillow converts it
I;16, I of a PNG             16 bits of grey: 65535 -> 255
with transparency            composited on white
F, LAB, HSV, other I         refused: no range is stated
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

ImageLike = str | Path | Image.Image | NDArray[np.generic] | Tensor

# Formats that Pillow only recognises, or hands to another program.
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
BACKGROUND = (255, 255, 255)  # behind transparent pixels
_ORIENTATION = 274  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INDEX_MODES = ("1", "L", "P", "I", "I;16")  # whose pixels are numbers, not colours
_DIRECT = ("RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBX")
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


def read_image(path: str | Path) -> Tensor:
    """Read a picture as RGB, turned upright by its EXIF orientation.

    Args:
        path: a file that the installed Pillow reads.

    Returns:
        Image, uint8 (3, H, W); the colours of a pixel lie together in memory, as decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, is damaged or too large, or its mode is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the image {path} does not exist")
    try:
        # Given a name, Pillow maps some files into memory, and garbles those that it turns itself.
        with path.open("rb") as raw, Image.open(raw) as file:
            return _as_tensor(turned(file, orientation(file)))
    except Image.DecompressionBombError as error:
        found, limit = re.findall(r"\d+", str(error))[:2]
        raise ValueError(
            f"{path} must be a readable image of at most {limit} pixels, got {found}; make it "
            "smaller"
        ) from None
    except Exception as error:  # decoders meet any bytes, and raise whatever these lead them to
        raise ValueError(f"{path} must be a readable image, but {_sentence(error)}") from error


def to_image(image: ImageLike) -> Tensor:
    """Return an image as a tensor (3, H, W).

    Args:
        image: a path; a PIL image; an array (H, W, 3) or (H, W, 4) in uint8, or (H, W, 3) in
            [0, 1]; a tensor (3, H, W), which is returned as it is.

    Raises:
        TypeError: it is none of these.
        ValueError: an array has another shape or type.
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return _as_tensor(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(
            "an image must be a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W), got "
            f"{type(image).__name__}"
        )
    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(
            f"an image array must have shape (H, W, 3), got {image.shape}; a tensor has the "
            "channels first"
        )
    if image.dtype == np.uint8:
        return _as_tensor(Image.fromarray(image))
    if not np.issubdtype(image.dtype, np.floating) or image.shape[2] == 4:
        raise ValueError(
            f"an image array must be uint8, or float (H, W, 3) in [0, 1], got {image.dtype} "
            f"{image.shape}"
        )
    return torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).permute(2, 0, 1)


def to_batch(image: Tensor) -> Tensor:
    """Return images as a float batch in [0, 1].

    Args:
        image: (3, H, W) or (B, 3, H, W), uint8 or float in [0, 1].

    Returns:
        (B, 3, H, W) float.

    Raises:
        ValueError: another shape, type or range.
    """
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or image.numel() == 0:
        raise ValueError(
            f"`image` must have shape (3, H, W) or (B, 3, H, W), got {tuple(image.shape)}; "
            "channels come before height and width"
        )
    images = image if image.ndim == 4 else image.unsqueeze(0)
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"`image` must be uint8, or float in [0, 1], got {images.dtype}")
    low, high = (float(value) for value in images.aminmax())
    if not (-1 <= low and high < 2):  # bicubic resizing may overshoot a little; NaN fails too
        raise ValueError(
            f"a float `image` must lie in [0, 1], got {low:g} to {high:g}; divide by 255 and leave "
            "normalisation to the network"
        )
    return images.float()


def readable_suffixes() -> frozenset[str]:
    """The endings of files that the installed Pillow reads, in lower case: ".jpg", ".webp", ..."""
    suffixes = Image.registered_extensions()
    return frozenset(s for s, kind in suffixes.items() if kind in {*Image.OPEN} - _NO_PICTURES)


def list_images(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """List the files of a folder by name, hidden ones left out.

    Returns:
        Those that Pillow reads by their ending, and the others (``.heic`` without a plug-in).
    """
    files = sorted(p for p in Path(folder).iterdir() if p.is_file() and p.name[0] != ".")
    suffixes = readable_suffixes()
    readable = [path for path in files if path.suffix.lower() in suffixes]
    return readable, [path for path in files if path.suffix.lower() not in suffixes]


def read_indices(path: Path) -> NDArray[np.integer[Any]]:
    """Read the numbers of a grey or palette PNG as they are stored, whatever their depth.

    Returns:
        (H, W); the palette of a palette image is not looked at.

    Raises:
        ValueError: the file is no PNG, is damaged, or holds colours.
    """
    try:
        with Image.open(path) as file:
            kind, mode = file.format, file.mode
            indices = np.array(file) if mode in _INDEX_MODES else None
        with path.open("rb") as raw:
            depth, colour = raw.read(26)[24:]  # of the IHDR chunk
    except Exception as error:  # decoders meet any bytes, and raise whatever these lead them to
        raise ValueError(f"label {path} must be a readable PNG, but {_sentence(error)}") from error
    if kind != "PNG":
        raise ValueError(f"label {path} must be a PNG, got {kind}, which may change indices")
    if indices is None:
        raise ValueError(
            f"label {path} must hold one class index a pixel, got colours instead of indices "
            f"(mode {mode}); save it as a greyscale or palette PNG"
        )
    if mode == "L" and colour == 0 and depth in (2, 4):  # Pillow stretches these greys to 0..255
        indices = indices // (255 // (2**depth - 1))
    return indices.astype(np.uint8) if mode == "1" else indices


def orientation(file: Image.Image) -> int:
    """Return the EXIF orientation 1..8; damaged EXIF has none, and the rest is not looked at.

    Pixels are loaded first: the loader of TIFF turns them itself and clears the tag.
    """
    file.load()
    try:
        return int(file.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever its bytes lead the parser to
        return 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image as its orientation says."""
    turn = _UPRIGHT.get(orientation)
    if turn is None:
        return image
    kind, image = image.format, image.transpose(turn)
    image.format = kind
    return image


def _as_tensor(image: Image.Image) -> Tensor:
    pixels = np.array(_as_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _ALPHA or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        background = Image.new("RGBA", with_alpha.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, with_alpha).convert("RGB")
    if image.mode in _DIRECT:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.array(image).astype(np.int64)
        if values.size and 0 <= values.min() and values.max() <= 65535:
            return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert(
                "RGB"
            )
    raise ValueError(
        f"the range of its mode {image.mode} is not stated; save it with 8 bits a channel"
    )


def _sentence(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
