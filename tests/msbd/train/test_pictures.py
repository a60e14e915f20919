"""Sources of training pictures: folders and tar shards."""

import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msbd.train.pictures import Part, PictureFolder, TarShards, expand_shards


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3): soft blotches, as unlike their mirror image as can be."""
    grain = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.array(Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC))


def coordinates(height: int, width: int) -> np.ndarray:
    """(height, width, 3): red is the column, green the row, so that a crop tells where it comes from."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, 77)], -1).astype(np.uint8)


def encoded(picture: np.ndarray, suffix: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG" if suffix.startswith("jp") else suffix.upper())
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


# ---- folders


def test_folder_is_read_by_path_with_the_captions_beside(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    elsewhere = tmp_path.parent / f"{tmp_path.name}-linked"
    elsewhere.mkdir()
    (tmp_path / "z").symlink_to(elsewhere)
    for number, name in enumerate(["a.PNG", "b/x.jpg", "b/y.webp", "c.bmp"]):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name)
    Image.new("RGB", (4, 4)).save(elsewhere / "linked.tif")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf  a red house \r\nand more\n")
    (tmp_path / "b" / "x.caption").write_text("ein grünes Haus", encoding="utf-8")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves behind")
    pictures = PictureFolder(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in pictures.files]
    assert names == ["a.PNG", "b/x.jpg", "b/y.webp", "c.bmp", "z/linked.tif"] and len(pictures) == 5
    assert [pictures.read(i)[1] for i in range(5)] == ["a red house", "ein grünes Haus", "", "", ""]
    assert pictures.read(3)[0].getpixel((0, 0)) == (3, 0, 0)
    assert PictureFolder(tmp_path / "c.bmp").files == [tmp_path / "c.bmp"]


def test_folders_that_cannot_be_used_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        PictureFolder(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("no picture")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=r"no picture in it; looked for names in \.png"):
            PictureFolder(path)


def test_pictures_are_upright_8_bit_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    Image.fromarray(coordinates(3, 5)).save(tmp_path / "1.png", exif=exif)
    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "2.png")
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (10, 20, 30, 255))
    half.save(tmp_path / "3.png")
    Image.new("RGB", (2, 2), (9, 8, 7)).quantize(4).save(tmp_path / "4.png")
    Image.new("L", (1, 1), 5).save(tmp_path / "5.png")
    turned, grey, transparent, palette, plain = (PictureFolder(tmp_path).read(i)[0] for i in range(5))
    assert np.array_equal(np.array(turned), np.rot90(coordinates(3, 5), -1))
    assert np.array_equal(np.array(grey)[..., 1], [[0, 100, 255]])
    assert np.array_equal(np.array(transparent), [[[255, 255, 255], [10, 20, 30]]])  # over white
    assert palette.getpixel((1, 1)) == (9, 8, 7) and plain.getpixel((0, 0)) == (5, 5, 5)
    assert {picture.mode for picture in (turned, grey, transparent, palette, plain)} == {"RGB"}


def test_unreadable_pictures_are_told_in_one_line(tmp_path: Path) -> None:
    whole = encoded(textured(40, 40))
    bad = {"1.png": whole[:500], "2.jpg": b"", "3.png": b"hello\nworld", "4.png": b""}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    Image.new("F", (2, 2)).save(tmp_path / "5.tif")
    pictures = PictureFolder(tmp_path)
    for index in range(5):
        with pytest.raises(ValueError, match=rf"^[^\n]*{index + 1}\.(png|jpg|tif): [^\n]+$"):
            pictures.read(index)


# ---- shards


def test_patterns_stand_for_shards(tmp_path: Path) -> None:
    names = ["a-08.tar", "a-09.tar", "a-10.tar", "b-1-x.tar", "b-1-y.tar", "b-2-x.tar"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "c{8..9}.d").mkdir()
    assert [f.name for f in expand_shards(f"{tmp_path}/a-{{08..10}}.tar")] == names[:3]
    assert [f.name for f in expand_shards(tmp_path / "a-{9..10}.tar".replace("9", "09"))] == names[1:3]
    assert [f.name for f in expand_shards(f"{tmp_path}/b-{{1..2}}-x.tar")] == ["b-1-x.tar", "b-2-x.tar"]
    assert [f.name for f in expand_shards(f"{tmp_path}/a-{{0..0}}{{8..9}}.tar")] == names[:2]
    assert [f.name for f in expand_shards(f"{tmp_path}/b-*.tar")] == names[3:]
    assert [f.name for f in expand_shards([tmp_path / names[4], f"{tmp_path}/a*"])] == [names[4], *names[:3]]


def test_shards_that_are_not_there_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a-0.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"a-1\.tar: there is no such shard"):
        expand_shards(f"{tmp_path}/a-{{0..1}}.tar")
    with pytest.raises(FileNotFoundError, match=r"b\*\.tar: there is no such shard"):
        expand_shards(f"{tmp_path}/b*.tar")
    with pytest.raises(ValueError, match=r"\{3\.\.1\} is an empty range"):
        expand_shards("a-{3..1}.tar")
    with pytest.raises(ValueError, match="no shards were named"):
        expand_shards([])


