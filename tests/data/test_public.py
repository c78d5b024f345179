from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from refinedet_cli.data import public
from refinedet_cli.errors import DataError


def packed(names: list[str], kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in names:
                archive.writestr(name, name)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = len(name)
                archive.addfile(entry, io.BytesIO(name.encode()))
    return buffer.getvalue()


CONTENTS = {
    "annotations_trainval2017.zip": packed(["annotations/instances_val2017.json"], "zip"),
    "val2017.zip": packed(["val2017/000000000139.jpg"], "zip"),
    "annotations_trainval2014.zip": packed(["annotations/instances_val2014.json"], "zip"),
    "val2014.zip": packed(["val2014/COCO_val2014_000000000042.jpg"], "zip"),
    "VOCtest_06-Nov-2007.tar": packed(
        ["VOCdevkit/VOC2007/ImageSets/Main/test.txt", "VOCdevkit/VOC2007/Annotations/000001.xml"], "tar"
    ),
}


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The archives that were fetched, from a server that has small ones."""
    names: list[str] = []

    def fetch(url: str, target: Path, size: int, on_progress) -> None:
        names.append(target.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(CONTENTS[target.name])
        on_progress(size)

    monkeypatch.setattr(public, "download", fetch)
    return names


def test_a_part_brings_only_its_own_archives(asked, tmp_path):
    seen = []
    fetched = public.fetch_public("coco", "val", lambda archive, done: seen.append((archive.name, done)), tmp_path)
    assert asked == ["annotations_trainval2017.zip", "val2017.zip"] == [a.name for a in fetched]
    assert seen == [("annotations_trainval2017.zip", 252_907_541), ("val2017.zip", 815_585_330)]
    assert public.find_public("coco", tmp_path) == tmp_path / "coco"
    assert (tmp_path / "coco" / "val2017" / "000000000139.jpg").is_file()
    assert not list(tmp_path.rglob("*.zip"))
    assert public.fetch_public("coco", "val", lambda *_: None, tmp_path) == ()
    assert len(asked) == 2


def test_voc_goes_where_it_is_looked_for(asked, tmp_path):
    public.fetch_public("voc2007", "test", lambda *_: None, tmp_path)
    assert asked == ["VOCtest_06-Nov-2007.tar"]
    assert public.find_public("voc2007", tmp_path) == tmp_path / "VOCdevkit" / "VOC2007"
    assert public.fetch_public("voc2007", "test", lambda *_: None, tmp_path) == ()


def test_a_set_that_lies_in_another_usual_place_is_not_fetched_again(asked, tmp_path):
    where = tmp_path / "VOC2007" / "ImageSets" / "Main"
    where.mkdir(parents=True)
    (where / "test.txt").write_text("000001\n")
    assert public.fetch_public("voc2007", "test", lambda *_: None, tmp_path) == ()
    assert asked == []


def test_an_archive_that_was_not_unpacked_to_its_end_is_unpacked_again(asked, tmp_path):
    public.fetch_public("coco", "val", lambda *_: None, tmp_path)
    (tmp_path / "coco" / "val2017.zip").write_bytes(CONTENTS["val2017.zip"])
    (tmp_path / "coco" / "val2017" / "000000000139.jpg").unlink()
    public.fetch_public("coco", "val", lambda *_: None, tmp_path)
    assert (tmp_path / "coco" / "val2017" / "000000000139.jpg").is_file()


def test_parts_that_are_not_public_are_refused(asked, tmp_path):
    with pytest.raises(DataError, match="not public"):
        public.fetch_public("voc2012", "test", lambda *_: None, tmp_path)
    assert asked == []


def test_coco_of_2014_goes_by_its_own_name(asked, tmp_path):
    with pytest.raises(DataError) as caught:
        public.find_public("coco", tmp_path, "val2014")
    assert "annotations_trainval2014.zip (253 MB), val2014.zip (6.6 GB) from" in (caught.value.hint or "")
    public.fetch_public("coco", "val2014", lambda *_: None, tmp_path)
    assert asked == ["annotations_trainval2014.zip", "val2014.zip"]
    assert public.find_public("coco", tmp_path) == tmp_path / "coco"
    assert public.fetch_public("coco", "val2014", lambda *_: None, tmp_path) == ()


def test_coco_in_two_folders_is_found_where_the_part_is(tmp_path):
    for folder, part in (("coco", "val2017"), ("coco2014", "val2014")):
        (tmp_path / folder / "annotations").mkdir(parents=True)
        (tmp_path / folder / "annotations" / f"instances_{part}.json").touch()
    assert public.find_public("coco", tmp_path, "val2014") == tmp_path / "coco2014"
    assert public.find_public("coco", tmp_path, "val") == public.find_public("coco", tmp_path) == tmp_path / "coco"
