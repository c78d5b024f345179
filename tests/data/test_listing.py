"""The search for pictures: order, names, links, and many of them."""

from __future__ import annotations

import errno
import glob
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refinedet_cli.data.images import FoundImage, read_image
from refinedet_cli.data.listing import DiskSet, Entry, find_images, list_images
from refinedet_cli.errors import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(*sources: object) -> list[str]:
    return [image.name for image in find_images([str(s) for s in sources])]


def test_folder_is_searched_to_the_bottom_in_order(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b.JPG",
        "a.png",
        "sub/z.webp",
        "sub/deep/c.tif",
        "notes.txt",
        ".hidden.jpg",
        ".cache/d.jpg",
        "a b.heic",
    )
    assert names(tmp_path) == ["a b.heic", "a.png", "b.JPG", "sub/deep/c.tif", "sub/z.webp"]


def test_file_that_is_named_needs_no_extension(tmp_path: Path) -> None:
    touch(tmp_path, "picture", ".hidden.jpg")
    assert names(tmp_path / "picture", tmp_path / ".hidden.jpg") == ["picture", ".hidden.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("*", ["a.jpg", "b.png"]),
        ("**/*.jpg", ["a.jpg", "s/c.jpg", "s/t/d.jpg"]),
        ("s/**", ["c.jpg", "t/d.jpg"]),
        ("*/c.*", ["s/c.jpg"]),
        ("[ab].???", ["a.jpg", "b.png"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    touch(tmp_path, "a.jpg", "b.png", "s/c.jpg", "s/t/d.jpg", "s/e.txt", ".h.jpg")
    assert names(tmp_path / pattern) == expected


def test_patterns_are_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "in/a.jpg", "in/s/b.jpg")
    monkeypatch.chdir(tmp_path)
    assert names("in/**/*.jpg") == ["a.jpg", "s/b.jpg"]
    assert names("*/a.jpg") == ["in/a.jpg"]
    assert names(".") == ["in/a.jpg", "in/s/b.jpg"]


def test_name_never_leads_upwards(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.jpg", "b/y.jpg")
    assert names(tmp_path / "a*" / ".." / "b" / "*.jpg") == ["y.jpg"]
    assert names(tmp_path / "a" / ".." / "b") == ["y.jpg"]


def test_existing_name_with_brackets_is_not_a_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].jpg", "a1.jpg")
    assert names(tmp_path / "a[1].jpg") == ["a[1].jpg"]


def test_a_picture_that_is_named_twice_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "s/a.jpg", "s/b.jpg")
    monkeypatch.chdir(tmp_path)
    found = find_images(["s/b.jpg", str(tmp_path / "s"), "s/../s/*.jpg"])
    assert [image.name for image in found] == ["b.jpg", "a.jpg"]


def test_equal_names_in_different_folders_become_unique(tmp_path: Path) -> None:
    touch(tmp_path, "x/one/a.jpg", "x/two/a.jpg", "x/two/b.jpg", "y/one/a.jpg")
    assert names(*(tmp_path / f for f in ("x/one", "x/two", "y/one"))) == [
        "x/one/a.jpg", "two/a.jpg", "b.jpg", "y/one/a.jpg",
    ]  # fmt: skip


def test_names_that_differ_only_in_case_stay_as_they_are(tmp_path: Path) -> None:
    touch(tmp_path, "A.jpg", "a.jpg")
    if len(list(tmp_path.iterdir())) == 1:
        pytest.skip("this file system does not tell cases apart")
    touch(tmp_path, "s/a.jpg")
    assert names(tmp_path) == ["A.jpg", "a.jpg", "s/a.jpg"]
    # What is lengthened is what is equal, and nothing else.
    assert names(tmp_path / "A.jpg", tmp_path / "a.jpg", tmp_path / "s") == [
        "A.jpg", f"{tmp_path.name}/a.jpg", "s/a.jpg",
    ]  # fmt: skip


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path, "pool/a.jpg", "set/b.jpg")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "pool")
    (tmp_path / "set" / "up").symlink_to(tmp_path / "set")
    assert names(tmp_path / "set") == ["b.jpg", "linked/a.jpg"]


