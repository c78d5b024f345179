"""The CSV files of a run: what is read back of them, whatever state they are in."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from refinedet_cli.engine import run_log
from refinedet_cli.engine.run_log import ClassScores, RunLog, read_classes, read_table
from refinedet_cli.metrics.coco import ClassResult, CocoResult

HEAD = "step,epoch,lr,input,total,gradient_norm,a_conf,a_loc,positives_a,pictures_per_second"
ROW = "{0},{1},0.001,64x64,3.5,9,2.5,1,17,12.5"


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join([HEAD, *rows, ""]))
    return path


def result(ap: float | None) -> CocoResult:
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    recalls = ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
    classes = tuple(
        ClassResult(label=i, AP=value, AP50=value, AP75=value, AR100=value, objects=i, detections=10 * i)
        for i, value in ((1, ap), (2, None))
    )
    arrays = {name: np.zeros(0) for name in ("precision", "recall", "scores")}
    return CocoResult(pictures=3, per_class=classes, **dict.fromkeys((*names, *recalls), ap), **arrays)


def test_columns_are_those_of_the_file(tmp_path):
    table = read_table(write(tmp_path / "log.csv", ROW.format(1, 0.5), ROW.format(2, 1.0)))
    assert len(table) == 2
    assert table.unread == 0
    assert table.terms == ("a_conf", "a_loc")
    assert table.positives == ("a",)
    assert table.columns["epoch"].tolist() == [0.5, 1.0]
    assert np.isnan(table.columns["input"]).all()


@pytest.mark.parametrize(
    "broken",
    ["3", "3,1.5,0.00", "x,1.5,0.001,64x64,3.5,9,2.5,1,17,12.5", ROW.format(3, ""), '3,"1.5', "\0\0\0\0", ",,,,"],
)
def test_a_broken_row_is_left_out_and_counted(tmp_path, broken):
    table = read_table(write(tmp_path / "log.csv", ROW.format(1, 0.5), broken, ROW.format(4, 2)))
    assert table.columns["step"].tolist() == [1, 4]
    assert table.unread == 1


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"hello", b"\xff\xfe\x00", b"step,lr\n1,2\n", b"a,step,epoch\n1,1,1\n"]
)
def test_a_file_of_somebody_else_is_empty(tmp_path, content):
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    table = read_table(path)
    assert len(table) == 0
    assert table.terms == table.positives == ()


def test_no_file_is_empty(tmp_path):
    assert len(read_table(tmp_path / "log.csv")) == 0
    assert read_classes(tmp_path / "classes.csv") == ()


def test_a_resumed_run_drops_broken_rows_and_goes_on(tmp_path):
    write(tmp_path / "log.csv", ROW.format(1, 0.5), ROW.format(2, 1), ROW.format(3, 1.5), "4,2")
    (tmp_path / "metrics.csv").write_bytes(b"")
    log = RunLog(tmp_path)
    log.restore({}, 2, 2)
    log.evaluation(2, 1.0, result(0.25))
    assert read_table(tmp_path / "log.csv").columns["step"].tolist() == [1, 2]
    assert read_table(tmp_path / "metrics.csv").columns["AP"].tolist() == [0.25]


def test_a_column_that_is_new_is_added_to_the_file_of_an_older_version(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,AP\r\n1,1.0,0.5\r\n")
    run_log._append(path, {"step": 2, "epoch": 2.0, "AP": 0.6, "AP50": 0.9})
    run_log._append(path, {"step": 3, "epoch": 3.0, "AP50": 0.8})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["AP"], r["AP50"]) for r in rows] == [("1", "0.5", ""), ("2", "0.6", "0.9"), ("3", "", "0.8")]


def test_classes_are_those_of_the_last_best(tmp_path):
    log = RunLog(tmp_path)
    log.best_classes(5, ("old", "b"), result(0.1))
    log.best_classes(9, ("a, or\nnot", 'b "quoted"'), result(0.5))
    assert read_classes(tmp_path / "classes.csv") == (
        ClassScores("a, or not", 0.5, 0.5, 0.5, 0.5, 1, 10),
        ClassScores('b "quoted"', None, None, None, None, 2, 20),
    )
    log.restore({}, 8, 8)
    assert read_classes(tmp_path / "classes.csv") == ()
