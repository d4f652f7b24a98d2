"""Images in memory, decoding, and batches."""

import io
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastrecycle.data import load_dataset
from fastrecycle.data.images import decode, to_rgb

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


# In memory


def test_arrays_open_as_rgb():
    dataset = load_dataset((PIXELS, LABELS))
    assert len(dataset) == 12
    np.testing.assert_array_equal(np.array(dataset.open(3)), PIXELS[3])
    gray = load_dataset((PIXELS[..., 0], LABELS)).open(3)
    assert gray.mode == "RGB"
    np.testing.assert_array_equal(np.array(gray)[..., 2], PIXELS[3, ..., 0])


def test_float_tensors_open_as_the_same_pixels():
    tensor = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255
    dataset = load_dataset((tensor, torch.from_numpy(LABELS)))
    np.testing.assert_array_equal(np.array(dataset.open(3)), PIXELS[3])


def test_lists_of_pil_images_may_differ_in_mode_and_size():
    dataset = load_dataset(([Image.new("L", (3, 4)), Image.new("RGBA", (9, 2))], ["a", "b"]))
    assert dataset.open(0).size == (3, 4)
    assert dataset.open(1).mode == "RGB"


@pytest.mark.parametrize(
    ("labels", "names", "codes"),
    [
        (["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
        (torch.tensor([7, 5, 7]), ("5", "7"), [1, 0, 1]),
        (np.array(["x", "y", "x"]), ("x", "y"), [0, 1, 0]),
        ([("a", 1), ("a", 0), ("a", 1)], ("('a', 0)", "('a', 1)"), [1, 0, 1]),
        ([1, "1", None], ("None", "1", "1"), None),
    ],
)
def test_labels_of_any_hashable_kind_become_class_names(labels, names, codes):
    dataset = load_dataset((PIXELS[:3], labels))
    if codes is None:  # 1 and "1" stay two classes, told apart
        assert len(set(dataset.class_names)) == 3
        assert len(set(dataset.labels)) == 3
    else:
        assert dataset.class_names == names
        assert dataset.labels.dtype == np.int64
        assert dataset.labels.tolist() == codes


def with_value(value):
    tensor = torch.full((4, 3, 2, 2), 0.5)
    tensor[2, 1, 0, 1] = value
    return tensor


@pytest.mark.parametrize(
    ("images", "labels", "error", "text"),
    [
        (with_value(float("nan")), [0] * 4, ValueError, r"images\[2\] has NaN"),
        (with_value(float("inf")), [0] * 4, ValueError, r"images\[2\] is in \[0.5, inf\]"),
        (with_value(-0.1), [0] * 4, ValueError, "before normalisation"),
        (torch.zeros(4, 1, 2, 2), [0] * 4, TypeError, r"float32 tensor of shape \(4, 1, 2, 2\)"),
        (torch.zeros(4, 3, 2, 2, dtype=torch.uint8), [0] * 4, TypeError, "uint8 tensor"),
        (PIXELS / 255, LABELS, TypeError, "float64 array"),
        (PIXELS.transpose(0, 3, 1, 2), LABELS, TypeError, "array of shape"),
        ([PIXELS[0]], [0], TypeError, "ndarray at index 0"),
        ("cats", [0], TypeError, "got str"),
        (PIXELS[:0], [], ValueError, "must not be empty"),
        (PIXELS[:, :0], LABELS, ValueError, "no pixels"),
        (PIXELS, LABELS[:5], ValueError, r"one entry an image \(12\), got 5"),
        (PIXELS, np.eye(12), ValueError, "not one-hot"),
        (PIXELS[:2], [[0], [1]], TypeError, "hashable"),
        (PIXELS[:2], [0.0, float("nan")], ValueError, "NaN, got one at index 1"),
    ],
)
def test_arrays_that_cannot_be_read_are_rejected(images, labels, error, text):
    with pytest.raises(error, match=text):
        load_dataset((images, labels))


# Decoding


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_decode_reads_the_usual_formats(kind):
    image = to_rgb(decode(encoded(Image.new("RGB", (8, 8), "red"), kind), "a file"))
    red, green, _ = image.getpixel((4, 4))
    assert (red > 250, green < 5) == (True, True)


def test_to_rgb_keeps_the_upper_byte_of_16_bits():
    deep = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    image = to_rgb(decode(encoded(deep), "a file"))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 1, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_to_rgb_takes_any_mode(mode):
    assert to_rgb(Image.new("RGB", (2, 2), "white").convert(mode)).mode == "RGB"


def test_to_rgb_takes_a_palette_with_transparency():
    image = Image.new("P", (2, 2))
    image.info["transparency"] = b"\x00\x80"
    assert to_rgb(image).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_decode_rejects_images_cut_short(kind):
    noise = Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    for length in (0, 5, len(data) // 2):
        with pytest.raises(ValueError, match=r"cat\.png in here is not a whole image"):
            decode(data[:length], "cat.png in here")


def test_decode_rejects_what_is_no_image():
    # Encapsulated PostScript would run Ghostscript.
    for data in (b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(ValueError, match="not a whole image"):
            decode(data, "a file")


@pytest.mark.parametrize("side", [11, 20])  # Pillow warns up to twice its limit, then raises
def test_decode_rejects_decompression_bombs(monkeypatch, side):
    data = encoded(Image.new("L", (side, side)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"big\.png has more than 100 pixels"):
        decode(data, "big.png")
    assert decode(encoded(Image.new("L", (10, 10))), "a file").size == (10, 10)


# Batches


@pytest.mark.parametrize("workers", [0, 1, 4, None])
def test_images_keep_the_order_asked_for(workers):
    dataset = load_dataset((PIXELS, LABELS))
    order = [5, 0, 11, 5, 3, 2, 8]
    batches = list(dataset.images(order, to_tensor, batch_size=3, workers=workers))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    expected = torch.from_numpy(PIXELS[order]).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat(batches), expected)


def test_images_keep_the_order_when_early_ones_are_slow():
    dataset = load_dataset((PIXELS, LABELS))
    delay = {PIXELS[i].tobytes(): 0.002 * (12 - i) for i in range(12)}

    def slow(image):
        time.sleep(delay[np.array(image).tobytes()])
        return to_tensor(image)

    loaded = torch.cat(list(dataset.images(range(12), slow, batch_size=5, workers=6)))
    assert torch.equal(loaded, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))


def test_images_decode_a_bounded_number_ahead_and_stop_when_closed():
    dataset = load_dataset((np.zeros((500, 2, 2), np.uint8), [0] * 500))
    count, lock = 0, threading.Lock()

    def counted(image):
        nonlocal count
        with lock:
            count += 1
        return to_tensor(image)

    batches = dataset.images(range(500), counted, batch_size=4, workers=2)
    next(batches)
    time.sleep(0.05)
    assert count <= 4 + 4 + 2
    batches.close()
    stopped = count
    time.sleep(0.02)
    assert count == stopped


def test_images_of_no_indices_are_none():
    assert list(load_dataset((PIXELS, LABELS)).images([], to_tensor)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_images_name_the_image_whose_transform_fails(workers):
    dataset = load_dataset((PIXELS, LABELS))

    def picky(image):
        if np.array_equal(np.array(image), PIXELS[7]):
            raise RuntimeError("too blue")
        return to_tensor(image)

    with pytest.raises(ValueError, match="transform failed on image 7: too blue"):
        list(dataset.images(range(12), picky, workers=workers))


def test_images_reject_transforms_of_another_kind():
    dataset = load_dataset(([Image.new("L", (3, 3)), Image.new("L", (4, 3))], [0, 1]))
    with pytest.raises(ValueError, match=r"got \(3, 3, 4\) for image 1 after \(3, 3, 3\)"):
        list(dataset.images([0, 1], to_tensor))
    with pytest.raises(TypeError, match="must return a tensor, got ndarray for image 0"):
        list(dataset.images([0], np.array))


@pytest.mark.parametrize(
    ("indices", "options", "error", "text"),
    [
        ([12], {}, IndexError, r"index must be in \[0, 12\), got 12"),
        ([-1], {}, IndexError, "got -1"),
        ([[0, 1]], {}, ValueError, r"flatten tasks with .ravel\(\)"),
        ([0.5], {}, ValueError, "integer array"),
        ([0], {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ([0], {"workers": -1}, ValueError, "workers must be at least 0"),
    ],
)
def test_images_reject_bad_arguments_at_once(indices, options, error, text):
    with pytest.raises(error, match=text):
        load_dataset((PIXELS, LABELS)).images(indices, to_tensor, **options)


def test_open_rejects_an_index_out_of_range():
    with pytest.raises(IndexError, match=r"must be in \[0, 12\), got 12"):
        load_dataset((PIXELS, LABELS)).open(12)


def test_datasets_can_be_pickled():
    dataset = pickle.loads(pickle.dumps(load_dataset((PIXELS, LABELS))))
    np.testing.assert_array_equal(np.array(dataset.open(3)), PIXELS[3])
