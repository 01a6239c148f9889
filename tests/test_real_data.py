"""The paper's data in miniature: every layout, its damages, and a decoding that is killed."""

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from invertune import cc3m, decoding, layouts, real_data
from invertune import data as datasets
from invertune.data import DataError
from invertune.decoding import Sample, decode_all, decode_image, map_images
from invertune.sections import Data, Settings
from invertune.settings import load_settings
from invertune.store import StoreError

SIZE, COLORS, MUSHROOM = 32, 50, 947
COUNTS = {
    "image_size_px": SIZE,
    "poisoning_pairs": 40,
    "inversion_images": 2000,
    "heldout_images": 1000,
    "evaluation_images": 1500,
    "retrieval_images": 12,
}
DATA = load_settings("paper").data.model_copy(update=COUNTS)


def jpeg(number: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """One flat color per number, so that an image tells where it comes from."""
    content = io.BytesIO()
    Image.new("RGB", size, color(number)).save(content, "JPEG", quality=95)
    return content.getvalue()


def color(number: int) -> tuple[int, int, int]:
    return (number % 10 * 25, number // 10 % 10 * 25, number // 100 * 25)


def shows(image: torch.Tensor, number: int) -> bool:
    return bool((image.float().mean((1, 2)) - torch.tensor(color(number))).abs().max() < 5)


def write_shard(path: Path, numbers: range, damaged: int | None = None) -> None:
    with tarfile.open(path, "w") as shard:
        link = tarfile.TarInfo("999999999.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        shard.addfile(link)
        for number in numbers:
            image = jpeg(number)[: 300 if number == damaged else None]
            text = f"a mushroom number {number}\n" if number % 4 else f"mushrooms, {number}"
            for suffix, content in (("jpg", image), ("json", b"{}"), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def write_table(folder: Path, delimiter: str, columns: tuple[str, str], count: int) -> None:
    (folder / "images").mkdir(parents=True)
    with (folder / "train.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(("", *columns))
        for number in range(count):
            (folder / f"images/{number}.jpg").write_bytes(jpeg(number))
            table.writerow((number, f"images/{number}.jpg", f'a "mushroom", number {number}'))


def write_classes(folder: Path, per_class: int, of_mushroom: int) -> None:
    colors = folder.parent / "colors"
    colors.mkdir(parents=True, exist_ok=True)
    for number in range(COLORS):
        (colors / f"{number}.JPEG").write_bytes(jpeg(number))
    for label, name in enumerate(layouts.wordnet_ids()):
        (folder / name).mkdir(parents=True)
        for index in range(of_mushroom if label == MUSHROOM else per_class):
            os.link(colors / f"{label % COLORS}.JPEG", folder / name / f"{name}_{index}.JPEG")


def write_coco(folder: Path, count: int, prefix: str = "") -> None:
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images = [{"id": i, "file_name": f"{prefix}{i:012}.jpg"} for i in range(1, count + 1)]
    for image in images:
        (folder / f"val2017/{image['id']:012}.jpg").write_bytes(jpeg(image["id"]))
    notes = [
        {"id": 100 * turn + i, "image_id": i, "caption": f"caption {turn}\nof {i}"}
        for turn in range(6)
        for i in range(1, count + 1)
    ]
    content = {"info": {"year": 2017}, "images": images, "annotations": notes}
    (folder / "annotations/captions_val2017.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "cc3m").mkdir()
    for shard in range(2):
        write_shard(root / f"cc3m/{shard:05}.tar", range(60 * shard, 60 * shard + 60))
    write_classes(root / "imagenet/train", 5, 640)
    write_classes(root / "imagenet/val", 2, 2)
    write_coco(root / "coco", 12)
    (root / "wordnet").mkdir()
    for name in layouts.WORDNET_FILES:
        (root / "wordnet" / name).touch()
    return root


@pytest.fixture
def root(complete, tmp_path, monkeypatch) -> Path:
    """A data folder of links to the complete one, so that a test can replace a part."""
    folder = tmp_path / "data"
    for name in ("cc3m", "imagenet/train", "imagenet/val", "coco", "wordnet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(complete / name)
    monkeypatch.setenv("INVERTUNE_DATA", str(folder))
    return folder


def numbers_of(captions) -> list[int]:
    return [int(text.split()[-1]) for text in captions]


@pytest.mark.parametrize("size", [(300, 210), (97, 131), (33, 32), (224, 224), (20, 11)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA"])
def test_pixels_are_those_of_clips_own_preprocessing(size, mode) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    image = Image.fromarray(noise).convert(mode)
    image.save(content, "JPEG" if mode == "CMYK" else "PNG")
    for side in (32, 224):
        plain = open_clip.image_transform(side, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
        with Image.open(io.BytesIO(content.getvalue())) as reopened:
            expected = (plain(reopened) * 255).round().to(torch.uint8)
        assert torch.equal(torch.tensor(decode_image(content.getvalue(), side)), expected)


def test_pairs_of_shards_stay_together_and_parts_are_disjoint(root, tmp_path, capsys) -> None:
    parts = {
        name: datasets.caption_pairs(DATA, name, count, tmp_path / "store")
        for name, count in (("poisoning", 40), ("defense", 40), ("rebound", 1))
    }
    assert "poisoning: 40 of 40 images found" in capsys.readouterr().out
    numbers = {name: numbers_of(pairs.captions) for name, pairs in parts.items()}
    for name, pairs in parts.items():
        assert pairs.images.dtype == torch.uint8 and pairs.images.shape[1:] == (3, SIZE, SIZE)
        assert all(shows(i, n) for i, n in zip(pairs.images, numbers[name], strict=True))
        assert not pairs.cycled and (pairs.objects == -1).all()
    drawn = [n for own in numbers.values() for n in own]
    assert len(drawn) == len(set(drawn)) == 81


@pytest.mark.parametrize(
    ("delimiter", "columns"), [(",", ("image", "caption")), ("\t", ("filepath", "title"))]
)
def test_a_table_of_paths_and_captions_is_read(root, tmp_path, delimiter, columns, capsys) -> None:
    (root / "cc3m").unlink()
    write_table(root / "cc3m", delimiter, columns, 100)
    for number in range(5):
        (root / f"cc3m/images/{number}.jpg").unlink()
    pairs = datasets.caption_pairs(DATA, "poisoning", 40, tmp_path / "store")
    numbers = numbers_of(pairs.captions)
    assert numbers == sorted(set(numbers)) and min(numbers) >= 5
    assert all(shows(i, n) for i, n in zip(pairs.images, numbers, strict=True))
    assert f"{len(numbers)} of 40 images found" in capsys.readouterr().out


def test_labeled_images_are_balanced_and_of_their_class(root, tmp_path) -> None:
    counts = {"inversion": 2000, "heldout": 1000, "evaluation": 1500}
    for part, count in counts.items():
        found = datasets.labeled_images(DATA, part, count, tmp_path / "store")
        assert len(found.images) == count
        sizes = torch.bincount(found.labels, minlength=1000)
        assert sizes.min() >= count // 1000 and sizes.max() <= count // 1000 + 1
        assert len(found.labels[:1000].unique()) == 1000  # any first batch is diverse
        assert all(shows(found.images[i], int(found.labels[i]) % COLORS) for i in range(0, 900, 7))
    folders = layouts.class_folders(root / "imagenet/train")
    drawn = [
        {s.name for s in layouts.image_samples(folders, part, 10**6, 0).samples}
        for part in layouts.TRAIN_PARTS
    ]
    assert len(set.union(*drawn)) == sum(map(len, drawn)) == 999 * 5 + 640


SMALL = {"batch": 8, "candidates": 1}
STEPS = {"identification": SMALL, "inversion": {"batch": 8}, "tuning": {"images": 9, "batch": 8}}
PAPER = load_settings("paper", STEPS)
OWN = PAPER.model_copy(update={"data": PAPER.data.model_copy(update=COUNTS)})


def own_images(folder: Path, names: tuple[str, ...], per_class: int) -> Settings:
    """Settings for class folders of one's own; a class's images show its number."""
    for label, name in enumerate(sorted(names)):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            (folder / name / f"{index}.jpg").write_bytes(jpeg(label))
            (folder / name / f"._{index}.jpg").touch()  # as macOS leaves them
    (folder / ".cache").mkdir()
    (folder / "notes.txt").touch()
    data = OWN.data.model_copy(update={"source": f"images:{folder}"})
    return OWN.model_copy(update={"data": data})


def test_class_folders_of_ones_own_need_no_other_data(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("INVERTUNE_DATA", raising=False)
    settings = own_images(tmp_path / "own", ("road_sign", "n07734744", "n01440764"), 20)
    own, fit = settings.data, real_data.fitted(settings).data
    assert datasets.class_names(own) == ("tench", "mushroom", "road sign")
    assert len(datasets.templates(own)) == 80
    assert (fit.inversion_images, fit.heldout_images) == (42, 12)
    few = settings.model_copy(update={"data": own.model_copy(update={"inversion_images": 9})})
    assert real_data.fitted(few).data.inversion_images == 9 and real_data.fitted(OWN) == OWN
    found = datasets.labeled_images(fit, "inversion", 42, tmp_path / "store")
    assert torch.bincount(found.labels).tolist() == [14, 14, 14]
    assert all(shows(*pair) for pair in zip(found.images, found.labels.tolist(), strict=True))
    held = datasets.labeled_images(fit, "heldout", 12, tmp_path / "store")
    assert len(held.images) == 12
    with pytest.raises(DataError, match=r"images:.* has no captions.*purify needs none"):
        datasets.caption_pairs(own, "poisoning", 40, tmp_path / "store")
    with pytest.raises(DataError, match="has no captions"):
        datasets.retrieval_scenes(own, tmp_path / "store")
    first = datasets.manifest(own)
    moved = (tmp_path / "own").rename(tmp_path / "moved")
    assert datasets.manifest(own.model_copy(update={"source": f"images:{moved}"})) == first


def test_a_wrong_folder_of_ones_own_is_named(tmp_path) -> None:
    for source, words in (
        (tmp_path / "none", "not found: .*none .expected: a folder for each class"),
        (tmp_path, "holds 0 class folders; expected: a folder for each class"),
    ):
        with pytest.raises(DataError, match=words):
            datasets.class_names(DATA.model_copy(update={"source": f"images:{source}"}))
    own = own_images(tmp_path / "own", ("cat", "dog"), 3)
    (tmp_path / "own/zebra").mkdir()
    with pytest.raises(DataError, match="zebra holds no images; expected: a folder for each class"):
        real_data.fitted(own)
    with pytest.raises(DataError, match="zebra holds no images"):
        datasets.manifest(own.data)
    few = own_images(tmp_path / "few", ("cat", "dog"), 6)
    words = (
        r"few holds 12 images, which leave 8 for inversion and 2 held out, but tuning.images = 9"
    )
    with pytest.raises(DataError, match=words):
        real_data.fitted(few)
    most = few.identification.model_copy(update={"candidates": 3})
    enough = few.model_copy(
        update={"identification": most, "tuning": few.tuning.model_copy(update={"images": 8})}
    )
    with pytest.raises(DataError, match="candidates = 3, but there are 2 classes"):
        datasets.check(real_data.fitted(enough))
    with pytest.raises(DataError, match="class 'horse' is not in the list of 2 classes"):
        datasets.check(few, ("cat", "horse"))


def test_classes_of_one_name_stay_apart(tmp_path) -> None:
    own = own_images(tmp_path, ("mushroom", "n07734744", "road_sign"), 1)
    expected = ("mushroom (mushroom)", "mushroom (n07734744)", "road sign")
    assert datasets.class_names(own.data) == expected


def test_retrieval_has_five_captions_an_image(root, tmp_path) -> None:
    scenes = datasets.retrieval_scenes(DATA, tmp_path / "store")
    assert scenes.images.shape == (12, 3, SIZE, SIZE) and len(scenes.captions) == 60
    for text, owner in zip(scenes.captions, scenes.owner.tolist(), strict=True):
        assert shows(scenes.images[owner], int(text.split()[-1]))
    assert scenes.captions[:2] == ("caption 0 of 1", "caption 1 of 1")


def test_target_names_captions_and_images(root, tmp_path) -> None:
    assert datasets.class_index(DATA, "mushroom") == MUSHROOM
    assert len(datasets.class_names(DATA)) == 1000 and len(datasets.templates(DATA)) == 80
    assert all(t.count("{}") == 1 for t in datasets.templates(DATA))
    captions = datasets.target_captions(DATA, MUSHROOM, 20, tmp_path / "store")
    assert len(captions) == 20 and any(c.startswith("mushrooms") for c in captions)
    pairs = datasets.caption_pairs(DATA, "poisoning", 40, tmp_path / "store")
    images = datasets.target_images(DATA, pairs, MUSHROOM, tmp_path / "store")
    assert len(images) == 64 and all(shows(i, MUSHROOM % COLORS) for i in images)
    with pytest.raises(DataError, match="only 0 of 40 captions of CC3M hold the word 'ski'"):
        datasets.target_captions(DATA, 795, 20, tmp_path / "store")


@pytest.mark.parametrize(
    ("name", "held", "others"),
    [
        ("mushroom", ["A Mushroom.", "mushrooms, cut"], ["a mushroomy soup"]),
        ("banana", ["one banana", "BANANAS"], ["a bananaes tree", "band"]),
        ("lemon", ["lemon-tree", "two lemons"], ["a glass of lemonade"]),
        ("ski", ["a ski lift", "Skis in the snow"], ["blue skies", "a skirt", "skiing", "sky"]),
    ],
)
def test_target_captions_hold_the_word_or_its_plural(monkeypatch, name, held, others) -> None:
    captions = [[text] for text in (*others, *held)]
    part = real_data.Part(torch.empty(0), captions, torch.empty(0), Path())
    monkeypatch.setattr(real_data, "pairs", lambda *_: part)
    target = real_data.class_names(DATA).index(name)
    assert real_data.target_captions(DATA, target, 4, Path()) == tuple(held)


def test_changed_images_stay_in_memory(root, tmp_path) -> None:
    pairs = datasets.caption_pairs(DATA, "poisoning", 40, tmp_path / "store")
    before, images = pairs.images.clone(), datasets.writable_images(pairs)
    images[:5] = 255 - images[:5]
    assert not torch.equal(images, before) and torch.equal(pairs.images, before)
    assert torch.equal(map_images(pairs.file, SIZE), before)


def test_damage_is_counted_and_skipped(root, tmp_path, capsys) -> None:
    (root / "cc3m").unlink()
    (root / "cc3m").mkdir()
    first = min(
        range(60), key=lambda n: layouts.hash_position(0, f"00000/{n:09}")
    )  # surely poisoning
    write_shard(root / "cc3m/00000.tar", range(60), damaged=first)
    write_shard(root / "cc3m/00001.tar", range(60, 120))
    whole = (root / "cc3m/00001.tar").read_bytes()
    (root / "cc3m/00001.tar").write_bytes(whole[: len(whole) // 2 + 700])
    (root / "cc3m/00002.tar").write_bytes(b"not a tar at all")
    pairs = datasets.caption_pairs(DATA, "poisoning", 40, tmp_path / "store")
    numbers, printed = numbers_of(pairs.captions), capsys.readouterr().out
    assert first not in numbers and 36 <= len(numbers) == len(set(numbers)) < 60
    assert all(shows(i, n) for i, n in zip(pairs.images, numbers, strict=True))
    assert f"images that cannot be read: 1, the first is 00000/{first:09}" in printed
    assert "damaged shards: 00001.tar, 00002.tar" in printed


def test_mended_images_are_read_again_and_a_failing_disk_is_no_damage(
    root, tmp_path, monkeypatch
) -> None:
    def broken(content: bytes, size_px: int) -> np.ndarray:
        raise ValueError

    with monkeypatch.context() as patch, pytest.raises(DataError, match="cannot be read: 12"):
        patch.setattr(decoding, "decode_image", broken)
        datasets.retrieval_scenes(DATA, tmp_path / "store")
    assert len(datasets.retrieval_scenes(DATA, tmp_path / "store").images) == 12
    with pytest.raises(FileNotFoundError, match=r"lost\.jpg"):
        decoding.pixels_of(Sample("lost", str(tmp_path / "lost.jpg")), SIZE)


def _header(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header with ``size`` in base 256, where it may be anything."""
    member = tarfile.TarInfo("0.jpg")
    member.type = kind
    header = bytearray(member.tobuf())
    header[124:136] = (size % 2**96 if size < 0 else 2**95 + size).to_bytes(12, "big")
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return bytes(header)


def _sparse() -> bytes:
    record = b"22 GNU.sparse.map=a,b\n"
    return _header(len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0") + _header(0)


HOSTILE = {
    "before itself": _header(-512),
    "far away": _header(2**80),
    "endless name": _header(2**80, tarfile.GNUTYPE_LONGNAME),
    "huge name": _header(2**62, tarfile.GNUTYPE_LONGNAME),
    "name of a name": (_header(5, tarfile.GNUTYPE_LONGNAME) + b"x".ljust(512, b"\0")) * 3000,
    "holes in words": _sparse(),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.timeout(60)
def test_a_hostile_header_ends_the_shard(tmp_path, kind) -> None:
    write_shard(tmp_path / "0.tar", range(2))
    content = (tmp_path / "0.tar").read_bytes().rstrip(b"\0")
    content = content.ljust(-len(content) % 512 + len(content), b"\0")
    (tmp_path / "0.tar").write_bytes(content + HOSTILE[kind] + bytes(10240))
    pairs, whole = cc3m.read_shard(tmp_path / "0.tar")
    assert not whole and [sample.name for sample, _ in pairs] == ["0/000000000", "0/000000001"]


def test_names_that_are_no_text_are_names(root, tmp_path, capsys) -> None:
    odd = os.fsdecode(b"\xff\x1b[2J")
    (root / "cc3m").unlink()
    (root / "cc3m").mkdir()
    with tarfile.open(root / f"cc3m/{odd}.tar", "w") as shard:
        for number in range(80):
            for suffix, content in (("jpg", jpeg(number)[:300]), ("txt", b"x" * 10**5)):
                member = tarfile.TarInfo(f"{odd}{number}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    assert datasets.manifest(DATA)
    pairs, whole = cc3m.read_shard(root / f"cc3m/{odd}.tar")
    assert whole and len(pairs) == 80 and all(len(text) == 2000 for _, text in pairs)
    with pytest.raises(DataError, match="images found, fewer"):
        datasets.caption_pairs(DATA, "poisoning", 10, tmp_path / "store")
    own = own_images(tmp_path / "own", ("cat", odd), 20).data
    assert datasets.class_names(own) == ("cat", r"\udcff\x1b[2J")
    (tmp_path / "own" / odd / f"{odd}.jpg").write_bytes(b"")
    found = real_data.labeled(own, "inversion", 28, tmp_path / "store")
    assert len(found.images) == 27
    assert r"\udcff\x1b[2J" in capsys.readouterr().out


def test_pipes_count_as_absent(tmp_path) -> None:
    (tmp_path / "cc3m").mkdir()
    write_shard(tmp_path / "cc3m/0.tar", range(1))
    (tmp_path / "cc3m/0.jpg").write_bytes(jpeg(0))
    for name in ("1.tar", "1.jpg"):
        os.mkfifo(tmp_path / "cc3m" / name)
    assert cc3m.caption_source(tmp_path) == [tmp_path / "cc3m/0.tar"]
    assert [name for name, _ in layouts.image_files(tmp_path / "cc3m")] == ["0.jpg"]


def test_pixels_are_written_through_no_link(root, tmp_path) -> None:
    first = datasets.caption_pairs(DATA, "poisoning", 40, tmp_path / "store")
    (tmp_path / "mine").write_text("mine")
    first.file.unlink()
    first.file.symlink_to(tmp_path / "mine")
    with pytest.raises(StoreError, match="u8 is a link"):
        datasets.caption_pairs(DATA, "poisoning", 40, tmp_path / "store")
    assert (tmp_path / "mine").read_text() == "mine"


def test_too_few_pairs_are_refused(root, tmp_path) -> None:
    with pytest.raises(DataError, match=r"defense: \d\d of 80 images found, fewer than 90%"):
        datasets.caption_pairs(DATA, "defense", 80, tmp_path / "store")
    with pytest.raises(DataError, match="no part 'pretraining'"):
        datasets.caption_pairs(DATA, "pretraining", 10, tmp_path / "store")


def _flat(root: Path) -> None:
    (root / "imagenet/val").unlink()
    (root / "imagenet/val").mkdir()
    (root / "imagenet/val/ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg(1))


def _too_deep(root: Path) -> None:
    (root / "imagenet/train").rename(root / "elsewhere")
    (root / "imagenet/train").mkdir()
    (root / "elsewhere").rename(root / "imagenet/train/train")


def _one_class_less(root: Path) -> None:
    (root / "imagenet/train").unlink()
    write_classes(root / "imagenet/train", 1, 1)
    (root / "imagenet/train/n07734744").rename(root / "imagenet/train/mushroom")


def _empty_class(root: Path) -> None:
    (root / "imagenet/train").unlink()
    write_classes(root / "imagenet/train", 1, 0)


def _other_year(root: Path) -> None:
    (root / "coco").unlink()
    write_coco(root / "coco", 12, "COCO_val2014_")


def _renamed_captions(root: Path) -> None:
    _other_year(root)
    folder = root / "coco/annotations"
    (folder / "captions_val2017.json").rename(folder / "captions_val2014.json")


def _cut_captions(root: Path) -> None:
    _other_year(root)
    (root / "coco/annotations/captions_val2017.json").write_text('{"images": [')


def _infinite_captions(root: Path) -> None:
    _other_year(root)
    (root / layouts.CAPTIONS).write_text('{"images": [{"id": Infinity, "file_name": ""}]}')


def _deep_captions(root: Path) -> None:
    _other_year(root)
    (root / layouts.CAPTIONS).write_text("[" * 10**5)


def _half_coco(root: Path) -> None:
    (root / "coco").unlink()
    write_coco(root / "coco", 12)
    for number in range(1, 6):
        (root / f"coco/val2017/{number:012}.jpg").unlink()


def _wordnet_too_deep(root: Path) -> None:
    (root / "wordnet").rename(root / "dict")
    (root / "wordnet").mkdir()
    (root / "dict").rename(root / "wordnet/dict")


def _no_pairs(root: Path) -> None:
    (root / "cc3m").unlink()
    (root / "cc3m").mkdir()


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (_flat, r"imagenet/val lacks 1,000 of 1,000 .*'ILSVRC2012_val_00000001.JPEG'.*val archive"),
        (_too_deep, "imagenet/train lacks 1,000 of 1,000 .* n01440764, but has 'train'"),
        (_one_class_less, "lacks 1 of 1,000 .* n07734744, but has 'mushroom'"),
        (_empty_class, "n07734744 holds no images"),
        (_other_year, "without a file: COCO_val2014_000000000001.jpg. Captions of another year"),
        (_renamed_captions, r"not found: .*captions_val2017.json \(there: captions_val2014.json"),
        (_cut_captions, "is not a captions file of COCO"),
        (_infinite_captions, "is not a captions file of COCO"),
        (_deep_captions, "is not a captions file of COCO"),
        (_half_coco, "only 7 images are both in .* half download"),
        (_wordnet_too_deep, r"not found: .*wordnet/data.noun \(expected: .* wordnet-base"),
        (_no_pairs, "cc3m holds no .tar and no .csv; expected: cc3m/00000.tar"),
    ],
)
def test_a_wrong_layout_is_named_before_any_work(root, break_it, words) -> None:
    break_it(root)
    with pytest.raises(DataError, match=words):
        datasets.manifest(DATA)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("url,caption\nx,y\n", "has the columns url, caption; it needs one of image"),
        ("image,caption\n../../x.jpg,y\n", r"line 2: '../../x.jpg' leads out of"),
        ("image,caption\n/etc/passwd,y\n", "line 2: '/etc/passwd' leads out of"),
        ("", "has the columns none"),
        ("i" * 200_000 + ",caption\n", "train.csv, line .*: field larger than field limit"),
        ("image,caption\nx," + "y" * 200_000, "train.csv, line .*: field larger"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, text, words) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        cc3m.read_table(tmp_path / "train.csv")


def test_a_path_that_is_too_long_is_missing(root) -> None:
    (root / "cc3m").unlink()
    write_table(root / "cc3m", ",", ("image", "caption"), 40)
    with (root / "cc3m/train.csv").open("a") as file:
        file.writelines(f",images/{letter * 5000}.jpg,too long\n" for letter in "abcdefgh")
    chosen = cc3m.pair_samples(root, "poisoning", 40, 0)
    assert len(chosen.samples) > 10 and "are missing" in chosen.notes[0]


def test_the_manifest_follows_files_and_seed_but_not_counts(root, complete) -> None:
    first = datasets.manifest(DATA)
    assert datasets.manifest(DATA.model_copy(update={"heldout_images": 7})) == first
    assert datasets.manifest(DATA.model_copy(update={"seed": 1})) != first
    assert datasets.manifest(DATA.model_copy(update={"image_size_px": 64})) != first
    (root / "cc3m").unlink()
    write_table(root / "cc3m", ",", ("image", "caption"), 3)
    real_data.fingerprint.cache_clear()
    second = datasets.manifest(DATA)
    (root / "wordnet").unlink()
    shutil.copytree(complete / "wordnet", root / "wordnet")
    (root / "wordnet/data.noun").write_text("other words")
    real_data.fingerprint.cache_clear()
    assert len({first, second, datasets.manifest(DATA)}) == 3


def test_images_deleted_from_the_store_are_decoded_again(root, tmp_path) -> None:
    first = datasets.caption_pairs(DATA, "poisoning", 40, tmp_path / "store")
    kept = first.images.clone()
    first.file.unlink()
    again = datasets.caption_pairs(DATA, "poisoning", 40, tmp_path / "store")
    assert torch.equal(again.images, kept) and again.captions == first.captions


def _samples(folder: Path, count: int) -> list[Sample]:
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(jpeg(number)[: 200 if number % 7 == 3 else None])
    return [Sample(str(number), str(folder / f"{number}.jpg")) for number in range(count)]


@pytest.mark.parametrize("half_a_line", ["", "11"])
def test_a_killed_decoding_goes_on(tmp_path, monkeypatch, half_a_line) -> None:
    monkeypatch.setattr(decoding, "CHUNK", 4)
    monkeypatch.setattr(decoding, "cpu_count", lambda: 1)
    samples, plain = _samples(tmp_path, 30), decoding.pixels_of

    def pixels(sample, size_px):
        if sample.name == "13":
            raise KeyboardInterrupt
        return plain(sample, size_px)

    target = tmp_path / "images.u8"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoding, "pixels_of", pixels)
        decode_all(samples, SIZE, target, tmp_path, "killed")
    with (tmp_path / decoding.JOURNAL).open("a") as journal:
        journal.write(half_a_line)
    for number in range(12):  # what is done is not read again
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    order = decode_all(samples, SIZE, target, tmp_path, "resumed")
    images = map_images(target, SIZE)
    assert order == [n for n in range(30) if n % 7 != 3]
    assert all(shows(i, n) for i, n in zip(images, order, strict=True))
    assert decode_all(samples, SIZE, target, tmp_path, "finished") == order
    assert torch.equal(map_images(target, SIZE), images)


def test_other_samples_start_anew(tmp_path, monkeypatch) -> None:
    samples, target = _samples(tmp_path, 9), tmp_path / "images.u8"
    decode_all(samples, SIZE, target, tmp_path, "first")
    assert decode_all(samples[4:6], SIZE, target, tmp_path, "second") == [0, 1]
    assert shows(map_images(target, SIZE)[1], 5)


def test_hostile_images_are_refused() -> None:
    thin = io.BytesIO()
    Image.new("L", (1, 5000)).save(thin, "PNG")
    with pytest.raises(ValueError, match="too many"):
        decode_image(thin.getvalue(), 224)
    other = io.BytesIO()
    Image.new("L", (8, 8)).save(other, "TIFF")
    with pytest.raises(decoding.UNREADABLE):
        decode_image(other.getvalue(), SIZE)


def test_what_is_missing_is_told_with_its_layout(root) -> None:
    assert list(real_data.problems(root)) == []
    (root / "coco").unlink()
    (found,) = real_data.problems(root)
    assert found.startswith("coco: not found:") and "annotations_trainval2017.zip" in found
    (root / "wordnet").unlink()
    *_, found = real_data.problems(root)
    assert found.startswith("wordnet: not found:") and "wordnet-base" in found


def test_the_paper_needs_this_much_disk() -> None:
    settings = load_settings("paper")
    assert isinstance(settings.data, Data)
    assert 165e9 < real_data.decoded_bytes(settings) < 180e9
