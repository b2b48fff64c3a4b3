"""The report: its verdict and warnings from results made by hand, its one page, any number of tasks."""

import base64
import re
import shlex
from pathlib import Path

import pytest
import typer

from lt4rec_sparse.cli import app
from lt4rec_sparse.recsys import report
from lt4rec_sparse.recsys.harness.baselines import CONSTANT, TREES
from lt4rec_sparse.recsys.harness.rows import BASE, HARD, RANDOM_RESCALED, S_WEIGHT, S_WEIGHT_LAST, SMALL
from lt4rec_sparse.recsys.metrics import MAIN_METRIC
from lt4rec_sparse.recsys.report import sections

KINDS = {"ctr": "binary", "cvr": "ratio"}
TITLES = {
    BASE: "single-task",
    HARD: "hard sharing",
    HARD + SMALL: "narrow",
    RANDOM_RESCALED: "random masks",
    S_WEIGHT: "S-Weight",
    S_WEIGHT_LAST: "S-Weight at 20 %",
    TREES: "trees",
    CONSTANT: "a constant",
}
TEST = {  # row -> (AUC, MSE)
    BASE: (0.70, 0.200),
    HARD: (0.69, 0.210),
    HARD + SMALL: (0.72, 0.190),
    RANDOM_RESCALED: (0.70, 0.190),
    S_WEIGHT: (0.71, 0.180),
    S_WEIGHT_LAST: (0.72, 0.220),
}
PATHS = {"sparse": 50.0, "dense": 100.0, "sparse, MLP alone": 40.0, "dense, MLP alone": 20.0}


def record_of(row, seed, values, kinds, calibration):
    def metrics(kind, auc, mse):
        main = {"auc": auc, "gauc": auc - 0.1, "log_loss": 1 - auc} if kind == "binary" else {"mse": mse}
        return {**main, "calibration": calibration}

    tasks = {task: metrics(kind, *values) for task, kind in kinds.items()}
    levels = [(0, 1.0), (1, 0.5), (2, 0.2)]
    searched, masked = row in (S_WEIGHT, S_WEIGHT_LAST), row in (S_WEIGHT, S_WEIGHT_LAST, RANDOM_RESCALED)
    owned = {"shared": 10, **{f"{task} only": 20 for task in kinds}, "dead": 50}
    return {
        "row": row,
        "seed": seed,
        "test": {"all": tasks, "tab_0": tasks},
        "validation": {"all": tasks},
        "masks": {
            "density": dict.fromkeys(kinds, 0.3),
            "ownership": {"layers.0": owned, "layers.1": owned},
        }
        if masked
        else None,
        "tickets": {
            task: [{"level": i, "density": density, "validation": metrics(kind, 0.7, 0.2)} for i, density in levels]
            for task, kind in kinds.items()
        }
        if searched
        else None,
        "best_level": dict.fromkeys(kinds, 1) if searched else None,
        "seconds": {"train": 2.0, "search": 3.0},
        "parameters": 100,
        "multiply_adds": 50,
    }


def frozen_of(kinds):
    first, *others = kinds
    precisions = {
        precision: {
            split: {
                task: {"auc": 0.7 - i / 1000} if kind == "binary" else {"mse": 0.2 + i / 1000}
                for task, kind in kinds.items()
            }
            for split in ("validation", "test")
        }
        | {
            "largest_difference": {task: i / 100 / (j + 1) for j, task in enumerate(kinds)},
            "prepacked_bytes": 3_000 - 1_000 * i,
            "accepted": precision != "int8",
        }
        for i, precision in enumerate(("fp32", "bf16", "int8"))
    }
    paths = PATHS | {f"sparse {precision}, MLP alone": 40.0 / (i + 2) for i, precision in enumerate(("bf16", "int8"))}
    return {
        "overlap": {f"{first} & {other}": dict.fromkeys(("layers.0", "layers.1"), 0.25) for other in others},
        "largest_difference": dict.fromkeys(kinds, 1.5e-7),
        "precisions": precisions,
        "bytes": {
            "dense, one model per task: embeddings": 8_000,
            "dense, one model per task: MLPs": 4_000,
            "embeddings": 4_000,
            "sparse sharing: MLP, canonical": 1_000,
            "artefact on disk": 6_000,
        },
        "latency": [
            {"candidates": size, "path": name, "median_us": us * size, "p20_us": us * size - 1, "p80_us": us * size + 1}
            for size in (1, 32)
            for name, us in paths.items()
        ],
        "engine": "none",
        "threads": 1,
    }


