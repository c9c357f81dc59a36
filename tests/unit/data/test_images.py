import pickle
import random
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, LlavaImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from milora_vl.data import images
from milora_vl.data.images import (
    BadImageError,
    ImagePathError,
    ImageTransform,
    load_image,
    mean_color,
    pad_to_square,
    read_image_size,
    resolve_image,
    to_rgb,
)

SIDE = 28
SIZES = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
PROCESSORS = [CLIPImageProcessor, CLIPImageProcessorPil, BitImageProcessor, BitImageProcessorPil]


def noise(width, height, seed=0):
    generator = random.Random(seed)
    return Image.frombytes("RGB", (width, height), generator.randbytes(3 * width * height))


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.png", "sub/a.png", "./a.png", "sub/../a.png", "a:b.png", "..a"]
)
def test_names_below_the_folder_resolve_below_it(tmp_path, name):
    path = resolve_image(tmp_path, name)
    assert path.is_relative_to(tmp_path)
    assert ".." not in path.parts


def test_an_absolute_name_below_the_folder_is_taken(tmp_path):
    assert resolve_image(tmp_path, str(tmp_path / "x" / "a.png")) == tmp_path / "x" / "a.png"


def test_a_link_placed_in_the_folder_by_its_owner_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    noise(4, 4).save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "coco").symlink_to(tmp_path / "elsewhere")
    assert load_image(resolve_image(tmp_path / "images", "coco/a.png")).size == (4, 4)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "../a.png",
        "a/../../b.png",
        "/etc/passwd",
        "//host/a.png",
        "http://host/a.png",
        "HTTPS://host/a.png",
        "file:///a.png",
        "s3://bucket/a.png",
        "data:image/png;base64,AA",
        "a\0.png",
    ],
)
def test_names_outside_the_folder_and_urls_are_refused(tmp_path, name):
    with pytest.raises(ImagePathError):
        resolve_image(tmp_path, name)


@pytest.mark.parametrize("start", ["file://", "file://localhost", "FILE://", "file:"])
def test_file_urls_are_paths(tmp_path, start):
    path = resolve_image(tmp_path, f"{start}{tmp_path}/sub/a%20b.png")
    assert path == tmp_path / "sub" / "a b.png"
    with pytest.raises(ImagePathError, match="outside"):
        resolve_image(tmp_path, f"{start}/etc/%2e%2e/etc/passwd")


def test_a_relative_file_url_starts_at_the_folder(tmp_path):
    assert resolve_image(tmp_path, "file://sub/a.png") == tmp_path / "sub" / "a.png"


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb_of_the_same_size(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture = noise(9, 5).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.frombytes("I;16", (9, 5), bytes(range(90)))
    picture.save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (9, 5))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_exif_orientation_is_followed_in_every_format(tmp_path, suffix, orientation):
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste("black", (0, 0, 32, 16))
    # the pixels as a camera held that way stores them: the inverse of the turn that EXIF asks for
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = inverse.get(orientation, images._TURNS.get(orientation))
    stored = upright if turn is None else upright.transpose(turn)
    exif = stored.getexif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored.save(path, exif=exif)
    image = load_image(path)
    assert image.size == read_image_size(path) == (64, 32)
    corners = [image.getpixel(at)[0] for at in ((8, 8), (56, 8), (8, 24), (56, 24))]
    assert [value > 128 for value in corners] == [False, True, True, True]


RAMP = np.tile(np.arange(64, dtype=np.uint32) * 1040, (4, 1))  # 0 to 65520


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        (RAMP.astype(np.uint16), "png"),
        (RAMP.astype(np.uint16), "tif"),
        (RAMP.astype(np.int32), "tif"),
        (RAMP.astype(np.uint16), "pgm"),
        (RAMP.astype(np.int32) * 32770, "tif"),
        (RAMP.astype(np.int32) - 30_000, "tif"),
        (RAMP.astype(np.float32) / 65520, "tif"),
        (RAMP.astype(np.float32) * 1e30 - 1e34, "tif"),
    ],
)
def test_deep_gray_keeps_its_levels(tmp_path, values, suffix):
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    image = load_image(tmp_path / f"deep.{suffix}")
    row = np.asarray(image)[0, :, 0].astype(int)
    assert np.abs(row - np.linspace(0, 255, 64)).max() <= 1
    assert image.mode == "RGB"
    with Image.open(tmp_path / f"deep.{suffix}") as opened:
        assert to_rgb(opened).tobytes() == image.tobytes()


