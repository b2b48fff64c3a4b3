"""The report: its numbers from results made by hand, its words where sparse sharing loses, its one page."""

import base64
import re

import pytest

from lt4rec_sparse.recsys import report
from lt4rec_sparse.recsys.harness.arms import HARD, MAIN_METRIC, RANDOM_LIKE, SINGLE, SPARSE, SPARSE_LAST, TITLES
from lt4rec_sparse.recsys.report import accuracy_table, table

KINDS = {"ctr": "binary", "cvr": "ratio"}
TEST = {  # arm -> (AUC, MSE)
    SINGLE: (0.70, 0.200),
    HARD: (0.69, 0.210),
    SPARSE: (0.71, 0.180),
    RANDOM_LIKE: (0.70, 0.190),
    SPARSE_LAST: (0.72, 0.220),
}
PATHS = {"sparse": 50.0, "dense": 100.0, "sparse, MLP alone": 40.0, "dense, MLP alone": 20.0}


def seed_result(number, test, kinds):
    def metrics(kind, auc, mse):
        return {"auc": auc, "gauc": auc - 0.1} if kind == "binary" else {"mse": mse, "calibration": 1.0}

    by_arm = {arm: {task: metrics(kind, *values) for task, kind in kinds.items()} for arm, values in test.items()}
    curve = [(0, 1.0), (1, 0.5), (2, 0.2)]
    return {
        "seed": number,
        "test": {arm: {"all": tasks, "tab_0": tasks} for arm, tasks in by_arm.items()},
        "tickets": {
            task: [
                {"level": level, "density": density, "validation": metrics(kind, 0.7, 0.2)} for level, density in curve
            ]
            for task, kind in kinds.items()
        },
        "best_level": dict.fromkeys(kinds, 1),
        "seconds": {"search.ctr.level_0": 2.0, "search.ctr.level_1": 3.0, HARD: 7.0},
    }


def frozen_result(kinds):
    layers = ("layers.0", "layers.1")
    first, *others = kinds
    owned = {"shared": 10, **{f"{task} only": 20 for task in kinds}, "dead": 50}
    return {
        "overlap": {f"{first} & {other}": dict.fromkeys(layers, 0.25) for other in others},
        "ownership": dict.fromkeys(layers, owned),
        "largest_difference": dict.fromkeys(kinds, 1.5e-7),
        "bytes": {
            "dense, one model a task: embeddings": 8_000,
            "dense, one model a task: MLPs": 4_000,
            "embeddings": 4_000,
            "sparse sharing: MLP, canonical": 1_000,
            "artefact on disk": 6_000,
        },
        "latency": [
            {"candidates": size, "path": name, "median_us": us * size, "p20_us": us * size - 1, "p80_us": us * size + 1}
            for size in (1, 32)
            for name, us in PATHS.items()
        ],
        "engine": "none",
        "threads": 1,
    }


def results_of(*tests, kinds=KINDS, **data):
    """Results of one seed a test: arm -> (AUC, MSE) of each."""
    split = {"days": ["1", "2"], "rows": 1_000, "tasks": {task: {"rows": 500, "label_mean": 0.25} for task in kinds}}
    return {
        "data": {
            "name": "by hand",
            "counts": {"rows_read": 3_010, "duplicates": 10, "train": split, "validation": split, "test": split},
            "tasks": kinds,
            "fields": ["video_id", "hour"],
            **data,
        },
        "config": {"embedding_dim": 4, "hidden": [16, 8], "epochs": 1, "batch_size": 512, "rounds": 2, "density": 0.2},
        "seeds": [seed_result(number, test, kinds) for number, test in enumerate(tests)],
        "frozen": {arm: frozen_result(kinds) for arm in (SPARSE, SPARSE_LAST)},
    }


def with_precisions(results):
    """Add what newer runs hold: each precision's metrics, as much worse as it is lower."""
    for frozen in results["frozen"].values():
        frozen["precisions"] = {}
        for i, precision in enumerate(("fp32", "bf16", "int8")):
            metrics = {
                task: {"auc": 0.7 - i / 1000} if kind == "binary" else {"mse": 0.2 + i / 1000}
                for task, kind in results["data"]["tasks"].items()
            }
            frozen["precisions"][precision] = {
                "validation": metrics,
                "test": metrics,
                "largest_difference": {task: i / 100 / (j + 1) for j, task in enumerate(results["data"]["tasks"])},
                "prepacked_bytes": 3_000 - 1_000 * i,
                "accepted": precision != "int8",
            }
            frozen["latency"] += [
                {"candidates": size, "path": f"sparse {precision}, MLP alone", "median_us": 40.0 * size / (i + 1)}
                for size in (1, 32)
                if i
            ]
    return results


