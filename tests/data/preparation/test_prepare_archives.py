"""`python -m visionpeft.prepare vtab1k|fgvc`: downloads, checksums, unpacking, and the layouts that are built."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
from archives_of_images import entry, jpeg, norb, png, record_of, served, tar, zipped
from data_layouts import SMALL
from PIL import Image

from visionpeft import prepare
from visionpeft.data import FGVC, VTAB1k
from visionpeft.data.fgvc import fgvc_datasets
from visionpeft.data.preparation import download, fgvc, staging, vtab, vtab_sources
from visionpeft.data.preparation.annotations import norb_matrix, npz_rows
from visionpeft.data.preparation.download import Archive, fetch, published_archives
from visionpeft.data.preparation.unpack import unpack
from visionpeft.data.vtab import vtab1k_tasks
from visionpeft.errors import DataError
from visionpeft.files import claim


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    """20 and 5 images in the place of 800 and 200."""
    monkeypatch.setattr(vtab_sources, "TRAIN", 20)
    monkeypatch.setattr(vtab_sources, "VAL", 5)


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A folder for archives; `publish` makes those in it the published ones of a data set."""

    class Archives:
        folder = tmp_path / "archives"
        content = published_archives() | {"vtab1k": {}, "fgvc": {}}

        def publish(self, kind, name, *paths, **changes):
            self.content[kind][name] = [entry(path, **changes) for path in paths]

    made = Archives()
    made.folder.mkdir()
    for module in (vtab, fgvc):
        monkeypatch.setattr(module, "published_archives", lambda: made.content)
    return made


def run(kind, task, root, *more):
    return prepare.main([kind, "--task", task, "--root", str(root), *map(str, more)])


