"""The figures: their axes show what the records say, for one and several seeds, two and four tasks."""

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from lt4rec_sparse.paper import figures
from lt4rec_sparse.recsys import plots
from lt4rec_sparse.recsys.metrics import MAIN_METRIC
from lt4rec_sparse.recsys.plots import DEAD, SHARED, TASK_COLOURS

TWO = {"ctr": "binary", "cvr": "ratio"}
FOUR = {**TWO, "like": "binary", "long_view": "binary"}
TITLES = {
    "single_task": "single-task",
    "hard_sharing": "hard sharing",
    "s_weight": "S-Weight",
    "s_neuron": "S-Neuron",
    "s_block": "S-Block of 32",
    "random_like": "random masks: densities of the tickets' layers",
}
DENSE = ("single_task", "hard_sharing")
LEVELS = 6


def record_of(row, seed, tasks):
    """A trial made by hand: no two rows, seeds, tasks or levels are alike, and none of them is far from the others."""
    place = list(TITLES).index(row)
    rng = np.random.default_rng([place, seed])
    base = {"auc": 0.72 + 0.002 * place, "mse": 0.095 - 0.001 * place}

    def metrics(kind, plus):
        name = MAIN_METRIC[kind]
        return {name: base[name] + (plus if name == "auc" else -plus / 3) + rng.normal(scale=4e-4)}

    masked = row not in DENSE
    owned = {"shared": 30 + place, **{f"{task} only": 10 + i + seed for i, task in enumerate(tasks)}, "dead": 35}
    return {
        "row": row,
        "seed": seed,
        "test": {"all": {task: metrics(kind, 0.002) for task, kind in tasks.items()}},
        "masks": {
            "density": {task: 0.4 - 0.02 * place + 0.005 * seed + 0.01 * i for i, task in enumerate(tasks)},
            "ownership": {f"layers.{i}": owned | {"dead": 20 + 20 * i} for i in range(3)},
        }
        if masked
        else None,
        "tickets": {
            task: [
                {
                    "level": level,
                    "density": 0.7**level,
                    "validation": metrics(kind, 0.003 - 0.0006 * (level - 2 - i) ** 2),
                }
                for level in range(LEVELS)
            ]
            for i, (task, kind) in enumerate(tasks.items())
        }
        if masked
        else None,
        "best_level": {task: 2 + (i + seed) % 2 for i, task in enumerate(tasks)} if masked else None,
        "serving": {
            "microseconds": {
                "256": (180.0 + 30 * place if masked else 900.0 - 200 * place) + 5 * rng.random(),
                "1": 10.0,
            }
        },
    }


def records_of(seeds, tasks):
    return [record_of(row, seed, tasks) for row in TITLES for seed in range(seeds)]


def masked_titles():
    return {row: title for row, title in TITLES.items() if row not in DENSE}


BUDGETS = {"base": "dense", "base_small_0.25": "dense 0.25x"}


def cells_of(seeds: int, regimes: int = 11) -> list[dict]:
    """Return regimes; in the last one no masked network is as fast as the narrow dense one."""
    rng = np.random.default_rng(0)

    def choice(budget, is_known):
        error = 0.001 if seeds > 1 else float("nan")
        numbers = {"ctr": [0.002 * rng.normal(), error], "cvr": [2 * rng.normal(), 1000 * error]}
        return {"budget": budget, **({"numbers": numbers} if is_known else {})}

    return [
        {
            "title": f"regime {place} with a long name",
            "chosen": {"int8": [choice(budget, place < regimes - 1 or budget == "base") for budget in BUDGETS]},
        }
        for place in range(regimes)
    ]


def ticket_values(records, task, kind):
    """Return `[levels, seeds]`: kept weights in %, and the metric."""
    curves = [record["tickets"][task] for record in records]
    x = [[100 * curve[level]["density"] for curve in curves] for level in range(LEVELS)]
    y = [[curve[level]["validation"][MAIN_METRIC[kind]] for curve in curves] for level in range(LEVELS)]
    return np.array(x), np.array(y)


def no_text_overlaps(figure):
    """Whether no two texts of a drawn figure cover each other."""
    figure.set_dpi(mpl.rcParams["savefig.dpi"])  # at which its labels were placed
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for text in set(figure.findobj(Text)) if text.get_visible() and text.get_text().strip()]
    # A tick outside the limits exists but is not drawn.
    hidden = set()
    for axis in figure.axes:
        for side, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            ticks = side.get_major_ticks() + side.get_minor_ticks()
            outside = [
                t for t in ticks if not min(low, high) * (1 - 1e-9) <= t.get_loc() <= max(low, high) * (1 + 1e-9)
            ]
            hidden |= {label for tick in outside for label in (tick.label1, tick.label2)}
    boxes = [t.get_window_extent(renderer) for t in texts if t not in hidden]
    return not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