def rows_of(markdown):
    """Return a Markdown table as first cell -> the others; emphasis goes."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Write a report without drawing, and return its Markdown."""
    blank = dict.fromkeys(report.PLOTS, lambda results, path: path.touch())

    def words_of(results):
        monkeypatch.setattr(report, "PLOTS", blank)
        return report.write_report(results, tmp_path).read_text()

    return words_of


def verdict_of(text, task):
    (line,) = re.findall(rf"^- \*\*{task}\*\*: (.*)$", text, re.MULTILINE)
    return line


def test_table_is_markdown():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_auc_differs_by_points_and_mse_by_percent_and_each_sign_is_as_it_is():
    rows = rows_of(accuracy_table(results_of(TEST), "all"))
    assert rows["model"] == ["ctr AUC", "against single-task", "cvr MSE", "against single-task"]
    assert rows[TITLES[SINGLE]] == ["0.70000", "", "0.20000", ""]
    assert rows[TITLES[SPARSE]] == ["0.71000", "+0.0100", "0.18000", "-10.00 %"]
    assert rows[TITLES[HARD]] == ["0.69000", "-0.0100", "0.21000", "+5.00 %"]
    assert rows[TITLES[RANDOM_LIKE]] == ["0.70000", "+0.0000", "0.19000", "-5.00 %"]


def test_only_sparse_sharing_is_bold():
    lines = accuracy_table(results_of(TEST), "all").splitlines()
    assert [line for line in lines if "**" in line] == [line for line in lines if TITLES[SPARSE] in line]


def test_several_seeds_have_deviations_and_paired_standard_errors():
    # The AUCs move more between the seeds than their differences: 0.01, 0.03 and 0.02, whose deviation is 0.01.
    tests = [
        {SINGLE: (0.70, 0.20), SPARSE: (0.71, 0.18)},
        {SINGLE: (0.72, 0.20), SPARSE: (0.75, 0.20)},
        {SINGLE: (0.74, 0.20), SPARSE: (0.76, 0.24)},
    ]
    rows = rows_of(accuracy_table(results_of(*tests), "all"))
    assert rows[TITLES[SINGLE]] == ["0.72000 ± 0.02000", "", "0.20000 ± 0.00000", ""]
    # 0.01 / sqrt(3); and -10 %, 0 % and 20 %, whose deviation is 15.28 %, over sqrt(3).
    assert rows[TITLES[SPARSE]] == ["0.74000 ± 0.02646", "+0.0200 ± 0.0058", "0.20667 ± 0.03055", "+3.33 ± 8.82 %"]


def test_the_number_of_seeds_is_said(words):
    one, two = (words(results_of(*[TEST] * n)) for n in (1, 2))
    assert "one seed: differences of one run's noise mean nothing" in one
    assert "standard error" not in one
    assert "2 seeds, mean ± standard deviation" in two
    assert "behind ± stands their standard error" in two


def test_the_verdict_names_every_loss(words):
    text = words(results_of(TEST))
    assert verdict_of(text, "ctr") == (
        f"sparse sharing: best tickets is 2 of 5 by AUC. It loses to {TITLES[SPARSE_LAST]}."
    )
    assert verdict_of(text, "cvr") == "sparse sharing: best tickets is 1 of 5 by MSE. It loses to none."
    worst = {**TEST, SPARSE: (0.60, 0.30)}
    text = words(results_of(worst))
    for task, metric in (("ctr", "AUC"), ("cvr", "MSE")):
        others = "; ".join(TITLES[arm] for arm in TEST if arm != SPARSE)
        assert f"is 5 of 5 by {metric}. It loses to {others}." in verdict_of(text, task)


def test_a_tie_is_no_loss(words):
    # Where the best ticket is the last one, both arms are the same model.
    text = words(results_of({**TEST, SPARSE_LAST: TEST[SPARSE]}))
    for task, metric in (("ctr", "AUC"), ("cvr", "MSE")):
        assert f"is 1 of 5 by {metric}. It loses to none." in verdict_of(text, task)


def test_the_verdict_is_over_the_mean_of_the_seeds(words):
    tests = [{SINGLE: (0.70, 0.20), SPARSE: (0.71, 0.19)}, {SINGLE: (0.74, 0.20), SPARSE: (0.70, 0.19)}]
    text = words(results_of(*tests))
    assert f"is 2 of 2 by AUC. It loses to {TITLES[SINGLE]}." in verdict_of(text, "ctr")


