"""The ``hwnas`` command: thin verbs over the stages. Nothing heavy is imported before a verb runs.

Exit codes: 0 done, 1 a check failed, 2 usage or configuration, 3 device unavailable.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hwnas import __version__
from hwnas.errors import HwnasError, UserError

if TYPE_CHECKING:
    from hwnas.pipeline import Pipeline

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
    help="Look at latency tables; read and compare those of others.", no_args_is_help=True
)
app.add_typer(table_app, name="table")
study_app = typer.Typer(help="Study the methods themselves.", no_args_is_help=True)
app.add_typer(study_app, name="study")

Config = Annotated[
    Path | None,
    typer.Argument(
        help="an experiment (.toml), or the folder of an earlier run; default: built-in settings"
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
    typer.Option("--fresh/--resume", help="start anew (earlier results are kept beside), or go on"),
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Quiet = Annotated[bool, typer.Option("-q", help="errors only")]
Verbose = Annotated[
    bool, typer.Option("-v", help="more detail: why a stage runs, every candidate, noisy entries")
]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]


def main() -> None:
    """Entry point: runs the app; what a person can act on becomes one sentence and an exit code."""
    try:
        app()
    except HwnasError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def _pipeline(
    verb: str,
    config: Path | None,
    overrides: list[str] | None,
    out: Path | None,
    quiet: bool,
    verbose: bool,
) -> Pipeline:
    """The experiment of a TOML file, of a run folder, or of the defaults, with its run
    folder; what it sets does something.
    """
    from hwnas.unused import check_used

    pipeline = _unchecked(config, overrides, out, quiet, verbose)
    is_run_folder = config is not None and config.is_dir()
    if not is_run_folder:  # its configuration says every key, so nobody asked for any
        check_used(pipeline.experiment, verb, overrides or [], pipeline.progress)
    return pipeline


def _unchecked(
    config: Path | None, overrides: list[str] | None, out: Path | None, quiet: bool, verbose: bool
) -> Pipeline:
    from hwnas.config import load_experiment
    from hwnas.pipeline import Pipeline
    from hwnas.runs import load_config
    from hwnas.terminal import TerminalProgress

    if config is not None and config.is_dir():
        if overrides:
            raise UserError(
                f"{config} is a run folder with its own configuration: give the .toml file to"
                f" change {overrides[0]!r}."
            )
        return Pipeline(
            load_config(config), out or config, TerminalProgress(quiet=quiet, verbose=verbose)
        )
    experiment = load_experiment(config, overrides)
    name = (
        config.stem
        if config is not None and "name" not in experiment.model_fields_set
        else experiment.name
    )
    return Pipeline(
        experiment, out or Path("runs") / name, TerminalProgress(quiet=quiet, verbose=verbose)
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends a stage with a sentence; the stage's own files let the same command go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted: run the same command again to go on from here", err=True)
        raise typer.Exit(130) from None


def _run_stage(name: str, pipeline: Pipeline, fresh: bool, as_json: bool) -> None:
    """Run one stage and print its result: the document, or the path."""
    with _interruptible():
        pipeline.run_stage(name, fresh=fresh)
    _print_result(pipeline.root / name / pipeline.stage(name).result, as_json)


def _print_result(path: Path, as_json: bool) -> None:
    if as_json and path.suffix == ".json":
        typer.echo(path.read_text(), nl=False)
    else:
        typer.echo(json.dumps({"path": str(path)}) if as_json else str(path))


def _check_verdict(pipeline: Pipeline) -> None:
    """Exit code 1 where validation failed."""
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
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="print what would be done, and how long (-q: without timing a few steps)"
        ),
    ] = False,
) -> None:
    """All stages: profile, search, train, export, validate, report. Current ones are skipped."""
    pipeline = _pipeline("run", config, overrides, out, quiet, verbose)
    if plan:
        typer.echo(pipeline.plan(timed=not quiet))
        return
    with _interruptible():
        pipeline.run(fresh=fresh)
    _print_result(
        pipeline.root / ("validate/verdict.json" if as_json else "report/report.html"), as_json
    )
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
    """Measure a device: every op of the space, and whole networks, into a calibrated
    latency table.
    """
    _run_stage(
        "profile", _pipeline("profile", config, overrides, out, quiet, verbose), fresh, as_json
    )


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
    _run_stage(
        "search", _pipeline("search", config, overrides, out, quiet, verbose), fresh, as_json
    )


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
    """Train the searched architecture, or the one that train.arch names."""
    _run_stage("train", _pipeline("train", config, overrides, out, quiet, verbose), fresh, as_json)


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
    """Write TFLite and ONNX files with labels, preprocessing and parity numbers: a bundle."""
    _run_stage(
        "export", _pipeline("export", config, overrides, out, quiet, verbose), fresh, as_json
    )


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
    """Run the bundle on the device: latency as predicted, accuracy as trained? Exit
    code 1 where not.
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
    """Draw what a run folder holds: one self-contained HTML file."""
    _run_stage(
        "report", _pipeline("report", config, overrides, out, quiet, verbose), fresh, as_json
    )