seeds_and_tasks = pytest.mark.parametrize(("seeds", "tasks"), [(1, FOUR), (3, TWO)])


@seeds_and_tasks
def test_figure_4_has_a_line_a_seed_their_mean_and_the_chosen_levels(tmp_path, seeds, tasks):
    records = [record for record in records_of(seeds, tasks) if record["row"] == "s_weight"]
    figure = plots.plot_tickets(records, tasks, tmp_path / "f.png")
    assert is_picture(tmp_path / "f.png")
    assert no_text_overlaps(figure)
    assert len(figure.axes) == len(tasks)
    for axis, (task, kind), colour in zip(figure.axes, tasks.items(), TASK_COLOURS, strict=False):
        x, y = ticket_values(records, task, kind)
        *by_seed, mean = axis.get_lines()
        for seed, (line, circle) in enumerate(zip(by_seed[::2], by_seed[1::2], strict=True)):
            np.testing.assert_array_equal(line.get_xydata(), np.stack([x[:, seed], y[:, seed]], 1))
            best = records[seed]["best_level"][task]
            np.testing.assert_array_equal(circle.get_xydata(), [[x[best, seed], y[best, seed]]])
            assert line.get_color() == colour
        assert len(by_seed) == 2 * seeds
        np.testing.assert_array_equal(mean.get_ydata(), y.mean(1))
        assert mean.get_linewidth() > by_seed[0].get_linewidth()
        assert axis.get_xscale() == "log"
        assert axis.get_xlim()[0] > 100 > x.min() > axis.get_xlim()[1]
        better = "higher" if kind == "binary" else "lower"
        assert axis.get_title() == f"{task} ({better} is better)"
        assert axis.get_ylabel() == f"validation {MAIN_METRIC[kind].upper()}"


@seeds_and_tasks
def test_granularity_has_a_line_a_title(tmp_path, seeds, tasks):
    records = records_of(seeds, tasks)
    figure = figures.plot_granularity(records, masked_titles(), tasks, tmp_path / "f.png")
    assert is_picture(tmp_path / "f.png")
    assert no_text_overlaps(figure)
    for axis, (task, kind) in zip(figure.axes, tasks.items(), strict=True):
        assert [c.get_label() for c in axis.containers] == list(masked_titles().values())
        for container, row in zip(axis.containers, masked_titles(), strict=True):
            x, y = ticket_values([record for record in records if record["row"] == row], task, kind)
            line, _, (bars,) = container
            np.testing.assert_array_equal(line.get_xydata(), np.stack([x.mean(1), y.mean(1)], 1))
            if seeds > 1:
                errors = y.std(1, ddof=1) / seeds**0.5
                heights = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
                np.testing.assert_allclose(heights, 2 * errors, rtol=0, atol=1e-12)  # roundings of values near 1


@seeds_and_tasks
def test_speed_has_a_mark_a_row_hollow_where_it_is_dense(tmp_path, seeds, tasks):
    records = records_of(seeds, tasks)
    figure = figures.plot_speed(records, TITLES, tasks, tmp_path / "f.png")
    assert is_picture(tmp_path / "f.png")
    assert no_text_overlaps(figure)
    for axis, (task, kind) in zip(figure.axes, tasks.items(), strict=True):
        for container, row in zip(axis.containers, TITLES, strict=True):
            found = [record for record in records if record["row"] == row]
            us = np.mean([record["serving"]["microseconds"]["256"] for record in found])
            value = np.mean([record["test"]["all"][task][MAIN_METRIC[kind]] for record in found])
            np.testing.assert_array_equal(container[0].get_xydata(), [[us, value]])
            assert (container[0].get_markerfacecolor() == "white") == (row in DENSE)
        seed_marks = [line for line in axis.get_lines() if line.get_markeredgecolor() == "black"]
        assert sum(len(line.get_xdata()) for line in seed_marks) == len(records)
        assert axis.get_xlabel() == "microseconds per request of 256 candidates"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == list(TITLES.values())


@seeds_and_tasks
def test_the_frontier_has_a_line_a_curve_in_order_of_time(tmp_path, seeds, tasks):
    times = {row: 300.0 - 20 * i for i, row in enumerate(TITLES)}
    records = [
        {**record, "served": {"int8": record["test"]["all"]}, "microseconds": {"int8": times[record["row"]]}}
        for record in records_of(seeds, tasks)
    ]
    curves = {row: "dense" if row in DENSE else "sparse" for row in TITLES}
    figure = figures.plot_frontier(records, curves, tasks, "int8", ("dense",), tmp_path / "f.png")
    assert is_picture(tmp_path / "f.png")
    assert no_text_overlaps(figure)
    for axis, (task, kind) in zip(figure.axes, tasks.items(), strict=True):
        assert [container.get_label() for container in axis.containers] == ["dense", "sparse"]
        for container in axis.containers:
            of_curve = [row for row, title in curves.items() if title == container.get_label()]
            wanted = sorted(
                (
                    times[row],
                    np.mean([r["served"]["int8"][task][MAIN_METRIC[kind]] for r in records if r["row"] == row]),
                )
                for row in of_curve
            )
            np.testing.assert_array_equal(container[0].get_xydata(), wanted)
            assert (container[0].get_markerfacecolor() == "white") == (container.get_label() == "dense")