def results_of(*tests, kinds=KINDS, calibration=1.0, steps=1_000, masks="best", rows=500, label_mean=0.25, **data):
    """Results of one seed per test: row -> (AUC, MSE)."""
    split = {
        "days": ["1", "2"],
        "rows": 1_000,
        "tasks": {task: {"rows": rows, "label_mean": label_mean} for task in kinds},
    }
    return {
        "data": {
            "name": "by hand",
            "counts": {"rows_read": 3_010, "duplicates": 10, "train": split, "validation": split, "test": split},
            "tasks": kinds,
            "fields": ["video_id", "hour"],
            **data,
        },
        "config": {
            "embedding_dim": 4,
            "hidden": [16, 8],
            "epochs": 1,
            "batch_size": 512,
            "rounds": 2,
            "density": 0.2,
            "granularity": "weight",
            "masks": masks,
            "seeds": len(tests),
            "learning_rates": [1e-3],
            "dtype": "float32",
        },
        "machine": {
            "cores": 2,
            "architecture": "x86_64",
            "torch_capability": "AVX2",
            "engine": "avx2",
            "lt4rec_sparse": "1.2",
            "torch": "3.4",
            "python": "3.99",
        },
        "command": "lt4rec-sparse run --seeds 1",
        "seconds": 12.3,
        "rows": {row: TITLES[row] for row in tests[0]},
        "learning_rates": {row: dict.fromkeys(kinds, 1e-3) for row in tests[0]},
        "steps": steps,
        "files": {S_WEIGHT: "model.safetensors", S_WEIGHT_LAST: "model_last.safetensors"},
        "frozen": {row: frozen_of(kinds) for row in (S_WEIGHT, S_WEIGHT_LAST)},
        "recovery": {},
        "records": [
            record_of(row, seed, values, kinds, calibration)
            for seed, test in enumerate(tests)
            for row, values in test.items()
        ],
    }


def rows_of(markdown):
    """Return a Markdown table as first cell -> the others; emphasis goes."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Write a report without drawing, and return its Markdown."""

    def words_of(results):
        for name in ("plot_tickets", "plot_ownership", "plot_latency"):
            monkeypatch.setattr(sections, name, lambda *args: args[-1].touch())
        return report.write_report(results, tmp_path).read_text()

    return words_of


def test_the_verdict_says_what_is_served_and_how_it_compares_at_what_cost():
    assert report.verdict(results_of(TEST)) == (
        "Serve S-Weight (model.safetensors), the best of 3 masked models on the validation days. On the test days it "
        "is better than single-task models (ctr AUC +0.0100, cvr MSE -10.00 %) and hard sharing (ctr AUC +0.0200, cvr "
        "MSE -14.29 %); worse at ctr (AUC -0.0100) and better at cvr (MSE -5.26 %) than a dense network with as many "
        "weights. This is one seed, which cannot tell a difference from the noise of another start. It costs 50 "
        "multiply-adds per row and took 5 s of processor time to train, with the search of its masks; single-task "
        "models 50 and 5 s, hard sharing 50 and 5 s, a dense network with as many weights 50 and 5 s."
    )
    assert "(model.safetensors), the tickets that were asked for. On" in report.verdict(
        results_of(TEST, masks="tickets")
    )
    worse = {**TEST, S_WEIGHT: (0.69, 0.2)}
    text = report.verdict(results_of(worse))
    assert "worse at ctr (AUC -0.0100) and no better at cvr (MSE +0.00 %) than single-task models" in text


def test_over_several_seeds_better_and_worse_are_said_of_clear_differences_alone():
    tests = [{**TEST, BASE: (0.70, 0.2)}, {**TEST, BASE: (0.68, 0.2)}]  # ctr: +0.01 and +0.03
    text = report.verdict(results_of(*tests))
    assert (
        "neither clearly better nor clearly worse at ctr (AUC +0.0200 ± 0.0100) and better at cvr (MSE -10.00 ± 0.00 %)"
        " than single-task models" in text
    )
    assert "differences beyond the noise of 2 seeds alone (paired t-test, p < 0.05)." in text


def test_what_is_no_number_is_no_gain():
    results = results_of({**TEST, BASE: (float("nan"), float("nan"))})
    assert "no better than single-task models (ctr AUC +nan, cvr MSE +nan %)" in report.verdict(results)


