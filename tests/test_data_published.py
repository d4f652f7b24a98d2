"""Registered sets as their authors publish them, on miniature trees of the real files."""

import contextlib
import io
import os
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from fastrecycle.data import load_dataset, matlab, published

SUFFIXES = ("", ".zip", ".tar", ".tgz")


def image(color, form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def images(*names):
    return {name: image(red % 256) for red, name in enumerate(names)}


def pack(path, files):
    """Write files (text or bytes) as the folder, zip or tar that the suffix says."""
    files = {n: f.encode() if isinstance(f, str) else f for n, f in files.items()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    elif path.suffix in (".tar", ".tgz"):
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def reds(dataset):
    return [dataset.open(index).getpixel((0, 0))[0] for index in range(len(dataset))]


def names(dataset):
    return [dataset.class_names[label] for label in dataset.labels]


# CUB-200-2011

BIRDS = [
    "001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross",
    "004.Groove_billed_Ani", "005.Crested_Auklet", "006.Least_Auklet",
]  # fmt: skip


def cub(prefix="CUB_200_2011/"):
    # The image numbers are in no order, as in the real table's folders of different lengths.
    paths = [
        f"{bird}/{bird[4:]}_{place:04d}_7964{place:02d}.jpg" for bird in BIRDS for place in (46, 9)
    ]
    numbers = [7 * place % 12 + 1 for place in range(12)]
    files = images(*(f"{prefix}images/{path}" for path in paths))
    files[f"{prefix}classes.txt"] = "".join(f"{i} {bird}\n" for i, bird in enumerate(BIRDS, 1))
    files[f"{prefix}images.txt"] = "".join(
        f"{number} {path}\n" for number, path in zip(numbers, paths, strict=True)
    )
    files[f"{prefix}image_class_labels.txt"] = "".join(
        f"{number} {place // 2 + 1}\n" for place, number in enumerate(numbers)
    )
    return files | {
        f"{prefix}README": "The Caltech-UCSD Birds-200-2011 Dataset",
        f"{prefix}bounding_boxes.txt": "1 60.0 27.0 325.0 304.0\n",
        f"{prefix}train_test_split.txt": "1 0\n",
        f"{prefix}parts/parts.txt": "1 back\n",
        "attributes.txt": "1 has_bill_shape::curved_(up_or_down)\n",
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_cub_is_split_by_class_as_published(tmp_path, suffix):
    path = pack(tmp_path / f"CUB_200_2011{suffix}", cub())
    assert load_dataset("cub", "train", tmp_path).class_names == (
        "Black footed Albatross", "Sooty Albatross", "Crested Auklet",
    )  # fmt: skip
    val = load_dataset("cub", "val", tmp_path)
    assert names(val) == ["Laysan Albatross"] * 2 + ["Least Auklet"] * 2
    assert val.files[0].endswith("images/002.Laysan_Albatross/Laysan_Albatross_0009_796409.jpg")
    assert reds(val) == [3, 2, 11, 10]
    assert load_dataset(path, "test").class_names == ("Groove billed Ani",)


def test_cub_s_two_hundred_classes_are_split_100_50_50(tmp_path):
    classes = [f"{i:03d}.Bird_{i}" for i in range(1, 201)]
    files = dict.fromkeys((f"images/{c}/{c[4:]}_0001_1.jpg" for c in classes), image(0))
    for table, value in (("classes", "{}"), ("images", "{0}/Bird_{1}_0001_1.jpg")):
        files[f"{table}.txt"] = "".join(
            f"{i} {value.format(c, i)}\n" for i, c in enumerate(classes, 1)
        )
    files["image_class_labels.txt"] = "".join(f"{i} {i}\n" for i in range(1, 201))
    pack(tmp_path / "cub.zip", files)
    sizes = [len(load_dataset("cub", s, tmp_path).class_names) for s in ("train", "val", "test")]
    assert sizes == [100, 50, 50]


@pytest.mark.parametrize(
    ("table", "content", "error", "text"),
    [
        ("images.txt", "1 001.Auk/lost.jpg\n", FileNotFoundError, "image 1: no file .*lost.jpg"),
        ("images.txt", "1 ../../secret.jpg\n", ValueError, "lies outside its folder"),
        ("images.txt", "99 001.Auk/a.jpg\n", ValueError, "image 99 must have a class .* got none"),
        (
            "images.txt",
            "1 {0}\n2 {0}\n".format(
                "001.Black_footed_Albatross/Black_footed_Albatross_0046_796446.jpg"
            ),
            ValueError,
            "image 2: .*is listed before",
        ),
        ("images.txt", "\n", ValueError, r"images.txt lists no image of the set"),
        ("classes.txt", "1\n", ValueError, r"classes.txt line 1 must be a new number and a value"),
        ("image_class_labels.txt", "1 1\n1 2\n", ValueError, "labels.txt line 2 must be a new"),
        ("image_class_labels.txt", "1 9\n", ValueError, "must have a class .* got"),
    ],
)
def test_cub_s_tables_that_cannot_be_read_are_rejected(tmp_path, table, content, error, text):
    pack(tmp_path / "cub", cub("") | {table: content})
    with pytest.raises(error, match=text):
        load_dataset("cub", data_root=tmp_path)


def test_published_names_are_said_where_a_set_is_absent(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"where CUB_200_2011 is read as it lies"):
        load_dataset("cub", data_root=tmp_path)


# CIFAR-FS


def cifar_fs(prefix="cifar100/"):
    classes = {"train": ["apple", "train"], "val": ["beaver"], "test": ["baby", "worm"]}
    names = [name for of in classes.values() for name in [*of]]
    files = images(*(f"{prefix}data/{name}/{name[0]}_s_{i:06d}.png" for name in names
                     for i in (1, 2)))  # fmt: skip
    return files | {
        f"{prefix}splits/bertinetto/{split}.txt": "\n".join(of) + "\n"
        for split, of in classes.items()
    }


@pytest.mark.parametrize("prefix", ["", "cifar100/"])
@pytest.mark.parametrize("file", ["cifar_fs", "cifar100.zip", "cifar100.tar"])
def test_cifar_fs_is_split_by_its_lists(tmp_path, file, prefix):
    pack(tmp_path / file, cifar_fs(prefix))
    train = load_dataset("cifar_fs", "train", tmp_path)
    assert train.class_names == ("apple", "train")  # a class, no split
    assert reds(train) == [0, 1, 2, 3]
    assert load_dataset("cifar_fs", "val", tmp_path).class_names == ("beaver",)
    assert load_dataset("cifar_fs", "test", tmp_path).class_names == ("baby", "worm")


def test_cifar_fs_with_lists_that_do_not_fit_is_rejected(tmp_path):
    lists = "splits/bertinetto/{}.txt"
    pack(tmp_path / "cifar_fs", cifar_fs("") | {lists.format("val"): "apple\n"})
    with pytest.raises(ValueError, match=r"val.txt has the class apple, which train.txt has too"):
        load_dataset("cifar_fs", data_root=tmp_path)
    (tmp_path / "cifar_fs" / lists.format("val")).write_text("beaver\nfox\n")
    with pytest.raises(FileNotFoundError, match="no image of the listed class fox"):
        load_dataset("cifar_fs", data_root=tmp_path)


# Oxford Flowers-102


def flowers(*numbers, prefix=""):
    table = io.BytesIO()
    savemat(table, {"labels": np.array([numbers], dtype=np.uint8)})
    paths = (f"{prefix}jpg/image_{place:05d}.jpg" for place in range(1, len(numbers) + 1))
    return images(*paths) | {f"{prefix}imagelabels.mat": table.getvalue()}


@pytest.mark.parametrize("prefix", ["", "flowers/"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_flowers_are_split_by_class_as_published(tmp_path, suffix, prefix):
    pack(tmp_path / f"vgg_flower{suffix}", flowers(77, 5, 10, 77, 9, 102, 5, prefix=prefix))
    test = load_dataset("vgg_flower", "test", tmp_path)
    assert names(test) == ["english marigold", "monkshood", "english marigold"]
    assert reds(test) == [1, 4, 6]
    assert test.files[0] == f"{prefix}jpg/image_00002.jpg"
    assert load_dataset("vgg_flower", "val", tmp_path).class_names == (
        "globe thistle", "blackberry lily",
    )  # fmt: skip
    assert reds(load_dataset("vgg_flower", "train", tmp_path)) == [0, 3]


def test_all_flowers_are_in_one_split(tmp_path):
    pack(tmp_path / "vgg_flower.zip", flowers(*range(1, 103)))
    sets = [load_dataset("vgg_flower", split, tmp_path) for split in ("train", "val", "test")]
    assert [len(dataset.class_names) for dataset in sets] == [71, 15, 16]
    assert len({name for dataset in sets for name in dataset.class_names}) == 102
    assert all(re.fullmatch("[a-z'-]+( [a-z'-]+)*", n) for d in sets for n in d.class_names)


def test_flowers_have_the_names_of_torchvision():
    known = pytest.importorskip("torchvision.datasets").Flowers102
    if not hasattr(known, "classes"):
        pytest.skip("this torchvision does not list them")
    listed = [name.strip() for name in published._FLOWER_NAMES.split(",")]
    assert listed == [name.rstrip("?") for name in known.classes]


@pytest.mark.parametrize("table", [b"", b"x" * 200, b"x" * 2**17, flowers(103)["imagelabels.mat"]])
def test_flowers_with_another_table_are_rejected(tmp_path, table):
    pack(tmp_path / "vgg_flower", flowers(5) | {"imagelabels.mat": table})
    with pytest.raises(ValueError, match=r"imagelabels.mat is not Flowers-102's table of labels"):
        load_dataset("vgg_flower", data_root=tmp_path)


def matrices(compressed, dtype):
    table = io.BytesIO()
    labels = np.array([[5, 9, 102, 77, 1, 30]], dtype=dtype)
    savemat(table, {"a": "text", "labels": labels, "z": 3.0}, do_compression=compressed)
    return table.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8", "u8"])
def test_matrices_are_read_as_scipy_reads_them(compressed, dtype):
    data = matrices(compressed, dtype)
    expected = loadmat(io.BytesIO(data))["labels"].ravel()
    read = matlab.read_matrix(data, "labels")
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(matlab.read_matrix(data, "z"), [3])
    with pytest.raises(ValueError, match="it has no matrix b"):
        matlab.read_matrix(data, "b")


def test_matrices_that_inflate_too_far_are_refused():
    table = io.BytesIO()
    savemat(table, {"labels": np.zeros((1, 2**21), np.uint8)}, do_compression=True)
    with pytest.raises(ValueError, match="a matrix of more than 1,048,576 bytes"):
        matlab.read_matrix(table.getvalue(), "labels")


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_matrices_raise_nothing_but_value_errors(compressed):
    data = matrices(compressed, "u1")
    rng = np.random.default_rng(0)
    for length in range(len(data)):
        with contextlib.suppress(ValueError):
            matlab.read_matrix(data[:length], "labels")
    for _ in range(2000):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(ValueError):
            matlab.read_matrix(bytes(damaged), "labels")


def test_flowers_without_their_table_or_an_image_are_rejected(tmp_path):
    files = flowers(5, 9)
    pack(tmp_path / "vgg_flower", {name: files[name] for name in files if "jpg" in name})
    with pytest.raises(FileNotFoundError, match=r"image_00001.jpg\) but no imagelabels.mat, which"):
        load_dataset("vgg_flower", data_root=tmp_path)
    del files["jpg/image_00002.jpg"]
    path = pack(tmp_path / "flowers.zip", files)
    with pytest.raises(FileNotFoundError, match=r"lists 2 images, .* no file jpg/image_00002.jpg"):
        load_dataset(path)


# ISIC 2018, task 3

LESIONS = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]


def isic(*labels, folder="ISIC2018_Task3_Training_GroundTruth/", prefix=""):
    files = images(
        *(
            f"{prefix}ISIC2018_Task3_Training_Input/ISIC_{24306 + i:07d}.jpg"
            for i in range(len(labels))
        )
    )
    table = f"image,{','.join(LESIONS)}\n"
    for place, label in enumerate(labels):
        marks = ",".join("1.0" if label == lesion else "0.0" for lesion in LESIONS)
        table += f"ISIC_{24306 + place:07d},{marks}\n"
    return files | {
        f"{prefix}{folder}ISIC2018_Task3_Training_GroundTruth.csv": table,
        f"{prefix}ISIC2018_Task3_Training_Input/ATTRIBUTION.txt": "HAM10000",
    }


@pytest.mark.parametrize("folder", ["", "ISIC2018_Task3_Training_GroundTruth/"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_isic_is_read_by_its_ground_truth(tmp_path, suffix, folder):
    pack(tmp_path / f"isic{suffix}", isic("NV", "VASC", "NV", "MEL", folder=folder))
    dataset = load_dataset("isic", data_root=tmp_path)
    assert dataset.class_names == ("melanoma", "melanocytic nevus", "vascular lesion")
    assert names(dataset)[:2] == ["melanocytic nevus", "vascular lesion"]
    assert dataset.files[3] == "ISIC2018_Task3_Training_Input/ISIC_0024309.jpg"
    assert reds(dataset) == [0, 1, 2, 3]


def test_isic_has_seven_classes(tmp_path, caplog):
    path = pack(tmp_path / "isic.zip", isic(*LESIONS, prefix="ISIC2018/"))
    assert len(load_dataset("isic", data_root=tmp_path).class_names) == 7
    assert "published split" not in caplog.text
    assert load_dataset(path).files[0].startswith("ISIC2018/ISIC2018_Task3_Training_Input/")


@pytest.mark.parametrize(
    ("old", "new", "error", "text"),
    [
        ("0.0", "1.0", ValueError, "line 2 must have 1 in one of MEL, NV, .* got 1.0, 1.0"),
        ("0.0", "0.5", ValueError, "line 2 must have 1 in one of MEL"),
        ("BKL", "KL", ValueError, "must have the columns image, MEL, .* got image, mel"),
        (",0.0\n", "\n", ValueError, "line 2 must have 8 values or more, got 7"),
        ("0024306", "0099999", FileNotFoundError, "line 2: no image .*ISIC_0099999.jpg, or"),
        ("0024307", "0024306", FileNotFoundError, "line 3: no image .*ISIC_0024306.jpg, or"),
    ],
)
def test_isic_s_tables_that_cannot_be_read_are_rejected(tmp_path, old, new, error, text):
    files = isic("NV", "MEL", folder="")
    table = "ISIC2018_Task3_Training_GroundTruth.csv"
    pack(tmp_path / "isic", files | {table: files[table].replace(old, new)})
    with pytest.raises(error, match=text):
        load_dataset("isic", data_root=tmp_path)


def test_isic_without_its_table_or_with_images_twice_is_rejected(tmp_path):
    files = isic("NV", "MEL", folder="")
    twice = {f"copy/{name}": data for name, data in files.items() if name.endswith("6.jpg")}
    with pytest.raises(ValueError, match=r"has ISIC_0024306.jpg twice, as ISIC.* and copy/"):
        load_dataset(pack(tmp_path / "twice.zip", files | twice))
    del files["ISIC2018_Task3_Training_GroundTruth.csv"]
    with pytest.raises(FileNotFoundError, match=r"no ISIC2018_Task3_Training_GroundTruth.csv"):
        load_dataset(pack(tmp_path / "isic.zip", files))


# ChestX-ray14

X_RAYS = [
    ("00000001_000.png", "Cardiomegaly"),
    ("00000001_001.png", "Cardiomegaly|Emphysema"),
    ("00000002_000.png", "No Finding"),
    ("00000003_000.png", "Hernia"),
    ("00000013_005.png", "Pneumonia"),
    ("00000013_011.png", "Infiltration|Mass"),
    ("00001301_000.png", "Atelectasis"),
    ("00001301_001.png", "Cardiomegaly"),
    ("00028173_016.png", "Nodule"),
]


def chestx(folder_of, table="Data_Entry_2017.csv"):
    lines = [
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
        "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    ]
    lines += [f"{file},{finding},0,1,058Y,M,PA,2682,2749,0.143,0.143," for file, finding in X_RAYS]
    paths = (f"{folder_of(place)}/{file}" for place, (file, _) in enumerate(X_RAYS))
    return images(*paths) | {
        table: "\n".join(lines) + "\n",
        "BBox_List_2017.csv": "Image Index,Finding Label,Bbox [x,y,w,h],,,\n",
        "test_list.txt": "00000003_000.png\n",
    }


def one_folder(place):
    return "images"


def twelve_folders(place):
    return f"images_{place + 1:03d}/images"


@pytest.mark.parametrize("table", ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"])
@pytest.mark.parametrize("folder_of", [one_folder, twelve_folders])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_chestx_gives_the_single_findings_of_the_benchmark(tmp_path, suffix, folder_of, table):
    pack(tmp_path / f"chestx{suffix}", chestx(folder_of, table))
    dataset = load_dataset("chestx", data_root=tmp_path)
    assert dataset.class_names == ("Atelectasis", "Cardiomegaly", "Nodule")
    assert names(dataset) == ["Cardiomegaly", "Atelectasis", "Cardiomegaly", "Nodule"]
    assert dataset.files[0] == f"{folder_of(0)}/00000001_000.png"
    assert reds(dataset) == [0, 6, 7, 8]


@pytest.mark.parametrize(
    ("old", "new", "error", "text"),
    [
        ("Finding Labels", "Labels", ValueError, "columns Image Index, Finding Labels, got image"),
        (
            "00028173",
            "00028174",
            FileNotFoundError,
            "line 10: no image .* unpack all of images_001",
        ),
        ("00028173_016", "00000001_000", FileNotFoundError, "line 10: .* is listed before"),
        ("00000001_000.png,", '00000001_000.png,"', ValueError, "is not a CSV in UTF-8"),
    ],
)
def test_chestx_tables_that_cannot_be_read_are_rejected(tmp_path, old, new, error, text):
    files = chestx(one_folder)
    table = files["Data_Entry_2017.csv"].replace(old, new)
    pack(tmp_path / "chestx", files | {"Data_Entry_2017.csv": table})
    with pytest.raises(error, match=text):
        load_dataset("chestx", data_root=tmp_path)


def test_chestx_without_its_table_is_rejected(tmp_path):
    pack(tmp_path / "chestx", images("images_001/images/00000001_000.png"))
    with pytest.raises(FileNotFoundError, match=r"00000001_000.png\) but no Data_Entry_2017.csv"):
        load_dataset("chestx", data_root=tmp_path)


# EuroSAT

LAND = [
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
    "PermanentCrop", "Residential", "River", "SeaLake",
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("eurosat", "2750/"),
        ("eurosat", "EuroSAT/2750/"),
        ("EuroSAT", "2750/"),
        ("EuroSAT.zip", "2750/"),
        ("EuroSAT_RGB.zip", "EuroSAT_RGB/"),
        ("EuroSAT_RGB", ""),
        ("2750", ""),
        ("eurosat.tar", "EuroSAT/2750/"),
        ("eurosat.tgz", "EuroSAT_RGB/"),
    ],
)
def test_eurosat_is_read_as_published(tmp_path, caplog, file, prefix):
    files = images(*(f"{prefix}{land}/{land}_{n}.jpg" for land in LAND for n in (1, 10)))
    pack(tmp_path / file, files)
    dataset = load_dataset("eurosat", data_root=tmp_path)
    assert dataset.class_names == tuple(LAND)
    assert reds(dataset) == list(range(20))
    assert "published split" not in caplog.text


def test_eurosat_s_other_bands_are_left_out(tmp_path):
    names = ("EuroSAT_RGB/River/River_1.jpg", "EuroSAT_MS/River/River_1.tif")
    pack(tmp_path / "eurosat.zip", images(*names))
    dataset = load_dataset("eurosat", data_root=tmp_path)
    assert (dataset.class_names, dataset.files) == (("River",), list(names[:1]))


def test_a_table_of_one_s_own_goes_before_the_published_layout(tmp_path):
    table = "filename,label,split\n{},water,test\n"
    name = "2750/River/River_1.jpg"
    pack(tmp_path / "eurosat", images(name) | {"mine.csv": table.format(name)})
    assert load_dataset("eurosat", data_root=tmp_path).class_names == ("water",)
    name = "jpg/image_00001.jpg"
    pack(tmp_path / "vgg_flower", flowers(5) | {"mine.csv": table.format(name)})
    assert load_dataset("vgg_flower", data_root=tmp_path).class_names == ("water",)


# CropDiseases

CROPS = {  # PlantVillage: crop -> the ends of its folders' names
    "Apple": "Apple_scab Black_rot Cedar_apple_rust healthy",
    "Blueberry": "healthy",
    "Cherry_(including_sour)": "Powdery_mildew healthy",
    "Corn_(maize)": "Cercospora_leaf_spot|Gray_leaf_spot Common_rust_ Northern_Leaf_Blight healthy",
    "Grape": "Black_rot Esca_(Black_Measles) Leaf_blight_(Isariopsis_Leaf_Spot) healthy",
    "Orange": "Haunglongbing_(Citrus_greening)",
    "Peach": "Bacterial_spot healthy",
    "Pepper,_bell": "Bacterial_spot healthy",
    "Potato": "Early_blight Late_blight healthy",
    "Raspberry": "healthy",
    "Soybean": "healthy",
    "Squash": "Powdery_mildew",
    "Strawberry": "Leaf_scorch healthy",
    "Tomato": (
        "Bacterial_spot Early_blight Late_blight Leaf_Mold Septoria_leaf_spot "
        "Spider_mites|Two-spotted_spider_mite Target_Spot Tomato_Yellow_Leaf_Curl_Virus "
        "Tomato_mosaic_virus healthy"
    ),
}
LEAVES = [
    f"{crop}___{end}".replace("|", " ") for crop, ends in CROPS.items() for end in ends.split()
]


@pytest.mark.parametrize(
    ("file", "prefix", "others"),
    [
        ("crop_diseases", "dataset/train/", ["dataset/test/"]),
        ("CropDiseases.zip", "CropDiseases/dataset/train/", ["CropDiseases/dataset/test/"]),
        ("crop_diseases", "", []),
        ("crop_diseases.tar", "PlantVillage/", []),
        ("PlantVillage-Dataset-master.zip", "PlantVillage-Dataset-master/raw/color/",
         ["PlantVillage-Dataset-master/raw/grayscale/",
          "PlantVillage-Dataset-master/raw/segmented/"]),
    ],
)  # fmt: skip
def test_crop_diseases_are_read_as_published(tmp_path, caplog, file, prefix, others):
    paths = [
        f"{folder}{leaf}/0a1b2c3d-{n}___RS_HL {n}.JPG"
        for folder in (prefix, *others)
        for leaf in LEAVES
        for n in (1, 2)
    ]
    pack(tmp_path / file, images(*paths))
    dataset = load_dataset("crop_diseases", data_root=tmp_path)
    assert dataset.class_names == tuple(sorted(LEAVES))
    assert dataset.files == sorted(paths[: 2 * len(LEAVES)])
    assert "published split" not in caplog.text


def test_crop_diseases_in_splits_of_their_own_keep_them(tmp_path):
    pack(tmp_path / "crop_diseases", images("train/Apple___rot/0.jpg", "test/Grape___rot/0.jpg"))
    assert load_dataset("crop_diseases", "test", tmp_path).class_names == ("Grape___rot",)


# mini-ImageNet


def mini_imagenet(prefix=""):
    classes = {"train": ["n01532829", "n01558993"], "val": ["n01855672"], "test": ["n01930112"]}
    files = {}
    for split, wnids in classes.items():
        listed = [(f"{wnid}{n:08d}.jpg", wnid) for wnid in wnids for n in (5, 6)]
        table = "".join(f"{file},{wnid}\n" for file, wnid in listed)
        files[f"{prefix}{split}.csv"] = f"filename,label\n{table}"
        files |= images(*(f"{prefix}images/{file}" for file, _ in listed))
    return files


@pytest.mark.parametrize("prefix", ["", "mini-imagenet/"])
@pytest.mark.parametrize("file", ["mini_imagenet", "mini-imagenet.zip", "miniImagenet.tar"])
def test_mini_imagenet_is_split_by_its_three_tables(tmp_path, file, prefix):
    pack(tmp_path / file, mini_imagenet(prefix))
    train = load_dataset("mini_imagenet", "train", tmp_path)
    assert names(train) == ["n01532829"] * 2 + ["n01558993"] * 2
    assert train.files[1] == f"{prefix}images/n0153282900000006.jpg"
    assert reds(train) == [0, 1, 2, 3]
    assert load_dataset("mini_imagenet", "val", tmp_path).class_names == ("n01855672",)
    assert load_dataset("mini_imagenet", "test", tmp_path).class_names == ("n01930112",)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file", ["mini_imagenet", "mini-imagenet.zip", "mini_imagenet.tar"])
@pytest.mark.parametrize("ending", ["pkl", "pickle"])
def test_mini_imagenet_s_pickles_are_refused_with_the_reason(tmp_path, file, ending):
    content = pickle.dumps(Trap(str(tmp_path / "sprung")))
    name = f"mini-imagenet-cache-test.{ending}"
    pack(tmp_path / file, {name: content})
    with pytest.raises(ValueError, match=f"cache-test.{ending} is a pickle; not opened, as that"):
        load_dataset("mini_imagenet", data_root=tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="runs whatever code it holds; give the images as class"):
        load_dataset(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_pickles_beside_images_are_left_alone(tmp_path):
    pack(tmp_path / "mini_imagenet", mini_imagenet() | {"mini-imagenet-cache-test.pkl": b"x"})
    assert len(load_dataset("mini_imagenet", data_root=tmp_path)) == 2