def test_a_training_that_collapsed_is_outside_of_the_frontier(tmp_path):
    """The others are told apart all the same."""
    records = [
        {"row": row, "served": {"int8": {"ctr": {"auc": auc + 0.001 * seed}}}, "microseconds": {"int8": us}}
        for row, us, auc in (("a", 100.0, 0.728), ("b", 200.0, 0.727), ("c", 50.0, 0.73), ("collapsed", 25.0, 0.5))
        for seed in range(3)
    ]
    curves = {"a": "dense", "b": "dense", "c": "sparse", "collapsed": "sparse"}
    (axis,) = figures.plot_frontier(records, curves, {"ctr": "binary"}, "int8", ("dense",), tmp_path / "f.png").axes
    low, high = axis.get_ylim()
    assert 0.72 < low < 0.727 and 0.732 < high < 0.74


@seeds_and_tasks
def test_overlap_has_a_bar_a_layer_and_row_of_100_percent(tmp_path, seeds, tasks):
    records = records_of(seeds, tasks)
    titles = {row: TITLES[row] for row in ("s_weight", "random_like")}
    figure = plots.plot_ownership(records, titles, tmp_path / "f.png")
    assert is_picture(tmp_path / "f.png")
    assert no_text_overlaps(figure)
    owners = ["shared", *(f"{task} only" for task in tasks), "dead"]
    colours = [SHARED, *TASK_COLOURS[: len(tasks)], DEAD]
    for axis, (row, title) in zip(figure.axes, titles.items(), strict=True):
        assert axis.get_title(loc="left") == title
        assert [label.get_text() for label in axis.get_yticklabels()] == ["layer 0", "layer 1", "layer 2"]
        found = [record["masks"]["ownership"] for record in records if record["row"] == row]
        bars = iter(axis.patches)
        for layer in ("layers.0", "layers.1", "layers.2"):
            left = 0.0
            for owner, colour in zip(owners, colours, strict=True):
                bar = next(bars)
                shares = [100 * seed[layer][owner] / sum(seed[layer].values()) for seed in found]
                assert bar.get_width() == pytest.approx(np.mean(shares))
                assert bar.get_x() == pytest.approx(left, abs=1e-12)
                assert to_hex(bar.get_facecolor()) == colour
                left += bar.get_width()
            assert left == pytest.approx(100)
        ends = sum(len(lines.get_segments()) for lines in axis.collections)
        assert ends == (0 if seeds == 1 else 3 * seeds * (len(owners) - 1))


@pytest.mark.parametrize("seeds", [1, 4])
def test_regimes_have_a_line_each_and_a_mark_per_budget(tmp_path, seeds):
    cells, tasks = cells_of(seeds), {"ctr": "binary", "cvr": "ratio"}
    figure = figures.plot_regimes(cells, BUDGETS, tasks, "int8", tmp_path / "f.png")
    assert is_picture(tmp_path / "f.png")
    assert no_text_overlaps(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [cell["title"] for cell in cells]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(BUDGETS.values())
    for axis, task, better in zip(figure.axes, tasks, ("right", "left"), strict=True):
        assert f"to the {better}: masked is better" in axis.get_xlabel()
        for marks, budget in zip(axis.containers, BUDGETS, strict=True):
            known = [
                (y, choice["numbers"][task])
                for y, cell in enumerate(cells)
                for choice in cell["chosen"]["int8"]
                if choice["budget"] == budget and "numbers" in choice
            ]
            line, _, bars = marks.lines
            assert list(line.get_xdata()) == [mean for _, (mean, _) in known]
            assert [round(y) for y in line.get_ydata()] == [y for y, _ in known]
            if seeds == 1:
                assert not bars
                continue
            for (left, right), (_, (mean, error)) in zip(bars[0].get_segments(), known, strict=True):
                assert (left[0], right[0]) == pytest.approx((mean - 2 * error, mean + 2 * error))
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1], "the first regime is at the top"


def test_35_rows_differ():
    assert len({tuple(style.values()) for style in figures._styles(map(str, range(35))).values()}) == 35


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=6))
def test_the_standard_error_is_the_deviation_of_the_mean(values):
    mean = sum(values) / len(values)
    expected = (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5
    assert plots.standard_error(values) == pytest.approx(expected)


def test_one_seed_has_no_standard_error():
    assert np.isnan(plots.standard_error([1.0]))
