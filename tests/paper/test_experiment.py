"""An experiment end to end, small: its records, its page, and that nothing is done twice."""

import json
import re
from dataclasses import asdict, replace
from functools import partial

import fsspec
import pytest
import torch

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.paper import equal_time, experiment, pages, regimes
from lt4rec_sparse.paper.experiment import EXPERIMENTS, run_experiment
from lt4rec_sparse.paper.regimes import Regime, around, run_regimes
from lt4rec_sparse.recsys.data import DataError, SimulatorConfig, open_source, simulate
from lt4rec_sparse.recsys.harness import starts, study
from lt4rec_sparse.recsys.harness.study import Resources
from lt4rec_sparse.recsys.harness.trials import Training
from lt4rec_sparse.stopwatch import interleaved

TRAINING = Training(hidden=(16, 8), embedding_dim=2, batch_size=2048)
HERE = Resources(executor="here")
TRAINED = "cheap"  # the experiment that trains; the others judge what they start from


@pytest.fixture(scope="module", autouse=True)
def short():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (pages, equal_time):
            patch.setattr(module, "interleaved", lambda calls: interleaved(calls, rounds=1, round_us=1.0))
        patch.setattr(study, "FURTHER", 0)
        patch.setattr(study, "SEEDS", (1000,))
        carry_out = partial(study.carry_out, grid=(1e-3, 2e-3))
        for module in (experiment, regimes):
            patch.setattr(module, "carry_out", carry_out)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "log"
    simulate(SimulatorConfig(users=60, videos=40, impressions=1_500, days=6), folder)
    return folder


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_writes_its_page(log, tmp_path, name, monkeypatch):
    if name != TRAINED:
        monkeypatch.setattr(starts, "train", lambda *args, **kwargs: 0.0)
    seeds = 2 if name == TRAINED else 1
    report = run_experiment(name, log, tmp_path, seeds, TRAINING, HERE)
    text = report.read_text(encoding="utf-8")
    records = json.loads((report.parent / "records.json").read_text(encoding="utf-8"))
    assert all(title in text for title in records["rows"].values())
    assert f"**Few steps**: {records['few_steps']}" in text
    for picture in re.findall(r"\((plots/\w+\.png)\)", text):
        assert (report.parent / picture).stat().st_size > 0
    page = (report.parent / "report.html").read_text(encoding="utf-8")
    assert 'src="plots/' not in page, "pictures are embedded"
    trained = {(record["row"], record["seed"], tuple(record["trial"]["tasks"])) for record in records["records"]}
    assert {row for row, _, _ in trained} == set(records["rows"])
    assert {seed for _, seed, _ in trained} == set(range(seeds))
    # A second time nothing is trained.
    monkeypatch.setattr(starts, "train", None)
    assert run_experiment(name, log, tmp_path, seeds, TRAINING, HERE) == report


@pytest.fixture(scope="module")
def two_binary(tmp_path_factory):
    """A log with two binary tasks, and without durations."""
    folder = tmp_path_factory.mktemp("binary") / "shop"
    folder.mkdir()
    rows = [f"{i % 5},{i % 7},i{i % 11},{i % 3 == 0:d},{i % 4 == 0:d}" for i in range(400)]
    (folder / "log.csv").write_text("\n".join(["day,user,item,clicked,bought", *rows]) + "\n")
    tasks = [f'[[tasks]]\nname = "{n}"\nkind = "binary"\nlabel = "{n}"' for n in ("clicked", "bought")]
    head = 'name = "shop"\nfiles = {log = ["log.csv"]}\ntime = {day = "day"}\ngroup = {column = "user"}'
    columns = 'columns = [{name = "user", type = "int"}, {name = "item"}]'
    split = "[split]\nvalidation_days = 1\ntest_days = 1"
    (folder / "schema.toml").write_text("\n".join([head, columns, split, *tasks]) + "\n")
    return folder


@pytest.mark.parametrize("name", ["table2", "table3"])
def test_a_log_with_two_binary_tasks_leaves_out_what_it_cannot_have(two_binary, tmp_path, name, monkeypatch):
    monkeypatch.setattr(starts, "train", lambda *args, **kwargs: 0.0)
    report = run_experiment(name, two_binary, tmp_path, 1, TRAINING, HERE)
    records = json.loads((report.parent / "records.json").read_text(encoding="utf-8"))
    text = report.read_text(encoding="utf-8")
    wanted = {
        "table2": {
            "S-Weight-gradientconflict": "conflict: got 0 tasks of a ratio among clicked, bought, wanted one",
            "S-Weight-tuning": "conflict: got 0 tasks of a ratio among clicked, bought, wanted one",
        },
        "table3": {
            pages.REPLAY: "got a log that does not carry play_time_ms, duration_ms, time_ms, wanted it in the schema's "
            "carried"
        },
    }[name]
    assert {title: records["left_out"][title] for title in wanted} == wanted
    assert all(f"- {title} is left out: {reason}." in text for title, reason in records["left_out"].items())
    assert all(f"| {title} | 1 |" in text for title in records["rows"].values())
    assert all(f"| {title} | 1 |" in text for title in records["baselines"]["rows"].values())
    if name == "table2":
        assert "| S-Weight-tuning | left out |" in text
        assert len(records["rows"]) > 20


@pytest.mark.parametrize(
    ("kinds", "carried", "wanted"),
    [
        (("binary", "ratio"), ("play_time_ms", "duration_ms", "time_ms"), {}),
        (
            ("binary", "binary"),
            ("play_time_ms", "duration_ms", "time_ms"),
            {pages.REPLAY: "got tasks of the kinds binary, binary, wanted binary, ratio"},
        ),
        (
            ("binary", "ratio"),
            ("time_ms",),
            {
                pages.REPLAY: "got a log that does not carry play_time_ms, duration_ms, wanted it in the schema's "
                "carried"
            },
        ),
    ],
)
def test_the_replay_needs_a_click_a_ratio_and_times(kinds, carried, wanted):
    assert EXPERIMENTS["table3"].obstacle(dict(zip("ab", kinds, strict=True)), carried) == wanted
    assert EXPERIMENTS["table2"].obstacle(dict(zip("ab", kinds, strict=True)), carried) == {}


