"""The ``hwnas`` command: thin verbs over the stages. Heavy modules are imported only
when a verb runs, so that ``hwnas --help`` is fast.

Exit codes: 0 done, 1 a check failed, 2 wrong usage or configuration, 3 device
unavailable.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from hwnas import __version__
from hwnas.errors import ConfigError, DataProblemsError, HwnasError, UserError
from hwnas.interruption import raising
from hwnas.printable import one_line, printable

if TYPE_CHECKING:
    from hwnas.config import Experiment
    from hwnas.pipeline import Pipeline

PACKAGE_FOLDER = str(Path(__file__).parent)
"""A warning attributed to a file below this folder is one that hwnas itself raised."""

PYTHON_SHOWWARNING = warnings.showwarning
"""Python's own display of warnings, before ``main`` replaces it."""

app = typer.Typer(
    name="hwnas",
    help=(
        "A phone, a data set and a latency budget in; a trained network that meets the budget out."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
table_app = typer.Typer(
    help="Show latency tables; import, compare and fit them.", no_args_is_help=True
)
app.add_typer(table_app, name="table")
study_app = typer.Typer(help="Study the methods themselves.", no_args_is_help=True)
app.add_typer(study_app, name="study")

# Every argument and option that a verb takes, declared once. Verbs that share one also
# share its help text.

Config = Annotated[
    Path | None,
    typer.Argument(
        help="an experiment (.toml) or the folder of an earlier run; default: built-in settings"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "-s", metavar="KEY=VALUE", help="set one key of the configuration: -s search.target_ms=3"
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="run folder; default: runs/<name of the experiment>")
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh/--resume", help="start again (earlier results are moved aside) or resume"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Quiet = Annotated[bool, typer.Option("-q", help="print errors only")]
Verbose = Annotated[
    bool, typer.Option("-v", help="more detail: why a stage runs, every candidate, noisy entries")
]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
Plan = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="print what would be done and how long it takes (-q: without timing a few steps)",
    ),
]
SpaceOrExperiment = Annotated[
    str, typer.Argument(help="a space, an experiment (.toml) or a run folder")
]
CoverageTable = Annotated[Path | None, typer.Argument(help="a latency table, to show its coverage")]
TableFile = Annotated[Path, typer.Argument(help="a latency table (.json)")]
OtherTable = Annotated[Path, typer.Argument(help="another latency table (.json)")]
NewTable = Annotated[Path, typer.Option("--out", help="the table to write (.json)")]
PublishedTable = Annotated[Path, typer.Argument(help="a published table, gzipped or not")]
TableFormat = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME[:COLUMN]",
        help="proxylessnas, ofa, single_path, tfnas, fbnet or tunas",
    ),
]
MeasuredNetworks = Annotated[
    Path,
    typer.Argument(
        help="measured networks (.csv): architecture,ms; a name, a document, positions or picks"
    ),
]
SpaceName = Annotated[
    str,
    typer.Option("--space", metavar="NAME", help="a built-in space or a space document (.json)"),
]
PriorTables = Annotated[
    list[Path] | None,
    typer.Option("--prior", help="a table of the same space from another device; may be repeated"),
]


def main() -> None:
    """Entry point: runs the app. An error that the user can act on becomes one sentence
    and an exit code.
    """
    warnings.showwarning = _show_warning
    try:
        app()
    except HwnasError as error:
        if "--debug" in sys.argv:
            raise
        # only a list of problems has several lines
        text = str(error) if isinstance(error, DataProblemsError) else one_line(str(error))
        _echo(f"error: {text}", err=True)
        sys.exit(error.exit_code)