def test_every_part_of_the_report_has_its_numbers(words):
    results = results_of(TEST, truth={"ctr_auc": 0.78, "cvr_mse": 0.05, "config": {}})
    text = words(results)
    assert "3,010 impressions, 10 of them duplicates" in text
    assert "one epoch of batches of 512" in text
    assert "2 rounds of pruning to 20% of the hidden weights;" in text
    results["config"]["granularity"] = "block32"
    assert "2 rounds of pruning to 20% of the hidden weights, by block32;" in words(results)
    assert "The best that the planted truth allows on these days: ctr_auc 0.7800, cvr_mse 0.0500." in text
    assert text.count("planted truth") == 1  # the slice has none
    assert "The slice `tab_0` of the test days." in text
    tables = rows_of(text)
    assert tables["train"] == ["1 to 2", "1,000", "500", "0.250", "500", "0.250"]
    assert tables["50.00%"] == ["0.70000 (chosen by 1 of 1)", "0.20000 (chosen by 1 of 1)"]
    assert tables["layers.0"] == ["100", "10.0%", "20.0%", "20.0%", "50.0%", "0.25"]
    assert tables["32"] == ["1600", "3200", "2.00", "1280", "640", "0.50"]
    assert tables["artefact on disk"] == ["6,000", "6,000"]
    assert "2.0x smaller than one dense fp32 model a task, its MLP 4.0x; 67% of it are embeddings" in text
    assert tables["mask search, all tasks and levels (level 0 is the single-task baseline)"] == ["5"]
    assert tables["hard sharing"] == ["7"]


def test_precisions_stand_beside_fp32(words):
    text = words(with_precisions(results_of(TEST)))
    assert "it loses at most 0.0005 of AUC against fp32 and raises the MSE by 0.2% at most" in text
    (section,) = re.findall(r"^## Precision\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert all(f"{TITLES[arm]}:" in section for arm in (SPARSE, SPARSE_LAST))
    rows = rows_of(section)
    assert rows["precision"][:4] == ["ctr AUC", "against fp32", "cvr MSE", "against fp32"]
    assert rows["precision"][4:] == ["largest difference of a score", "µs at 1", "µs at 32", "bytes", "accepted"]
    assert rows["fp32"] == ["0.70000", "+0.00000", "0.20000", "+0.000%", "0.0e+00", "40", "1280", "3,000", "yes"]
    assert rows["bf16"] == ["0.69900", "-0.00100", "0.20100", "+0.500%", "1.0e-02", "20", "640", "2,000", "yes"]
    assert rows["int8"] == ["0.69800", "-0.00200", "0.20200", "+1.000%", "2.0e-02", "13", "427", "1,000", "no"]
    # A precision more is no other path of the tables and plots that there were.
    assert rows_of(text)["32"] == ["1600", "3200", "2.00", "1280", "640", "0.50"]


def test_results_without_precisions_are_reported_without_them(words):
    assert "Precision" not in words(results_of(TEST))


def test_the_page_holds_its_pictures_and_asks_for_nothing(tmp_path):
    text = report.write_report(results_of(TEST, name="<b>log</b> & more"), tmp_path).read_text()
    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    pictures = re.findall(r"!\[[^\]]+\]\((plots/[a-z]+\.png)\)", text)
    assert len(sources) == len(pictures) == 3
    for source, picture in zip(sources, pictures, strict=True):
        head, data = source.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == (tmp_path / picture).read_bytes()
    assert not re.search(r"https?:|<link|<script|@import|url\(", page)
    assert "<title>LT4REC, sparse: &lt;b&gt;log&lt;/b&gt; &amp; more</title>" in page
    assert "<b>log" not in page
    assert page.count("<table>") == sum(line.startswith("| --- |") for line in text.splitlines())


def test_the_report_is_replaced_when_written_again(words, tmp_path):
    first = words(results_of(TEST))
    assert words(results_of(TEST)) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plots", "report.html", "report.md"]


@pytest.mark.parametrize("tasks", [1, 3, 6])
def test_any_number_of_tasks(tmp_path, tasks):
    kinds = {f"task_{i}": ("binary", "ratio")[i % 2] for i in range(tasks)}
    text = report.write_report(results_of(TEST, kinds=kinds), tmp_path).read_text()
    for task, kind in kinds.items():
        assert f"by {MAIN_METRIC[kind].upper()}" in verdict_of(text, task)
