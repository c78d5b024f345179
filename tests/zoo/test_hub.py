"""From what a user calls weights to a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from refinedet_cli.core.presets import PRESETS
from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo import hub
from refinedet_cli.zoo.checkpoint import file_sha256, load_detector, read_header
from refinedet_cli.zoo.hub import DEFAULT_WEIGHTS, read_manifest, resolve_weights, weights_folder

MANIFEST = f"""
[{DEFAULT_WEIGHTS}]
file = "default.safetensors"
sha256 = "00"

["other_model"]
file = "other.safetensors"

[lost]
file = "lost.safetensors"
"""


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose weights lie in a folder beside it, as in a clone; the working folder is another."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "manifest.toml").write_text(MANIFEST)
    for name in ("default", "other"):
        (folder / f"{name}.safetensors").write_bytes(b"x")
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "refinedet_cli" / "zoo" / "hub.py"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return folder


def test_bundled_weights_by_name(bundle):
    assert resolve_weights("other_model") == bundle / "other.safetensors"


def test_no_name_means_the_default(bundle):
    assert resolve_weights(None) == bundle / "default.safetensors"
    assert resolve_weights(DEFAULT_WEIGHTS) == bundle / "default.safetensors"


def test_a_path_on_disk(bundle, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"y")
    assert resolve_weights(str(path)) == path


def test_a_path_on_disk_wins_over_a_bundled_name(bundle):
    Path("other_model").write_bytes(b"y")
    assert resolve_weights("other_model").resolve() == Path.cwd() / "other_model"
    assert resolve_weights("other_model").read_bytes() == b"y"


def test_a_folder_does_not_hide_a_bundled_name(bundle):
    Path("other_model").mkdir()
    assert resolve_weights("other_model") == bundle / "other.safetensors"


def test_an_unknown_name_is_answered_with_the_bundled_ones(bundle):
    with pytest.raises(CheckpointError, match="'best': is neither a file nor") as caught:
        resolve_weights("best")
    assert all(name in (caught.value.hint or "") for name in (DEFAULT_WEIGHTS, "other_model"))


@pytest.mark.parametrize("name", ["", ".", "..", "runs"])
def test_a_folder_is_no_weights(bundle, name):
    Path("runs").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, not a file"):
        resolve_weights(name)


def test_a_name_that_no_path_can_have(bundle):
    with pytest.raises(CheckpointError):
        resolve_weights("a\0b")


def test_a_bundled_file_that_is_gone(bundle):
    with pytest.raises(CheckpointError, match=r"'lost' are missing at .*lost\.safetensors"):
        resolve_weights("lost")


def test_an_installed_package_carries_its_own(bundle, tmp_path):
    inside = tmp_path / "refinedet_cli" / "_weights"
    inside.mkdir(parents=True)
    (inside / "manifest.toml").write_text("[inner]\nfile = 'i.safetensors'\n")
    assert weights_folder() == inside
    assert list(read_manifest()) == ["inner"]


def test_no_weights_at_all(bundle):
    (bundle / "manifest.toml").unlink()
    for call in (weights_folder, read_manifest, lambda: resolve_weights(None), lambda: resolve_weights("best")):
        with pytest.raises(CheckpointError, match="the bundled weights are missing"):
            call()


def test_a_path_needs_no_bundle(bundle, tmp_path):
    (bundle / "manifest.toml").unlink()
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"y")
    assert resolve_weights(str(path)) == path


def test_the_weights_that_are_really_bundled():
    manifest = read_manifest()
    assert DEFAULT_WEIGHTS in manifest
    for name, entry in manifest.items():
        path = resolve_weights(name)
        assert path.parent == weights_folder()
        assert file_sha256(path) == entry["sha256"]
        config, provenance = read_header(path)
        assert config.preset in PRESETS
        assert provenance
    assert load_detector(resolve_weights(None)).config.preset == DEFAULT_WEIGHTS
