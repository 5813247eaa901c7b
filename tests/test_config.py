"""Experiment configurations: the shipped ones load, and every mistake is located."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from torch import nn

from hwnas.config import Experiment, Plugin, load_experiment
from hwnas.core.objective import AbsoluteObjective, MnasObjective, PenalisedObjective
from hwnas.devices.device import known_devices
from hwnas.engine import make_optimizer
from hwnas.errors import ConfigError
from hwnas.experiments import experiment_space
from hwnas.resources import resource_path
from hwnas.runs import load_config, save_config
from hwnas.search import STRATEGIES

COCO = 'task = "detect"\n[data]\nname = "coco"\naugment = "ssd"\n'
TUNAS_RECIPES = ("quickstart.toml", "cifar10.toml", "cifar10-npz.toml", "imagenet.toml")
SHIPPED = sorted(resource_path("configs").rglob("*.toml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


def test_something_is_shipped() -> None:
    assert "quickstart.toml" in {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_loads_and_its_names_exist(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment_space(experiment).size > 1
    assert experiment.device.name in known_devices()
    experiment.search.strategy.options(STRATEGIES.get(experiment.search.strategy.name).Config)


def test_the_resolved_configuration_loads_again() -> None:
    for path in (None, *SHIPPED):
        # the settings are kept, not the name of the recipe that they come from
        experiment = load_experiment(path).model_copy(update={"recipe": None})
        content = experiment.model_dump(mode="json", by_alias=True)
        assert Experiment.model_validate(content) == experiment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede = 3", r"unknown key 'sede'; did you mean 'seed'\?"),
        ("[serch]\nepochs = 3", r"unknown key 'serch'; did you mean 'search'\?"),
        ("[validat]\nimages = 3", r"unknown key 'validat'; did you mean 'validate'\?"),
        ("[validation]\nimages = 3", r"unknown key 'validation'; did you mean 'validate'\?"),
        ("[validate]\nimags = 3", r"unknown key 'validate\.imags'; did you mean 'images'\?"),
        ("[search]\ntaget_ms = 3", r"unknown key 'search\.taget_ms'; did you mean 'target_ms'\?"),
        ("[search.optimizer]\nlearning = 3", r"unknown key 'search\.optimizer\.learning'; "),
        ("[train.optimizer]\nwarm_up = 0.1", r"unknown key 'train\.optimizer\.warm_up'; did you mean 'warmup'\?"),
        ('[search.objective]\nname = "absolute"\nbeat = -0.1', r"unknown key 'search\.objective\.absolute\.beat'; did you mean 'beta'\?"),
        ("[data]\nqqqq = 1", r"unknown key 'data\.qqqq'; known: allow_outside, augment, channels, "),
        ('seed = "x"', "seed = 'x': input should be a valid integer"),
        ("search = 3", "search = 3: input should be a valid dictionary"),
        ("[search]\nepochs = 0", "search.epochs = 0: input should be greater than 0"),
        ("[search]\nbatch_size = 1.5", "search.batch_size = 1.5: "),
        ("[search]\nstrategy = {rl_lr = 1}", r"key 'search\.strategy\.name' is missing; add it"),
        ('[search]\nobjective = {name = "mna"}', "search.objective"),
        ('[device]\nruntime = "ncnn"', "device.runtime = 'ncnn': input should be 'litert' or 'onnxruntime'"),
        ("[search]\ntarget_range = 1.5", "target_range = 1.5: input should be less than or equal to 1"),
        ("[data]\nchannels = 1\nmean = [0.5, 0.5, 0.5]", r"data\.mean has 3 values for 1 channels; give one per channel"),
        ("[data]\nstd = [0.2]", r"data\.std has 1 values for 3 channels; give one per channel"),
        ("[data]\nchannels = 2", "data.channels = 2: input should be 1 or 3"),
        ('[data]\nresize = "letterbox"', "data.resize = 'letterbox': input should be 'squash', 'crop' or 'pad'"),
        ('[data]\ninterpolation = "area"', "data.interpolation = 'area': input should be 'bilinear' or 'bicubic'"),
        ('[data]\nresize = "crop"\ncrop_fraction = 1.1', "data.crop_fraction = 1.1: input should be less than or equal to 1"),
        ("[data]\ncrop_fraction = 0.9", r"data\.crop_fraction is for data\.resize = 'crop', not 'squash'; remove it"),
        ('[data]\nresize = "pad"\ncrop_fraction = 1', r"data\.crop_fraction is for data\.resize = 'crop', not 'pad'"),
        ('[data]\nname = "folder"\naugment = "imagenet"\nresize = "pad"', r"data\.resize = 'pad' adds borders .*; choose crop or squash"),
        (COCO + 'resize = "crop"', r"data\.resize = 'crop' would cut off objects at the edges; choose squash or pad"),
        ('[export]\nformats = ["tflite"]', "export.formats.0 = 'tflite'"),
        ('task = "segment"', "task = 'segment': input should be 'classify' or 'detect'"),
        ('task = "detect"', r"task = 'detect' needs boxes, and data\.name = 'digits' has none; choose data\.name = 'coco'"),
        ('[data]\nname = "coco"\naugment = "none"', "data.name = 'coco' has boxes .*; set task = 'detect'"),
        ('[train]\nbackbone = "runs/x"', r"train\.backbone initialises a detector; remove it, or set task = 'detect'"),
        (COCO + '[train]\nbackbone = "runs/x"\nweights = "supernet"', "both set the initial weights"),
        (COCO + "[train]\nbn_momentum = 0", "train.bn_momentum = 0: input should be greater than 0"),
        (COCO + "[detector]\nextras = [1]", "detector.extras.0 = 1"),
        (COCO + "[detector]\npost_processing = {iou = 0.5}", r"unknown key 'detector\.post_processing\.iou'; did you mean 'nms_iou'\?"),
        ("seed = = 3", r"is not valid TOML: .*line 1"),
        ("[search]\n[search]", "is not valid TOML"),
        ("name = 'é", "is not valid TOML"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_experiment(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_one_channel_with_one_mean_is_fine(tmp_path: Path) -> None:
    data = load_experiment(
        written(tmp_path, "[data]\nchannels = 1\nmean = [0.3]\nstd = [0.4]")
    ).data
    assert (data.mean, data.std) == ((0.3,), (0.4,))


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("", "squash"),
        ('augment = "imagenet"\nname = "folder"\ncrop_fraction = 0.9', "crop"),
        ('augment = "imagenet"\nname = "folder"\nresize = "squash"', "squash"),
        ('resize = "pad"\ninterpolation = "bicubic"', "pad"),
    ],
)
def test_how_images_are_resized_by_default_and_when_set(
    tmp_path: Path, text: str, mode: str
) -> None:
    """A key that is not set stays out of the resolved configuration, whose hash decides
    whether a stage is up to date.
    """
    data = load_experiment(written(tmp_path, f"[data]\n{text}")).data
    assert data.resize_mode == mode
    assert {"resize", "crop_fraction", "interpolation"} & set(data.model_dump()) == {
        line.split()[0] for line in text.splitlines() if line.split()[0] not in ("augment", "name")
    }


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml does not exist: check the path"):
        load_experiment(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_experiment(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml is not valid TOML"):
        load_experiment(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("seed=7", "seed", 7),
        ("search.target_ms=1.5", "search.target_ms", 1.5),
        ("search.target_ms = 1.5", "search.target_ms", 1.5),
        ("search.allow_uncalibrated=true", "search.allow_uncalibrated", True),
        ("space.name=proxylessnas", "space.name", "proxylessnas"),  # a bare string
        ('space.name="proxylessnas"', "space.name", "proxylessnas"),
        ("data.path=/some/where else/x=y", "data.path", "/some/where else/x=y"),
        ("data.mean=[0.1, 0.2, 0.3]", "data.mean", (0.1, 0.2, 0.3)),
        ('export.formats=["onnx"]', "export.formats", ("onnx",)),
        ("device.cores=[2,3]", "device.cores", (2, 3)),
        ("search.objective={name = 'mnas'}", "search.objective", MnasObjective(name="mnas")),
        ("search.objective.beta=-0.2", "search.objective", AbsoluteObjective(beta=-0.2)),
        ("validate.rounds=3", "validation.rounds", 3),
        (
            "search.optimizer.options.eps=0.5",
            "search.optimizer.options",
            {"eps": 0.5, "alpha": 0.8},
        ),
    ],
)
def test_one_key_is_set_from_the_command_line(
    tmp_path: Path, override: str, place: str, value: object
) -> None:
    path = written(
        tmp_path,
        '[search.objective]\nname = "absolute"\n[search.optimizer.options]\nalpha ='
        " 0.8\n[train]\nepochs = 9",
    )
    experiment = load_experiment(path, [override])
    setting: object = experiment
    for part in place.split("."):
        setting = getattr(setting, part)
    assert setting == value
    assert experiment.train.epochs == 9


def test_later_overrides_win_and_earlier_ones_stay() -> None:
    search = load_experiment(
        None, ["search.epochs=3", "search.target_ms=5", "search.epochs=4"]
    ).search
    assert (search.epochs, search.target_ms) == (4, 5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"-s 'seed' is not KEY=VALUE; write for instance -s search\.target_ms=1\.5"),
        ("=3", "-s '=3' is not KEY=VALUE"),
        (
            "search.taget_ms=3",
            r"^-s search\.taget_ms=3: unknown key 'search\.taget_ms'; did you mean 'target_ms'\?",
        ),
        ("search.target_ms=fast", r"search\.target_ms = 'fast': input should be a valid number"),
        ("search=fast", "search = 'fast'"),
        ("search.epochs.x=3", r"search\.epochs = {'x': 3}"),
        ("search..epochs=3", r"unknown key 'search\.'"),
    ],
)
def test_wrong_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(None, [override])


@pytest.mark.parametrize(
    ("text", "overrides", "source"),
    [
        ("seed = 1", ["seed=-1"], "-s seed=-1: seed = -1"),
        ("", ["data.name=3", "name=foo"], r"^-s data\.name=3: data\.name = 3"),
        ("seed = -1", ["search.epochs=3"], r"\S*x\.toml: seed = -1"),
        ("seed = -1", ["seed=-2"], "-s seed=-2: seed = -2"),
        ("seed = -1", ["search.epochs=0"], r"\S*x\.toml: seed = -1"),
        (
            "",
            ["search.objective.name=mnas", "search.objective.betta=1"],
            r"-s search\.objective\.betta=1: unknown key",
        ),
        (
            "",
            ["search.supernet.full_resolution=0.5", "seed=3"],
            r"-s search\.supernet\.full_resolution=0\.5: full_resolution = 0\.5 says",
        ),
        (
            "[search.supernet]\nfull_resolution = 0.5",
            ["search.epochs=3"],
            r"\S*x\.toml: full_resolution = 0\.5 says",
        ),
        ("task = 'detect'", ["seed=3"], r"\S*x\.toml: task = 'detect' needs boxes"),
        (
            "task = 'detect'\ndata.name = 'coco'\ndata.augment = 'none'",
            ["data.name=digits"],
            r"-s data\.name=digits: task = 'detect' needs boxes",
        ),
    ],
)
def test_errors_name_the_source_of_the_wrong_value(
    tmp_path: Path, text: str, overrides: list[str], source: str
) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{source}"):
        load_experiment(path, overrides)


def test_both_targets_may_be_set_so_that_one_override_is_enough(tmp_path: Path) -> None:
    search = load_experiment(
        written(tmp_path, "[search]\ntarget_range = 0.5"), ["search.target_ms=3"]
    ).search
    assert (search.target_ms, search.target_range) == (3.0, 0.5)


def test_options_of_a_plugin_are_checked_against_its_own_model() -> None:
    config = STRATEGIES.get("tunas").Config
    assert Plugin(name="tunas", rl_lr=0.25).options(config).rl_lr == 0.25
    assert Plugin(name="tunas").options(config) == config()
    with pytest.raises(
        ConfigError, match=r"options of 'tunas': unknown key 'rl_rl'; did you mean 'rl_lr'\?"
    ):
        Plugin(name="tunas", rl_rl=0.25).options(config)
    with pytest.raises(ConfigError, match="options of 'tunas': rl_lr = 'x'"):
        Plugin(name="tunas", rl_lr="x").options(config)


def test_a_penalised_objective_can_be_configured(tmp_path: Path) -> None:
    text = (
        '[search.objective]\nname = "penalised"\nnonlinear = "positive"\naggregate = "mul"\nscale ='
        " -0.07"
    )
    expected = PenalisedObjective(
        name="penalised", nonlinear="positive", aggregate="mul", scale=-0.07
    )
    assert load_experiment(written(tmp_path, text)).search.objective == expected


def test_a_plug_in_can_be_given_by_its_bare_name() -> None:
    """``-s search.strategy=fbnet`` means the same as a table with only the name."""
    assert load_experiment(None, ["search.strategy=fbnet"]) == load_experiment(
        None, ['search.strategy={name = "fbnet"}']
    )


def test_naming_an_optimizer_brings_its_own_defaults() -> None:
    default = load_experiment(None, []).train.optimizer
    assert (default.name, default.lr, default.weight_decay, default.warmup) == (
        "rmsproptf",
        0.165,
        4e-5,
        0.025,
    )
    named = load_experiment(
        None, ["search.optimizer.name=adamw", "search.optimizer.warmup=0.5"]
    ).search.optimizer
    assert (named.name, named.lr, named.weight_decay, named.warmup) == ("adamw", 0.024, 0.02, 0.5)
    assert load_experiment(None, ["train.optimizer={name = 'sgd'}"]).train.optimizer.lr == 0.165


def test_an_optimizers_options_are_numbers_or_lists_of_them() -> None:
    setting = "train.optimizer={name = 'adamw', options = {betas = [0.6, 0.99], eps = 1e-6}}"
    experiment = load_experiment(None, [setting])
    assert experiment.train.optimizer.options == {"betas": (0.6, 0.99), "eps": 1e-6}
    assert (
        Experiment.model_validate(experiment.model_dump(mode="json", by_alias=True)) == experiment
    )
    optimizer = make_optimizer(nn.Linear(2, 2), experiment.train.optimizer, 0.1)
    assert all(group["betas"] == (0.6, 0.99) for group in optimizer.param_groups)
    with pytest.raises(ConfigError, match="options"):
        load_experiment(None, ["train.optimizer.options={betas = [0.6, 'x']}"])


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if path.name in TUNAS_RECIPES], ids=lambda path: path.name
)
def test_tunas_recipes_set_its_optimizer(path: Path) -> None:
    """The published results used these settings, whatever the defaults."""
    for optimizer in (
        load_experiment(path).search.optimizer,
        load_experiment(path).train.optimizer,
    ):
        expected = ("rmsproptf", 0.165, 0.9, 4e-5, None, 0.025)
        settings = (
            optimizer.name,
            optimizer.lr,
            optimizer.momentum,
            optimizer.weight_decay,
            optimizer.options,
            optimizer.warmup,
        )
        assert settings == expected


def test_every_shipped_recipe_names_its_optimizers() -> None:
    for path in SHIPPED:
        experiment = load_experiment(path)
        if path.name != "profile-224.toml":  # only profiles
            assert "optimizer" in {
                *experiment.train.model_fields_set,
                *experiment.search.model_fields_set,
            }, path


def test_a_budget_of_another_kind_replaces_the_one_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "one.toml"
    path.write_text('[search.budget]\nkind = "macs"\nmax_macs = 20_000_000\n')
    other = "search.budget={kind = 'params', max_params = 300000}"
    assert load_experiment(path, [other]).search.main_budget.most == 300_000
    same = "search.budget.max_macs=10000000"
    assert load_experiment(path, [same]).search.main_budget.most == 10_000_000


def test_renamed_keys_are_read_and_reported(tmp_path: Path) -> None:
    """In a file and with ``-s``, for one release."""
    path = tmp_path / "old.toml"
    path.write_text("[search.optimizer]\nunused = 'move'\n[shrink]\njudged_samples = 7\n")
    with pytest.warns(FutureWarning) as warned:
        config = load_experiment(path, ["train.optimizer.unused=rest"])
    assert config.search.optimizer.inactive_weights == "decay"
    assert config.train.optimizer.inactive_weights == "frozen"
    assert config.shrink.evaluated_samples == 7
    assert [str(warning.message) for warning in warned] == [
        f"{path}: search.optimizer.unused = 'move' is now search.optimizer.inactive_weights ="
        " 'decay'; the old spelling is read until the next release.",
        f"{path}: shrink.judged_samples = 7 is now shrink.evaluated_samples = 7; the old spelling"
        " is read until the next release.",
        "-s train.optimizer.unused=rest: train.optimizer.unused = 'rest' is now"
        " train.optimizer.inactive_weights = 'frozen'; the old spelling is read until the next"
        " release.",
    ]


def test_renamed_keys_of_a_run_folder_are_read_without_a_warning(tmp_path: Path) -> None:
    """hwnas wrote them: a user who never set them could not act on a warning."""
    config = load_experiment(None, ["search.optimizer.inactive_weights=decay"])
    save_config(tmp_path, config)
    content = json.loads((tmp_path / "config.json").read_text())
    for section, value in (("search", "move"), ("train", "rest")):
        del content[section]["optimizer"]["inactive_weights"]
        content[section]["optimizer"]["unused"] = value
    content["shrink"]["judged_samples"] = content["shrink"].pop("evaluated_samples")
    (tmp_path / "config.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_config(tmp_path) == config


def test_values_of_renamed_keys_are_checked_like_any_other(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning), pytest.raises(ConfigError, match="inactive_weights = 'x'"):
        load_experiment(None, ["search.optimizer.unused=x"])
    with pytest.raises(ConfigError, match="optimizer"):
        load_experiment(None, ["search.optimizer=3"])
    both = "search.optimizer={unused = 'move', inactive_weights = 'frozen'}"
    with pytest.raises(ConfigError, match=r"unknown key 'search\.optimizer\.unused'"):
        load_experiment(None, [both])