def test_the_verdict_says_what_masks_found_of_a_planted_truth(words):
    truth = {"ctr_auc": 0.8, "cvr_mse": 0.1, "constant": {"ctr_auc": 0.5, "cvr_mse": 0.3}, "config": {}}
    results = results_of(TEST, truth=truth)
    found = {"planted": {"ctr": 0.4, "cvr": 0.5}, "other": {"ctr": 0.1, "cvr": 0.2}, "auc": {"ctr": 0.9, "cvr": 0.8}}
    results["recovery"] = {S_WEIGHT: found}
    # (0.71 - 0.5) / 0.3 and (0.3 - 0.18) / 0.2.
    assert report.verdict(results).endswith(
        " It reaches 70 % (ctr) and 60 % (cvr) of what the planted truth allows over a constant. Its masks keep "
        "40 % and 50 % of the inputs planted for ctr and cvr, 10 % and 20 % of the others."
    )
    text = words(results)
    assert "The best values that the planted truth allows on these days: ctr_auc 0.8000, cvr_mse 0.1000." in text
    assert "| S-Weight | ctr | 40.0% | 10.0% | 0.900 |" in text


def about(results):
    return [warning.about for warning in report.warned(results)]


def test_verdict_warnings_and_next_steps_come_before_all_tables_and_the_machine_last(words):
    results = results_of(TEST, calibration=1.2, steps=20)
    text = words(results)
    first, last = text.index("\n|"), text.rindex("\n## ")
    verdict, *_ = report.verdict(results).partition(". ")
    order = [f"**{verdict}", "## Warnings", "## What to do next"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert places[-1] < first
    assert text[last:].startswith("\n## How it was made\n\n`lt4rec-sparse run --seeds 1`, 12 s on 2 cores")
    for warning in report.warned(results):
        assert f"- **{warning.about}**: {warning.text}\n" in text
        assert "\n" not in str(warning)
    assert "## Warnings" not in words(results_of(TEST, TEST))


# Of 500 rows with 25 % positives, chance moves the mean label by 15 % (two standard errors), of 50,000 by 1.5 %.
@pytest.mark.parametrize(
    ("calibration", "rows", "warned", "is_chance"),
    [
        (1.2, 500, True, False),
        (0.85, 500, True, True),
        (1.09, 500, False, False),
        (1.09, 50_000, True, False),
        (0.96, 50_000, False, False),
        (1.2, 100, True, True),
        (float("nan"), 500, True, False),
    ],
)
def test_a_calibration_far_from_1_is_remarked(words, calibration, rows, warned, is_chance):
    results = results_of(TEST, TEST, calibration=calibration, rows=rows)
    text = words(results)
    assert ("calibration of ctr" in about(results)) == warned
    assert (f"**calibration of ctr**: the served model predicts {calibration:.2f} times" in text) == warned
    assert ("Chance alone may do this" in text) == is_chance


def test_trees_and_constants_that_are_better_at_a_task_are_remarked():
    def said(row, *values):
        results = results_of(*[{**TEST, row: value} for value in values])
        return {w.about: w.text for w in report.warned(results)}

    trees = "gradient-boosted trees"
    both = said(TREES, (0.72, 0.1))[trees]
    assert "at ctr (AUC 0.7200 against 0.7100, log loss 0.2800 against 0.2900) and at cvr (MSE 0.1000 against" in both
    assert "at cvr (MSE 0.1000 against 0.1800)." in said(TREES, (0.70, 0.1))[trees]
    assert trees not in said(TREES, (0.70, 0.3))
    assert trees not in said(TREES, (0.71, 0.18))  # as good
    assert trees not in said(TREES, (0.75, 0.3), (0.7099, 0.3))  # better and worse: not clear
    assert "do not serve its scores" in said(CONSTANT, (0.5, 0.1))["a constant"]
    assert "a constant" not in said(CONSTANT, (0.5, 0.3))


def test_a_narrow_dense_network_that_is_better_at_every_task_is_remarked():
    who = "the narrow dense network"
    assert who in about(results_of({**TEST, HARD + SMALL: (0.72, 0.170)}))
    not_clear = results_of({**TEST, HARD + SMALL: (0.75, 0.170)}, {**TEST, HARD + SMALL: (0.7099, 0.1799)})
    assert who not in about(not_clear)
    assert who not in about(results_of(TEST))


@pytest.mark.parametrize(
    ("rows", "label_mean", "few"),
    [
        (1_000, 0.09, "90 positive rows in train, 90 positive rows in validation, 90 positive rows in test. "),
        (1_000, 0.95, "50 negative rows in train"),
        (1_000, 0.5, None),
        (1_000, 0.1, None),
    ],
)
def test_few_rows_of_a_class_are_remarked(rows, label_mean, few):
    found = {w.about: w.text for w in report.warned(results_of(TEST, rows=rows, label_mean=label_mean))}
    assert ("few rows of ctr" in found) == (few is not None)
    assert few is None or found["few rows of ctr"].startswith(few)
    assert "few rows of cvr" not in found  # no classes, and rows enough


def test_few_rows_of_a_ratio_are_remarked():
    found = {w.about: w.text for w in report.warned(results_of(TEST, rows=99, label_mean=0.5))}
    assert found["few rows of cvr"].startswith("99 known rows in train, ")


def test_one_seed_is_remarked():
    assert "one seed" in about(results_of(TEST))
    assert "one seed" not in about(results_of(TEST, TEST))


def test_rows_that_were_left_out_are_in_the_table_with_the_reason(words):
    text = words(results_of(TEST) | {"left_out": {"gradient-boosted trees": "got none, wanted some"}})
    assert "| gradient-boosted trees | left out |" in text
    assert "- gradient-boosted trees is left out: got none, wanted some." in text


def test_few_steps_are_remarked(words):
    for steps in (20, 299):
        text = words(results_of(TEST, steps=steps))
        assert f"- **few steps**: every model takes {steps} steps per task at most." in text
    assert "few steps" not in words(results_of(TEST, steps=300))
    assert "few steps" not in words(results_of(TEST))


def commands(text):
    return re.findall(r"^  ```bash\n  (.+)\n  ```$", text, re.MULTILINE)


def test_what_to_do_next_follows_from_the_results(words):
    text = words(results_of(TEST))
    assert "Train up to 3 seeds in the same folder" in text
    assert "Search learning rates, which this run did not" in text
    assert "Train longer" not in text
    assert "Serve in bf16: of the accepted precisions" in text, "int8 is faster still and not accepted"
    assert "the MLPs as fast as dense fp32 torch, as far as these timings can tell (1.0x)" in text
    many = results_of(*[{**TEST, HARD + SMALL: (0.72, 0.170)}] * 2, steps=200)
    many["config"]["learning_rates"] = [1e-3, 2e-3]
    for frozen in many["frozen"].values():
        frozen["precisions"]["bf16"]["accepted"] = False
    text = words(many)
    assert "seeds in the same folder" not in text, "every difference is clear"
    assert "Search learning rates" not in text
    assert "Train longer: 4 epochs make 800 steps or more" in text
    assert "the MLPs 0.5x as fast as dense fp32 torch. **Dense torch is faster here**" in text.replace(
        "**: let `lt4rec-sparse plan` choose the kernels.", "**"
    )


@pytest.mark.parametrize(
    "command",
    [
        "lt4rec-sparse run",
        "lt4rec-sparse run -q --seeds=1 --data 'my log' --tasks '' --out o --learning-rate 0.001 --epochs 1",
        "lt4rec-sparse run --data=x --no-base-rates --patience 1",
    ],
)
def test_every_command_can_be_pasted(words, tmp_path, command):
    """Each is parsed by the command line itself, and goes on with the options of the run."""
    results = results_of(TEST, steps=20)
    results["command"] = command
    found = commands(words(results))
    parsed = []
    for line in found:
        _, name, *arguments = shlex.split(line)
        parsed.append((name, typer.main.get_command(app).commands[name].make_context(name, arguments).params))
    assert [name for name, _ in parsed] == ["run", "run", "run", "experiment", "serve", "score"]
    longer, seeds, rates, experiment, serve, score = (params for _, params in parsed)
    own = typer.main.get_command(app).commands["run"].make_context("run", shlex.split(command)[2:]).params
    changed = {
        "longer": {**own, "epochs": 40, "patience": 2, "out": Path(f"{tmp_path}-longer")},
        "seeds": {**own, "seeds": 3},
        "rates": {**own, "learning_rate": "0.0005,0.001,0.002", "out": Path(f"{tmp_path}-rates")},
    }
    assert {"longer": longer, "seeds": seeds, "rates": rates} == changed
    data = own["data"] or str(tmp_path / "simulated")
    assert (experiment["name"], experiment["data"], experiment["hidden"]) == ("tickets", data, "16,8")
    assert (experiment["batch_size"], experiment["epochs"], experiment["embedding_dim"]) == (512, 1, 4)
    assert (serve["model"], serve["precision"]) == (tmp_path / "model.safetensors", "bf16")
    assert (score["model"], score["data"]) == (tmp_path / "model.safetensors", data)


def test_a_run_that_no_command_made_has_no_command_to_go_on_with(words):
    results = results_of(TEST, steps=20)
    results["command"] = "lt4rec-sparse /usr/bin/pytest tests"
    assert [shlex.split(line)[1] for line in commands(words(results))] == ["experiment", "serve", "score"]


def test_the_noise_of_the_timings_is_said(words):
    results = results_of(TEST)
    for frozen in results["frozen"].values():
        for timed in frozen["latency"]:
            timed |= {"p20_us": 0.95 * timed["median_us"], "p80_us": 1.05 * timed["median_us"]}
    results["frozen"][S_WEIGHT]["latency"][0] |= {"p20_us": 30.0, "p80_us": 60.0}  # of 50
    text = words(results)
    assert "spread by 10% of their median (20th to 80th percentile; the median call, at worst 60%)" in text


def test_every_part_of_the_report_has_its_numbers(words):
    results = results_of(TEST)
    text = words(results)
    assert "12 s on 2 cores (x86_64, AVX2, engine: avx2); lt4rec-sparse 1.2, torch 3.4, Python 3.99." in text
    assert "3,010 impressions, of which 10 duplicates" in text
    assert "one epoch of batches of 512" in text
    assert "2 rounds of pruning to 20% of the hidden weights; one seed." in text
    assert "The slice `tab_0`:" in text
    assert "| **S-Weight** |" in text
    assert "| S-Weight at 20 % |" in text
    tables = rows_of(text)
    assert tables["train"] == ["1 to 2", "1,000", "500", "0.250", "500", "0.250"]
    assert tables["50.0%"] == ["0.70000 (best at one seed)", "0.20000 (best at one seed)"]
    assert tables["layers.0"] == ["100", "10.0%", "20.0%", "20.0%", "50.0%", "0.25"]
    assert tables["32"] == ["1600", "3200", "2.00", "1280", "640", "0.50"]
    assert tables["artefact on disk"] == ["6,000", "6,000"]
    assert "2.0x smaller on disk than one dense fp32 model per task, its MLP 4.0x; 67% of it are embeddings" in text
    results["config"]["granularity"] = "block32"
    assert "2 rounds of pruning to 20% of the hidden weights, by block32;" in words(results)


def test_precisions_stand_beside_fp32(words):
    text = words(results_of(TEST))
    assert "it loses at most 0.0005 of AUC against fp32 and raises the MSE by 0.2% at most" in text
    (section,) = re.findall(r"^## Precision\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert all(f"{TITLES[row]}:" in section for row in (S_WEIGHT, S_WEIGHT_LAST))
    rows = rows_of(section)
    assert rows["precision"][:4] == ["ctr AUC", "against fp32", "cvr MSE", "against fp32"]
    assert rows["precision"][4:] == ["largest difference of a score", "µs at 1", "µs at 32", "bytes", "accepted"]
    assert rows["fp32"] == ["0.70000", "+0.00000", "0.20000", "+0.000%", "0.0e+00", "40", "1280", "3,000", "yes"]
    assert rows["bf16"] == ["0.69900", "-0.00100", "0.20100", "+0.500%", "1.0e-02", "20", "640", "2,000", "yes"]
    assert rows["int8"] == ["0.69800", "-0.00200", "0.20200", "+1.000%", "2.0e-02", "13", "427", "1,000", "no"]


def test_the_page_holds_its_pictures_and_asks_for_nothing(tmp_path):
    text = report.write_report(results_of(TEST, name="<b>log</b> & more"), tmp_path).read_text()
    page = (tmp_path / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
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


@pytest.mark.parametrize(
    "name",
    [
        "![x](http://a/b.png)",
        "![x][y]\n\n[y]: http://a/b.png",
        "![a ![b](plots/tickets.png)](http://a/b.png)",
        "![x]( http://a/b.png 'y')",
        "<img src=http://a/b.png>",
    ],
)
def test_no_name_puts_a_picture_into_the_page(tmp_path, name):
    report.write_report(results_of(TEST, name=name), tmp_path)
    sources = re.findall(r'<img[^>]* src="?([^">]{0,10})', (tmp_path / "report.html").read_text())
    assert set(sources) == {"data:image"}


def test_the_report_is_replaced_when_written_again(words, tmp_path):
    first = words(results_of(TEST))
    assert words(results_of(TEST)) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plots", "report.html", "report.md"]


@pytest.mark.parametrize("tasks", [1, 3, 6])
def test_any_number_of_tasks(tmp_path, tasks):
    kinds = {f"task_{i}": ("binary", "ratio")[i % 2] for i in range(tasks)}
    results = results_of(TEST, kinds=kinds)
    report.write_report(results, tmp_path)
    for task, kind in kinds.items():
        assert f"{task} {MAIN_METRIC[kind].upper()} " in report.verdict(results)
