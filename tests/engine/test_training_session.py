"""What a run is made of: the options and the run file together, and a record from which it can be made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, to_dict
from refinedet_cli.core.presets import tiny
from refinedet_cli.data.loading import PREFETCHED
from refinedet_cli.engine import training_session
from refinedet_cli.engine.batch_size import FoundBatch
from refinedet_cli.engine.training_session import TrainingSession
from refinedet_cli.errors import ConfigError, DataError, DeviceError, UsageError
from refinedet_cli.zoo.checkpoint import save_checkpoint


def make_data(folder: Path, pictures: int) -> Path:
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i in range(pictures):
        pixels = np.random.default_rng([pictures, i]).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1, "bbox": [8, 8, 40, 40], "area": 1600, "iscrowd": 0}
        )
    path = folder / "train.json"
    categories = [{"id": 1, "name": "thing"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with two data sets, weights, and a run file that names them."""
    project = tmp_path / "project"
    make_data(project / "sets" / "one", 4)
    make_data(project / "sets" / "two", 3)
    config = tiny(Classes(names=("thing",), category_ids=(1,))).detector
    torch.manual_seed(0)
    save_checkpoint(project / "tiny.safetensors", config, build(config).network.state_dict(), {})
    (project / "run.toml").write_text(
        """
        [data]
        train = ["sets/one/train.json", "sets/two/train.json"]
        val = ["sets/two/train.json"]
        root = "sets"
        [start]
        preset = "tiny"
        weights = "tiny.safetensors"
        [train]
        steps = 1
        batch = 2
        precision = "fp32"
        """
    )
    monkeypatch.chdir(project)
    return project


def prepare(**changes: Any) -> TrainingSession:
    settings: dict[str, Any] = {
        "data": [],
        "val": [],
        "images": None,
        "root": None,
        "out": Path("runs/a"),
        "weights": None,
        "backbone_weights": None,
        "preset": None,
        "config": Path("run.toml"),
        "settings": [],
        "device": "cpu",
        "workers": 0,
        "cache": None,
        "resume": False,
        "overwrite": False,
        **changes,
    }
    return training_session.prepare(**settings)


def test_the_record_of_a_run_makes_it_again_from_another_folder(project, monkeypatch):
    first = prepare()
    assert (len(first.data.records), len(first.validation.records)) == (7, 3)
    assert first.settings == {
        "detector": to_dict(first.preset.detector),
        "train": to_dict(first.preset.train),
        "data": {
            "train": ["../../sets/one/train.json", "../../sets/two/train.json"],
            "val": ["../../sets/two/train.json"],
            "images": None,
            "root": "../../sets",
        },
        "start": {"weights": "../../tiny.safetensors", "backbone_weights": None},
    }
    first.run(lambda report: None, training_session.never)
    monkeypatch.chdir("sets")
    again = prepare(config=Path("../runs/a/config.json"), out=Path("../runs/b"))
    assert again.settings == first.settings
    assert again.data.fingerprint == first.data.fingerprint
    again.run(lambda report: None, training_session.never)
    a, b = (project / "runs" / name for name in "ab")
    assert (a / "config.json").read_bytes() == (b / "config.json").read_bytes()
    one, two = (load_file(run / "last.safetensors") for run in (a, b))
    torch.testing.assert_close(two, one, rtol=0, atol=0)


def test_data_of_the_options_does_not_keep_the_validation_of_the_file(project):
    session = prepare(data=["sets/two/train.json"])
    assert len(session.data.records) + len(session.validation.records) == 3
    assert session.settings["data"]["val"] == []
    named = prepare(data=["sets/two/train.json"], val=["sets/one/train.json"])
    assert (len(named.data.records), len(named.validation.records)) == (3, 4)


