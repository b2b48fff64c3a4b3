"""The command line: `lt4rec-sparse run`, `experiment`, `simulate`, `candidates`, `features`, `score` and so on.

Commands import what they need when they run: `--help` and a mistyped option are answered without loading torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from lt4rec_sparse import __version__, cli_diff, cli_features, cli_schema, cli_update
from lt4rec_sparse.cli_training import (
    BaseRates,
    ClipNorm,
    Ema,
    Patience,
    PatienceOfRun,
    Quiet,
    Schedule,
    SparseGradients,
    SparseSteps,
    TopK,
    Tracker,
    TrainingPrecision,
    WarmUpSteps,
    WeightDecay,
)
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.serve.command import serve

if TYPE_CHECKING:
    from lt4rec_sparse.recsys.models import Conflict

# Click's own in older versions of typer, a copy within typer in newer ones.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
TRAINING_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
MAX_WIDTH = 1 << 16
LINE_SECONDS = 5.0  # between two lines of a stage where the output is no terminal


class Commands(typer.core.TyperGroup):
    """The commands; each answers an error that the user can correct with one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Parse a command's arguments and run it."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of the output has read enough; typer ends quietly
        except (InputError, OSError, UsageError, MemoryError) as error:
            text = getattr(error, "format_message", error.__str__)()  # `str` leaves out which option it was
            if isinstance(error, MemoryError):
                text = f"got sizes beyond this machine's memory ({text}), wanted smaller ones"
            typer.echo(f"lt4rec-sparse: {' '.join(text.split())}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train one network for several ranking tasks, with a sparse mask per task, and serve it. "
    "`lt4rec-sparse run` without options tries it on a simulated click log.",
    rich_markup_mode=None,  # plain text: rich alone would double the time of --help
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lt4rec-sparse {__version__}")
        raise typer.Exit


def _within(low: float, high: float) -> Callable[[float | None], float | None]:
    """Return a check of an option's number, the same in every version of typer; NaN is within nothing."""

    def check(value: float | None) -> float | None:
        if value is not None and not low <= value <= high:
            raise typer.BadParameter(f"got {value}, wanted {low:,} to {high:,}")
        return value

    return check


_EMBEDDING_DIM = _within(1, 4096)


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"got {value}, wanted a finite number")
    return value


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of all commands."""


Workers = Annotated[
    int | None,
    typer.Option(callback=_within(1, 1024), help="Trainings side by side, each in a process. By default one per core."),
]
Artefact = Annotated[Path, typer.Argument(help="The artefact that `run` wrote: model.safetensors.")]


@app.command()
def run(
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A folder with Parquet or CSV files and a schema.toml, or in KuaiRand's layout; or its URL, such as "
            "s3://bucket/shop. Without it a small click log is simulated.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; a run that was interrupted continues there. [runs/<data>]")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How often everything is trained, each time from another start.")] = 1,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs of every training. By default as many as make 800 steps, at least 1; 2 on the simulated log."
        ),
    ] = None,
    masks: Annotated[
        str,
        typer.Option(
            help="How the masks are found. random: drawn, without a search; tickets: pruned step by step, as in the "
            "paper; best: both, and the validation days choose."
        ),
    ] = "best",
    rounds: Annotated[
        int | None,
        typer.Option(help="Rounds of pruning per task, for tickets. By default 4, or 2 on the simulated log."),
    ] = None,
    density: Annotated[float, typer.Option(help="Share of the hidden weights that each task keeps in the end.")] = 0.1,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Impressions per training step. By default 1024, or fewer where an epoch would have under 150 steps."
        ),
    ] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(
            help="Learning rate of Adam; of several, such as 0.0005,0.001, the validation days choose one per model "
            "and task. By default 0.001."
        ),
    ] = None,
    precision: TrainingPrecision = "auto",
    workers: Workers = None,
    embedding_dim: Annotated[
        int | None,
        typer.Option(callback=_EMBEDDING_DIM, help="Width of an embedding. By default 16, or 8 on the simulated log."),
    ] = None,
    hidden: Annotated[
        str | None,
        typer.Option(help="Widths of the hidden layers. By default 512,256,128, or half of them on the simulated log."),
    ] = None,
    granularity: Annotated[
        str,
        typer.Option(
            help="What is pruned or kept together: blocks of 16 outputs and 4 inputs (16x4), the fastest; single "
            "weights (weight), two of four (2:4), square blocks (block4, block16, block32, block64) or whole neurons "
            "(neuron)."
        ),
    ] = "16x4",
    tasks: Annotated[
        str,
        typer.Option(help="Names of tasks, such as ctr,cvr,like. By default all that the schema does not call extra."),
    ] = "",
    sparse_gradients: SparseGradients = False,
    embeddings: Annotated[
        str,
        typer.Option(
            help="How model.safetensors holds embeddings: fp32, fp16 or int8, a half or a third of the bytes."
        ),
    ] = "fp32",
    patience: PatienceOfRun = None,
    base_rates: BaseRates = True,
    sparse_steps: SparseSteps = True,
    schedule: Schedule = "constant",
    warm_up_steps: WarmUpSteps = 0,
    weight_decay: WeightDecay = 0.0,
    clip_norm: ClipNorm = 0.0,
    ema: Ema = 0.0,
    top_k: TopK = 10,
    tracker: Tracker = "none",
    quiet: Quiet = False,
) -> None:
    """Train a sparse network on a click log and report it.

    It finds a mask per task, trains one shared network, freezes it and measures it beside other models. The run folder
    then holds report.md, report.html and model.safetensors, which `score` serves.
    """
    from lt4rec_sparse.recsys.data.remote import data_name, located
    from lt4rec_sparse.recsys.harness.settings import SIMULATED, RunSettings
    from lt4rec_sparse.recsys.harness.study import Resources
    from lt4rec_sparse.recsys.run import Finished
    from lt4rec_sparse.recsys.run import run as run_product
    from lt4rec_sparse.recsys.training import led

    given: dict[str, Any] = {
        "embedding_dim": embedding_dim,
        "hidden": None if hidden is None else _widths(hidden),
        "learning_rates": None if learning_rate is None else _rates(learning_rate),
        "epochs": epochs,
        "batch_size": batch_size,
        "patience": patience,
        "rounds": rounds,
    }
    settings = replace(
        SIMULATED if data is None else RunSettings(),
        seeds=seeds,
        masks=masks,
        density=density,
        granularity=granularity,
        tasks=_names(tasks),
        dtype=training_dtype(precision),
        sparse_gradients=sparse_gradients,
        embeddings=embeddings,
        base_rates=base_rates,
        sparse_steps=sparse_steps,
        schedule=schedule,
        warm_up_steps=warm_up_steps,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        ema=ema,
        top_k=top_k,
        **{name: value for name, value in given.items() if value is not None},
    )
    out = out or Path("runs") / ("simulated" if data is None else data_name(data))

    def carried_out() -> Finished:
        with shown_progress(quiet) as progress:
            source = None if data is None else located(data)
            return run_product(source, out, settings, progress, Resources(workers, tracker=tracker))

    finished = led(carried_out)
    if finished is None:  # one of torchrun's other processes: the first one speaks
        return
    for warning in finished.warnings:
        _warn(warning)
    typer.echo(finished.verdict)
    typer.echo(f"{finished.report}, report.html, model.safetensors, metrics.jsonl")


@app.command()
def experiment(
    name: Annotated[
        str,
        typer.Argument(
            help="table2, table3, figure4, granularity, frontier, cheap, tickets, tasks, or regimes (simulated)."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A folder with a schema.toml, or in KuaiRand's layout, or its URL; none for regimes.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder of all experiments on this log, which continue there. [runs/experiments/<data>]"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How often every row is trained, each time from another start.")] = 5,
    workers: Workers = None,
    executor: Annotated[
        str, typer.Option(help="Where trainings run: processes; ray, if it is installed; here, one after another.")
    ] = "processes",
    epochs: Annotated[int, typer.Option(help="Epochs of every training, or the most.")] = 1,
    patience: Patience = 0,
    batch_size: Annotated[int, typer.Option(help="Impressions per training step.")] = 1024,
    embedding_dim: Annotated[int, typer.Option(callback=_EMBEDDING_DIM, help="Width of an embedding.")] = 16,
    hidden: Annotated[str, typer.Option(help="Widths of the MLP's hidden layers, from the input on.")] = "512,256,128",
    cross: Annotated[
        str, typer.Option(help="How fields are crossed: dlrm (dot products into the MLP), wide_deep or deepfm.")
    ] = "dlrm",
    precision: TrainingPrecision = "auto",
    sparse_gradients: SparseGradients = False,
    base_rates: BaseRates = False,
    sparse_steps: SparseSteps = False,
    schedule: Schedule = "constant",
    warm_up_steps: WarmUpSteps = 0,
    weight_decay: WeightDecay = 0.0,
    clip_norm: ClipNorm = 0.0,
    ema: Ema = 0.0,
    top_k: TopK = 0,
    tracker: Tracker = "none",
    loss: Annotated[
        list[str] | None,
        typer.Option(help="The loss of a task, such as ctr=focal: bce, focal or mse. May be given once per task."),
    ] = None,
    cvr_scale: Annotated[
        float,
        typer.Option(callback=_finite, help="Row S-Weight-taskbalance: weight of the CVR loss; the CTR loss has 1."),
    ] = 5.0,
    conflict: Annotated[
        str,
        typer.Option(
            help="Row S-Weight-gradientconflict: five numbers. A video is long above the first (ms); a long one is "
            "hardly watched below the second (watch ratio), another below the third; such a clicked row counts by the "
            "fourth in the CTR loss and by the fifth in the CVR loss."
        ),
    ] = "60000,0.1,0.2,0.2,5",
    exclusive_dim: Annotated[
        int | None,
        typer.Option(
            callback=_EMBEDDING_DIM,
            help="Row S-Weight-multiview: width of each task's own embedding. By default a quarter of --embedding-dim.",
        ),
    ] = None,
    wider: Annotated[
        float,
        typer.Option(callback=_within(0, 16), help="Row S-Weight-biggernet: factor of the hidden layers' widths."),
    ] = 1.375,
    impressions: Annotated[
        int | None,
        typer.Option(help="Only for regimes: impressions of the simulated log in the middle. [60000]"),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Carry out one of the paper's experiments.

    Its rows are trained over several seeds; the folder then holds report.md with tables and plots, and records.json.
    """
    from lt4rec_sparse.paper.declared import Variants
    from lt4rec_sparse.paper.experiment import run_experiment
    from lt4rec_sparse.paper.regimes import TRAINING, Regime, around, run_regimes
    from lt4rec_sparse.recsys.data.remote import data_name, located
    from lt4rec_sparse.recsys.harness.study import Resources
    from lt4rec_sparse.recsys.harness.trials import Training
    from lt4rec_sparse.recsys.training import led

    if name == "regimes" and data is not None:
        raise InputError(f"--data: got {data} for regimes, wanted none: its logs are simulated")
    if name != "regimes" and data is None:
        raise InputError("--data: got none, wanted a folder with a log")
    if data is not None and impressions is not None:
        raise InputError(f"--impressions: got {impressions} with --data, wanted none: only regimes simulates its logs")
    out = out or Path("runs") / "experiments" / ("regimes" if data is None else data_name(data))
    resources, dtype = Resources(workers, executor, tracker), training_dtype(precision)
    training = Training(
        hidden=_widths(hidden),
        embedding_dim=embedding_dim,
        epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        cross=cross,
        losses=_losses(loss or []),
        dtype=dtype,
        sparse_gradients=sparse_gradients,
        base_rates=base_rates,
        sparse_steps=sparse_steps,
        schedule=schedule,
        warm_up_steps=warm_up_steps,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        ema=ema,
    )
    variants = Variants(cvr_scale, _conflict(conflict), exclusive_dim, wider)
    if data is None and (training, variants, top_k) != (Training(dtype=dtype), Variants(), 0):
        raise InputError("regimes: got options of networks or training, wanted none: its rows train in one way")

    def carried_out() -> Path:
        with shown_progress(quiet) as progress:
            if data is None:
                regimes = around(Regime() if impressions is None else Regime(impressions))
                return run_regimes(out, seeds, regimes, replace(TRAINING, dtype=dtype), resources, progress, _warn)
            args = name, located(data), out, seeds, training, resources
            return run_experiment(*args, progress, variants, top_k, _warn)

    report = led(carried_out)
    if report is not None:  # in torchrun's other processes: the first one speaks
        typer.echo(f"{report}, report.html, records.json")


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    impressions: Annotated[int, typer.Option(callback=_within(100, 1_000_000_000), help="Rows of the log.")] = 80_000,
    conflict: Annotated[float, typer.Option(help="How strongly the tasks oppose each other, 0 to 1.")] = 0.5,
    click_rate: Annotated[float, typer.Option(help="Share of the impressions that are clicked, in (0, 1).")] = 0.35,
    watch_rate: Annotated[
        float | None, typer.Option(help="Share of the clicks that are watched long. By default it is not fixed.")
    ] = None,
    planted_fields: Annotated[
        int,
        typer.Option(
            callback=_within(0, 1_000),
            help="Number of fields of each kind (for both tasks, for clicks, for watching, for neither) per user and "
            "per video. 0 for realistic columns instead.",
        ),
    ] = 0,
    request_size: Annotated[int, typer.Option(help="Videos that are shown to a user at once.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same log.")] = 0,
) -> None:
    """Write a simulated click log whose truth is known.

    The folder then holds Parquet files and their schema.toml, for `run --data`, and truth.json.
    """
    from lt4rec_sparse.recsys.data import SimulatorConfig
    from lt4rec_sparse.recsys.data import simulate as write_log

    write_log(
        SimulatorConfig(
            impressions=impressions,
            conflict=conflict,
            click_rate=click_rate,
            watch_rate=watch_rate,
            planted_fields=planted_fields,
            request_size=request_size,
            seed=seed,
        ),
        out,
    )


app.command()(cli_update.update)
app.command()(cli_features.candidates)
app.command()(cli_features.features)
app.command()(cli_schema.schema)


@app.command()
def score(
    model: Artefact,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="[CANDIDATES] OUT",
            help="CANDIDATES: a Parquet or CSV file with every feature column of the model, as `candidates` writes it; "
            "none with --data. OUT: the file to write, .parquet or .csv: one row per candidate in their order, one "
            "column per task.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Score rows of the log in this folder, or at its URL, as `run --data` takes it, instead of "
            "CANDIDATES.",
        ),
    ] = None,
    days: Annotated[
        str | None,
        typer.Option(help="Which rows of --data: test (default), validation, train, or days such as DAY,DAY..DAY."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Columns to write before the scores, such as user_id,video_id. By default the group, the keys of the "
            "side tables, the day, and columns of CANDIDATES that are no feature; '' for none."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="How the MLP computes: fp32 (default), bf16 or int8; on a GPU fp32, bf16 or fp16."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, or a GPU such as cuda or cuda:1.")] = "cpu",
    plan: Annotated[
        Path | None,
        typer.Option(help="What `lt4rec-sparse plan` measured on this machine: which kernels run, in which precision."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Score a file of candidates, or a log's own rows, with an artefact."""
    from lt4rec_sparse.nn import Plan
    from lt4rec_sparse.ranker import load
    from lt4rec_sparse.recsys.data import open_source
    from lt4rec_sparse.recsys.data.remote import local_for
    from lt4rec_sparse.recsys.data.written import check_table_name
    from lt4rec_sparse.recsys.scoring import score_file, score_log

    *candidates, out = files
    if len(candidates) != (data is None):
        wanted = "CANDIDATES and OUT" if data is None else "OUT alone beside --data"
        raise InputError(f"score: got {', '.join(map(str, files))}, wanted {wanted}")
    if data is None and days is not None:
        raise InputError(f"--days: got {days!r} without --data, wanted both")
    check_out(out, model, *candidates, *([] if plan is None else [plan]))
    check_table_name(out)
    is_gpu = _is_gpu(device)
    measured = None if plan is None else Plan.load(plan)
    if measured is not None and precision not in (None, measured.precision):
        got = f"{precision} beside a plan that was measured for {measured.precision}"
        raise InputError(f"--precision: got {got}, wanted the same, or one of the two options")
    if is_gpu:
        ranker = load(model).on_gpu(precision or "fp32", measured, device)
    elif measured is not None:
        ranker = load(model).planned(measured)
    else:
        ranker = load(model, precision or "fp32")
    kept = None if keep is None else _names(keep)
    if data is None:
        score_file(ranker, candidates[0], out, kept)
        return
    schema = ranker.encoder.schema
    with shown_progress(quiet) as progress, local_for(data, out, schema, progress) as folder:
        source = open_source(folder, schema)
        check_out(out, *source.files)
        score_log(ranker, source, out, days or "test", kept, progress)


@app.command()
def plan(
    model: Artefact,
    out: Annotated[Path, typer.Argument(help="The file to write, for `lt4rec-sparse score --plan`.")],
    precision: Annotated[
        str,
        typer.Option(
            help="The lowest precision allowed: fp32, bf16 or int8. On a GPU the precision of all layers: fp32, bf16 "
            "or fp16."
        ),
    ] = "fp32",
    device: Annotated[str, typer.Option(help="What to measure: cpu, or a GPU such as cuda or cuda:1.")] = "cpu",
    batch: Annotated[
        list[int] | None,
        typer.Option(help="A request size to measure. May be given several times, in ascending order."),
    ] = None,
) -> None:
    """Measure which kernels are fastest on this machine.

    For each request size the artefact's layers are timed sparse and dense; `score --plan` follows the result.
    """
    from lt4rec_sparse.ranker import load

    check_out(out, model)
    _is_gpu(device)
    mlp = load(model).mlp
    try:
        measured = mlp.measure_plan(batch, precision, device)
    except ValueError as error:
        raise InputError(str(error)) from error
    measured.save(out)
    typer.echo(str(measured))


@app.command()
def export(
    model: Artefact,
    out: Annotated[Path, typer.Argument(help="The engine file to write.")],
    precision: Annotated[str, typer.Option(help="How the MLP computes: fp32, bf16 or int8.")] = "fp32",
) -> None:
    """Write an engine file, which C, C++, Rust or Go serve without Python."""
    from lt4rec_sparse.ranker import load

    check_out(out, model)
    load(model, precision).to_engine_file(out)
    typer.echo(f"{out}: {out.stat().st_size:,} bytes")


@app.command()
def inspect(model: Artefact) -> None:
    """Show the tasks, fields, layers and bytes of an artefact."""
    from lt4rec_sparse import ops
    from lt4rec_sparse.network import PRECISIONS
    from lt4rec_sparse.ranker import load

    ranker = load(model)
    network = ranker.mlp.network
    typer.echo(f"tasks: {', '.join(ranker.tasks)}")
    typer.echo(f"fields: {', '.join(field.column for field in ranker.encoder.fields)}")
    if ranker.encoder.numbers:
        inputs = (f"{name} ({width})" for name, width in ranker.encoder.numbers.items())
        typer.echo(f"numbers (inputs): {', '.join(inputs)}")
    for i, layer in enumerate(network.hidden):
        kept = ", ".join(f"{task} {layer.weight.mask(task).float().mean().item():.1%}" for task in ranker.tasks)
        rows, columns = layer.weight.shape
        typer.echo(f"layer {i}: {columns} -> {rows}, kept by {kept}, {layer.weight.nbytes:,} bytes")
    is_calibrated = network.quantization is not None
    kinds = [precision for precision in PRECISIONS if is_calibrated or precision != "int8"]
    typer.echo(f"MLP: {network.nbytes:,} bytes; prepacked in memory, for the batch sizes in use:")
    for kind in kinds:
        layouts = [f"{nbytes:,} as {layout}" for layout, nbytes in ops.layout_nbytes(network, kind).items()]
        typer.echo(f"  {kind}: {', '.join(layouts) or 'no engine'}")
    typer.echo(f"calibrated for int8: {'yes' if is_calibrated else 'no'}")
    kind = "" if ranker.inputs.kind == "fp32" else f" in {ranker.inputs.kind}"
    typer.echo(f"embeddings: {ranker.inputs.nbytes:,} bytes{kind}")
    if ranker.inputs.absent:
        typer.echo(f"embeddings that must be given: {', '.join(sorted(ranker.inputs.absent))}")
    if ranker.encoder.until is not None:
        typer.echo(f"trained until: {ranker.encoder.until}")


app.command()(cli_diff.diff)
app.command()(serve)


def _is_gpu(device: str) -> bool:
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device: got {device!r}, wanted cpu or cuda")
    return kind == "cuda"


def check_out(out: Path, *inputs: Path) -> None:
    """Refuse a file that cannot be written, or is read, before hours of work, not after them."""
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"OUT: got {str(out)!r}, wanted a file in a folder that exists")
    if any(path.exists() and out.exists() and out.samefile(path) for path in inputs):
        raise InputError(f"OUT: got {str(out)!r}, which is read, wanted another file")


@contextmanager
def shown_progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show each stage on stderr, with the time left: a bar on a terminal, lines elsewhere, nothing if `quiet`."""
    if quiet:
        yield lambda stage, done, total: None
        return

    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(lambda line: typer.echo(line, err=True))
        return
    bars: dict[str, rich.TaskID] = {}
    text = rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()
    times = rich.TimeElapsedColumn(), rich.TextColumn("left:"), rich.TimeRemainingColumn()
    with rich.Progress(*text, *times, console=console) as shown:

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = shown.add_task(stage, total=total)
            shown.update(bars[stage], completed=done, total=total)

        yield progress


class Lines:
    """Progress as lines of text: at a stage's first and last step, and at most every `LINE_SECONDS` in between."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._begun: dict[str, tuple[float, int]] = {}  # stage -> when it was first heard of, and the steps done then
        self._written: dict[str, tuple[float, str]] = {}  # stage -> when its last line was written, and that line

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take in that `done` of `total` steps of a stage are done."""
        now = time.monotonic()
        begun, before = self._begun.setdefault(stage, (now, done))
        line = f"{stage}: {done} of {total}"
        last = self._written.get(stage)
        if last is not None and (last[1] == line or (done < total and now - last[0] < LINE_SECONDS)):
            return
        self._written[stage] = now, line
        if before < done < total:
            line += f", about {_duration((now - begun) / (done - before) * (total - done))} left"
        self._write(line)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _warn(warning: str) -> None:
    typer.echo(f"warning: {warning}", err=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _widths(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--hidden: got {text!r}, wanted widths such as 512,256,128") from error
    if max(found) > MAX_WIDTH:
        raise InputError(f"--hidden: got {text!r}, wanted widths of at most {MAX_WIDTH}")
    return found


def _numbers(text: str) -> tuple[float, ...]:
    """Return "0.0005,0.001" as numbers; of any other text, or an infinite number or NaN, raise ValueError."""
    found = tuple(float(part) for part in text.split(","))
    if not all(map(math.isfinite, found)):
        raise ValueError("got an infinite number")
    return found


def _rates(text: str) -> tuple[float, ...]:
    try:
        return _numbers(text)
    except ValueError as error:
        raise InputError(f"--learning-rate: got {text!r}, wanted finite numbers such as 0.0005,0.001,0.002") from error


def _conflict(text: str) -> Conflict:
    from lt4rec_sparse.recsys.models import Conflict

    try:
        long_ms, long_ratio, short_ratio, click, watch = _numbers(text)
        return Conflict(long_ms, long_ratio, short_ratio, click, watch)
    except ValueError as error:
        raise InputError(f"--conflict: got {text!r}, wanted five numbers such as 60000,0.1,0.2,0.2,5") from error


def _losses(named: list[str]) -> tuple[tuple[str, str], ...]:
    """Return ["ctr=focal"] as (task, loss)."""
    pairs = [text.partition("=") for text in named]
    found = {task: loss for task, _, loss in pairs}
    if len(found) < len(pairs) or not all(task and loss for task, _, loss in pairs):
        raise InputError(f"--loss: got {' '.join(named)}, wanted pairs such as ctr=focal, at most one per task")
    return tuple(sorted(found.items()))


def training_dtype(precision: str) -> str:
    """Return the dtype in which training multiplies matrices."""
    from lt4rec_sparse.recsys.training import fastest_dtype

    if precision == "auto":
        return fastest_dtype()
    if precision not in TRAINING_DTYPES:
        raise InputError(f"--precision: got {precision!r}, wanted one of auto, {', '.join(TRAINING_DTYPES)}")
    return TRAINING_DTYPES[precision]
