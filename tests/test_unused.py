"""Settings that do nothing are refused or said; every key of every table is classified."""

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
    """Keeps what was said."""

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
def test_shipped_configurations_set_nothing_in_vain(path: Path) -> None:
    for verb in ("run", "profile", "search", "train", "export", "validate"):
        assert warned(path, verb=verb) == []


def test_the_commands_of_the_readme_set_nothing_in_vain() -> None:
    seen = 0
    for _, *arguments in commands():
        text = shlex.join(arguments)
        if ".toml" not in text or "[" in text.replace("[0", ""):
            continue
        verb = " ".join(arguments[:2]) if arguments[0] == "study" else arguments[0]
        overrides = [value for flag, value in itertools.pairwise(arguments) if flag == "-s"]
        config = next(argument for argument in arguments if argument.endswith(".toml"))
        said = warned(Path(config), overrides, verb)
        # that file is for both modes
        assert all("profile.mode = 'networks'" in line for line in said), said
        seen += 1
    assert seen >= 12


@pytest.mark.parametrize(
    ("overrides", "verb", "message"),
    [
        (["train.arch=mobilenet_v2", "profile.rounds=3"], "run", "profile.rounds = 3 does nothing: train.arch = 'mobilenet_v2' is trained"),
        (["train.arch=mobilenet_v2", "search.epochs=3"], "run", "search.epochs = 3.0 does nothing"),
        (["train.arch=mobilenet_v2", "space.act=relu6"], "train", "space.act = 'relu6' does nothing: .* a network of its own"),
        (["train.arch=x.json", "space.width=0.5"], "train", "space.width = 0.5 does nothing: .* the widths of its document; remove it"),
        (["search.table=x.json", "profile.rounds=3"], "run", "profile.rounds = 3 does nothing: search.table = 'x.json' is used instead"),
        (["profile.networks=30"], "profile", "profile.networks = 30 does nothing: .*; set profile.mode = 'networks', or profile.fit_n"),
        (["profile.prior=['x.json']"], "profile", "profile.prior = .'x.json',. does nothing: profile.mode = 'ops'"),
        (["profile.mode=networks", "profile.fit_networks=30"], "profile", "profile.fit_networks = 30 does nothing"),
        (["search.weights=x", "search.strategy=spos"], "search", "search.strategy = {'name': 'spos'} does nothing: search.weights = 'x'"),
        (["search.strategy=random_standalone", "search.supernet.wsbn=true"], "run", "share no weights"),
        (["search.strategy=random_standalone", "search.finder=evolution"], "run", "search.finder = .* does nothing: strategy 'random_st"),
        (["export.score_calibration=true", "export.formats=['onnx']"], "export", "has no TFLite file, whose metadata would hold it"),
        (["search.optimizer.name=adamw", "search.optimizer.momentum=0.8"], "search", "momentum = 0.8 does nothing: .*'adamw' takes no"),
        (["train.optimizer.name=adamw", "train.optimizer.momentum=0.8"], "train", "momentum = 0.8 does nothing: .*'adamw' takes no"),
        (["train.optimizer.inactive_weights=decay"], "train", "inactive_weights = 'decay' does nothing: a training uses every weight"),
        ([*COCO, "train.dropout=0.1"], "train", "train.dropout = 0.1 does nothing: task = 'detect'"),
        ([*COCO, "train.label_smoothing=0.1"], "train", "train.label_smoothing = 0.1 does nothing: task = 'detect'"),
        ([*COCO, "search.label_smoothing=0.1"], "search", "search.label_smoothing = 0.1 does nothing: task = 'detect'"),
        ([*COCO, "validate.accuracy_tolerance=0.1"], "validate", "does nothing: task = 'detect'"),
        ([*COCO, "train.arch=ssdlite320_mobilenet_v3_large", "detector.scores=sigmoid"], "train", "has its own detector"),
        (["detector.extras=[64, 32]"], "run", r"detector.extras = \(64, 32\) does nothing: task = 'classify' has no boxes"),
        (["validate.int8_ap_tolerance=0.1"], "run", "does nothing: task = 'classify' has no boxes"),
        (["validate.tolerances={top2=0.1}"], "run", "does nothing: the metric of task = 'classify' has its own tolerance keys"),
        (["export.formats=['onnx']", "export.calibration_images=9"], "export", "does nothing: export.formats has no int8 file"),
        (["export.formats=['tflite-int8']", "validate.parity_tolerance=9"], "validate", "export.formats has no float file"),
        ([*COCO, "validate.app_score=0.001"], "validate", "validate.app_score = 0.001 does nothing: .*min_score = 0.001 drops .* higher"),
        ([*COCO, "detector.post_processing.min_score=0.5", "validate.app_score=0.4"], "run", "app_score = 0.4 does nothing: .* 0.5 drops"),
        (["data.path=/x"], "run", "data.path = '/x' does nothing: data.name = 'digits' ships with scikit-learn"),
        (["study.top_k=3"], "run", "study.top_k = 3 does nothing: only 'hwnas study' reads it"),
        (["study.top_k=3"], "study compare", "study.top_k = 3 does nothing: 'hwnas study compare' does not read it"),
        (["study.compare.max_macs=3"], "study rank", "does nothing: 'hwnas study rank' does not read it"),
        (["shrink.samples=3"], "study rank", "does nothing: 'hwnas study rank' does not read it"),
        (["search.target_ms=3"], "study shrink", "does nothing: 'hwnas study shrink' does not read it"),
        (["study.scores=['macs']", "study.base_epochs=1"], "study rank", "does nothing: it is for the score angle"),
        (["study.ray_gpus=1"], "study rank", "does nothing: no cluster is configured; set study.ray_address"),
        (["study.ray_address=auto", "study.processes=2"], "study compare", "does nothing: study.ray_address = 'auto' runs"),
        (["study.compare.max_macs=3", "search.target_ms=1"], "study compare", "does nothing: study.compare.max_macs = 3 is the budget"),
        (["study.compare.max_macs=3", *MACS], "study compare", "search.budget = .* does nothing: study.compare.max_macs = 3 is the budget"),
        ([*MACS, "profile.rounds=3"], "run", "profile.rounds = 3 does nothing: search.budget.kind = 'macs' is counted"),
        (MACS, "study shrink", "search.budget = .* does nothing: 'hwnas study shrink' does not read it"),
        (["shrink.drop=each", "shrink.dropped=3"], "study shrink", "shrink.dropped = 3 does nothing: shrink.drop = 'each'"),
        (["shrink.evaluated_samples=3"], "study shrink", "shrink.evaluated_samples = 3 does nothing: no metric .* evaluates architectures"),
        (["shrink.alpha_lr=0.1"], "study shrink", "shrink.alpha_lr = 0.1 does nothing: only the metric magnitude uses it"),
        (["shrink.metrics=['random']", "shrink.epochs=3"], "study shrink", "shrink.epochs = 3.0 does nothing: no metric .* trains"),
        (["shrink.metrics=['random']", "shrink.base_epochs=3"], "study shrink", "does nothing: only the metric angle uses it"),
    ],
)  # fmt: skip
def test_what_the_command_line_sets_in_vain_is_refused(
    overrides: list[str], verb: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        warned(None, overrides, verb)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "verb"),
    [
        # an architecture in the space's notation is of the space
        (["train.arch=22", "space.act=relu6", "space.width=0.5"], "train"),
        (["train.arch=mobilenet_v2", "space.width=0.5"], "train"),
        # what the verb does is done all the same
        (["train.arch=mobilenet_v2", "profile.rounds=3"], "profile"),
        (["profile.mode=networks", "profile.networks=30"], "profile"),
        (["profile.networks=['mobilenet_v2']"], "profile"),
        (["profile.mode=networks", "profile.networks=mobilenet_v2"], "profile"),
        (["search.strategy=spos", "search.evaluation_images=50"], "search"),
        (["search.finder=evolution", "search.evaluation_images=50"], "search"),
        (["search.optimizer.name=sgd", "search.optimizer.momentum=0.8"], "search"),
        # not below app_score's default, which nobody has asked for
        ([*COCO, "detector.post_processing.min_score=0.5"], "run"),
        ([*COCO, "detector.post_processing.min_score=0.5", "validate.app_score=0.6"], "run"),
        ([*COCO, "validate.app_score=0.001"], "export"),
        (["search.epochs=3"], "train"),  # the same keys are given to one stage after another
    ],
)
def test_what_is_used_is_let_be(overrides: list[str], verb: str) -> None:
    assert warned(None, overrides, verb) == []