def test_names_longer_than_their_paths_are_numbered(tmp_path: Path) -> None:
    count = len(tmp_path.parts) + 5
    for root in ("x", "y"):
        for i in range(count):
            touch(tmp_path, f"{root}{i}/{'a.jpg' if i == count - 1 else 'notes.txt'}")
            if i:
                (tmp_path / f"{root}{i - 1}" / "l").symlink_to(tmp_path / f"{root}{i}")
    folders = "l/" * (count - 1)
    assert names(tmp_path / "x0", tmp_path / "y0") == [f"{folders}a.jpg", f"{folders}a-2.jpg"]


@pytest.mark.parametrize("pattern", ["**/*.jpg", "**", "**/**/*.jpg", "*/**/*.jpg", "s*/../**/*.jpg"])
def test_patterns_do_not_go_round_with_links(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, "in/s/a.jpg", "in/s/t/b.jpg", "in/s/.h/c.jpg", "pool/d.jpg")
    for i in range(3):
        (tmp_path / "in" / "s" / f"up{i}").symlink_to(tmp_path / "in")
        (tmp_path / "in" / "s" / "t" / f"here{i}").symlink_to(tmp_path / "in" / "s" / "t")
    (tmp_path / "in" / "s" / "t" / "linked").symlink_to(tmp_path / "pool")
    found = find_images([str(tmp_path / "in" / pattern)])
    assert sorted(image.path.name for image in found) == ["a.jpg", "b.jpg", "d.jpg"]


