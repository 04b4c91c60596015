"""Any picture -> the same pixels as the original's processor; no picture -> one clear line."""

import base64
import functools
import io
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgevlm.errors import ImageError
from edgevlm.image import MAX_PIXELS, RGB, Pixels, pixels, preprocess, read, read_image
from edgevlm.image.plan import plan
from edgevlm.specs import Fit, ImageSpec

HALF = (0.5, 0.5, 0.5)


def encoded(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> RGB:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("width", "height"),
    [(224, 224), (1, 1), (1, 1000), (1000, 1), (640, 480), (37, 411), (3000, 2000), (223, 225)],
)
def test_pixels_equal_transformers_bit_for_bit(width: int, height: int) -> None:
    transformers = pytest.importorskip("transformers")
    rgb = noise(width, height)
    processor = transformers.SiglipImageProcessor(
        size={"height": 224, "width": 224}, resample=3, image_mean=HALF, image_std=HALF
    )
    expected = processor(
        Image.fromarray(rgb), return_tensors="np", input_data_format="channels_last"
    )["pixel_values"][0]
    pixels = preprocess(rgb, ImageSpec(224, 256, HALF, HALF))
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, expected)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_spec(fit: Fit, size: int, **options: Any) -> ImageSpec:
    return ImageSpec(size, 576, CLIP_MEAN, CLIP_STD, fit=fit, **options)


def squared(picture: Image.Image) -> Image.Image:
    """The picture on a square canvas of the mean colour, written with numpy."""
    rgb = np.asarray(picture.convert("RGB"))
    height, width = rgb.shape[:2]
    side = max(height, width)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = (122, 116, 104)
    y, x = (side - height) // 2, (side - width) // 2
    canvas[y : y + height, x : x + width] = rgb
    return Image.fromarray(canvas)


def clip_pixels(picture: Image.Image, size: int, resample: int = 3) -> Pixels:
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=resample,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    # Said outright: a picture 3 pixels high looks to transformers like one of 3 channels.
    out = processor(picture.convert("RGB"), return_tensors="np", input_data_format="channels_last")
    return np.asarray(out["pixel_values"][0], np.float32)


def with_alpha(width: int, height: int) -> Image.Image:
    alpha = Image.fromarray(noise(width, height)[..., 0])
    picture = Image.fromarray(noise(width, height, 1))
    picture.putalpha(alpha)
    return picture


PICTURES: dict[str, Callable[[], Image.Image]] = {
    **{
        f"{w}x{h}": functools.partial(lambda *sides: Image.fromarray(noise(*sides)), w, h)
        for w, h in [
            *[(336, 336), (1, 1), (3, 7), (7, 3), (3, 3), (640, 480), (480, 640), (335, 337)],
            *[(337, 335), (336, 500), (501, 336), (500, 333), (333, 500), (1023, 767), (50, 51)],
            *[(101, 100), (1000, 20), (20, 1001), (672, 671), (2000, 1500)],
        ]
    },
    "rgba": lambda: with_alpha(123, 77),
    "palette": lambda: Image.fromarray(noise(91, 200)).quantize(32),
    "grey": lambda: Image.fromarray(noise(301, 200)[..., 0]),
    "grey and alpha": lambda: with_alpha(60, 90).convert("LA"),
    "photo": lambda: Image.radial_gradient("L").resize((2400, 1800)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_padded_and_cropped_pixels_equal_clips_bit_for_bit(name: str) -> None:
    picture = PICTURES[name]()
    rgb = read_image(picture)
    for size in (336, 55):
        cropped = preprocess(rgb, clip_spec("crop", size))
        assert cropped.shape == (3, size, size) and cropped.dtype == np.float32
        np.testing.assert_array_equal(cropped, clip_pixels(picture, size))
        padded = preprocess(rgb, clip_spec("pad", size))
        np.testing.assert_array_equal(padded, clip_pixels(squared(picture), size))


@pytest.mark.parametrize(("width", "height"), [(1, 1000), (1000, 1), (2, 999)])
def test_long_and_narrow_pictures(width: int, height: int) -> None:
    picture = Image.fromarray(noise(width, height))
    rgb = read_image(picture)
    np.testing.assert_array_equal(
        preprocess(rgb, clip_spec("pad", 336)), clip_pixels(squared(picture), 336)
    )
    np.testing.assert_array_equal(
        preprocess(rgb, clip_spec("crop", 112)), clip_pixels(picture, 112)
    )


@pytest.mark.parametrize(("name", "number"), [("nearest", 0), ("lanczos", 1), ("bilinear", 2)])
def test_other_filters_pad_and_crop_the_same(name: str, number: int) -> None:
    picture = Image.fromarray(noise(97, 41))
    rgb = read_image(picture)
    seen: dict[Fit, Image.Image] = {"crop": picture, "pad": squared(picture)}
    for fit in seen:
        pixels = preprocess(rgb, clip_spec(fit, 28, resample=name))
        np.testing.assert_array_equal(pixels, clip_pixels(seen[fit], 28, number))


def test_a_pad_in_many_strips_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rgb = noise(90, 333)
    whole = preprocess(rgb, clip_spec("pad", 56))
    monkeypatch.setattr(pixels, "_STRIP_PIXELS", 700)
    np.testing.assert_array_equal(preprocess(rgb, clip_spec("pad", 56)), whole)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("shape", [(1, MAX_PIXELS), (MAX_PIXELS, 1), (1, 500_000)])
def test_a_picture_that_would_swell_is_refused(fit: Fit, shape: tuple[int, ...]) -> None:
    rgb = np.zeros((*shape, 3), np.uint8)
    with pytest.raises(ImageError, match="too long and narrow") as caught:
        preprocess(rgb, clip_spec(fit, 336))
    assert f"{shape[1]} x {shape[0]} pixels" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path) -> None:
    rgb = noise(30, 20)
    data = encoded(Image.fromarray(rgb))
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (rgb, Image.fromarray(rgb), data, path, str(path), url):
        np.testing.assert_array_equal(read_image(source), rgb)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "TGA"])
def test_lossless_formats(format: str) -> None:
    rgb = noise(16, 16)
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(rgb), format, **options)), rgb)


def test_exif_orientation_is_applied() -> None:
    rgb = np.zeros((10, 30, 3), np.uint8)
    rgb[:, :15] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to show
    seen = read_image(encoded(Image.fromarray(rgb), "JPEG", exif=exif, quality=95))
    assert seen.shape == (30, 10, 3)
    assert seen[2].mean() > 250 and seen[-3].mean() < 5


def test_modes_other_than_rgb() -> None:
    rgb = noise(8, 8)
    picture = Image.fromarray(rgb)
    alpha = picture.copy()
    alpha.putalpha(0)
    np.testing.assert_array_equal(read_image(encoded(alpha)), rgb)  # alpha dropped, colours kept
    palette = picture.quantize(16)
    np.testing.assert_array_equal(read_image(encoded(palette)), np.array(palette.convert("RGB")))
    cmyk = picture.convert("CMYK")
    np.testing.assert_array_equal(read_image(encoded(cmyk, "TIFF")), np.array(cmyk.convert("RGB")))
    assert read_image(encoded(picture.convert("1"))).shape == (8, 8, 3)
    assert read_image(encoded(picture.convert("LA"))).shape == (8, 8, 3)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for format in ("PNG", "TIFF"):
        seen = read_image(encoded(Image.fromarray(grey), format))
        np.testing.assert_array_equal(seen[..., 0], np.rint(grey / 257).astype(np.uint8))


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(data)[0, 0].tolist() == [255, 0, 0]


def bad_sources(folder: Path) -> dict[Any, str]:
    whole = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    (folder / "text.png").write_text("not a picture", encoding="utf-8")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return {
        folder / "none.png": "no such file",
        folder: "is a folder",
        folder / "text.png": "not a picture",
        folder / "empty.jpg": "is empty",
        folder / "cut.jpg": "damaged or truncated",
        b"": "is empty",
        b"\x89PNG\r\n\x1a\n garbage": "picture",
        "http://127.0.0.1:9/x.png": "cannot be downloaded",
        "http://": "cannot be downloaded",
        "data:image/png;base64,####": "",
    }


def test_bad_sources_say_what_is_wrong(tmp_path: Path) -> None:
    for source, reason in bad_sources(tmp_path).items():
        with pytest.raises(ImageError) as caught:
            read_image(source)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_must_be_rgb_bytes(array: NDArray[Any]) -> None:
    with pytest.raises(ImageError, match="must be uint8"):
        read_image(array)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_PIXELS", 99)
    with pytest.raises(ImageError, match="10 x 10 pixels.*scale it down"):
        read_image(encoded(Image.new("RGB", (10, 10))))
    with pytest.raises(ImageError, match="scale it down"):
        read_image(np.zeros((10, 10, 3), np.uint8))


@pytest.mark.fault("Pictures", "a decompression bomb", "refused by its header")
def test_a_decompression_bomb_is_refused() -> None:
    with pytest.raises(ImageError, match="scale it down"):
        read_image(encoded(Image.new("1", (10_000, 9_000))))


class _Handler(BaseHTTPRequestHandler):
    picture = encoded(Image.fromarray(noise(5, 6)))

    def do_GET(self) -> None:
        found = self.path == "/photo.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.picture if found else b"")

    def log_message(self, *_: object) -> None:
        pass


def test_pictures_from_a_server() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(read_image(f"{base}/photo.png"), noise(5, 6))
        with pytest.raises(ImageError, match="answered 404"):
            read_image(f"{base}/other.png")
        server.shutdown()


@pytest.mark.parametrize(
    ("fit", "size", "canvas", "tile"),
    [
        ("stretch", (90, 50), (28, 28), (0, 0, 28, 28)),
        ("pad", (90, 50), (28, 28), (0, 0, 28, 28)),
        ("crop", (90, 50), (50, 28), (11, 0, 39, 28)),
        ("crop", (50, 90), (28, 50), (0, 11, 28, 39)),
        ("crop", (1, 1), (28, 28), (0, 0, 28, 28)),
    ],
)
def test_a_plan_is_the_canvas_its_middle_and_the_rows(
    fit: Fit, size: tuple[int, int], canvas: tuple[int, int], tile: tuple[int, int, int, int]
) -> None:
    found = plan(*size, clip_spec(fit, 28))
    assert (found.canvas, found.tiles, found.overview) == (canvas, (tile,), "none")
    assert found.rows == 576
    # Resized to more than is seen of it.
    larger = plan(*size, clip_spec(fit, 28, resize=32))
    assert min(larger.canvas) == 32
    left, top, right, bottom = larger.tiles[0]
    assert (right - left, bottom - top) == (28, 28) and left + top >= 4
