"""Unused settings are refused or warned about, and every key is classified."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hwnas.cli import app
from hwnas.config import all_keys, keys_given, load_experiment
from hwnas.errors import ConfigError
from hwnas.progress import Progress
from hwnas.resources import resource_path
from hwnas.runs import load_config, save_config
from hwnas.unused import check_used
from hwnas.unused.case import STUDIES, VERBS
from hwnas.unused.keys import KEYS
from tests.conftest import write_tiny
from tests.test_readme import commands

SHIPPED = sorted(resource_path("configs").rglob("*.toml"))
MACS = ["search.budget={kind='macs', max_macs=9}"]
COCO = ["task=detect", "data.name=coco", "data.augment=ssdlite"]


class Heard(Progress):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def warned(config: Path | None, overrides: Sequence[str] = (), verb: str = "run") -> list[str]:
    heard = Heard()
    check_used(load_experiment(config, list(overrides)), verb, overrides, heard)
    return heard.warnings


def test_every_key_of_every_table_is_classified() -> None:
    assert set(KEYS) == set(all_keys())


def test_every_case_names_keys_and_verbs_that_exist() -> None:
    for case in {case for cases in KEYS.values() for case in cases}:
        assert set(case.verbs) <= {*VERBS, *STUDIES}
        for key in case.by:
            assert any(f"{known}.".startswith(f"{key}.") for known in all_keys()), key


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_have_no_unused_settings(path: Path) -> None:
    for verb in ("run", "profile", "search", "train", "export", "validate"):
        assert warned(path, verb=verb) == []


def test_the_commands_in_the_readme_have_no_unused_settings() -> None:
    seen = 0
    for _, *arguments in commands():
        text = shlex.join(arguments)
        if ".toml" not in text or "[" in text.replace("[0", ""):
            continue
        verb = " ".join(arguments[:2]) if arguments[0] == "study" else arguments[0]
        overrides = [value for flag, value in itertools.pairwise(arguments) if flag == "-s"]
        config = next(argument for argument in arguments if argument.endswith(".toml"))
        warnings = warned(Path(config), overrides, verb)
        # one of the files has settings for both profile modes
        assert all("profile.mode = 'networks'" in line for line in warnings), warnings
        seen += 1
    assert seen >= 12


@pytest.mark.parametrize(
    ("overrides", "verb", "message"),
    [
        (["train.arch=mobilenet_v2", "profile.rounds=3"], "run", "profile.rounds = 3 has no effect: train.arch = 'mobilenet_v2' is"),
        (["train.arch=mobilenet_v2", "search.epochs=3"], "run", "search.epochs = 3.0 has no effect"),
        (["train.arch=mobilenet_v2", "space.act=relu6"], "train", "space.act = 'relu6' has no effect: .* a network of its own"),
        (["train.arch=x.json", "space.width=0.5"], "train", "space.width = 0.5 has no effect: .* the widths of its document; remove it"),
        (["search.table=x.json", "profile.rounds=3"], "run", "profile.rounds = 3 has no effect: search.table = 'x.json' is used instead"),
        (["profile.networks=30"], "profile", "profile.networks = 30 has no effect: .*; set profile.mode = 'networks', or profile.fit_n"),
        (["profile.prior=['x.json']"], "profile", "profile.prior = .'x.json',. has no effect: profile.mode = 'ops'"),
        (["profile.mode=networks", "profile.fit_networks=30"], "profile", "profile.fit_networks = 30 has no effect"),
        (["search.weights=x", "search.strategy=spos"], "search", "search.strategy = {'name': 'spos'} has no effect: search.weights = 'x'"),
        (["search.strategy=random_standalone", "search.supernet.wsbn=true"], "run", "share no weights"),
        (["search.strategy=random_standalone", "search.finder=evolution"], "run", "search.finder = .* has no effect: strategy 'random_st"),
        (["export.score_calibration=true", "export.formats=['onnx']"], "export", "has no TFLite file, whose metadata would contain it"),
        (["search.optimizer.name=adamw", "search.optimizer.momentum=0.8"], "search", "momentum = 0.8 has no effect: .*'adamw' takes no"),
        (["train.optimizer.name=adamw", "train.optimizer.momentum=0.8"], "train", "momentum = 0.8 has no effect: .*'adamw' takes no"),
        (["train.optimizer.inactive_weights=decay"], "train", "inactive_weights = 'decay' has no effect: training uses every weight"),
        (["train.teacher_share=0.9"], "train", "train.teacher_share = 0.9 has no effect: no teacher is configured; set train.teacher"),
        (["train.progressive.stages=3"], "train", "train.progressive.stages = 3 has no effect: train.progressive.start = 1 has the full"),
        ([*COCO, "train.augmentation.mosaic_off=0.2"], "train", "mosaic_off = 0.2 has no effect: train.augmentation.mosaic = 0 makes"),
        ([*COCO, "train.dropout=0.1"], "train", "train.dropout = 0.1 has no effect: task = 'detect'"),
        ([*COCO, "train.label_smoothing=0.1"], "train", "train.label_smoothing = 0.1 has no effect: task = 'detect'"),
        ([*COCO, "search.label_smoothing=0.1"], "search", "search.label_smoothing = 0.1 has no effect: task = 'detect'"),
        ([*COCO, "validate.accuracy_tolerance=0.1"], "validate", "has no effect: task = 'detect'"),
        ([*COCO, "train.arch=ssdlite320_mobilenet_v3_large", "detector.scores=sigmoid"], "train", "has its own detector"),
        (["detector.extras=[64, 32]"], "run", r"detector.extras = \(64, 32\) has no effect: task = 'classify' has no boxes"),
        (["validate.int8_ap_tolerance=0.1"], "run", "has no effect: task = 'classify' has no boxes"),
        (["validate.tolerances={top2=0.1}"], "run", "has no effect: the metric of task = 'classify' has its own tolerance keys"),
        (["export.formats=['onnx']", "export.calibration_images=9"], "export", "has no effect: export.formats has no int8 file"),
        (["export.formats=['tflite-int8']", "validate.parity_tolerance=9"], "validate", "export.formats has no float file"),
        ([*COCO, "validate.app_score=0.001"], "validate", "validate.app_score = 0.001 has no effect: .*min_score = 0.001 drops .* higher"),
        ([*COCO, "detector.post_processing.min_score=0.5", "validate.app_score=0.4"], "run", "app_score = 0.4 has no effect: .* 0.5 drops"),
        (["data.path=/x"], "run", "data.path = '/x' has no effect: data.name = 'digits' ships with scikit-learn"),
        (["data.unreadable=skip"], "run", "data.unreadable = 'skip' has no effect: data.name = 'digits' has no files of single"),
        (["data.name=npz", "data.path=/x", "data.skip=['a']"], "train", "data.skip = .'a',. has no effect: data.name = 'npz' has no"),
        (["data.name=folder", "data.path=/x", "data.allow_outside=true"], "run", "has no effect: .* no annotation files that name images"),
        (["study.top_k=3"], "run", "study.top_k = 3 has no effect: only 'hwnas study' reads it"),
        (["study.top_k=3"], "study compare", "study.top_k = 3 has no effect: 'hwnas study compare' does not read it"),
        (["study.compare.max_macs=3"], "study rank", "has no effect: 'hwnas study rank' does not read it"),
        (["shrink.samples=3"], "study rank", "has no effect: 'hwnas study rank' does not read it"),
        (["search.target_ms=3"], "study shrink", "has no effect: 'hwnas study shrink' does not read it"),
        (["study.scores=['macs']", "study.base_epochs=1"], "study rank", "has no effect: it only affects the score .angle."),
        (["study.ray_gpus=1"], "study rank", "has no effect: no cluster is configured; set study.ray_address"),
        (["study.ray_address=auto", "study.processes=2"], "study compare", "has no effect: study.ray_address = 'auto' runs"),
        (["study.compare.max_macs=3", "search.target_ms=1"], "study compare", "has no effect: study.compare.max_macs = 3 is the budget"),
        (["study.compare.max_macs=3", *MACS], "study compare", "search.budget = .* has no effect: .*max_macs = 3 is the budget"),
        ([*MACS, "profile.rounds=3"], "run", "profile.rounds = 3 has no effect: search.budget.kind = 'macs' is counted"),
        (MACS, "study shrink", "search.budget = .* has no effect: 'hwnas study shrink' does not read it"),
        (["shrink.drop=each", "shrink.dropped=3"], "study shrink", "shrink.dropped = 3 has no effect: shrink.drop = 'each'"),
        (["shrink.evaluated_samples=3"], "study shrink", "shrink.evaluated_samples = 3 has no effect: no metric .* evaluates"),
        (["shrink.alpha_lr=0.1"], "study shrink", "shrink.alpha_lr = 0.1 has no effect: only the metric magnitude uses it"),
        (["shrink.metrics=['random']", "shrink.epochs=3"], "study shrink", "shrink.epochs = 3.0 has no effect: no metric .* trains"),
        (["shrink.metrics=['random']", "shrink.base_epochs=3"], "study shrink", "has no effect: only the metric angle uses it"),
    ],
)  # fmt: skip
def test_unused_settings_on_the_command_line_are_refused(
    overrides: list[str], verb: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        warned(None, overrides, verb)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "verb"),
    [
        # an architecture in the space's notation depends on the space
        (["train.arch=22", "space.act=relu6", "space.width=0.5"], "train"),
        (["train.arch=mobilenet_v2", "space.width=0.5"], "train"),
        # the verb profiles all the same
        (["train.arch=mobilenet_v2", "profile.rounds=3"], "profile"),
        (["profile.mode=networks", "profile.networks=30"], "profile"),
        (["profile.networks=['mobilenet_v2']"], "profile"),
        (["profile.mode=networks", "profile.networks=mobilenet_v2"], "profile"),
        (["search.strategy=spos", "search.evaluation_images=50"], "search"),
        (["search.finder=evolution", "search.evaluation_images=50"], "search"),
        (["search.optimizer.name=sgd", "search.optimizer.momentum=0.8"], "search"),
        # the default of app_score is lower, but it was not set
        ([*COCO, "detector.post_processing.min_score=0.5"], "run"),
        ([*COCO, "detector.post_processing.min_score=0.5", "validate.app_score=0.6"], "run"),
        ([*COCO, "validate.app_score=0.001"], "export"),
        ([*COCO, "train.augmentation={mosaic = 0.5, mosaic_off = 0.2}"], "train"),
        (["search.epochs=3"], "train"),  # users give every stage's command the same overrides
    ],
)
def test_settings_in_use_are_accepted(overrides: list[str], verb: str) -> None:
    assert warned(None, overrides, verb) == []


def test_unused_settings_in_a_file_get_a_one_line_warning(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        "[search]\ntarget_range = 0.5\nepochs = 3\n[profile]\nrounds = 3\n[space]\nwidth = 0.5\n"
    )
    assert warned(tmp_path / "x.toml") == []
    (line,) = warned(tmp_path / "x.toml", ["train.arch=mobilenet_v2"])
    expected = "profile.rounds, search.target_range, search.epochs have no effect."
    assert line == f"train.arch = 'mobilenet_v2' is trained without a search, so {expected}"


def test_a_range_in_the_file_gives_way_to_a_budget_and_never_vice_versa(
    tmp_path: Path,
) -> None:
    (tmp_path / "x.toml").write_text("[search]\ntarget_range = 0.5\n")
    assert warned(tmp_path / "x.toml", ["search.target_ms=3"]) == []
    (tmp_path / "x.toml").write_text("[search]\ntarget_ms = 3\n")
    with pytest.raises(
        ConfigError,
        match=r"search\.target_range = 0\.5 has no effect: search\.target_ms = 3 is the budget",
    ):
        warned(tmp_path / "x.toml", ["search.target_range=0.5"])
    assert warned(None, ["search.target_ms=3", "search.target_range=0.5"]) == [
        "search.target_ms = 3 is the budget, so search.target_range has no effect."
    ]
    for budget in ("target_ms = 3", "budget = {kind = 'macs', max_macs = 9}"):
        (tmp_path / "x.toml").write_text(f"[search]\n{budget}\ntarget_range = 0.5\n")
        with pytest.raises(ConfigError, match=r"remove one of them"):
            warned(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_text("[search]\nbudget = {kind = 'macs'}\ntarget_range = 0.5\n")
    assert (
        warned(tmp_path / "x.toml") == []
    )  # a kind without a number leaves the budget to the range


@pytest.mark.parametrize(
    "overrides",
    [
        # profile and search have no effect here, yet a run folder lists all of their keys
        ["train.arch=mobilenet_v2"],
        # formerly the defaults, but not adamw's
        ['search.optimizer={name = "adamw", lr = 0.165, weight_decay = 4e-5, warmup = 0.025}'],
        ["data.classes=10"],  # set, so not counted again
        ["search.random_samples=8", "search.strategy=random_standalone"],
    ],
)
def test_a_run_folder_reloads_as_the_run_that_it_was(overrides: list[str], tmp_path: Path) -> None:
    """Whatever the defaults are now, and without any error."""
    config = write_tiny(tmp_path / "tiny")
    experiment = load_experiment(config, overrides)
    save_config(tmp_path / "tiny", experiment)
    assert load_config(tmp_path / "tiny") == experiment
    assert CliRunner().invoke(app, ["run", str(tmp_path / "tiny"), "--plan", "-q"]).exit_code == 0


def test_default_values_do_not_count_as_given() -> None:
    grey = load_experiment(None, ["data.channels=1", "search.optimizer.name=adamw"])
    assert (grey.data.mean, grey.search.optimizer.lr) == ((0.449,), 0.024)
    assert {"data.channels", "search.optimizer.name"} == set(keys_given(grey))
