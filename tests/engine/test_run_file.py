"""Run files: what they may say, where their paths lead, and how a run's own config.json finds its way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refinedet_cli.engine.run_file import RunFile, read_run_file, relative_to_run
from refinedet_cli.errors import ConfigError


def written(folder: Path, text: str, name: str = "run.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_no_file_says_nothing():
    assert read_run_file(None) == RunFile()
    assert RunFile().settings == {}


def test_every_table(tmp_path):
    path = written(
        tmp_path,
        """
        [data]
        train = ["voc2007:trainval", "voc2012:trainval"]
        val = "voc2007:test"
        images = "pictures"
        root = "/sets"
        [start]
        preset = "tiny"
        weights = "none"
        backbone_weights = "imagenet"
        [train]
        lr = 0.01
        [train.augment]
        hue = 0.0
        [network]
        tcb = false
        """,
    )
    assert read_run_file(path) == RunFile(
        path=path,
        preset="tiny",
        data=("voc2007:trainval", "voc2012:trainval"),
        val=("voc2007:test",),
        images=Path("pictures"),
        root=Path("/sets"),
        weights="none",
        backbone_weights="imagenet",
        settings={"train": {"lr": 0.01, "augment": {"hue": 0.0}}, "network": {"tcb": False}},
    )


def test_the_config_of_a_run_names_its_preset_data_and_settings(tmp_path):
    document = {
        "detector": {"family": "refinedet", "preset": "tiny", "classes": {"names": ["a"]}, "loss": {"neg_ratio": 2}},
        "train": {"lr": 0.1},
        "data": {"train": ["voc2007"], "val": [], "images": None, "root": None},
        "start": {"weights": None, "backbone_weights": None},
    }
    path = written(tmp_path, json.dumps(document), "config.json")
    assert read_run_file(path) == RunFile(
        path=path,
        preset="tiny",
        data=("voc2007",),
        settings={"loss": {"neg_ratio": 2}, "train": {"lr": 0.1}},
    )


def test_a_config_of_an_earlier_version_has_no_data(tmp_path):
    path = written(tmp_path, '{"detector": {"preset": "tiny"}, "train": {}}', "config.json")
    assert read_run_file(path) == RunFile(path=path, preset="tiny", settings={"train": {}})


def test_paths_are_found_beside_the_file_first_then_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for made in ("recipes/mine", "recipes/both", "both", "here", "recipes/coco"):
        Path(made).mkdir(parents=True)
    Path("recipes/w.safetensors").touch()
    text = """
        [data]
        train = ["mine", "both", "here", "nowhere", "mine:test", "here:test", "coco", "coco:train", "/here"]
        [start]
        weights = "w.safetensors"
        """
    found = read_run_file(written(Path("recipes"), text))
    assert found.data == (
        *("recipes/mine", "recipes/both", "here", "nowhere", "recipes/mine:test", "here:test"),
        # The name of a known data set is not the folder that lies beside the file.
        *("coco", "coco:train", "/here"),
    )
    assert found.weights == "recipes/w.safetensors"


def test_what_a_run_records_is_found_again_from_any_folder(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "sets" / "mine").mkdir(parents=True)
    (project / "elsewhere").mkdir()
    out = Path("runs/a")
    monkeypatch.chdir(project)
    given = ["sets/mine", "sets/mine:test", "voc2007:trainval", "none", str(tmp_path), "./sets/../sets/mine"]
    recorded = [relative_to_run(value, out) for value in given]
    assert recorded == [
        *("../../sets/mine", "../../sets/mine:test", "voc2007:trainval", "none", str(tmp_path), "../../sets/mine"),
    ]
    path = written(out, json.dumps({"data": {"train": recorded}}), "config.json")
    monkeypatch.chdir("elsewhere")
    again = read_run_file(Path("../runs/a/config.json")).data
    assert [Path(value).resolve() for value in (again[0], again[5])] == [project / "sets" / "mine"] * 2
    assert again[1].endswith(":test")
    assert again[2:5] == ("voc2007:trainval", "none", str(tmp_path))
    # The project moves, and the data with it.
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    (first, *_) = read_run_file(moved / path).data
    assert Path(first).resolve() == moved / "sets" / "mine"


def test_a_run_below_a_linked_folder_finds_its_data(tmp_path, monkeypatch):
    (tmp_path / "sets").mkdir()
    (tmp_path / "disk" / "deep" / "runs").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "deep" / "runs", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    out = Path("runs/a")
    out.mkdir()
    path = written(out, json.dumps({"data": {"train": [relative_to_run("sets", out)]}}), "config.json")
    (found,) = read_run_file(path).data
    assert Path(found).resolve() == tmp_path / "sets"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("[data]\ntrian = 'x'", "unknown setting 'data.trian'", id="unknown data"),
        pytest.param("[start]\nlr = 1", "unknown setting 'start.lr'", id="unknown start"),
        pytest.param("data = 'voc2007'", "data must be a table", id="no table"),
        pytest.param("start = 3", "start must be a table", id="no table of start"),
        pytest.param("detector = 3", "detector must be a table", id="no table of a detector"),
        pytest.param("[data]\ntrain = 3", "data.train must be a list of texts", id="a number"),
        pytest.param("[data]\nval = ['a', 3]", "data.val must be a list of texts", id="a number in a list"),
        pytest.param("[data]\ntrain = ''", "data.train must be a list of texts", id="empty"),
        pytest.param("[data]\nimages = ['a']", "data.images must be a text", id="a list"),
        pytest.param("[start]\nweights = ''", "start.weights must be a text", id="empty weights"),
        pytest.param("[train", "run files are TOML", id="no TOML"),
    ],
)
def test_what_does_not_belong_is_named_with_the_file(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_run_file(path)
    assert str(path) in caught.value.message
    assert said in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("none.toml", "check the name and its case"),
        ("none/run.toml", "none does not exist either"),
        ("", "it is a folder; name the TOML file, or the config.json of a run"),
        ("n" * 300, "check the path"),
    ],
)
def test_what_cannot_be_read_is_said_with_a_cure(tmp_path, name, cure):
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_run_file(tmp_path / name)
    assert cure in caught.value.hint


def test_what_holds_no_tables_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected tables"):
        read_run_file(written(tmp_path, "[1]", "list.json"))


def test_a_byte_order_mark_is_no_content(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\nlr = 0.5\n")
    assert read_run_file(path).settings == {"train": {"lr": 0.5}}