def test_shards_give_what_a_folder_of_the_same_pictures_gives(tmp_path: Path) -> None:
    folder, members = tmp_path / "folder", []
    folder.mkdir()
    for number, (suffix, caption) in enumerate(
        [("png", "txt"), ("jpg", "caption"), ("webp", ""), ("jpeg", "txt")]
    ):
        data = encoded(textured(30 + number, 50, number), suffix)
        (folder / f"{number}.{suffix}").write_bytes(data)
        members.append((f"./set/{number}.{suffix}", data))
        if caption:
            (folder / f"{number}.{caption}").write_text(f"picture {number}\n")
            members.append((f"./set/{number}.{caption}", f"picture {number}\n".encode()))
    first, second = members[:4], [("set/", b""), ("set/1.json", b"{}"), *members[4:]]
    write_tar(tmp_path / "t-0.tar", first)
    with pytest.warns(UserWarning, match="1 of 3 examples have no picture"):
        write_tar(tmp_path / "t-1.tar", second[1:])
        shards = TarShards(f"{tmp_path}/t-{{0..1}}.tar")
    pictures = PictureFolder(folder)
    assert len(shards) == len(pictures) == 4
    for n in range(4):
        (one, caption), (other, beside) = shards.read(n), pictures.read(n)
        assert np.array_equal(np.array(one), np.array(other)) and caption == beside
    again = pickle.loads(pickle.dumps(shards))
    assert np.array_equal(np.array(again.read(3)[0]), np.array(shards.read(3)[0]))
    assert [shards.read(i)[1] for i in range(4)] == ["picture 0", "picture 1", "", "picture 3"]


def test_members_belong_together_up_to_the_first_dot(tmp_path: Path) -> None:
    picture, other = encoded(coordinates(4, 6)), encoded(coordinates(5, 7))
    members = [
        ("a/._1.png", b"what macOS leaves behind"),
        ("a/1.TXT", b"one"),
        ("a/1.seg.png", other),
        ("a/1.PNG", picture),
        ("b/1.text", b"two"),
        ("b/1.png", other),
    ]
    shards = TarShards(write_tar(tmp_path / "t.tar", members))
    assert [(shards.read(i)[0].size, shards.read(i)[1]) for i in range(2)] == [
        ((6, 4), "one"),
        ((7, 5), "two"),
    ]


def test_long_names_and_every_tar_format(tmp_path: Path) -> None:
    name = "/".join(["a-folder-with-a-long-name"] * 12) + "/ä"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "t.tar", "w", format=form) as tar:
            for ending, data in (("png", encoded(coordinates(4, 6))), ("txt", b"caption")):
                entry = tarfile.TarInfo(f"{name}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        picture, caption = TarShards(tmp_path / "t.tar").read(0)
        assert np.array_equal(np.array(picture), coordinates(4, 6)) and caption == "caption"


def test_shards_that_cannot_be_used_are_told_in_one_line(tmp_path: Path) -> None:
    members = [("1.png", encoded(textured(64, 64))), ("1.txt", b"caption")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "captions.tar", members[1:])
    write_tar(tmp_path / "gzipped.tar", members, "w:gz")
    (tmp_path / "cut.tar").write_bytes(whole[: len(members[0][1]) // 2])
    second = whole.index(members[1][0].encode())  # its header
    (tmp_path / "short.tar").write_bytes(whole[:second])
    (tmp_path / "damaged.tar").write_bytes(whole[:second] + b"?" + whole[second + 1 :])
    (tmp_path / "nothing.tar").touch()
    (tmp_path / "text.tar").write_text("hello " * 300)
    reasons = {"empty": "no picture", "captions": "no picture", "gzipped": "not a whole", "cut": "not a whole",
               "short": "not a whole", "damaged": "not a whole", "nothing": "not a whole", "text": "not a whole"}  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=rf"^[^\n]*{name}\.tar: {reason}[^\n]*$"):
            TarShards(tmp_path / f"{name}.tar")


def test_a_broken_member_is_named(tmp_path: Path) -> None:
    shards = TarShards(write_tar(tmp_path / "t.tar", [("7.png", b"no picture")]))
    with pytest.raises(ValueError, match=r"t\.tar: 7\.png: not a readable picture: of no known format"):
        shards.read(0)


def test_a_member_with_an_unprintable_name_is_told_in_one_line(tmp_path: Path) -> None:
    shards = TarShards(write_tar(tmp_path / "t.tar", [("7\n\udce9.png", b"no picture")]))
    with pytest.raises(ValueError, match=r"t\.tar: 7  \.png: not a readable picture"):
        shards.read(0)


@pytest.mark.parametrize("size", [2**62, 2**95 - 1])
def test_a_header_that_says_too_much_is_refused(size: int, tmp_path: Path) -> None:
    """Of a long name, which tarfile reads as long as the header says."""
    header = bytearray(tarfile.TarInfo("7.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157] = b"\x80" + size.to_bytes(12, "big")[1:], tarfile.GNUTYPE_LONGNAME
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "t.tar").write_bytes(header + bytes(1024))
    with pytest.raises(ValueError, match=r"^[^\n]*t\.tar: not a whole, uncompressed tar file \([^\n]+\)$"):
        TarShards(tmp_path / "t.tar")


def test_a_part_has_some_of_the_pictures() -> None:
    class Numbers:
        def __len__(self) -> int:
            return 5

        def read(self, index: int) -> tuple[np.ndarray, str]:
            return np.zeros((1, 1, 3), np.uint8), str(index)

    part = Part(Numbers(), range(1, 5, 2))
    assert len(part) == 2 and [part.read(i)[1] for i in range(2)] == ["1", "3"]
