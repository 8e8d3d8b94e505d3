from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from ltd.data.batch import BadSampleError
from ltd.data.decode import decode_image, probe


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return 10 * float(np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2))))


def test_turned_and_transparent_images() -> None:
    picture = np.zeros((4, 6, 3), dtype=np.uint8)
    picture[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    data = saved(Image.fromarray(picture), "PNG", exif=exif)
    info, frame = probe(data, "png"), decode_image(data)
    assert (info.height, info.width) == frame.shape[1:3] == (6, 4)
    assert (frame[0, :3] == 255).all() and (frame[0, 3:] == 0).all()
    assert (decode_image(saved(Image.new("RGBA", (3, 3), (0, 0, 0, 0)), "PNG")) == 255).all()
    half = decode_image(saved(Image.new("RGBA", (3, 3), (200, 0, 0, 128)), "PNG"))
    assert np.abs(half[0, 0, 0].astype(int) - [227, 127, 127]).max() <= 1


def test_odd_kinds_decode_right() -> None:
    picture = astronaut()[::4, ::4]
    image = Image.fromarray(picture)
    assert psnr(decode_image(saved(image.convert("CMYK"), "JPEG", quality=98))[0], picture) > 35
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 77  # 16 bits a pixel, the whole range
    assert (decode_image(saved(Image.fromarray(grey), "PNG"))[0, :, :, 1] == grey >> 8).all()
    frames = [Image.fromarray(np.roll(picture, step, 0)) for step in (0, 30, 60)]
    animated = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (decode_image(animated)[0] == picture).all()  # its first frame
    paletted = image.quantize(16)
    assert (decode_image(saved(paletted, "PNG"))[0] == np.asarray(paletted.convert("RGB"))).all()


@pytest.mark.parametrize(("orientation", "height", "width"), [(1, 64, 64), (6, 40, 56), (3, 100, 30)])
def test_a_jpeg_decoded_small_is_the_whole_one_scaled(orientation: int, height: int, width: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(astronaut()[:500, :411]), "JPEG", quality=95, exif=exif)
    whole = Image.fromarray(decode_image(data)[0])
    factor = max(height / whole.height, width / whole.width)
    size = (round(whole.width * factor), round(whole.height * factor))
    scaled = np.asarray(whole.resize(size, Image.Resampling.BICUBIC))
    for crop in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        top, left = round(crop[0] * (size[1] - height)), round(crop[1] * (size[0] - width))
        wanted = scaled[None, top : top + height, left : left + width]
        assert psnr(decode_image(data, height=height, width=width, crop=crop), wanted) > 40


def test_bombs_are_refused_before_they_are_decoded() -> None:
    for image in (Image.new("1", (9_000, 9_000)), Image.new("1", (20_000, 20_000))):
        for call in (probe, decode_image):
            with pytest.raises(BadSampleError) as caught:
                call(saved(image, "PNG"))
            assert caught.value.cause == "too_large"
            assert "is more than the limit of 64000000 pixels" in str(caught.value)
            assert "DOS" not in str(caught.value)  # Pillow's own words, where its limit is reached before ours
    line = saved(Image.new("1", (60_000, 1)), "PNG")  # covering a square with it would take a picture of 60,000 squares
    with pytest.raises(BadSampleError) as caught:
        decode_image(line, height=256, width=256)
    assert caught.value.cause == "too_large"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_orientation_does_not_cost_the_picture() -> None:
    data = saved(Image.fromarray(astronaut()[:32, :32]), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert decode_image(data).shape == (1, 32, 32, 3)
    assert probe(data, "jpg").width == 32


@pytest.mark.parametrize("extension", ["png", "mp4", None])
def test_messages_hold_no_address(extension: str | None) -> None:
    with pytest.raises(BadSampleError) as caught:
        probe(b"no image" * 50, extension)
    assert "0x" not in str(caught.value) and "BytesIO" not in str(caught.value)