def left(folder):
    """What is in a folder besides kept downloads."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".downloads")


def listed(folder, split):
    rows = [line.split() for line in (folder / f"{split}.txt").read_text().splitlines()]
    return [(path, int(label)) for path, label in rows]


def cifar(folder, trained=60, tested=10):
    """Image i is of class i % 100 and has the value i everywhere."""

    def records(count):
        return b"".join(bytes([0, i % 100]) + bytes([i % 256]) * 3072 for i in range(count))

    files = {"cifar-100-binary/train.bin": records(trained), "cifar-100-binary/test.bin": records(tested)}
    return tar(folder / "cifar-100-binary.tar.gz", files)


# Download


@pytest.fixture
def big(tmp_path):
    content = np.random.default_rng(0).bytes(100_000)
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "big.bin").write_bytes(content)
    return folder / "big.bin"


def test_dropped_connections_are_resumed_and_not_repeated(big, tmp_path):
    with served(big.parent) as server:
        server.drop_after = [30_000, 25_000]
        file = fetch(Archive(**entry(big)), tmp_path / "kept", mirror=server.address)
    assert file.read_bytes() == big.read_bytes()
    assert server.ranges == [None, "bytes=30000-", "bytes=55000-"]
    assert left(tmp_path / "kept") == ["big.bin"]


def test_a_download_that_was_killed_goes_on(big, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/big.bin.partial").write_bytes(big.read_bytes()[:77_777])
    with served(big.parent) as server:
        assert fetch(Archive(**entry(big)), tmp_path / "kept", mirror=server.address).stat().st_size == 100_000
    assert server.ranges == ["bytes=77777-"]


def test_a_server_without_ranges_sends_it_all_again(big, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/big.bin.partial").write_bytes(big.read_bytes()[:77_777])
    with served(big.parent) as server:
        server.ignores_ranges = True
        assert fetch(Archive(**entry(big)), tmp_path / "kept", mirror=server.address).read_bytes() == big.read_bytes()


def test_what_is_longer_than_the_file_is_thrown_away(big, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/big.bin.partial").write_bytes(bytes(200_000))
    with served(big.parent) as server:
        assert fetch(Archive(**entry(big)), tmp_path / "kept", mirror=server.address).read_bytes() == big.read_bytes()


def test_a_wrong_file_is_refused_and_removed(big, tmp_path):
    with served(big.parent) as server, pytest.raises(DataError, match=r"its md5 is .*, not 00"):
        fetch(Archive("big.bin", md5="00"), tmp_path / "kept", mirror=server.address)
    assert left(tmp_path / "kept") == []
    # of something else resumed onto it, too
    (tmp_path / "kept/big.bin.partial").write_bytes(bytes(50))
    with served(big.parent) as server, pytest.raises(DataError, match="is not the published"):
        fetch(Archive(**entry(big)), tmp_path / "kept", mirror=server.address)
    assert left(tmp_path / "kept") == []


def test_giving_up_keeps_what_has_come(big, tmp_path):
    with served(big.parent) as server:
        server.drop_after = [10_000] * download.ATTEMPTS
        with pytest.raises(DataError, match="the connection ended early; what has come is kept"):
            fetch(Archive(**entry(big)), tmp_path / "kept", mirror=server.address)
        assert (tmp_path / "kept/big.bin.partial").stat().st_size == 50_000
        assert fetch(Archive(**entry(big)), tmp_path / "kept", mirror=server.address).read_bytes() == big.read_bytes()


def test_what_cannot_be_had_is_told(big, tmp_path):
    with served(big.parent) as server, pytest.raises(DataError, match="404"):
        fetch(Archive("none.bin"), tmp_path, mirror=server.address)
    with pytest.raises(DataError, match="no address that can be downloaded from"):
        fetch(Archive("big.bin", url="ftp://somewhere/big.bin"), tmp_path)
    with pytest.raises(DataError, match="it needs a form; then pass its folder with --from"):
        fetch(Archive("big.bin", by_hand="it needs a form"), tmp_path)
    assert fetch(Archive("big.bin", url=big.as_uri()), tmp_path).read_bytes() == big.read_bytes()


# Unpacking


def escaping(path, name, kind=tarfile.REGTYPE, link=""):
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        archive.addfile(info, io.BytesIO(b""))
    return path


@pytest.mark.parametrize(
    ("name", "kind", "link", "said"),
    [
        ("../out.png", tarfile.REGTYPE, "", "leaves the unpacked folder"),
        ("a/../../out.png", tarfile.REGTYPE, "", "leaves the unpacked folder"),
        ("/tmp/out.png", tarfile.REGTYPE, "", "leaves the unpacked folder"),
        ("..\\out.png", tarfile.REGTYPE, "", "leaves the unpacked folder"),
        ("link", tarfile.SYMTYPE, "/etc/passwd", "is a link or a device"),
        ("link", tarfile.LNKTYPE, "../out.png", "is a link or a device"),
        ("pipe", tarfile.FIFOTYPE, "", "is a link or a device"),
        ("disk", tarfile.BLKTYPE, "", "is a link or a device"),
    ],
)
def test_tar_members_stay_inside(name, kind, link, said, tmp_path):
    archive = escaping(tmp_path / "bad.tar", name, kind, link)
    (tmp_path / "in/side").mkdir(parents=True)
    with pytest.raises(DataError, match=said):
        unpack(archive, tmp_path / "in/side")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.tar", "in", "side"]


def test_zip_members_stay_inside(tmp_path):
    with pytest.raises(DataError, match="leaves the unpacked folder"):
        unpack(zipped(tmp_path / "bad.zip", {"../out.png": b""}), tmp_path / "inside")
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="is a link or a device"):
        unpack(tmp_path / "link.zip", tmp_path / "inside")
    assert not (tmp_path / "inside").exists()


def test_damaged_archives(tmp_path):
    good = tar(tmp_path / "good.tar.gz", {"a": os.urandom(5000), "b": os.urandom(5000)})
    (tmp_path / "cut.tar.gz").write_bytes(good.read_bytes()[:6000])
    changed = bytearray(zipped(tmp_path / "good.zip", {"a": b"x" * 500}).read_bytes())
    changed[40] ^= 1
    (tmp_path / "changed.zip").write_bytes(changed)
    (tmp_path / "text.tar.gz").write_text("not found")
    for name in ("cut.tar.gz", "changed.zip", "text.tar.gz"):
        with pytest.raises(DataError, match="is damaged"):
            unpack(tmp_path / name, tmp_path / "out")
    unpack(good, tmp_path / "whole")
    assert sorted(path.stat().st_size for path in (tmp_path / "whole").iterdir()) == [5000, 5000]


# VTAB-1k


def test_cifar_from_a_server(archives, tmp_path, capsys):
    archives.publish("vtab1k", "cifar", cifar(archives.folder))
    root = tmp_path / "root"
    with served(archives.folder) as server:
        assert run("vtab1k", "cifar100", root, "--mirror", server.address) == 0
        assert len(server.ranges) == 1
    assert "split: own" in capsys.readouterr().out
    assert left(root) == ["cifar"]
    train, val, both, test = (listed(root / "cifar", s) for s in ("train800", "val200", "train800val200", "test"))
    assert (len(train), len(val), len(test)) == (20, 5, 10)
    assert both == train + val
    value = {path: np.array(Image.open(root / "cifar" / path)) for path, _ in [*both, *test]}
    assert all((pixels == label).all() for path, label in [*both, *test] for pixels in [value[path]])
    assert len({int(pixels[0, 0, 0]) for path, pixels in value.items() if "/test/" not in path}) == 25  # drawn once
    assert {int(value[path][0, 0, 0]) for path, _ in test} == set(range(10))
    record = record_of(root / "cifar")
    assert (record["split"], record["official_test"], record["seed"]) == ("own", True, 0)
    assert record["archives"]["cifar-100-binary.tar.gz"]["checksum_published"]

    data = VTAB1k("cifar", root)
    assert any(note.startswith("split: own (official test images") for note in data.description()["notes"])
    data.preprocessing = SMALL
    assert next(iter(data.train_dataloader()))[0].shape == (25, 3, 16, 16)

    # the archive is kept for another build, which the seed decides
    before = (root / "cifar/train800.txt").read_text()
    assert run("vtab1k", "cifar", root) == 2
    assert "exists; remove it to build it again" in capsys.readouterr().err
    for seed, same in (("0", True), ("1", False)):
        (root / "cifar").rename(root / f"before {seed}")
        assert run("vtab1k", "cifar", root, "--seed", seed) == 0
        assert ((root / "cifar/train800.txt").read_text() == before) == same


def test_a_kill_leaves_nothing_half_written(archives, tmp_path, monkeypatch):
    archives.publish("vtab1k", "cifar", cifar(archives.folder))
    given = ("--from", archives.folder)
    write_json = staging.write_json

    def kill(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging, "write_json", kill)  # when all images are written
        assert run("vtab1k", "cifar", tmp_path / "root", *given) == 130
    assert left(tmp_path / "root") == []
    (tmp_path / "root/.cifar.partial/folder/images").mkdir(parents=True)  # as kill -9 leaves it
    (tmp_path / "root/.cifar.partial/made-by-visionpeft").touch()
    assert staging.write_json is write_json
    assert run("vtab1k", "cifar", tmp_path / "root", *given) == 0
    assert left(tmp_path / "root") == ["cifar"]
    assert len(VTAB1k("cifar", tmp_path / "root").sources["train"]) == 25


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_was_not_made_here_is_not_deleted(kind, archives, tmp_path, capsys):
    """Something of the user's that has the name of the folder we unpack in."""
    archives.publish("vtab1k", "cifar", cifar(archives.folder))
    root, mine = tmp_path / "root", tmp_path / "mine"
    (mine / "photos").mkdir(parents=True)
    (mine / "photos" / "cat.jpg").write_bytes(b"mine")
    root.mkdir()
    taken = root / ".cifar.partial"
    if kind == "folder":
        (mine).rename(taken)
    elif kind == "link":
        taken.symlink_to(mine)
    else:
        taken.write_bytes(b"mine")
    assert run("vtab1k", "cifar", root, "--from", archives.folder) == 2
    assert "was not made by visionpeft" in capsys.readouterr().err
    kept = taken if kind == "file" else taken / "photos" / "cat.jpg"
    assert kept.read_bytes() == b"mine"
    assert not (root / "cifar").exists()
    # The negative control: out of the way, the same command builds the task and leaves it alone.
    taken.rename(root / "elsewhere")
    assert run("vtab1k", "cifar", root, "--from", archives.folder) == 0