def test_loading_processes_fit_the_machine_and_its_shared_memory(project, monkeypatch):
    monkeypatch.setattr(training_session, "usable_cores", lambda: 64)
    batch = 2 * 3 * 64 * 64 * 4  # bytes

    def free(batches: float) -> None:
        monkeypatch.setattr(training_session, "free_shared_memory", lambda: int(batches * batch / 0.8) + 1)

    free(1000)
    assert prepare(workers=None).options.workers == 16
    assert prepare(workers=20).options.workers == 20
    free(2 * PREFETCHED + 1)
    session = prepare(workers=None)
    assert session.options.workers == 2
    assert any("workers: 2 in place of 16" in note and "/dev/shm" in note for note in session.notes)
    assert prepare(workers=2).options.workers == 2
    with pytest.raises(DeviceError, match=r"--workers 3: .*/dev/shm, where .* MB are free, enough for 2") as caught:
        prepare(workers=3)
    assert "--shm-size" in (caught.value.hint or "")
    free(0.5)
    assert prepare(workers=None).options.workers == prepare(workers=0).options.workers == 0
    monkeypatch.setattr(training_session, "free_shared_memory", lambda: None)  # no such limit
    assert prepare(workers=20).options.workers == 20
    monkeypatch.setattr(training_session, "usable_cores", lambda: 3)
    session = prepare(workers=None)
    assert session.options.workers == 2
    assert not any(note.startswith("workers") for note in session.notes)


def test_pictures_are_kept_in_memory_where_a_quarter_of_what_is_free_holds_them(project, monkeypatch):
    decoded = 7 * 64 * 64 * 3
    for free, cached in ((4 * decoded, True), (4 * decoded - 1, False), (None, False)):
        monkeypatch.setattr(training_session, "free_memory", lambda free=free: free)
        assert prepare().options.cache is cached


def test_what_training_and_validation_leave_out_is_told_and_scored_as_a_part(project):
    data = json.loads(Path("sets/two/train.json").read_text())
    crowds = [{**data["annotations"][0], "id": 90, "iscrowd": 1}]
    other = [
        {**data["annotations"][0], "id": 91, "category_id": 2},
        {**data["annotations"][0], "id": 92, "bbox": [1, 1, 0, 9]},
    ]
    more = {
        **data,
        "categories": [*data["categories"], {"id": 2, "name": "other"}],
        "annotations": [*data["annotations"], *crowds, *other],
    }
    Path("sets/two/more.json").write_text(json.dumps(more))
    Path("sets/two/crowd.json").write_text(json.dumps({**data, "annotations": [*data["annotations"], *crowds]}))
    session = prepare(data=["sets/two/crowd.json"], val=["sets/two/more.json"])
    notes = "\n".join(session.notes)
    assert "1 box around a crowd is left out of training" in notes
    assert "validation: 1 object of a class that the model does not know left out: other" in notes
    assert "validation: 1 " in notes.replace("validation: 1 object of", "")  # the box without area
    session.run(lambda report: None, training_session.never)
    assert session.validation.classes.names == ("thing", "other")


def test_what_the_run_changes_of_its_preset_is_told(project):
    told = [
        n for n in prepare(settings=["loss.neg_ratio=2"]).notes if n.startswith("settings other than the preset's: ")
    ]
    assert [line.split(": ")[1] for line in told] == [
        'loss.neg_ratio=2.0, train.batch=2, train.steps=1, train.precision="fp32"'
    ]
    shapes = [[[16.0, 16.0]] * 20] * 4
    (note,) = (n for n in prepare(settings=[f"anchors.shapes={shapes}"]).notes if n.startswith("settings other"))
    assert "anchors.shapes=[[[16.0, 16.0], [16.0, 16.0], [16.0, ...," in note


def test_validation_without_an_object_is_told(project):
    data = json.loads(Path("sets/two/train.json").read_text())
    Path("sets/two/empty.json").write_text(json.dumps({**data, "annotations": []}))
    assert any("there is no AP" in note for note in prepare(val=["sets/two/empty.json"]).notes)
    assert not any("there is no AP" in note for note in prepare().notes)


def test_validation_data_of_other_classes_are_refused_with_the_option_that_mends_it(project):
    data = json.loads(Path("sets/two/train.json").read_text())
    other = [{**category, "name": f"{category['name']} of another kind"} for category in data["categories"]]
    Path("sets/two/strange.json").write_text(json.dumps({**data, "categories": other}))
    with pytest.raises(DataError, match=r"shares no class with the training data .*: it has thing of") as caught:
        prepare(val=["sets/two/strange.json"])
    assert "--val" in caught.value.hint
    assert "weights" not in caught.value.hint


