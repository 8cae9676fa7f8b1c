"""Images of whatever kind as arrays, and of another size."""

from typing import Any

import numpy as np

DTYPES = "uint8, uint16, bool (which becomes 0 and 255) and floating point"


def as_array(image: Any) -> np.ndarray:
    """An image as [height, width, channels] in uint8, uint16 or float32.

    Args:
        image: an array, of grey images also [height, width], or a picture of PIL, as it is to be seen: turned as its
            EXIF data say, palettes and inks as colours, without transparency.

    Raises:
        ValueError: its type isn't one of `DTYPES`, or it holds NaN or infinity.
    """
    if hasattr(image, "convert"):
        image = _of_picture(image)
    image = np.asarray(image)
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * np.uint8(255)
    elif np.issubdtype(image.dtype, np.floating):
        image = image.astype(np.float32)
        if not np.isfinite(image).all():
            raise ValueError("an image with values that are not finite")
    else:
        image = image.astype(image.dtype.newbyteorder("="), copy=False)
    if image.dtype not in (np.uint8, np.uint16, np.float32):
        raise ValueError(f"images of type {image.dtype}; allowed: {DTYPES}")
    return image[..., None] if image.ndim == 2 else image


def _of_picture(picture: Any) -> np.ndarray:
    from PIL import ImageOps

    picture = ImageOps.exif_transpose(picture)
    dtype = type_of(picture.mode)
    if dtype == np.uint8:
        return np.asarray(picture.convert("L" if is_grey(picture.mode) else "RGB"))
    pixels = np.asarray(picture)
    if dtype == np.uint16 and not 0 <= pixels.min() <= pixels.max() <= 65535:
        raise ValueError(
            f"pixels from {pixels.min()} to {pixels.max()}; allowed: 0 to 65535, or floating point numbers"
        )
    return pixels.astype(dtype)


def type_of(mode: str) -> np.dtype:
    """What pixels of a picture of PIL are: of 8 bits, of 16, or floating point numbers."""
    return np.dtype(np.float32 if mode == "F" else np.uint16 if mode.startswith("I") else np.uint8)


def is_grey(mode: str) -> bool:
    """Whether a picture of PIL has no colours."""
    return mode in ("1", "L", "LA", "La") or type_of(mode) != np.uint8


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image of another size: its middle, of the right proportions, with linear interpolation, averaging where it
    shrinks.

    Args:
        image: [height, width, channels].
        size: height and width.
    """
    from PIL import Image

    height, width = size
    scale = min(image.shape[0] / height, image.shape[1] / width)
    cut = [max(1, round(scale * length)) for length in size]
    top, left = ((old - new) // 2 for old, new in zip(image.shape, cut, strict=False))
    image = np.ascontiguousarray(image[top : top + cut[0], left : left + cut[1]])

    def fit(array: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))

    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return fit(image)
    deep = image if image.dtype == np.uint8 else image.astype(np.float32)
    result = np.stack([fit(channel) for channel in np.moveaxis(deep, -1, 0)], axis=-1)
    return np.round(result).astype(np.uint16) if image.dtype == np.uint16 else result
