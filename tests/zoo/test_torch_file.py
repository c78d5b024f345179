"""Files of torch.save that mean harm: nothing of them runs, and none takes more memory than it is long."""

from __future__ import annotations

import io
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo.importers.weight_file import read_weight_file
from refinedet_cli.zoo.torch_file import UnreadableFileError, is_plain, load_torch_file
from refinedet_cli.zoo.warm_start import read_tensors

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor(3)}


@pytest.fixture(scope="module")
def fuzz(load_script) -> Any:
    return load_script("benchmarks/fuzz_importers.py")


def write(path: Path, content: object, *, archive: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    return path


@pytest.mark.parametrize("archive", [True, False])
def test_tensors_numbers_and_texts_are_read(tmp_path, archive):
    content = {
        "state_dict": STATE,
        "epoch": 3,
        "name": "x",
        "list": [1.5, None, (True, 2)],
        "p": torch.nn.Parameter(STATE["a.weight"]),
    }
    found = load_torch_file(write(tmp_path / "a.pth", content, archive=archive))
    assert torch.equal(found["state_dict"]["a.weight"], STATE["a.weight"])
    assert (found["epoch"], found["name"], found["list"]) == (3, "x", [1.5, None, (True, 2)])
    assert isinstance(found["p"], torch.nn.Parameter)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("read", [load_torch_file, read_tensors, read_weight_file])
def test_code_is_named_and_not_run(tmp_path, fuzz, archive, read):
    target = tmp_path / "owned"
    path = write(tmp_path / "a.pth", {"a.weight": fuzz.Payload(target)}, archive=archive)
    with pytest.raises(CheckpointError, match=r"refused, it holds more than tensors \(pathlib\.Path\.touch|getattr"):
        read(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # so the guard had something to stop


@pytest.mark.parametrize("content", [torch.nn.Linear(2, 2), {"a": io.BytesIO}], ids=["module", "class"])
def test_whole_modules_are_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="holds more than tensors") as caught:
        load_torch_file(write(tmp_path / "a.pth", content, archive=True))
    assert caught.value.hint == "save the state dict alone, or as safetensors"


def test_every_hostile_file_is_refused_and_stays_small(tmp_path, fuzz):
    target, path = tmp_path / "owned", tmp_path / "a.pth"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contents = list(fuzz.hostile(target))
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_weight_file(path)
    assert not target.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - max(before, made) < 200_000  # kB


def test_calls_that_ask_for_memory_are_refused(tmp_path, fuzz):
    path = tmp_path / "a.pth"
    path.write_bytes(fuzz.bytearray_bomb())
    with pytest.raises(CheckpointError, match=r"more than tensors \(builtins\.bytearray\)"):
        load_torch_file(path)
    path.write_bytes(fuzz.storage_bomb())
    with pytest.raises(UnreadableFileError):
        load_torch_file(path)


def test_a_compressed_archive_is_refused(tmp_path, fuzz):
    path = write(tmp_path / "a.pth", STATE, archive=True)
    path.write_bytes(fuzz.compressed(path.read_bytes()))
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        load_torch_file(path)


def test_a_torchscript_program_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    with pytest.raises(CheckpointError, match="a TorchScript program, which is not run"):
        load_torch_file(path)


def test_repeated_numbers_are_no_plain_tensor(tmp_path):
    wide = torch.zeros(1).expand(1000, 1000)
    assert not is_plain(wide)
    assert is_plain(torch.zeros(3, 4).t())
    path = write(tmp_path / "a.pth", {"vgg.0.weight": wide}, archive=True)
    with pytest.raises(UnreadableFileError, match=r"tensor 'vgg\.0\.weight' is not in the file as an ordinary array"):
        read_weight_file(path)


@pytest.mark.parametrize("archive", [True, False])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, archive):
    path = write(tmp_path / "a.pth", STATE, archive=archive)
    content = path.read_bytes()
    for end in [*range(0, len(content), 41), len(content) - 1]:
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError):
            read_weight_file(path)


def test_pickles_of_other_things_are_no_weights(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        load_torch_file(path)
    write(path, [STATE], archive=True)
    with pytest.raises(CheckpointError, match="holds a list, no state dict"):
        read_weight_file(path)
    write(path, {"epoch": 3, "lr": 0.1}, archive=True)
    with pytest.raises(CheckpointError, match="no state dict in it; it holds 'epoch', 'lr'"):
        read_weight_file(path)