def _echo(text: str, *, nl: bool = True, err: bool = False) -> None:
    """Print a text, in which names from files cannot control the terminal."""
    typer.echo(printable(text), nl=nl, err=err)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of hwnas as one plain line on standard error; the source
    location means nothing to a user. Warnings of other packages keep Python's format.
    """
    is_for_users = issubclass(category, FutureWarning | UserWarning)
    if is_for_users and filename.startswith(PACKAGE_FOLDER):
        _echo(f"warning: {message}", err=True)
    else:
        PYTHON_SHOWWARNING(message, category, filename, lineno, file, line)


def _pipeline(
    verb: str,
    config: Path | None,
    overrides: list[str] | None,
    out: Path | None,
    quiet: bool,
    verbose: bool,
) -> Pipeline:
    """The experiment of a TOML file, of a run folder, or of the defaults, with its run
    folder. Raises ConfigError if a key that the user set has no effect.
    """
    from hwnas.unused import check_used

    pipeline = _unchecked(config, overrides, out, quiet, verbose)
    # The config.json of a run folder contains every key, so it does not show which keys
    # the user set.
    is_run_folder = config is not None and config.is_dir()
    if not is_run_folder:
        check_used(pipeline.experiment, verb, overrides or [], pipeline.progress)
    return pipeline


def _unchecked(
    config: Path | None, overrides: list[str] | None, out: Path | None, quiet: bool, verbose: bool
) -> Pipeline:
    from hwnas.pipeline import Pipeline
    from hwnas.terminal import TerminalProgress

    experiment = _experiment(config, overrides)
    root = out
    if root is None and config is not None and config.is_dir():
        root = config
    if root is None:
        root = Path("runs") / _run_name(experiment, config)
    return Pipeline(experiment, root, TerminalProgress(quiet=quiet, verbose=verbose))


def _run_name(experiment: Experiment, config: Path | None) -> str:
    """The name of the run folder: that of the experiment, else that of its file. Raises
    ConfigError if the file's name cannot be one.
    """
    from hwnas.config.experiment import checked_name

    if config is None or "name" in experiment.model_fields_set:
        return experiment.name
    try:
        return checked_name(config.stem)
    except ValueError as error:
        raise ConfigError(f"{config} gives its run folder no name: {error}.") from error


def _experiment(config: Path | None, overrides: list[str] | None) -> Experiment:
    """The experiment of a TOML file, of a run folder, or of the defaults."""
    from hwnas.config import load_experiment
    from hwnas.document import user_path
    from hwnas.runs import load_config

    if config is None or not user_path(str(config), "CONFIG").is_dir():
        return load_experiment(config, overrides)
    if overrides:
        raise UserError(
            f"{config} is a run folder with its own configuration: give the .toml file to"
            f" change {overrides[0]!r}."
        )
    return load_config(config)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end a stage with one sentence. The files of the stage
    allow the same command to resume.
    """
    with raising() as interruption:
        try:
            yield
        except (KeyboardInterrupt, OSError):
            number = interruption.number
            # an OSError after SIGHUP: the closed terminal refuses the end of a progress bar
            if number is None:
                raise
            by = "" if number == signal.SIGINT else f" by {number.name}"
            with contextlib.suppress(OSError):
                _echo(f"interrupted{by}: run the same command again to resume", err=True)
            raise typer.Exit(128 + number) from None  # as shells report it


def _run_stage(name: str, pipeline: Pipeline, fresh: bool, as_json: bool) -> None:
    """Run one stage and print its result: the document or the path."""
    with _interruptible():
        pipeline.run_stage(name, fresh=fresh)
    _print_result(pipeline.root / name / pipeline.stage(name).result, as_json)


def _print_result(path: Path, as_json: bool) -> None:
    if not as_json:
        _echo(str(path))
    elif path.suffix == ".json":
        _echo(path.read_text(), nl=False)
    else:
        _echo(json.dumps({"path": str(path)}))


def _check_verdict(pipeline: Pipeline) -> None:
    """Exit with code 1 if validation failed."""
    from hwnas.verdict import Verdict

    path = pipeline.root / "validate" / "verdict.json"
    if path.exists() and not Verdict.load(path).passed:
        raise typer.Exit(1)


@app.command()
def run(
    config: Config = None,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
    plan: Plan = False,
) -> None:
    """Run all stages: profile, search, train, export, validate, report. Those that are
    up to date are skipped.
    """
    pipeline = _pipeline("run", config, overrides, out, quiet, verbose)
    if plan:
        _echo(pipeline.plan(timed=not quiet))
        return

    with _interruptible():
        pipeline.run(fresh=fresh)
    result = "validate/verdict.json" if as_json else "report/report.html"
    _print_result(pipeline.root / result, as_json)
    _check_verdict(pipeline)


