"""Every kind of image file, against what torchvision makes of it, and every way in which a
file can be wrong.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from torchvision.datasets.folder import pil_loader

from hwnas.data.decoding import Examined, decode, examine
from hwnas.data.wording import shown
from hwnas.errors import UnreadableImageError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
GREYS_16 = RNG.integers(0, 65536, (12, 16), dtype=np.uint16)
SMOOTH = np.tile(np.linspace(0, 255, 200, dtype=np.uint8)[:, None, None], (1, 300, 3))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def is_like(found: Image.Image, expected: Image.Image) -> bool:
    return found.mode == expected.mode and np.array_equal(pixels(found), pixels(expected))


# what torchvision does too


def _palette(path: Path) -> None:
    Image.fromarray(COLOURS).quantize(16).save(path)


def _palette_with_transparency(path: Path) -> None:
    Image.fromarray(COLOURS).quantize(16).save(path, transparency=bytes(range(16)))


def _colour_key(path: Path) -> None:
    Image.fromarray(COLOURS).save(path, transparency=tuple(map(int, COLOURS[0, 0])))


def _in_mode(mode: str) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(COLOURS).convert(mode).save(path)


def _with_alpha(path: Path) -> None:
    alpha = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16, 1)
    Image.fromarray(np.concatenate([COLOURS, alpha], axis=2)).save(path)


def _animated(path: Path) -> None:
    first = Image.fromarray(COLOURS)
    first.save(path, save_all=True, append_images=[Image.new("RGB", (16, 12), "red")])


def _rotated_by_exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOURS).save(path, exif=exif)


def _png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG that Pillow cannot write itself."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def _colours_of_16_bits(path: Path) -> None:
    values = RNG.integers(0, 65536, (4, 5, 3)).astype(">u2")
    path.write_bytes(_png(5, 4, 16, 2, b"".join(b"\0" + row.tobytes() for row in values)))


USUAL: dict[str, tuple[str, Callable[[Path], None]]] = {
    "RGB": ("a.png", _in_mode("RGB")),
    "jpeg": ("a.jpg", _in_mode("RGB")),
    "grey": ("a.png", _in_mode("L")),
    "grey jpeg": ("a.jpg", _in_mode("L")),
    "1 bit": ("a.png", _in_mode("1")),
    "CMYK": ("a.jpg", _in_mode("CMYK")),
    "CMYK tiff": ("a.tiff", _in_mode("CMYK")),
    "YCbCr": ("a.tiff", _in_mode("YCbCr")),
    "LA": ("a.png", _in_mode("LA")),
    "RGBA": ("a.png", _with_alpha),
    "webp with alpha": ("a.webp", _with_alpha),
    "palette": ("a.png", _palette),
    "palette with transparency": ("a.png", _palette_with_transparency),
    "colour key": ("a.png", _colour_key),
    "animated png": ("a.png", _animated),
    "animated webp": ("a.webp", _animated),
    "animated gif named png": ("a.png", lambda path: _animated_gif(path)),
    "pages": ("a.tiff", _animated),
    "EXIF orientation": ("a.jpg", _rotated_by_exif),
    "16-bit colour": ("a.png", _colours_of_16_bits),
    "bmp": ("a.bmp", _in_mode("RGB")),
    "ppm": ("a.ppm", _in_mode("RGB")),
}


def _animated_gif(path: Path) -> None:
    _animated(path.with_suffix(".gif"))
    path.with_suffix(".gif").rename(path)


@pytest.mark.parametrize("kind", USUAL)
def test_images_are_what_torchvision_makes_of_them(tmp_path: Path, kind: str) -> None:
    """Without a warning, and in grey by way of the colours."""
    name, write = USUAL[kind]
    write(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pil_loader(str(tmp_path / name))
        stored = Image.open(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, size = decode(tmp_path, name, 3)
        grey, _ = decode(tmp_path, name, 1)
    assert size == stored.size
    assert is_like(found, expected)
    assert is_like(grey, expected.convert("L"))
    assert examine(tmp_path, name, 3) == Examined(stored.mode, *stored.size)


def test_the_orientation_stays_as_stored(tmp_path: Path) -> None:
    _rotated_by_exif(tmp_path / "a.jpg")
    assert decode(tmp_path, "a.jpg", 3)[0].size == (16, 12)


# 16 bits


def _big_endian(path: Path) -> None:
    Image.fromarray(GREYS_16.astype(">u2")).save(path)


SIXTEEN: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "png": ("I;16", "a.png", lambda path: Image.fromarray(GREYS_16).save(path)),
    "tiff": ("I;16", "a.tiff", lambda path: Image.fromarray(GREYS_16).save(path)),
    "big-endian tiff": ("I;16B", "a.tiff", _big_endian),
    "32-bit tiff": ("I", "a.tiff", lambda path: Image.fromarray(GREYS_16.astype("i4")).save(path)),
    "pgm": (
        "I",
        "a.pgm",
        lambda path: path.write_bytes(b"P5 16 12 65535\n" + GREYS_16.astype(">u2").tobytes()),
    ),
}


@pytest.mark.parametrize("kind", SIXTEEN)
def test_16_bit_greys_keep_their_high_bytes(tmp_path: Path, kind: str) -> None:
    """Pillow alone would make all but 256 of the 65,536 greys white."""
    mode, name, write = SIXTEEN[kind]
    write(tmp_path / name)
    assert Image.open(tmp_path / name).mode == mode
    grey, size = decode(tmp_path, name, 1)
    assert size == (16, 12)
    assert grey.mode == "L"
    assert np.array_equal(pixels(grey), GREYS_16 // 256)
    assert is_like(decode(tmp_path, name, 3)[0], grey.convert("RGB"))


def test_16_bit_pictures_are_the_8_bit_ones(tmp_path: Path) -> None:
    """From black (0) to white (65535), also when they are shrunk."""
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(every).save(tmp_path / "8.png")
    Image.fromarray(every * np.uint16(257)).save(tmp_path / "16.png")
    for most in (None, 8):
        of_8, of_16 = (decode(tmp_path, f"{bits}.png", 3, most=most)[0] for bits in (8, 16))
        assert is_like(of_8, of_16)
    white, _ = decode(tmp_path, "16.png", 1)
    assert (white.getpixel((0, 0)), white.getpixel((15, 15))) == (0, 255)


@pytest.mark.parametrize("values", [[-1, 7], [0, 65536]])
def test_integers_beyond_16_bits_are_refused(tmp_path: Path, values: list[int]) -> None:
    Image.fromarray(np.array([values], dtype=np.int32)).save(tmp_path / "a.tiff")
    said = refused(tmp_path, "a.tiff")
    assert f"values from {values[0]} to {values[1]}, not of 8 or 16 bits" in said


def test_floating_point_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    assert "floating-point values: save it with 8 or 16 bits" in refused(tmp_path, "a.tiff")
    assert examine(tmp_path, "a.tiff", 3).mode == "F"


# shrinking


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_images_are_shrunk_while_decoding(tmp_path: Path, name: str) -> None:
    Image.fromarray(SMOOTH).save(tmp_path / name)
    image, size = decode(tmp_path, name, 3, most=30)
    assert (image.size, size) == ((30, 20), (300, 200))
    assert abs(int(pixels(image)[10, 10, 0]) - 133) < 6
    image, size = decode(tmp_path, name, 3, most=300)
    assert (image.size, size) == ((300, 200), (300, 200))


def test_what_is_transparent_is_shrunk_like_the_rest(tmp_path: Path) -> None:
    """Averages with alpha would make black of it, in training only."""
    rgba = np.full((40, 40, 4), 200, np.uint8)
    rgba[..., 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert (pixels(decode(tmp_path, "a.png", 3, most=10)[0]) == 200).all()


def test_palettes_are_shrunk_by_their_colours(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).quantize(2).save(tmp_path / "a.png")
    shrunk = pixels(decode(tmp_path, "a.png", 3, most=8)[0])
    assert ((shrunk > 100) & (shrunk < 155)).all()


# what does not decode


def refused(root: Path, name: str) -> str:
    """The message of ``decode``; ``examine`` has the same reason."""
    with pytest.raises(UnreadableImageError) as caught:
        decode(root, name, 3)
    message = str(caught.value)
    assert caught.value.image == name
    # long names are cut in the middle
    assert message.startswith(f"image {shown(str(root / name))} does not decode (")
    assert message.endswith("): replace or remove it, or set data.unreadable = 'skip'.")
    assert "\n" not in message
    reason = examine(root, name, 3).reason
    assert reason is not None
    assert f"does not decode ({reason})" in message
    copy = pickle.loads(pickle.dumps(caught.value))  # from a loader process
    assert (str(copy), copy.image) == (message, name)
    return message


def _saved(suffix: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(SMOOTH).save(file, format=suffix, **options)
    return file.getvalue()


@pytest.mark.parametrize("format_name", ["jpeg", "png", "webp", "bmp", "tiff", "ppm"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, format_name: str, part: float) -> None:
    content = _saved(format_name)
    (tmp_path / "a.png").write_bytes(content[: int(part * len(content))])
    refused(tmp_path, "a.png")


def test_a_truncated_photograph_is_called_that(tmp_path: Path) -> None:
    content = _saved("jpeg")
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    assert "(truncated)" in refused(tmp_path, "a.jpg")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_examining_finds_what_decoding_would_find(tmp_path: Path, options: dict[str, bool]) -> None:
    """It computes fewer pixels, of the same bytes."""
    content = _saved("jpeg", quality=95, **options)
    verdicts = set()
    lengths = np.linspace(100, len(content), 20).astype(int).tolist()
    for length in [*lengths, len(content) - 1, len(content) - 2]:
        (tmp_path / "a.jpg").write_bytes(content[:length])
        examined = examine(tmp_path, "a.jpg", 3).reason is None
        try:
            decode(tmp_path, "a.jpg", 3)
            decoded = True
        except UnreadableImageError:
            decoded = False
        assert examined == decoded, length
        verdicts.add(decoded)
    assert verdicts == {False, True}


def test_files_that_hold_no_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("<html>404 Not Found</html>")
    assert "(not an image)" in refused(tmp_path, "text.jpg")
    (tmp_path / "empty.jpg").touch()
    assert "(empty)" in refused(tmp_path, "empty.jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert "(not a regular file)" in refused(tmp_path, "folder.jpg")
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    assert "(missing)" in refused(tmp_path, "link.jpg")
    assert "(missing)" in refused(tmp_path, "absent.jpg")
    assert "(File name too long)" in refused(tmp_path, "a" * 5000)
    assert examine(tmp_path, "a\0.jpg", 3).reason == "missing"


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives it to Ghostscript, whatever the file is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", format="eps")
    assert "(PostScript, a program)" in refused(tmp_path, "a.jpg")
    assert not (tmp_path / "ran").exists()


def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    assert "(not a regular file)" in refused(tmp_path, "a.jpg")


@pytest.mark.parametrize(
    "content",
    [
        _png(0, 4, 8, 2, b""),
        _png(2**31 - 1, 2**31 - 1, 8, 0, b""),
        _png(3, 3, 8, 2, b"\0"),
        b"P6 0 4 255\n",
        b"P6 4 4 255\n",
        b"GIF89a\0\0\0\0\0\0\0;",
        b"BM" + bytes(60),
        b"RIFF\x10\0\0\0WEBPVP8 " + bytes(8),
        b"II*\0\x08\0\0\0\xff\xff" + bytes(20),
        b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(20),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow
def test_impossible_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path, "a.png")


def test_flipped_bytes_never_give_a_traceback(tmp_path: Path) -> None:
    """Some of them still decode; the others are one sentence."""
    outcomes = set()
    for format_name in ("png", "jpeg", "webp", "tiff", "gif", "bmp"):
        content = np.frombuffer(_saved(format_name), np.uint8)
        for seed in range(25):
            rng = np.random.default_rng(seed)
            flipped = content.copy()
            # most of them in the header, where they do most
            places = rng.integers(0, 200 if seed % 2 else len(content), 4)
            flipped[places % len(content)] = rng.integers(0, 256, 4)
            (tmp_path / "a.png").write_bytes(flipped.tobytes())
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    decode(tmp_path, "a.png", 3, most=32)
                outcomes.add("decoded")
            except UnreadableImageError as error:
                assert "\n" not in str(error)
                outcomes.add("refused")
    assert outcomes == {"decoded", "refused"}


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At Pillow's limit; from half of it on, Pillow warns and the image is used."""
    Image.new("1", (2000, 1000)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999_999)
    assert "(more than 1 million pixels)" in refused(tmp_path, "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_001)
    with pytest.warns(Image.DecompressionBombWarning):
        assert decode(tmp_path, "a.png", 3)[1] == (2000, 1000)


def test_running_out_of_memory_is_not_the_fault_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")

    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fails)
    for look in (decode, examine):
        with pytest.raises(MemoryError):
            look(tmp_path, "a.png", 3)


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "\x1b[31m.jpg").touch()
    with pytest.raises(UnreadableImageError) as caught:
        decode(tmp_path, "\x1b[31m.jpg", 3)
    assert "\x1b" not in str(caught.value)
    assert r"\u001b[31m.jpg" in str(caught.value)


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EMFILE, "x"), OSError(errno.ENOMEM, "x")]
)
def test_what_the_machine_lacks_is_not_blamed_on_the_image(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``data.unreadable = "skip"`` the image would be left out."""
    Image.new("L", (4, 4)).save(tmp_path / "a.png")

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", refuse)
    for function in (decode, examine):
        with pytest.raises(type(error)):
            function(tmp_path, "a.png", 1)