@app.command()
def space(
    config: Annotated[str, typer.Argument(help="a space, an experiment (.toml) or a run folder")],
    table: Annotated[
        Path | None, typer.Argument(help="a latency table, to show its coverage")
    ] = None,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a space, of an experiment as its data shape it: size, plan, a sample, what a
    table covers and predicts.
    """
    from hwnas.core.describe import coverage, describe_space
    from hwnas.core.table import LatencyTable
    from hwnas.shown import shown_space

    found = shown_space(config, overrides or [])
    path = table or found.table_path
    known = LatencyTable.load(path) if path is not None else None
    if as_json:
        typer.echo(
            (
                found.space.to_json()
                if known is None
                else json.dumps(coverage(found.space, known, found.networks), indent=1)
            ),
            nl=known is not None,
        )
        return
    typer.echo(describe_space(found.space, known, found.networks))


@app.command()
def devices(as_json: Json = False, debug: Debug = False) -> None:
    """List the devices that can be named in a configuration, and the phones that are plugged in."""
    from hwnas.devices.adb_client import attached_phones
    from hwnas.devices.device import known_devices

    found, phones = known_devices(), attached_phones()
    if as_json:
        documents = {name: device.model_dump(mode="json") for name, device in found.items()}
        typer.echo(
            json.dumps(
                {
                    **documents,
                    **{f"adb:{serial}": {"state": state} for serial, state in phones.items()},
                },
                indent=1,
            )
        )
        return
    for name, connection, text in [
        *((name, device.connection, device.soc) for name, device in found.items()),
        *((f"adb:{serial}", "adb", state) for serial, state in phones.items()),
        *(
            []
            if phones
            else [
                ("adb", "adb", "an Android phone: none is attached, as far as `adb devices` knows")
            ]
        ),
        ("ssh:USER@HOST", "ssh", "any board or server that `ssh USER@HOST` reaches"),
    ]:
        typer.echo(f"{name:20} {connection:10} {text}")


@table_app.command("show")
def table_show(
    path: Annotated[Path, typer.Argument(help="a latency table (.json)")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a table: its conditions, how well it adds up, and its entries."""
    from hwnas.core.describe import describe_table
    from hwnas.core.table import LatencyTable

    table = LatencyTable.load(path)
    typer.echo(table.to_json() if as_json else describe_table(table), nl=not as_json)


@table_app.command("import")
def table_import(
    file: Annotated[Path, typer.Argument(help="a published table, gzipped or not")],
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME[:COLUMN]",
            help="proxylessnas, ofa, single_path, tfnas, fbnet or tunas",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="the table to write (.json)")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn somebody else's table into one of ours; what no op stands for is listed."""
    from hwnas.tables.formats import import_table

    if out.resolve() == file.resolve():
        raise UserError(
            f"--out {out} is the file to import: choose another, which import will write."
        )
    imported = import_table(file, format_name)
    imported.table.save(out)
    prices = len(imported.table.entries) + sum(map(len, imported.table.slots.values()))
    if as_json:
        typer.echo(json.dumps({"path": str(out), "prices": prices, "unmapped": imported.unmapped}))
        return
    typer.echo(
        f"{out}\n{prices} prices; {len(imported.unmapped)} of the source not"
        f" mapped{':' if imported.unmapped else ''}"
    )
    for name, reason in imported.unmapped.items():
        typer.echo(f"  {name}: {reason}")


@table_app.command("compare")
def table_compare(
    a: Annotated[Path, typer.Argument(help="a latency table (.json)")],
    b: Annotated[Path, typer.Argument(help="another")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what the same ops cost in two tables: their ratios, the range, and how far
    the orders agree.
    """
    import shutil

    from hwnas.core.table import LatencyTable
    from hwnas.tables.compare import compare, describe_comparison

    found = compare(LatencyTable.load(a), LatencyTable.load(b))
    width = shutil.get_terminal_size((100, 40)).columns
    typer.echo(
        json.dumps(found.to_dict(), indent=1) if as_json else describe_comparison(found, width)
    )


@table_app.command("fit")
def table_fit(
    file: Annotated[
        Path,
        typer.Argument(
            help="measured networks (.csv): architecture,ms; a name, a document, positions or picks"
        ),
    ],
    space_name: Annotated[
        str,
        typer.Option(
            "--space", metavar="NAME", help="a built-in space, or a space document (.json)"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="the table to write (.json)")],
    prior: Annotated[
        list[Path] | None,
        typer.Option("--prior", help="another device's table of the space; may be repeated"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit a table to whole networks that somebody has timed; says its cross-validated
    error, and whether more would help.
    """
    from hwnas.core.spaces import load_space
    from hwnas.core.table import LatencyTable
    from hwnas.tables.networks import fit_from_csv

    if out.resolve() in {path.resolve() for path in (file, *(prior or ()))}:
        raise UserError(
            f"--out {out} is a file that is read: choose another, which fit will write."
        )
    table = fit_from_csv(
        file, load_space(space_name), [LatencyTable.load(path) for path in prior or ()]
    )
    table.save(out)
    if as_json:
        typer.echo(json.dumps({"path": str(out), **table.provenance}))
        return
    typer.echo(f"{out}\n{table.provenance['more_networks']}\n{table.provenance['prior_alone']}")


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
    """Does a super-net rank architectures right? Its scores against accuracies that are known."""
    from hwnas.studies import study_rank as study

    _study(
        study,
        "rank/study.json",
        _pipeline("study rank", config, overrides, out, quiet, verbose),
        fresh,
        as_json,
    )


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
    """Do search methods beat random search at equal cost? What each finds, by
    accuracies that are known.
    """
    from hwnas.studies import study_compare as study

    _study(
        study,
        "compare/compare.json",
        _pipeline("study compare", config, overrides, out, quiet, verbose),
        fresh,
        as_json,
    )


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
    """Shrink a space by what a super-net says of its operators; what of the good
    networks is left?
    """
    from hwnas.studies import study_shrink as study

    _study(
        study,
        "shrink/shrink.json",
        _pipeline("study shrink", config, overrides, out, quiet, verbose),
        fresh,
        as_json,
    )


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Check this installation: packages, runtimes, threads, cores, clock. Exit code 1
    where something is missing.
    """
    from hwnas.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([finding.__dict__ for finding in findings], indent=1))
    else:
        for finding in findings:
            typer.echo(
                f"{'ok     ' if finding.good else 'MISSING'} {finding.subject:18} {finding.text}"
            )
    if not all(finding.good for finding in findings):
        raise typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"hwnas {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass
