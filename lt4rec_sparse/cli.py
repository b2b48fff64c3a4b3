"""The command line: `lt4rec-sparse run`, `experiment`, `simulate`, `score`, `plan`, `inspect`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lt4rec_sparse.errors import InputError

if TYPE_CHECKING:
    from lt4rec_sparse.recsys.models import Conflict

# Click's own in older versions of typer, a copy within typer in newer ones.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Commands(typer.core.TyperGroup):
    """The commands, each of which answers bad input in one line."""

    def invoke(self, ctx: Any) -> Any:
        """Parse a command's arguments and run it."""
        with one_line_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=__doc__,
    rich_markup_mode="markdown",
)


@app.command()
def run(
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder in KuaiRand's layout, or with Parquet or CSV files and a schema.toml; else simulated."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; a run that stopped goes on there.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 1,
    epochs: Annotated[int | None, typer.Option(help="Epochs of every training: 1, or 2 on the simulated log.")] = None,
    masks: Annotated[
        str,
        typer.Option(help="random, without a search; tickets, the paper's; or best: both, and validation chooses."),
    ] = "best",
    rounds: Annotated[
        int | None, typer.Option(help="Rounds of pruning per task, for tickets: 4, or 2 on the simulated log.")
    ] = None,
    density: Annotated[
        float, typer.Option(help="Share of the hidden weights that a random mask keeps, or the last ticket.")
    ] = 0.2,
    batch_size: Annotated[int | None, typer.Option(help="Impressions per batch: 1024, or 512 simulated.")] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(help="Adam's, 0.001; of several, as 0.0005,0.001, validation chooses one per task and model."),
    ] = None,
    products: Annotated[
        str,
        typer.Option(help="Dtype of matrix products while training: auto (the faster one here), float32, bfloat16."),
    ] = "auto",
    workers: Annotated[int | None, typer.Option(help="Processes that train side by side; one per core.")] = None,
    embedding_dim: Annotated[int | None, typer.Option(help="Width of an embedding: 16, or 8 simulated.")] = None,
    hidden: Annotated[
        str | None, typer.Option(help="Widths of the MLP's hidden layers: 512,256,128, or half of them simulated.")
    ] = None,
    granularity: Annotated[
        str, typer.Option(help="What pruning takes as one: weight, 2:4, block4, block16, block32, block64 or neuron.")
    ] = "weight",
    tasks: Annotated[str, typer.Option(help="Names, such as ctr,cvr,like; all but the schema's extra ones.")] = "",
) -> None:
    """Give each task a mask, train one shared network, freeze it, and report it against its opponents."""
    from lt4rec_sparse.recsys.harness.settings import SIMULATED, RunSettings
    from lt4rec_sparse.recsys.harness.study import Resources
    from lt4rec_sparse.recsys.run import run as run_experiment

    default = RunSettings() if data else SIMULATED
    settings = RunSettings(
        seeds=seeds,
        embedding_dim=default.embedding_dim if embedding_dim is None else embedding_dim,
        hidden=default.hidden if hidden is None else widths(hidden),
        learning_rates=default.learning_rates if learning_rate is None else rates(learning_rate),
        epochs=default.epochs if epochs is None else epochs,
        batch_size=default.batch_size if batch_size is None else batch_size,
        masks=masks,
        rounds=default.rounds if rounds is None else rounds,
        density=density,
        granularity=granularity,
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        dtype=dtype_of(products),
    )
    out = out or Path("runs") / (data.resolve().name if data else "simulated")
    with progress_bars() as progress:
        finished = run_experiment(data, out, settings, progress, Resources(workers))
    typer.echo(finished.verdict)
    typer.echo(f"{finished.report}, report.html, model.safetensors, metrics.jsonl")


@app.command()
def experiment(
    name: Annotated[
        str, typer.Argument(help="table2, table3, figure4, granularity, cheap, tickets, tasks, or regimes (simulated).")
    ],
    data: Annotated[
        Path | None, typer.Option(help="A folder in KuaiRand's layout, or with a schema.toml; not for regimes.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where all experiments on this log stand; what stopped goes on there.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds of every row.")] = 5,
    workers: Annotated[int | None, typer.Option(help="Processes side by side; one a core.")] = None,
    executor: Annotated[str, typer.Option(help="processes, ray (where it is installed), or here.")] = "processes",
    epochs: Annotated[int, typer.Option(help="Epochs of every training.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Impressions a batch.")] = 1024,
    embedding_dim: Annotated[int, typer.Option(help="Width of an embedding.")] = 16,
    hidden: Annotated[str, typer.Option(help="Widths of the MLP's hidden layers.")] = "512,256,128",
    cross: Annotated[str, typer.Option(help="dlrm, wide_deep or deepfm.")] = "dlrm",
    products: Annotated[
        str,
        typer.Option(help="Dtype of matrix products while training: auto (the faster one here), float32, bfloat16."),
    ] = "auto",
    loss: Annotated[
        list[str] | None, typer.Option(help="A task's loss, such as ctr=focal: bce, focal or mse; for each task once.")
    ] = None,
    cvr_scale: Annotated[float, typer.Option(help="Eq 2's b beside a = 1, of S-Weight-taskbalance.")] = 5.0,
    conflict: Annotated[
        str,
        typer.Option(
            help="Of S-Weight-gradientconflict: when a video is long (ms), below which ratios a long and a short one "
            "are hardly watched, and what such a row counts for the click and for the watching."
        ),
    ] = "60000,0.1,0.2,0.2,5",
    exclusive_dim: Annotated[
        int | None,
        typer.Option(help="Width of a task's own embedding, of S-Weight-multiview; a quarter of the others'."),
    ] = None,
    wider: Annotated[float, typer.Option(help="Width factor of S-Weight-biggernet.")] = 1.375,
    impressions: Annotated[int, typer.Option(help="Of each simulated log of regimes.")] = 2_000_000,
) -> None:
    """Carry out a declared experiment of the paper, or beyond it, over seeds, and write its tables and plots."""
    from lt4rec_sparse.paper.declared import Variants
    from lt4rec_sparse.paper.experiment import run_experiment
    from lt4rec_sparse.paper.regimes import TRAINING, Regimes, run_regimes
    from lt4rec_sparse.recsys.harness.study import Resources
    from lt4rec_sparse.recsys.harness.trials import Training

    if name == "regimes":
        if data is not None:
            raise InputError(f"--data: got {data} for regimes, wanted none: its logs are simulated")
        out = out or Path("runs") / "experiments" / "regimes"
        regimes = Regimes(impressions, training=replace(TRAINING, dtype=dtype_of(products)))
        with progress_bars() as progress:
            report = run_regimes(out, seeds, regimes, Resources(workers, executor), progress)
        typer.echo(f"{report}, report.html, records.json")
        return
    if data is None:
        raise InputError("--data: got none, wanted a folder with a log")
    training = Training(
        hidden=widths(hidden),
        embedding_dim=embedding_dim,
        epochs=epochs,
        batch_size=batch_size,
        cross=cross,
        losses=tuple(sorted(losses(loss or []).items())),
        dtype=dtype_of(products),
    )
    variants = Variants(cvr_scale, conflict_of(conflict), exclusive_dim, wider)
    out = out or Path("runs") / "experiments" / data.resolve().name
    with progress_bars() as progress:
        report = run_experiment(name, data, out, seeds, training, Resources(workers, executor), progress, variants)
    typer.echo(f"{report}, report.html, records.json")


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    impressions: Annotated[int, typer.Option(help="Rows of the log.")] = 80_000,
    conflict: Annotated[float, typer.Option(help="How far the tasks oppose each other, 0 to 1.")] = 0.5,
    click_rate: Annotated[float, typer.Option(help="Share of impressions that are clicked.")] = 0.35,
    watch_rate: Annotated[float | None, typer.Option(help="Share of clicks that are viewed long.")] = None,
    planted_fields: Annotated[int, typer.Option(help="Fields of each kind and side whose use is known.")] = 0,
    request_size: Annotated[int, typer.Option(help="Videos shown at once.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Write a click log with planted truth: Parquet files and their schema.toml."""
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


@app.command()
def score(
    model: Annotated[Path, typer.Argument(help="The artefact, model.safetensors.")],
    candidates: Annotated[Path, typer.Argument(help="A Parquet or CSV file with the model's feature columns.")],
    out: Annotated[Path, typer.Argument(help="The Parquet file to write: one column a task.")],
    precision: Annotated[
        str, typer.Option(help="How the MLP computes: fp32, bf16 or int8; on a GPU fp32, bf16 or fp16.")
    ] = "fp32",
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, or a GPU, as cuda or cuda:1.")] = "cpu",
    plan: Annotated[Path | None, typer.Option(help="What `plan` measured here; it decides the precision.")] = None,
) -> None:
    """Score a file of candidates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lt4rec_sparse.files import whole_file
    from lt4rec_sparse.nn import Plan
    from lt4rec_sparse.ranker import load
    from lt4rec_sparse.recsys.data import read_candidates

    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"OUT: got {str(out)!r}, wanted a file in a folder that exists")
    measured = None if plan is None else Plan.load(plan)
    if _is_gpu(device):
        ranker = load(model).on_gpu(precision, measured, device)
    elif measured is not None:
        ranker = load(model).planned(measured)
    else:
        ranker = load(model, precision)
    scores = ranker.score(read_candidates(candidates, ranker.encoder.schema))
    with whole_file(out) as temporary:
        pq.write_table(pa.table(dict(scores)), temporary)


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="The artefact, model.safetensors.")],
    out: Annotated[Path, typer.Argument(help="The file to write, for `score --plan`.")],
    precision: Annotated[
        str, typer.Option(help="The lowest allowed: fp32, bf16 or int8; on a GPU the one of all: fp32, bf16 or fp16.")
    ] = "fp32",
    device: Annotated[str, typer.Option(help="What to measure: cpu, or a GPU, as cuda or cuda:1.")] = "cpu",
    batch: Annotated[
        list[int] | None, typer.Option(help="A request size to measure; as often as wanted, ascending.")
    ] = None,
) -> None:
    """Measure which kernels serve an artefact fastest here, batch size by batch size."""
    import torch

    from lt4rec_sparse.nn import Plan, SparseMLP, measure_plan
    from lt4rec_sparse.ranker import load

    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"OUT: got {str(out)!r}, wanted a file in a folder that exists")
    is_gpu = _is_gpu(device)
    mlp = load(model).mlp
    assert isinstance(mlp, SparseMLP)
    if is_gpu and not torch.cuda.is_available():
        raise InputError(f"device: got {device}, wanted one that this machine's torch sees: cpu")
    sizes = {"batch_sizes": batch} if batch else {}
    try:
        if is_gpu:
            measured = measure_plan(mlp, precision=precision, device=device, **sizes)
        else:
            measured = Plan.measure(mlp, precision=precision, **sizes)
    except ValueError as error:
        raise InputError(str(error)) from error
    measured.save(out)
    Console(highlight=False, markup=False, soft_wrap=True).print(str(measured))


@app.command()
def inspect(model: Annotated[Path, typer.Argument(help="The artefact, model.safetensors.")]) -> None:
    """Show what an artefact holds: tasks, fields, layers, densities, precisions, bytes."""
    from lt4rec_sparse.ops import PRECISIONS
    from lt4rec_sparse.ranker import load

    ranker = load(model)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"tasks: {', '.join(ranker.tasks)}")
    console.print(f"fields: {', '.join(field.column for field in ranker.encoder.fields)}")
    for i, layer in enumerate(ranker.mlp.hidden):
        density = {task: f"{layer.weight.mask(task).float().mean().item():.1%}" for task in ranker.tasks}
        rows, columns = layer.weight.shape
        console.print(f"layer {i}: {columns} -> {rows}, kept by {density}, {layer.weight.nbytes:,} bytes")
    is_calibrated = ranker.mlp.codes is not None
    kinds = [precision for precision in PRECISIONS if is_calibrated or precision != "int8"]
    prepacked = ", ".join(f"{kind} {ranker.to_precision(kind).mlp.prepacked_nbytes:,}" for kind in kinds)
    console.print(f"MLP: {ranker.mlp.nbytes:,} bytes, prepacked in memory: {prepacked}")
    console.print(f"calibrated for int8: {'yes' if is_calibrated else 'no'}")
    console.print(f"embeddings: {ranker.inputs.embedding.numel() * 4:,} bytes")


def _is_gpu(device: str) -> bool:
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device: got {device!r}, wanted cpu or cuda")
    return kind == "cuda"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error of the user's input into one line on stderr and exit code 2."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has enough of it; typer ends quietly
    except (InputError, OSError, UsageError) as error:
        text = getattr(error, "format_message", error.__str__)()  # the latter leaves out which option it was
        typer.echo(f"lt4rec-sparse: {' '.join(text.split())}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar a stage while it runs, and a line once it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    started: dict[str, TaskID] = {}
    said: set[str] = set()  # a stage may begin again: a search of rates goes on where the best is at an edge
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in started:
                started[stage] = bars.add_task(stage, total=total)
            bars.update(started[stage], completed=done, total=total)
            if done == total:
                bars.stop_task(started[stage])
                if not console.is_terminal and stage not in said:
                    said.add(stage)
                    console.print(f"done: {stage}", highlight=False)

        yield progress


def widths(text: str) -> tuple[int, ...]:
    """Return "512,256,128" as numbers.

    Raises:
        InputError: If a part is no number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--hidden: got {text!r}, wanted widths such as 512,256,128") from error


def rates(text: str) -> tuple[float, ...]:
    """Return "0.0005,0.001" as numbers.

    Raises:
        InputError: If a part is no number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--learning-rate: got {text!r}, wanted numbers such as 0.0005,0.001,0.002") from error


def dtype_of(products: str) -> str:
    """Return the dtype that matrix products compute in while training; "auto" is the faster one on this machine."""
    from lt4rec_sparse.recsys.training import fastest_dtype

    return fastest_dtype() if products == "auto" else products


def losses(named: list[str]) -> dict[str, str]:
    """Return ["ctr=focal"] as task -> loss.

    Raises:
        InputError: If one is no pair, or a task stands twice.
    """
    pairs = [text.partition("=") for text in named]
    found = {task: loss for task, _, loss in pairs}
    if len(found) < len(pairs) or not all(task and loss for task, _, loss in pairs):
        raise InputError(f"--loss: got {' '.join(named)}, wanted such as ctr=focal, for each task once")
    return found


def conflict_of(text: str) -> Conflict:
    """Return "60000,0.1,0.2,0.2,5" as thresholds and factors.

    Raises:
        InputError: If they are not five numbers of at least 0.
    """
    from lt4rec_sparse.recsys.models import Conflict

    try:
        long_ms, long_ratio, short_ratio, click, watch = (float(part) for part in text.split(","))
        return Conflict(long_ms, long_ratio, short_ratio, click, watch)
    except ValueError as error:
        raise InputError(f"--conflict: got {text!r}, wanted five numbers such as 60000,0.1,0.2,0.2,5") from error


def main() -> None:
    """Run the command line."""
    app(prog_name="lt4rec-sparse")


if __name__ == "__main__":
    main()