def test_no_validation_trains_on_everything(project):
    session = prepare(val=["none"])
    assert (len(session.data.records), session.validation) == (7, None)
    assert session.settings["data"]["val"] == ["none"]
    assert "validation: none" in session.notes
    session.run(lambda report: None, training_session.never)
    assert not (project / "runs/a/best.safetensors").exists()


def test_weights_of_the_options_replace_the_whole_start_of_the_file(project):
    Path("imagenet.toml").write_text('[start]\npreset = "tiny"\nbackbone_weights = "imagenet"\n')
    # Would reach for the Hub if the file still counted.
    session = prepare(config=Path("imagenet.toml"), data=["sets/one/train.json"], weights="none")
    assert session.settings["start"] == {"weights": "none", "backbone_weights": None}
    assert "start: random weights" in session.notes


def test_patience_needs_something_to_validate_on(project):
    with pytest.raises(ConfigError, match=r"train\.patience counts evaluations, and there is nothing to validate on"):
        prepare(val=["none"], settings=["train.patience=2", "train.evaluate_every=1"])
    assert prepare(settings=["train.patience=2", "train.evaluate_every=1"]).preset.train.patience == 2


def found_batch(monkeypatch: pytest.MonkeyPatch, batch: int) -> list[int]:
    """Have a look for the batch end with this one; gives the recipes' batches of the looks."""
    looks: list[int] = []

    def find(detector, data, validation, config, options):
        looks.append(config.batch)
        return FoundBatch(batch, "why", ())

    monkeypatch.setattr(training_session.batch_size, "find_batch", find)
    return looks


def test_a_batch_that_was_looked_for_is_recorded_as_its_number(project, monkeypatch):
    looks = found_batch(monkeypatch, 3)
    session = prepare(find_batch=True)
    assert looks == [2]
    assert session.settings["train"]["batch"] == 3
    assert session.preset.train.lr == tiny(session.data.classes).train.lr  # the user's, whatever the batch
    assert session.notes[-3:-1] == (
        "batch: 3 found by trial; why",
        "batch: train.lr stays 0.001, which the recipe pairs with a batch of 2",
    )
    assert "of batch 3" in session.notes[-1]
    session.run(lambda report: None, training_session.never)
    assert json.loads(Path("runs/a/config.json").read_text())["train"]["batch"] == 3
    # Resumed, it is not looked for again: another answer would be another run.
    found_batch(monkeypatch, 5)
    again = prepare(find_batch=True, resume=True)
    assert again.preset.train.batch == 3
    assert "batch: 3, which the run began with" in again.notes


def test_the_batch_of_the_recipe_may_be_found(project, monkeypatch):
    found_batch(monkeypatch, 2)
    assert not any("train.lr" in note for note in prepare(find_batch=True).notes)


def test_a_preview_is_no_run(project):
    shown = prepare(out=None).preview(Path("sheets/a.png"))
    assert len(shown.samples) == 2  # one step of two
    assert Path("sheets/a.png").is_file()
    assert not Path("runs").exists()


def test_two_kinds_of_weights_in_a_file_are_refused_at_once(project):
    Path("both.toml").write_text('[start]\nweights = "tiny.safetensors"\nbackbone_weights = "imagenet"\n')
    with pytest.raises(ConfigError, match="exclude each other"):
        prepare(config=Path("both.toml"), data=["sets/one/train.json"])


def test_nothing_to_train_on_is_a_usage_error(project):
    with pytest.raises(UsageError, match=r"--data is missing$"):
        prepare(config=None)


def test_without_a_folder_there_is_only_a_forecast(project):
    session = prepare(out=None)
    assert session.forecast().steps == 1
    with pytest.raises(ValueError, match="without a folder"):
        session.run(lambda report: None, training_session.never)
    assert not (project / "runs").exists()


def test_validation_data_are_joined(project):
    session = prepare(val=["sets/one/train.json", "sets/two/train.json"])
    assert session.validation is not None
    assert len(session.validation) == 7
    with pytest.raises(UsageError, match="--val none does not go with other"):
        prepare(val=["sets/one/train.json", "none"])