def test_the_replay_needs_users():
    kinds, table3 = {"ctr": "binary", "cvr": "ratio"}, EXPERIMENTS["table3"]
    wanted = {pages.REPLAY: "got a log without [group], wanted the user of each row: a request is one user's"}
    assert table3.obstacle(kinds, table3.carried, grouped=False) == wanted
    assert EXPERIMENTS["table2"].obstacle(kinds, table3.carried, grouped=False) == {}


def test_trials_on_other_data_are_refused(log, tmp_path, monkeypatch):
    monkeypatch.setattr(starts, "train", lambda *args, **kwargs: 0.0)
    run_experiment("table3", log, tmp_path / "out", 1, TRAINING, HERE)
    other = tmp_path / "other"
    simulate(SimulatorConfig(users=60, videos=40, impressions=1_500, days=6, seed=1), other)
    with pytest.raises(DataError, match="wanted the same"):
        run_experiment("table3", other, tmp_path / "out", 1, TRAINING, HERE)


@pytest.mark.end_to_end
def test_a_log_at_a_url_is_copied_first(small_folder, tmp_path, monkeypatch):
    system = fsspec.filesystem("memory")
    for path in small_folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/bucket/shop/{path.relative_to(small_folder)}", path.read_bytes())
    prepared = []

    def stop(data, *arguments, **rest):
        prepared.append(data)
        raise InputError("enough")

    monkeypatch.setattr(experiment, "prepare", stop)
    try:
        with pytest.raises(InputError, match="enough"):
            run_experiment("table3", "memory://bucket/shop", tmp_path / "out", 1, TRAINING, HERE)
    finally:
        system.store.clear()
    assert prepared == [tmp_path / "out" / "copy"]
    assert open_source(prepared[0]).schema == open_source(small_folder).schema


def test_few_steps_are_warned_of_before_anything_is_trained(log, tmp_path, monkeypatch):
    def stop(*arguments, **rest):
        raise InputError("enough" if rest else arguments[0])

    monkeypatch.setattr(experiment, "carry_out", stop)
    few = r"few steps: every model takes \d+ steps per task at most\."
    with pytest.raises(InputError, match=f"^{few}"):
        run_experiment("tickets", log, tmp_path / "out", 1, TRAINING, HERE, warn=stop)
    with pytest.raises(InputError, match=r"^enough$"):
        run_experiment("tickets", log, tmp_path / "out", 1, replace(TRAINING, epochs=1_000), HERE, warn=stop)
    with pytest.raises(InputError, match=rf"^few steps: small: {few.removeprefix('few steps: ')}"):
        run_regimes(tmp_path / "map", 1, {"small": Regime(3_000, planted_fields=1)}, TRAINING, HERE, warn=stop)


def test_regimes_are_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(starts, "train", lambda *args, **kwargs: 0.0)
    middle = Regime(3_000, 0.2, planted_fields=1, hidden=(32, 16))
    around_it = {"middle": middle, "50 % clicks": replace(middle, click_rate=0.5)}
    report = run_regimes(tmp_path / "map", 1, around_it, TRAINING, HERE)
    records = json.loads((report.parent / "records.json").read_text(encoding="utf-8"))
    assert [cell["title"] for cell in records["cells"]] == list(around_it)
    for cell, regime in zip(records["cells"], around_it.values(), strict=True):
        assert cell["regime"] == json.loads(json.dumps(asdict(regime)))
        assert {record["trial"]["training"]["hidden"][0] for record in cell["records"]} >= {32, 16, 8, 4}
        found = cell["recovery"][0]
        assert found["way"] == "tickets of weights"
        assert set(found["density"]["ctr"]) == {"shared", "click", "watch", "noise"}
        for precision, choices in cell["chosen"].items():
            assert [choice["microseconds"] for choice in choices] == sorted(
                (us for row, us in cell["microseconds"][precision].items() if row.startswith("base")), reverse=True
            )
            assert not {choice["masked"] for choice in choices} & {"weights_0.2", "s_weight_last"}
    text = report.read_text(encoding="utf-8")
    for picture in ("regimes_fp32", "regimes_int8"):
        assert f"(plots/{picture}.png)" in text
        assert (report.parent / "plots" / f"{picture}.png").stat().st_size > 0
    with pytest.raises(InputError, match="got trials on another simulated log"):
        run_regimes(tmp_path / "map", 1, {"middle": replace(middle, impressions=2_000)}, TRAINING, HERE)


def test_a_regime_differs_from_the_middle_in_one_thing():
    middle = Regime(1_000)
    for title, regime in around(middle).items():
        changed = [name for name, value in asdict(regime).items() if value != asdict(middle)[name]]
        assert len(changed) == (title != "middle")


def test_what_is_no_experiment_is_refused(small_folder, tmp_path):
    with pytest.raises(InputError, match="experiment: got 'table9', wanted one of table2"):
        run_experiment("table9", small_folder, tmp_path, 1)
    with pytest.raises(InputError, match="seeds: got 0, wanted at least 1"):
        run_experiment("table2", small_folder, tmp_path, 0)
    with pytest.raises(InputError, match="losses: got one of like, wanted them of the log's tasks"):
        run_experiment("table2", small_folder, tmp_path, 1, Training(losses=(("like", "bce"),)))
    assert not list(tmp_path.iterdir())
