"""Mistakes are reported before the device is touched, and what the data determine need
not be set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hwnas.config import DataConfig, load_experiment
from hwnas.data.inspection import classes_in, with_classes
from hwnas.engine import check_optimizer
from hwnas.errors import ConfigError, UserError
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.runs import load_config, save_config
from tests.conftest import write_tiny
from tests.train.rectangles import write_rectangles

GREY = {"channels": 1, "resolution": 8}


def write_folder(root: Path, classes: dict[str, tuple[str, ...]]) -> Path:
    """Write greyscale images, three for each class of each part."""
    rng = np.random.default_rng(0)
    for part, names in classes.items():
        for name in names:
            (root / part / name).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(rng.integers(0, 255, (12, 9), dtype=np.uint8)).save(
                    root / part / name / f"{number}.png"
                )
    return root


def write_npz(root: Path, classes: int, test_classes: int | None = None, channels: int = 1) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", classes), ("test", test_classes or classes)):
        np.savez(
            root / f"{part}.npz",
            x=np.zeros((4 * count, 8, 8, channels), np.uint8),
            y=np.arange(4 * count) % count,
        )
    return root


def test_classes_are_counted_if_they_are_not_set(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "folder", {"train": ("ant", "bee", "cat"), "val": ("ant", "bee", "cat")}
    )
    write_rectangles(tmp_path / "boxes", classes=2)
    for name, path, count in (
        ("folder", folder, 3),
        ("npz", write_npz(tmp_path / "npz", 5), 5),
        ("coco", tmp_path / "boxes", 2),
    ):
        config = DataConfig.model_validate(
            {"name": name, "path": str(path), **(GREY if name == "npz" else {})}
        )
        assert with_classes(config).classes == classes_in(config) == count
        given = config.model_copy(update={"classes": 7})
        assert with_classes(given) is given
    assert with_classes(DataConfig(name="digits")).classes == 10


def test_the_space_gets_the_counted_number_of_classes(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "npz", 5, channels=3)
    pipeline = Pipeline(
        load_experiment(None, ["data.name=npz", f"data.path={path}"]), tmp_path, Progress()
    )
    assert (pipeline.space.classes, pipeline.experiment.data.classes) == (5, 5)
    save_config(tmp_path, pipeline.experiment)
    assert load_config(tmp_path).data.classes == 5
    with pytest.raises(
        ConfigError,
        match=(
            r"data\.classes is not set and cannot be counted: data\.name = 'npz' needs data\.path"
        ),
    ):
        Pipeline(load_experiment(None, ["data.name=npz"]), tmp_path, Progress())


def test_defaults_follow_the_other_settings() -> None:
    assert load_experiment(None, ["task=detect", "data.name=coco"]).data.augment == "ssdlite"
    assert (
        load_experiment(None, ["task=detect", "data.name=coco", "data.augment=none"]).data.augment
        == "none"
    )
    assert load_experiment(None, ["data.name=npz"]).data.augment == "crop_flip"
    grey = load_experiment(None, ["data.channels=1"]).data
    assert (grey.mean, grey.std) == ((0.449,), (0.226,))
    assert len(load_experiment(None, []).data.mean) == 3
    with pytest.raises(ConfigError, match="needs a folder of images; choose crop_flip"):
        load_experiment(None, ["data.name=npz", "data.augment=imagenet"])


def refused(tmp_path: Path, *overrides: str) -> str:
    """The message with which a run is refused, before any device is touched."""
    experiment = load_experiment(write_tiny(tmp_path / "tiny"), ["data.augment=none", *overrides])
    with pytest.raises(UserError) as caught:
        Pipeline(experiment, tmp_path / "run", Progress()).run()
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.optimizer.name=admaw"], "search.optimizer.name = 'admaw'"),
        (["train.optimizer.name=admaw"], "train.optimizer.name = 'admaw'"),
        (["train.optimizer.options={bogus = 1.0}"], "train.optimizer.name = "),
        (["search.batch_size=2", "search.strategy.cores=2"], "options of 'tunas'"),
        (
            ["train.weights=supernet", "search.supernet.proxy_width=0.5"],
            "train.weights = 'supernet' needs a super-net of full size",
        ),
        (["search.supernet.proxy_resolution=32"], "search.supernet.proxy_resolution = 32"),
        (["search.table=absent.json"], "search.table = 'absent.json' does not exist"),
        (["search.table=latency_tables"], "search.table = 'latency_tables' is a folder: name the"),
        (["search.backbone=absent"], "search.backbone initialises a super-net of detectors"),
        (["search.weights=absent"], "search.weights = 'absent'"),
        (["train.arch=mobilenet_v22"], "did you mean 'mobilenet_v2'"),
        (["train.arch=absent.json"], "absent.json does not exist"),
        (
            ["search.finder={name = 'evolution', bogus = 1}"],
            "options of 'evolution': unknown key 'bogus'",
        ),
        (['search.limits=[{kind = "macs", max_macs = 1}]'], "macs"),
        (
            ["data.name=npz", "data.path=/absent", "data.classes=10"],
            "data.path '/absent' is not a folder",
        ),
    ],
)
def test_settings_that_a_later_stage_cannot_use_are_refused_at_once(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    try:
        assert message in refused(tmp_path, *overrides)
    except ConfigError as error:  # the configuration itself is refused
        assert message in str(error)


def test_splits_that_do_not_agree_are_refused_at_once(tmp_path: Path) -> None:
    apart = write_folder(tmp_path / "apart", {"train": ("ant", "bee"), "val": ("ant", "cow")})
    of_space = ["space.name=mobile32", "data.resolution=32"]
    assert "has images of 'cow', but train has no such class (val lacks 'bee')" in refused(
        tmp_path, *of_space, "data.name=folder", f"data.path={apart}"
    )
    alike = write_folder(
        tmp_path / "alike", {"train": ("ant", "bee", "cow"), "val": ("ant", "bee", "cow")}
    )
    message = refused(
        tmp_path, *of_space, "data.name=folder", f"data.path={alike}", "data.classes=4"
    )
    assert (
        "has 3 class folders in train, but data.classes = 4: set it to 3, or leave it out"
        in message
    )
    missing = write_folder(tmp_path / "missing", {"train": ("ant", "bee")})
    assert "val does not exist: lay the images out as val/<class>/<image>" in refused(
        tmp_path, *of_space, "data.name=folder", f"data.path={missing}"
    )
    path = write_npz(tmp_path / "npz", 10, test_classes=12)
    assert "labels 0 to 11, but data.classes = 10" in refused(
        tmp_path, "data.name=npz", f"data.path={path}"
    )
    colours = write_npz(tmp_path / "rgb", 10, channels=3)
    assert "has 3 channels, but data.channels = 1" in refused(
        tmp_path, "data.name=npz", f"data.path={colours}", "data.classes=10"
    )


def test_the_number_of_classes_comes_from_a_space_document(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "npz", 4)
    experiment = load_experiment(
        write_tiny(tmp_path / "tiny"), ["data.name=npz", f"data.path={path}"]
    )
    assert "classes" not in experiment.data.model_fields_set
    pipeline = Pipeline(experiment, tmp_path / "run", Progress())
    assert pipeline.experiment.data.classes == pipeline.space.classes == 10


def test_arrays_whose_classes_cannot_be_counted_are_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path, 5)
    np.savez(path / "train.npz", x=np.zeros((0, 8, 8, 1), np.uint8), y=np.zeros(0, np.int64))
    with pytest.raises(
        ConfigError, match=r"cannot be counted: data 'npz' has no training images: check data\.path"
    ):
        Pipeline(
            load_experiment(None, ["data.name=npz", f"data.path={path}"]), tmp_path, Progress()
        )
    np.savez(path / "train.npz", x=np.zeros((9, 8, 8, 1), np.uint8), y=np.full(9, -1))
    with pytest.raises(ConfigError, match=r"data 'npz' has the label -1: labels count from 0"):
        Pipeline(
            load_experiment(None, ["data.name=npz", f"data.path={path}"]), tmp_path, Progress()
        )


def test_an_optimiser_without_state_cannot_decay_inactive_weights() -> None:
    """Checked before the profile, not at the first step."""
    overrides = [
        "search.optimizer.name=momentum",
        "search.optimizer.momentum=0.0",
        "search.optimizer.inactive_weights=decay",
    ]
    config = load_experiment(None, overrides).search.optimizer
    with pytest.raises(
        ConfigError,
        match=r"search\.optimizer\.inactive_weights = 'decay', but 'momentum' without momentum keeps no state",
    ):
        check_optimizer(config, "search.optimizer")
    check_optimizer(config.model_copy(update={"momentum": 0.9}), "search.optimizer")