@app.command()
def profile(
    config: Config = None,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Measure every op of the space and some whole networks on a device, and write a
    calibrated latency table.
    """
    pipeline = _pipeline("profile", config, overrides, out, quiet, verbose)
    _run_stage("profile", pipeline, fresh, as_json)


@app.command()
def search(
    config: Config = None,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Search the space for the most accurate architecture at the target latency."""
    pipeline = _pipeline("search", config, overrides, out, quiet, verbose)
    _run_stage("search", pipeline, fresh, as_json)


@app.command()
def train(
    config: Config = None,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Train the architecture that the search found, or the one that
    train.arch names.
    """
    pipeline = _pipeline("train", config, overrides, out, quiet, verbose)
    _run_stage("train", pipeline, fresh, as_json)


@app.command()
def export(
    config: Config = None,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a bundle: TFLite and ONNX files with labels, preprocessing and parity
    numbers.
    """
    pipeline = _pipeline("export", config, overrides, out, quiet, verbose)
    _run_stage("export", pipeline, fresh, as_json)


@app.command()
def validate(
    config: Config = None,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run the bundle on the device and check that latency is as predicted and accuracy
    as trained; if not, exit with code 1.
    """
    pipeline = _pipeline("validate", config, overrides, out, quiet, verbose)
    _run_stage("validate", pipeline, fresh, as_json)
    _check_verdict(pipeline)


@app.command()
def report(
    config: Config = None,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Report the results in a run folder as one self-contained HTML file."""
    pipeline = _pipeline("report", config, overrides, out, quiet, verbose)
    _run_stage("report", pipeline, fresh, as_json)


@app.command()
def space(
    config: SpaceOrExperiment,
    table: CoverageTable = None,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a built-in space, or the space of an experiment fitted to its data: its
    size, the ops to measure, a sample, and what a table covers and predicts.
    """
    from hwnas.core.describe import coverage, describe_space
    from hwnas.core.table import LatencyTable
    from hwnas.shown import shown_space

    shown = shown_space(config, overrides or [])
    path = table or shown.table_path
    latency_table = LatencyTable.load(path) if path is not None else None
    if not as_json:
        _echo(describe_space(shown.space, latency_table, shown.networks))
    elif latency_table is None:
        _echo(shown.space.to_json(), nl=False)
    else:
        _echo(json.dumps(coverage(shown.space, latency_table, shown.networks), indent=1))


@app.command()
def data(
    config: Config = None,
    overrides: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check the images of an experiment. Decodes all of them once; prints classes, sizes
    and whatever would stop a later stage, and then exits with code 2.
    """
    from hwnas.data import summary
    from hwnas.preflight import inspect_data, needed_stages
    from hwnas.terminal import TerminalProgress

    experiment = _experiment(config, overrides)
    with _interruptible():
        inspection = inspect_data(
            experiment, needed_stages(experiment), TerminalProgress(quiet=quiet)
        )
    if as_json:
        _echo(json.dumps(summary.as_json(inspection, experiment.data), indent=1))
    elif quiet:
        inspection.check()
    else:
        _echo(summary.as_text(inspection, experiment.data))
    if inspection.problems:
        raise typer.Exit(2)


@app.command()
def devices(as_json: Json = False, debug: Debug = False) -> None:
    """List the devices that a configuration can name, and the phones that
    are attached.
    """
    from hwnas.devices.adb_client import attached_phones
    from hwnas.devices.device import known_devices

    known = known_devices()
    phones = attached_phones()
    if as_json:
        documents = {name: device.model_dump(mode="json") for name, device in known.items()}
        states = {f"adb:{serial}": {"state": state} for serial, state in phones.items()}
        _echo(json.dumps({**documents, **states}, indent=1))
        return

    rows = [(name, device.connection, device.soc) for name, device in known.items()]
    rows += [(f"adb:{serial}", "adb", state) for serial, state in phones.items()]
    if not phones:
        rows.append(("adb", "adb", "an Android phone; `adb devices` lists none at the moment"))
    rows.append(("ssh:USER@HOST", "ssh", "any board or server that `ssh USER@HOST` reaches"))
    for name, connection, text in rows:
        _echo(f"{name:20} {connection:10} {text}")


@table_app.command("show")
def table_show(path: TableFile, as_json: Json = False, debug: Debug = False) -> None:
    """Show a table: its conditions, its calibration and its entries."""
    from hwnas.core.describe import describe_table
    from hwnas.core.table import LatencyTable

    table = LatencyTable.load(path)
    if as_json:
        _echo(table.to_json(), nl=False)
    else:
        _echo(describe_table(table))


@table_app.command("import")
def table_import(
    file: PublishedTable,
    format_name: TableFormat,
    out: NewTable,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a published table to the format of hwnas; lists the entries of the source
    that match no op.
    """
    from hwnas.tables.formats import import_table

    if out.resolve() == file.resolve():
        raise UserError(
            f"--out {out} is also the file to import, and would be overwritten: choose another"
            " path."
        )
    imported = import_table(file, format_name)
    imported.table.save(out)
    count = len(imported.table.entries) + sum(map(len, imported.table.slots.values()))
    if as_json:
        # "prices" is the old name of "entries", for one release
        result = {"path": str(out), "entries": count, "prices": count}
        _echo(json.dumps({**result, "unmapped": imported.unmapped}))
        return

    colon = ":" if imported.unmapped else ""
    unmapped_count = len(imported.unmapped)
    _echo(f"{out}\n{count} entries; {unmapped_count} of the source not mapped{colon}")
    for name, reason in imported.unmapped.items():
        _echo(f"  {name}: {reason}")


@table_app.command("compare")
def table_compare(a: TableFile, b: OtherTable, as_json: Json = False, debug: Debug = False) -> None:
    """Compare what the same ops cost in two tables: the ratios, their range, and their
    rank correlation.
    """
    import shutil

    from hwnas.core.table import LatencyTable
    from hwnas.document import uncollected
    from hwnas.tables.compare import compare, describe_comparison

    with uncollected():  # 100,000 ops are a million objects
        comparison = compare(LatencyTable.load(a), LatencyTable.load(b))
        if as_json:
            text = json.dumps(comparison.to_dict(), indent=1)
        else:
            width = shutil.get_terminal_size((100, 40)).columns
            text = describe_comparison(comparison, width)
    _echo(text)


@table_app.command("fit")
def table_fit(
    file: MeasuredNetworks,
    space_name: SpaceName,
    out: NewTable,
    prior: PriorTables = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit a table to the measured latencies of whole networks; reports the
    cross-validated error, and whether more networks would help.
    """
    from hwnas.core.spaces import load_space
    from hwnas.core.table import LatencyTable
    from hwnas.tables.networks import fit_from_csv

    prior_paths = prior or []
    inputs = {path.resolve() for path in (file, *prior_paths)}
    if out.resolve() in inputs:
        raise UserError(
            f"--out {out} is also an input, and would be overwritten: choose another path."
        )
    priors = [LatencyTable.load(path) for path in prior_paths]
    table = fit_from_csv(file, load_space(space_name), priors)
    table.save(out)
    if as_json:
        _echo(json.dumps({"path": str(out), **table.provenance}))
        return
    _echo(f"{out}\n{table.provenance['more_networks']}\n{table.provenance['prior_alone']}")


def _study(
    study: Callable[..., None], result: str, pipeline: Pipeline, fresh: bool, as_json: bool
) -> None:
    with _interruptible():
        study(pipeline, fresh=fresh)
    _print_result(pipeline.root / result, as_json)


@study_app.command("rank")
def study_rank(
    config: Config = None,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compare the scores of a super-net with known accuracies: does it rank
    architectures correctly?
    """
    from hwnas.studies import study_rank as study

    pipeline = _pipeline("study rank", config, overrides, out, quiet, verbose)
    _study(study, "rank/study.json", pipeline, fresh, as_json)


@study_app.command("compare")
def study_compare(
    config: Config = None,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compare search methods by the true accuracy of what they find: do they beat
    random search at equal cost?
    """
    from hwnas.studies import study_compare as study

    pipeline = _pipeline("study compare", config, overrides, out, quiet, verbose)
    _study(study, "compare/compare.json", pipeline, fresh, as_json)


@study_app.command("shrink")
def study_shrink(
    config: Config = None,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Shrink a space by dropping the operators that a super-net scores lowest; reports
    how many good networks remain.
    """
    from hwnas.studies import study_shrink as study

    pipeline = _pipeline("study shrink", config, overrides, out, quiet, verbose)
    _study(study, "shrink/shrink.json", pipeline, fresh, as_json)


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Check this installation: packages, runtimes, threads, cores, clock. Exits with
    code 1 if something is missing.
    """
    from hwnas.doctor import examine

    findings = examine()
    if as_json:
        _echo(json.dumps([finding.__dict__ for finding in findings], indent=1))
    else:
        for finding in findings:
            state = "ok     " if finding.good else "MISSING"
            _echo(f"{state} {finding.subject:18} {finding.text}")
    if not all(finding.good for finding in findings):
        raise typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        _echo(f"hwnas {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass
