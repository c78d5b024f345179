"""Charts of a run: what they show is what the files say."""

from __future__ import annotations

import numpy as np
import pytest

from refinedet_cli.engine.run_figures import MOST_POINTS, best_row, draw_training, draw_validation, running_median
from refinedet_cli.engine.run_log import Table


def log(rows: int, **columns: np.ndarray) -> Table:
    steps = np.arange(1.0, rows + 1)
    shapes = {"total": 3 + np.sin(steps), "gradient_norm": steps, "a_conf": np.sqrt(steps), "positives_a": steps % 7}
    speed = {"pictures_per_second": np.full(rows, 12.5)}
    return Table({"step": steps, "epoch": steps / 10, "lr": 1 / steps, **shapes, **speed, **columns})


def evaluations(*ap: float) -> Table:
    count = len(ap)
    columns = {name: np.array(ap) for name in ("AP", "AP50", "AP_small")}
    return Table({"step": np.arange(count) * 5.0 + 5, "epoch": np.arange(count) + 1.0, **columns})


def test_few_rows_are_shown_as_they_are():
    table = log(40)
    charts = {chart.title: chart for chart in draw_training(table, 4.0, ())}
    assert list(charts) == ["Loss", "Loss: a_conf", "Learning rate", "Positives", "Gradient norm", "Speed"]
    for title, name in (("Loss", "total"), ("Loss: a_conf", "a_conf"), ("Learning rate", "lr")):
        chart = charts[title]
        assert chart.rows_each == 1
        assert chart.steps == tuple(range(1, 41))
        assert chart.lines[0].values == pytest.approx(table.columns[name], rel=1e-4)
    assert charts["Loss"].places[-1] == 100.0


def test_many_rows_become_medians_of_neighbours_and_the_last_row_is_there():
    rows = 3 * MOST_POINTS + 1
    table = log(rows)
    chart = draw_training(table, rows / 10, ())[0]
    assert chart.rows_each == 4
    assert len(chart.steps) <= MOST_POINTS
    assert chart.steps[-1] == rows
    total = table.columns["total"]
    assert chart.lines[0].values[:2] == pytest.approx([np.median(total[:4]), np.median(total[4:8])], rel=1e-4)
    # Between the lowest and the highest of them, the thin line still reaches every row.
    heights = [float(point.split(",")[1]) for point in chart.lines[0].behind.split()]
    top = float(chart.y_ticks[-1].text)
    assert min(heights) == pytest.approx(100 - 100 * total.max() / top, abs=0.02)


def test_a_spike_does_not_flatten_the_rest_and_is_told():
    total = np.full(200, 2.0)
    total[3] = 900.0
    chart = draw_training(log(200, total=total), 20, ())[0]
    assert float(chart.y_ticks[-1].text) < 10
    assert "highest 900" in chart.note


@pytest.mark.parametrize("values", [[np.nan] * 5, [0.0] * 5, [np.inf, 1, 2, np.nan, -1], [1e-9] * 5])
def test_odd_numbers_are_no_failure(values):
    charts = draw_training(log(5, total=np.array(values), lr=np.array(values)), 0.5, (0.2,))
    assert "nan" not in charts[0].lines[0].points
    assert all(value is None or np.isfinite(value) for chart in charts for value in chart.lines[0].values)


def test_the_best_is_the_first_of_the_highest():
    assert best_row(evaluations(0.1, 0.5, 0.3, 0.5)) == 1
    assert best_row(evaluations(np.nan, 0.2)) == 1
    assert best_row(evaluations(np.nan)) is None
    assert best_row(Table()) is None


def test_the_best_is_marked_where_it_is():
    overall, sizes = draw_validation(evaluations(0.1, 0.5, 0.3), 3.0, (1.5,))
    assert [line.name for line in overall.lines] == ["AP", "AP50"]
    assert overall.best is not None
    assert overall.best.left == pytest.approx(200 / 3)
    top = float(overall.y_ticks[-1].text)
    assert overall.best.top == pytest.approx(100 - 50 / top)
    assert "best AP 0.500, epoch 2" in overall.best.text
    assert overall.lines[0].values == (0.1, 0.5, 0.3)
    assert overall.resumed == (50.0,)
    assert sizes.best is None
    assert [line.name for line in sizes.lines] == ["AP_small"]


def test_nothing_logged_gives_no_chart():
    assert draw_training(Table(), 0.0, ()) == []
    assert draw_validation(Table(), 0.0, ()) == []


def test_a_running_median_is_that_of_the_values_around():
    values = np.random.default_rng(0).normal(size=100)
    smooth = running_median(values)
    assert smooth[50] == np.median(values[48:53])
    assert smooth[0] == np.median(values[:3])
    assert running_median(np.array([1.0, np.nan, 3.0])).tolist() == [2.0, 2.0, 2.0]
    assert np.isnan(running_median(np.array([np.nan]))).all()