@given(
    st.lists(
        st.sampled_from(["**", "*", "a", "?", "[ab]", "[!a]*", ".h", "**a", "*.jpg", ".."]), min_size=1, max_size=4
    )
)
def test_patterns_match_what_glob_matches(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp() / "as glob"
    touch(folder, "x.jpg", "a/y.jpg", "a/a/z.jpg", "a/b/c/w.jpg", "b/.h/v.jpg", ".h/a/u.jpg", "b/a.jpg", "b/n.txt")
    pattern = str(folder / Path("*", *parts))
    expected = {Path(p).resolve() for p in glob.glob(pattern, recursive=True) if p.endswith(".jpg")}  # noqa: PTH207
    if not expected:
        with pytest.raises(DataError, match="matches no pictures"):
            find_images([pattern])
    else:
        assert {image.path.resolve() for image in find_images([pattern])} == expected


def lock(monkeypatch: pytest.MonkeyPatch, locked: Path) -> None:
    """Make a folder unreadable, for root too."""
    scan = os.scandir

    def refuse(path: Any = ".") -> Any:
        if not isinstance(path, int) and Path(path) == locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_a_folder_that_cannot_be_read_is_listed_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jpg", "lost+found/b.jpg", "z/c.jpg")
    lock(monkeypatch, tmp_path / "lost+found")
    with list_images([str(tmp_path)]) as images:
        assert [image.name for image in images] == ["a.jpg", "lost+found", "z/c.jpg"]
    with list_images([str(tmp_path / "**" / "*.jpg")]) as images:
        assert [image.name for image in images] == ["a.jpg", "z/c.jpg"]


def test_a_folder_that_cannot_be_read_is_an_error_where_it_is_named_or_nothing_may_be_lacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.jpg", "lost+found/b.jpg")
    lock(monkeypatch, tmp_path / "lost+found")
    with pytest.raises(DataError, match=r"lost\+found cannot be read"):
        find_images([str(tmp_path)])
    with (
        pytest.raises(DataError, match=r"lost\+found' cannot be read"),
        list_images([str(tmp_path / "a.jpg"), str(tmp_path / "lost+found")]),
    ):
        pass


def test_a_link_above_the_folder_searches_nothing_else(tmp_path: Path) -> None:
    touch(tmp_path, "other/a.jpg", "set/b.jpg", "set/inner/c.jpg")
    (tmp_path / "set" / "up").symlink_to(tmp_path)
    (tmp_path / "set" / "inner" / "all").symlink_to("/")
    assert names(tmp_path / "set") == ["b.jpg", "inner/c.jpg"]
    assert "other/a.jpg" in names(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.jpg", "does not exist"),
        ("empty", "holds no pictures"),
        ("", "is empty"),
        ("*.gif", "matches no pictures"),
        ("https://example.org/a.jpg", "not downloaded"),
        ("n" * 300, "cannot be read"),
    ],
    ids=["missing", "empty folder", "no name", "pattern", "address", "long"],
)
def test_source_without_pictures_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    touch(tmp_path, "a.jpg", "empty/notes.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        find_images(["a.jpg", source])
    assert caught.value.hint
    assert source in caught.value.message


@pytest.mark.parametrize("entry", ["gone.jpg", "empty", "*.gif", "https://example.org/a.jpg", "n" * 300])
def test_what_a_list_names_in_vain_is_listed_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    touch(tmp_path, "a.jpg", "empty/notes.txt")
    monkeypatch.chdir(tmp_path)
    found = find_images([Entry("a.jpg"), Entry(entry)])
    assert [image.path for image in found] == [Path("a.jpg"), Path(entry)]
    with pytest.raises(DataError):
        read_image(found[1].path)


@pytest.mark.parametrize("entry", ["gone/..", "nul\0.jpg"])
def test_what_cannot_be_the_name_of_a_picture_is_refused_in_a_list_too(entry: str) -> None:
    with pytest.raises(DataError):
        find_images([Entry(entry)])


def test_no_source_at_all_is_a_data_error() -> None:
    with pytest.raises(DataError):
        find_images([])


def test_found_images_are_paths_that_open(tmp_path: Path) -> None:
    Image.new("RGB", (9, 6)).save(tmp_path / "a.png")
    found = find_images([str(tmp_path)])
    assert found == [FoundImage(tmp_path / "a.png", "a.png")]
    assert read_image(found[0].path).shape == (6, 9, 3)


def test_many_pictures_are_found_quickly(tmp_path: Path) -> None:
    for i in range(2000):
        (tmp_path / f"{i:05}.jpg").touch()
    start = time.perf_counter()
    assert len(names(tmp_path)) == 2000
    assert time.perf_counter() - start < 5


# --- many of them


def test_folders_and_names_are_in_the_order_of_their_parts(tmp_path: Path) -> None:
    written = ["a b.jpg", "a.jpg", "a/z.jpg", "a-b/c.jpg", "a0.jpg", "Z.jpg", "ü.jpg", "a/b/c.jpg", "a/b.jpg"]
    touch(tmp_path, *written)
    assert names(tmp_path) == sorted(written, key=lambda name: name.split("/"))


def test_a_list_can_be_read_again_and_counts(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "s/b.jpg")
    with list_images(iter([str(tmp_path)])) as images:
        assert len(images) == 2
        assert list(images) == list(images) == find_images([str(tmp_path)])
        # One loop inside another, as a run and its summary may be.
        assert [(a.name, b.name) for a in images for b in images][1] == ("a.jpg", "s/b.jpg")


def test_folders_can_be_left_out_before_names_are_given(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "out/annotated/a.jpg", "out/annotated2/b.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    sources = [str(tmp_path / "link/annotated/a.jpg"), str(tmp_path / "x" / "a.jpg"), str(tmp_path / "out")]
    with list_images(sources, leave_out=[tmp_path / "out" / "annotated"]) as images:
        assert [image.name for image in images] == ["a.jpg", "annotated2/b.jpg"]
        assert (len(images), images.left_out) == (2, 1)


def test_nothing_but_what_is_left_out_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "annotated/a.jpg")
    with (
        pytest.raises(DataError, match="this tool wrote"),
        list_images([str(tmp_path)], leave_out=[tmp_path / "annotated"]),
    ):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="names are text there")
def test_names_that_are_no_text_or_hold_line_ends(tmp_path: Path) -> None:
    odd = [b"caf\xe9.jpg", b"two\nlines.jpg", "日本.png".encode(), b"[b]*?.jpg", b"'; DROP TABLE image; --.jpg"]
    for name in odd:
        (tmp_path / os.fsdecode(name)).touch()
    found = find_images([str(tmp_path)])
    assert {os.fsencode(image.name) for image in found} == set(odd)
    assert all(image.path.is_file() for image in found)


def test_a_set_on_disk_tells_what_is_new() -> None:
    with DiskSet() as members:
        assert [members.add(value) for value in ("a", "A", "a", "", "", "\udce9", "\udce9")] == [
            True, True, False, True, False, True, False,
        ]  # fmt: skip


@settings(max_examples=40)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=3), max_size=8))
def test_names_of_parts_sort_as_text(parts: list[str]) -> None:
    from refinedet_cli.data.listing import _sort_key

    paths = ["/".join(parts[:i] + parts[i + 1 :]) for i in range(len(parts))]
    assert sorted(paths, key=lambda path: path.split("/")) == sorted(
        paths, key=lambda path: _sort_key(path.encode("utf-8"))
    )