def test_a_file_for_many_commands_is_warned_of_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        "[search]\ntarget_range = 0.5\nepochs = 3\n[profile]\nrounds = 3\n[space]\nwidth = 0.5\n"
    )
    assert warned(tmp_path / "x.toml") == []
    (line,) = warned(tmp_path / "x.toml", ["train.arch=mobilenet_v2"])
    expected = "profile.rounds, search.target_range, search.epochs do nothing."
    assert line == f"train.arch = 'mobilenet_v2' is trained without a search, so {expected}"


def test_a_range_in_the_file_gives_way_to_a_budget_and_never_the_other_way_round(
    tmp_path: Path,
) -> None:
    (tmp_path / "x.toml").write_text("[search]\ntarget_range = 0.5\n")
    assert warned(tmp_path / "x.toml", ["search.target_ms=3"]) == []
    (tmp_path / "x.toml").write_text("[search]\ntarget_ms = 3\n")
    with pytest.raises(
        ConfigError,
        match=r"search\.target_range = 0\.5 does nothing: search\.target_ms = 3 is the budget",
    ):
        warned(tmp_path / "x.toml", ["search.target_range=0.5"])
    assert warned(None, ["search.target_ms=3", "search.target_range=0.5"]) == [
        "search.target_ms = 3 is the budget, so search.target_range does nothing."
    ]
    for budget in ("target_ms = 3", "budget = {kind = 'macs', max_macs = 9}"):
        (tmp_path / "x.toml").write_text(f"[search]\n{budget}\ntarget_range = 0.5\n")
        with pytest.raises(ConfigError, match=r"remove one of them"):
            warned(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_text("[search]\nbudget = {kind = 'macs'}\ntarget_range = 0.5\n")
    assert warned(tmp_path / "x.toml") == []  # its kind alone leaves the number to the range


@pytest.mark.parametrize(
    "overrides",
    [
        # its profile and search do nothing, and a run folder says every key of them
        ["train.arch=mobilenet_v2"],
        # a former default is no default of adamw's
        ['search.optimizer={name = "adamw", lr = 0.165, weight_decay = 4e-5, warmup = 0.025}'],
        ["data.classes=10"],  # a number, and not to be counted again
        ["search.random_samples=8", "search.strategy=random_standalone"],
    ],
)
def test_a_run_folder_is_the_run_that_it_was(overrides: list[str], tmp_path: Path) -> None:
    """Whatever the defaults are now, and without asking for anything."""
    config = write_tiny(tmp_path / "tiny")
    experiment = load_experiment(config, overrides)
    save_config(tmp_path / "tiny", experiment)
    assert load_config(tmp_path / "tiny") == experiment
    assert CliRunner().invoke(app, ["run", str(tmp_path / "tiny"), "--plan", "-q"]).exit_code == 0


def test_usual_values_do_not_count_as_given() -> None:
    grey = load_experiment(None, ["data.channels=1", "search.optimizer.name=adamw"])
    assert (grey.data.mean, grey.search.optimizer.lr) == ((0.449,), 0.024)
    assert {"data.channels", "search.optimizer.name"} == set(keys_given(grey))