def test_a_target_made_in_the_meantime_stays(archives, tmp_path, monkeypatch, capsys):
    archives.publish("vtab1k", "cifar", cifar(archives.folder))
    write_json = staging.write_json

    def while_we_write(*arguments):
        write_json(*arguments)
        (tmp_path / "root/cifar").mkdir()
        (tmp_path / "root/cifar/mine").write_text("mine")

    monkeypatch.setattr(staging, "write_json", while_we_write)
    assert run("vtab1k", "cifar", tmp_path / "root", "--from", archives.folder) == 2
    assert "has been made in the meantime" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "root/cifar").iterdir()] == ["mine"]
    assert left(tmp_path / "root") == ["cifar"]


def test_a_member_never_writes_through_a_link(tmp_path):
    """An archive given with --from is linked into the folder; a member of its name must not reach the file itself."""
    given, folder = tmp_path / "labels.mat", tmp_path / "unpacked"
    given.write_bytes(b"mine")
    folder.mkdir()
    (folder / "labels.mat").symlink_to(given)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("labels.mat", "theirs")
        file.writestr("other.txt", "theirs")
    unpack(tmp_path / "a.zip", folder)
    assert given.read_bytes() == b"mine"
    assert (folder / "labels.mat").read_bytes() == b"theirs"
    assert not (folder / "labels.mat").is_symlink()