def test_sixteen_bits_are_scaled_by_their_depth_not_their_range(tmp_path):
    values = np.full((2, 2), 0x4000, np.uint16)
    for name in ("dark.png", "dark.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert load_image(tmp_path / name).getpixel((0, 0)) == (64, 64, 64)


def test_unsigned_integers_beyond_the_signed_ones_are_bright(tmp_path):
    path = tmp_path / "unsigned.tif"
    Image.fromarray((RAMP * 65537).view(np.int32)).save(path, tiffinfo={339: 1})
    content = path.read_bytes()
    entry = content.index(struct.pack("<HHI", 339, 3, 1))
    path.write_bytes(content[: entry + 8] + struct.pack("<H", 1) + content[entry + 10 :])
    row = np.asarray(load_image(path))[0, :, 0].astype(int)
    assert np.abs(row - np.linspace(0, 255, 64)).max() <= 1


def test_eight_bits_in_a_wider_file_stay_as_they_are(tmp_path):
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert (np.asarray(load_image(tmp_path / "a.tif"))[..., 0] == values).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(tmp_path, value):
    values = np.zeros((4, 4), np.float32)
    values[0, 0] = value
    Image.fromarray(values).save(tmp_path / "odd.tif")
    with pytest.raises(BadImageError, match=r"odd\.tif.*not finite"):
        load_image(tmp_path / "odd.tif")


def test_alpha_is_dropped_not_blended(tmp_path):
    Image.new("RGBA", (2, 2), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (200, 100, 50)


def png_claiming(width, height):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data))
            + kind
            + data
            + struct.pack(">I", zlib.crc32(kind + data) & 0xFFFFFFFF)
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a picture",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a\x01\x00",
        png_claiming(10_000, 10_000),
        png_claiming(60_000, 60_000),
        png_claiming(4, 4),
    ],
    ids=["empty", "text", "png", "gif", "huge", "bomb", "short data"],
)
def test_a_bad_file_is_named(tmp_path, content):
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=r"odd\.png"):
        load_image(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for name in ("none.png", "."):
        with pytest.raises(BadImageError, match=str(tmp_path)):
            load_image(tmp_path / name)


def test_the_pixel_limit_is_checked_before_decoding_and_can_be_raised(tmp_path):
    noise(20, 20).save(tmp_path / "a.png")
    with pytest.raises(BadImageError, match="20 x 20 px is more than the limit of 399 px"):
        load_image(tmp_path / "a.png", max_pixels=399)
    with pytest.raises(BadImageError, match="limit of 399 px"):
        read_image_size(tmp_path / "a.png", max_pixels=399)
    assert load_image(tmp_path / "a.png", max_pixels=400).size == (20, 20)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged metadata
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_damaged_files_load_or_raise_the_one_error(tmp_path, suffix):
    good = tmp_path / f"good.{suffix}"
    noise(12, 12).save(good)
    content = good.read_bytes()
    generator = random.Random(suffix)
    n_bad = 0
    for case in range(60):
        damaged = bytearray(content[: generator.randrange(len(content))] if case % 2 else content)
        for _ in range(case % 5 if damaged else 0):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(damaged)
        try:
            assert load_image(path).mode == "RGB"
        except BadImageError:
            n_bad += 1
    assert n_bad > 5


# --- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(10, 4), (4, 10), (9, 4), (4, 9), (7, 7), (1, 20)])
def test_padding_centres_the_whole_picture_on_the_mean_color(width, height):
    picture = noise(width, height)
    square = pad_to_square(picture, (1, 2, 3))
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    assert square.size == (side, side)
    assert square.crop((left, top, left + width, top + height)).tobytes() == picture.tobytes()
    border = sum(square.getpixel((x, y)) == (1, 2, 3) for x in range(side) for y in range(side))
    assert border == side * side - width * height


def test_a_very_long_picture_is_shrunk_before_padding():
    square = pad_to_square(Image.new("RGB", (3000, 30), "red"), (0, 0, 0), max_pixels=10_000)
    assert square.size == (100, 100)
    assert square.getbbox() == (0, 49, 100, 50)


@pytest.mark.parametrize("processor_class", PROCESSORS)
@pytest.mark.parametrize("size", [(40, 20), (20, 40), (30, 30)])
def test_padded_transform_equals_llavas_own_processor(processor_class, size):
    processor = processor_class(**SIZES)
    reference = LlavaImageProcessor(
        do_pad=True, image_mean=processor.image_mean, image_std=processor.image_std, **SIZES
    )
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    pixels = ImageTransform(processor, pad=True)(picture)
    expected = reference(images=picture, return_tensors="pt")["pixel_values"][0]
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.float32, (3, SIDE, SIDE))
    # Pillow and torchvision round a resized pixel differently by up to one level of 255
    torch.testing.assert_close(pixels, expected, atol=1.5 / 255 / min(processor.image_std), rtol=0)


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_without_padding_the_processor_alone_decides(processor_class):
    processor = processor_class(**SIZES)
    picture = noise(40, 20)
    pixels = ImageTransform(processor, pad=False)(picture)
    expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, expected.float(), atol=0, rtol=0)
    padded = ImageTransform(processor, pad=True)(picture)
    assert not torch.equal(padded, pixels)


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_padding_is_almost_zero_after_normalisation(processor_class):
    pixels = ImageTransform(processor_class(**SIZES))(Image.new("RGB", (56, 28), "white"))
    assert pixels[:, 0].abs().max() < 1 / 255 / 0.22  # the mean, rounded down to a level of 255
    assert pixels[:, SIDE // 2].min() > 1


def test_the_pixel_limit_holds_for_what_resizing_makes_of_an_image():
    def peak_gib():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    large = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    transform = ImageTransform(large, pad=False)
    before = peak_gib()
    for size in ((1500, 1), (1, 1500)):
        transform.check_size(*size)
        assert transform(Image.new("RGB", size)).shape == (3, 336, 336)
    assert peak_gib() - before < 0.1
    large.do_center_crop = False
    with pytest.raises(BadImageError, match=r"1500 x 1 px would be resized to 504000 x 336"):
        ImageTransform(large, pad=False)(Image.new("RGB", (1500, 1)))
    ImageTransform(large, pad=True).check_size(1500, 1)  # a square first


@pytest.mark.parametrize("processor_class", PROCESSORS)
@pytest.mark.parametrize("size", [(75, 1), (1, 60), (90, 2), (2, 121)])
def test_a_long_image_cut_before_resizing_gives_the_same_pixels(processor_class, size, monkeypatch):
    transform = ImageTransform(processor_class(**SIZES), pad=False)
    picture = noise(*size)
    expected = transform(picture)
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 28 * 28 * 20)
    assert transform._edge(*size)
    torch.testing.assert_close(transform(picture), expected, atol=0.02, rtol=0)


def test_transform_pickles_for_worker_processes():
    transform = ImageTransform(CLIPImageProcessor(**SIZES))
    picture = noise(9, 5)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(picture), transform(picture))


def test_mean_color_rounds_down_and_needs_three_channels():
    processor = CLIPImageProcessor(image_mean=[0.5, 0.25, 0.999])
    assert mean_color(processor) == (127, 63, 254)
    with pytest.raises(ValueError, match="pad=False"):
        mean_color(CLIPImageProcessor(image_mean=[0.5]))