def test_a_name_that_is_a_file_and_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a", "file")
        file.writestr("a/b", "file")
    with pytest.raises(DataError, match="both a file and a folder"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_two_at_a_time_are_refused(archives, tmp_path, capsys):
    archives.publish("vtab1k", "cifar", cifar(archives.folder))
    (tmp_path / ".downloads").mkdir()
    with claim(tmp_path / ".downloads/lock"):
        assert run("vtab1k", "cifar", tmp_path, "--from", archives.folder) == 2
    assert "another process is preparing data" in capsys.readouterr().err


def test_a_wrong_archive_is_not_used(archives, tmp_path, capsys):
    archives.publish("vtab1k", "cifar", cifar(archives.folder), md5="0" * 32)
    assert run("vtab1k", "cifar", tmp_path / "root", "--from", archives.folder) == 2
    error = capsys.readouterr().err
    assert "is not the published cifar-100-binary.tar.gz" in error
    assert error.count("\n") == 1
    assert left(tmp_path / "root") == []


def test_too_few_images_are_refused(archives, tmp_path, capsys):
    archives.publish("vtab1k", "cifar", cifar(archives.folder, trained=21))
    assert run("vtab1k", "cifar", tmp_path / "root", "--from", archives.folder) == 2
    assert "the archive has 18 images to train on and 3 to select on" in capsys.readouterr().err
    assert left(tmp_path / "root") == []


def prepared(archives, tmp_path, task, *paths):
    archives.publish("vtab1k", task, *paths)
    assert run("vtab1k", task, tmp_path / "root", "--from", archives.folder) == 0
    folder = tmp_path / "root" / task
    return folder, {split: listed(folder, split) for split in ("train800", "val200", "test")}


def test_dtd_keeps_the_published_files(archives, tmp_path):
    files = {}
    names = vtab1k_tasks()["dtd"]["names"][:6]
    for split, numbers in (("train", range(6)), ("val", range(6, 9)), ("test", range(9, 12))):
        paths = [f"{name}/{name}_{number:04d}.jpg" for name in names for number in numbers]
        files |= {f"dtd/images/{path}": jpeg(len(files) + i) for i, path in enumerate(paths)}
        files[f"dtd/labels/{split}1.txt"] = "\n".join(paths).encode()
    folder, splits = prepared(archives, tmp_path, "dtd", tar(archives.folder / "dtd.tar.gz", files))
    by_content = {content: path for path, content in files.items()}
    for split, rows in splits.items():
        for path, label in rows:
            source = by_content[(folder / path).read_bytes()]  # not encoded again
            assert names[label] in source
            number = int(source[-8:-4])
            assert {"train800": number < 6, "val200": 6 <= number < 9, "test": number >= 9}[split]
    assert {split: len(rows) for split, rows in splits.items()} == {"train800": 20, "val200": 5, "test": 18}


def test_svhn_and_flowers(archives, tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    paths = []
    for split, count in (("train", 60), ("test", 12)):
        digits = np.arange(count) % 10
        paths.append(archives.folder / f"{split}_32x32.mat")
        images = np.broadcast_to(digits.astype(np.uint8), (32, 32, 3, count))
        savemat(paths[-1], {"X": images, "y": np.where(digits == 0, 10, digits)[:, None].astype(np.uint8)})
    folder, splits = prepared(archives, tmp_path, "svhn", *paths)
    for path, label in splits["train800"] + splits["test"]:
        assert (np.array(Image.open(folder / path)) == label).all()

    numbers = np.arange(1, 61)
    savemat(archives.folder / "imagelabels.mat", {"labels": (numbers % 10 + 1)[None].astype(np.uint8)})
    ids = {"trnid": numbers[None, :30], "valid": numbers[None, 30:40], "tstid": numbers[None, 40:]}
    savemat(archives.folder / "setid.mat", ids)
    files = {f"jpg/image_{number:05d}.jpg": jpeg(number) for number in numbers}
    mats = [archives.folder / "imagelabels.mat", archives.folder / "setid.mat"]
    flowers = tar(archives.folder / "102flowers.tgz", files)
    folder, splits = prepared(archives, tmp_path, "oxford_flowers102", flowers, *mats)
    number_of = {content: int(path[-9:-4]) for path, content in files.items()}
    for split, first, last in (("train800", 1, 30), ("val200", 31, 40), ("test", 41, 60)):
        for path, label in splits[split]:
            number = number_of[(folder / path).read_bytes()]
            assert first <= number <= last
            assert label == number % 10

    archives.publish("fgvc", "oxford_flowers", flowers, *mats)
    assert run("fgvc", "OxfordFlowers", tmp_path / "fine", "--from", archives.folder) == 0
    target = tmp_path / "fine/OxfordFlowers"
    assert record_of(target)["split"] == "published"
    data = FGVC("oxford_flowers", tmp_path / "fine")
    data.setup()
    assert [len(data.sources[split]) for split in ("train", "val", "test")] == [30, 10, 20]
    assert (target / "jpg/image_00007.jpg").read_bytes() == files["jpg/image_00007.jpg"]


def test_pets(archives, tmp_path):
    breeds = {1: "Abyssinian", 2: "american_bulldog", 37: "yorkshire_terrier"}
    images, notes = {}, {}
    for split, numbers in (("trainval", range(12)), ("test", range(12, 15))):
        rows = ["# a remark"]
        for label, breed in breeds.items():
            images |= {f"images/{breed}_{number}.jpg": jpeg(1000 * label + number) for number in numbers}
            rows += [f"{breed}_{number} {label} 1 1" for number in numbers]
        notes[f"annotations/{split}.txt"] = "\n".join(rows).encode()
    # 36 images: 28 to draw 20 from, 8 to draw 5 from
    packed = tar(archives.folder / "images.tar.gz", images), tar(archives.folder / "annotations.tar.gz", notes)
    folder, splits = prepared(archives, tmp_path, "oxford_iiit_pet", *packed)
    source = {content: path for path, content in images.items()}
    for rows in splits.values():
        assert all(breeds[label + 1] in source[(folder / path).read_bytes()] for path, label in rows)
    assert len(splits["test"]) == 9
    assert len({(folder / path).read_bytes() for rows in splits.values() for path, _ in rows}) == 20 + 5 + 9


@pytest.mark.parametrize(("task", "count", "tested"), [("eurosat", 10, 10), ("resisc45", 10, 18)])
def test_class_folders(archives, tmp_path, task, count, tested):
    names = sorted(name.replace(" ", "_") for name in vtab1k_tasks()[task]["names"])[: 5 if task == "eurosat" else 9]
    files = {f"top/{name}/{i}.png": png(20 * label + i) for label, name in enumerate(names) for i in range(count)}
    folder, splits = prepared(archives, tmp_path, task, zipped(archives.folder / "images.zip", files))
    assert len(splits["test"]) == tested
    for rows in splits.values():
        assert all(np.array(Image.open(folder / path))[0, 0, 0] // 20 == label for path, label in rows)
    assert record_of(folder)["official_test"] is False


def test_caltech_in_an_archive_within_an_archive(archives, tmp_path):
    files = {
        f"101_ObjectCategories/{name}/image_{i:04d}.jpg": jpeg(1000 * label + i)
        for label, name in enumerate(("BACKGROUND_Google", "accordion"))
        for i in range(33)
    }
    inner = tar(tmp_path / "inner.tar.gz", files).read_bytes()
    outer = zipped(archives.folder / "caltech-101.zip", {"caltech-101/101_ObjectCategories.tar.gz": inner})
    _, splits = prepared(archives, tmp_path, "caltech101", outer)
    assert Counter(label for _, label in splits["test"]) == {0: 3, 1: 3}


def test_sun_leaves_damaged_images_out(archives, tmp_path):
    files = {
        f"SUN397{name}/sun_{i:03d}.jpg": jpeg(500 * label + i)
        for label, name in enumerate(("/a/abbey", "/a/apse/indoor"))
        for i in range(30)
    }
    for name in list(files)[::6]:
        files[name] = files[name][:60]
    files["SUN397/ClassName.txt"] = b"/a/abbey\n/a/apse/indoor\n"
    folder, splits = prepared(archives, tmp_path, "sun397", tar(archives.folder / "SUN397.tar.gz", files))
    record = record_of(folder)
    assert len(splits["test"]) + sum(name.startswith("test") for name in record["left_out"]) == 12
    assert record["left_out"]
    data = VTAB1k("sun397", tmp_path / "root")
    assert any(note.startswith("damaged images left out: ") for note in data.description()["notes"])


def test_clevr(archives, tmp_path):
    files = {}
    for split, count in (("train", 60), ("val", 6)):
        scenes = []
        for i in range(count):
            depths = [8.2 + i % 3, *[12.0] * (2 + i % 8)]
            objects = [{"pixel_coords": [1, 2, depth]} for depth in depths]
            scenes.append({"image_filename": f"CLEVR_{split}_{i:06d}.png", "objects": objects})
            files[f"CLEVR_v1.0/images/{split}/CLEVR_{split}_{i:06d}.png"] = png(i)
        files[f"CLEVR_v1.0/scenes/CLEVR_{split}_scenes.json"] = json.dumps({"scenes": scenes}).encode()
    archive = zipped(archives.folder / "CLEVR_v1.0.zip", files)
    for task, label_of in (("clevr_count", lambda i: i % 8), ("clevr_dist", lambda i: {0: 1, 1: 3, 2: 5}[i % 3])):
        folder, splits = prepared(archives, tmp_path, task, archive)
        for rows in splits.values():
            assert all(label_of(int(np.array(Image.open(folder / path))[0, 0, 0])) == label for path, label in rows)
        assert len(splits["test"]) == 6


@pytest.mark.parametrize(
    ("depth", "label"), [(0.5, 0), (8.0, 0), (8.01, 1), (8.5, 1), (9.3, 3), (9.99, 4), (10.0, 4), (10.5, 5)]
)
def test_bins_of_clevr(depth, label):
    objects = [{"pixel_coords": [0, 0, depth]}, {"pixel_coords": [0, 0, 50.0]}]
    assert vtab_sources.clevr_distance(objects) == label


def test_smallnorb(archives, tmp_path):
    def matrices(split, count, offset):
        images = np.zeros((count, 2, 5, 5), np.uint8)
        images[:, 0] = (np.arange(count) + offset)[:, None, None]
        images[:, 1] = 255  # the right image
        info = np.stack([np.arange(count), np.arange(count) % 9, 2 * (np.arange(count) % 18), np.arange(count)], 1)
        found = []
        for kind, values in (("dat", images), ("info", info.astype(np.int32))):
            found.append(archives.folder / f"smallnorb-{split}-{kind}.mat.gz")
            found[-1].write_bytes(norb(values))
        return found

    paths = [*matrices("training", 30, 0), *matrices("testing", 20, 100)]
    for task, classes in (("smallnorb_azi", 18), ("smallnorb_ele", 9)):
        folder, splits = prepared(archives, tmp_path, task, *paths)
        values = {
            split: {path: int(np.array(Image.open(folder / path))[0, 0]) for path, _ in rows}
            for split, rows in splits.items()
        }
        assert all(value < 100 for value in values["train800"].values())
        tested = set(values["test"].values())
        assert len(tested) == 10
        assert min(tested) >= 100
        assert not tested & set(values["val200"].values())
        for split, rows in splits.items():
            assert all(values[split][path] % 100 % classes == label for path, label in rows)
    short = tmp_path / "short.gz"
    short.write_bytes(gzip.compress(gzip.decompress(norb(np.zeros((4, 4), np.uint8)))[:-1]))
    with pytest.raises(DataError, match="15 bytes of values"):
        norb_matrix(short)


def test_dsprites(archives, tmp_path, monkeypatch):
    count = 200
    monkeypatch.setattr(vtab_sources.dsprites, "COUNT", count)
    images = (np.arange(count)[:, None, None] >> np.arange(8)[:, None] & 1).astype(np.uint8).repeat(8, axis=2)
    file = archives.folder / "dsprites_small.npz"
    np.savez_compressed(file, imgs=images, metadata=np.array([{"pickled": True}], dtype=object))
    folder, splits = prepared(archives, tmp_path, "dsprites_loc", file)
    assert len(splits["test"]) == 20
    seen = set()
    for rows in splits.values():
        for path, label in rows:
            pixels = np.array(Image.open(folder / path))
            assert set(np.unique(pixels)) <= {0, 255}
            index = int((pixels[:, 0] > 0) @ (1 << np.arange(8)))
            assert label == index // 32 % 32 * 16 // 32  # posX varies second fastest, posY with 32 values fastest
            seen.add(index)
    assert len(seen) == 45
    chosen = np.array([7, 3, 3, 199, 0])
    assert (npz_rows(file, "imgs", chosen) == images[chosen]).all()
    with pytest.raises(DataError, match="has 200 rows, not 201"):
        npz_rows(file, "imgs", np.array([200]))
    with pytest.raises(DataError, match="not one of plain rows"):
        npz_rows(file, "metadata", np.array([0]))


def test_refused_tasks_say_where_to_get_them(tmp_path, capsys):
    refused = published_archives()["refused"]
    assert (
        set(refused) | set(published_archives()["vtab1k"])
        == set(vtab1k_tasks())
        == set(refused) | set(vtab_sources.SOURCES)
    )
    for task in refused:
        assert run("vtab1k", task, tmp_path) == 2
        error = capsys.readouterr().err
        assert f"{task} is not built here" in error
        assert "https://" in error
        assert error.count("\n") == 1
    assert run("vtab1k", "resisc45", tmp_path) == 2
    assert "then pass its folder with --from" in capsys.readouterr().err
    assert left(tmp_path) == []


# FGVC


@pytest.fixture
def birds(archives):
    """A CUB of 4 classes with 15 training and 5 test images each."""
    rows = [(f"00{c}.Bird_{c}/{i:04d}.jpg", c, int(i < 15)) for c in range(1, 5) for i in range(20)]
    files = {f"CUB_200_2011/images/{path}": jpeg(100 * label + i) for i, (path, label, _) in enumerate(rows)}
    for name, column in (("images", 0), ("image_class_labels", 1), ("train_test_split", 2)):
        lines = [f"{number} {row[column]}" for number, row in enumerate(rows, start=1)]
        files[f"CUB_200_2011/{name}.txt"] = "\n".join(lines).encode()
    archives.publish("fgvc", "cub", tar(archives.folder / "CUB_200_2011.tgz", files))
    return files


def test_birds_hold_a_tenth_out_and_say_so(archives, birds, tmp_path, capsys):
    assert run("fgvc", "cub", tmp_path / "root", "--from", archives.folder) == 0
    assert "split: own" in capsys.readouterr().out
    data = FGVC("cub", tmp_path / "root")
    data.setup()
    assert [len(data.sources[split]) for split in ("train", "val", "test")] == [54, 6, 20]
    assert data.class_names == ["1", "2", "3", "4"]
    assert any(note.startswith("split: own") for note in data.description()["notes"])
    path = data.sources["test"].paths[0]
    assert path.read_bytes() == birds[f"CUB_200_2011/images/{path.parent.name}/{path.name}"]
    assert path.stem >= "0015"


def test_published_splits_are_taken_as_they_are(archives, birds, tmp_path, capsys):
    own = tmp_path / "json"
    own.mkdir()
    paths = [name.removeprefix("CUB_200_2011/images/") for name in birds if name.endswith(".jpg")]
    splits = {"train": paths[::4] + paths[1::4], "val": paths[2::4], "test": paths[3::4]}
    for split, names in splits.items():
        (own / f"{split}.json").write_text(json.dumps({name: int(name[2]) for name in names}))
    given = ("--from", archives.folder, "--published-splits", own)
    assert run("fgvc", "cub", tmp_path / "root", *given) == 0
    assert record_of(tmp_path / "root/CUB")["split"] == "published"
    assert list(json.loads((tmp_path / "root/CUB/val.json").read_text())) == splits["val"]
    assert len(FGVC("cub", tmp_path / "root").sources["train"]) == 40
    (own / "val.json").write_text(json.dumps({"none.jpg": 1}))
    assert run("fgvc", "cub", tmp_path / "other", *given) == 2
    assert "none.jpg is listed and not in the archive" in capsys.readouterr().err
    (own / "val.json").write_text(json.dumps({"../../CUB_200_2011.tgz": 1}))
    assert run("fgvc", "cub", tmp_path / "other", *given) == 2
    assert "leaves the image folder" in capsys.readouterr().err
    assert left(tmp_path / "other") == []


def cells(texts):
    found = np.empty((len(texts), 1), object)
    found[:, 0] = texts
    return found


def test_dogs_and_cars(archives, tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    folders = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")
    files, lists = {}, {}
    for split, numbers in (("train", range(20)), ("test", range(20, 24))):
        paths = [f"{folder}/{folder[:9]}_{number}.jpg" for folder in folders for number in numbers]
        files |= {f"Images/{path}": jpeg(len(files) + i) for i, path in enumerate(paths)}
        content = io.BytesIO()
        labels = np.repeat([1, 2], len(numbers))[:, None]
        savemat(content, {"file_list": cells(paths), "labels": labels.astype(np.uint8)})
        lists[f"{split}_list.mat"] = content.getvalue()
    packed = tar(archives.folder / "images.tar", files, "w"), tar(archives.folder / "lists.tar", lists, "w")
    archives.publish("fgvc", "stanford_dogs", *packed)
    assert run("fgvc", "stanford_dogs", tmp_path / "root", "--from", archives.folder) == 0
    data = FGVC("stanford_dogs", tmp_path / "root")
    data.setup()
    assert [len(data.sources[split]) for split in ("train", "val", "test")] == [36, 4, 8]
    assert data.sources["test"].labels == [0] * 4 + [1] * 4

    kind = np.dtype([("class", object), ("fname", object)])
    files, content = {}, {}
    for split, count in (("train", 30), ("test", 6)):
        entries = np.empty((1, count), kind)
        for number in range(count):
            entries[0, number] = (1 + number % 3, f"{number + 1:05d}.jpg")
            files[f"cars_{split}/{number + 1:05d}.jpg"] = jpeg(number + 7)
        content[split] = io.BytesIO()
        savemat(content[split], {"annotations": entries})
    paths = [
        tar(archives.folder / f"cars_{split}.tgz", {n: c for n, c in files.items() if n.startswith(f"cars_{split}")})
        for split in ("train", "test")
    ]
    paths.append(tar(archives.folder / "car_devkit.tgz", {"devkit/cars_train_annos.mat": content["train"].getvalue()}))
    paths.append(archives.folder / "cars_test_annos_withlabels.mat")
    paths[-1].write_bytes(content["test"].getvalue())
    archives.publish("fgvc", "stanford_cars", *paths)
    assert run("fgvc", "stanford_cars", tmp_path / "root", "--from", archives.folder) == 0
    data = FGVC("stanford_cars", tmp_path / "root")
    data.setup()
    assert [len(data.sources[split]) for split in ("train", "val", "test")] == [27, 3, 6]
    assert data.sources["test"].labels == [0, 1, 2] * 2


def test_a_tenth_is_what_the_benchmark_holds_out():
    """Published sizes of validation splits are a tenth of the official training images, rounded up."""
    for name, sizes in fgvc_datasets().items():
        if name != "oxford_flowers":
            labels = dict.fromkeys(range(sizes["train"] + sizes["val"]), 0)
            assert len(fgvc._hold_out({"train": labels, "test": {}}, 0)["val"]) == sizes["val"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vtab1k", "--task", "cifer", "--root", "."], "unknown VTAB-1k task 'cifer': did you mean cifar"),
        (["vtab1k", "--root", "."], "--task; see python -m visionpeft.prepare vtab1k --help"),
        (["fgvc", "--task", "cub"], "--root; see python -m visionpeft.prepare fgvc --help"),
        (["fgvc", "--task", "nabirds", "--root", "."], "nabirds.tar.gz is not downloaded: it needs a form"),
        (["vtab", "--task", "cifar", "--root", "."], "invalid choice: 'vtab'"),
    ],
)
def test_wrong_command_lines(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert left(tmp_path) == []


def test_a_damaged_record_is_refused(archives, tmp_path):
    archives.publish("vtab1k", "cifar", cifar(archives.folder))
    assert run("vtab1k", "cifar", tmp_path / "root", "--from", archives.folder) == 0
    (tmp_path / "root/cifar/prepared.json").write_text("[]")
    with pytest.raises(DataError, match=r"is not what visionpeft\.prepare writes"):
        VTAB1k("cifar", tmp_path / "root")
