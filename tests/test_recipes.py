"""Named settings that an experiment starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hwnas.config import Experiment, load_experiment
from hwnas.config.experiment import recipe_names
from hwnas.data.training_augmentation import TrainingAugmentation
from hwnas.engine import check_optimizer, lr_factor
from hwnas.errors import ConfigError
from hwnas.progress import Progress
from hwnas.resources import resource_path
from hwnas.search import STRATEGIES
from hwnas.unused import check_used

SOURCES = ("arXiv", "Our choice")
DETECTORS = ("detector-small-data", "mobiledet", "ssdlite-torchvision")
BOXES = 'task = "detect"\n[data]\nname = "coco"\npath = "x"\nclasses = 3\n'
PHOTOGRAPHS = '[data]\nname = "npz"\npath = "x"\nresolution = 32\nclasses = 10\n'


def experiment(folder: Path, text: str, *overrides: str) -> Experiment:
    path = folder / "mine.toml"
    path.write_text(text + PHOTOGRAPHS)
    return load_experiment(path, list(overrides))


def experiment_with(recipe: str, folder: Path) -> Experiment:
    """With data that suit the recipe."""
    path = folder / "mine.toml"
    path.write_text(f'recipe = "{recipe}"\n' + (BOXES if recipe in DETECTORS else PHOTOGRAPHS))
    return load_experiment(path)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_all_its_settings_count(name: str, tmp_path: Path) -> None:
    loaded = experiment_with(name, tmp_path)
    for verb in ("search", "train"):
        check_used(loaded, verb, [], Refusing())
    strategy = loaded.search.strategy
    strategy.options(STRATEGIES.get(strategy.name).Config)
    text = (resource_path("configs/recipes") / f"{name}.toml").read_text()
    assert text.startswith("#") and any(source in text for source in SOURCES)


@pytest.mark.parametrize("name", recipe_names())
def test_optimizers_and_policies_of_recipes_can_be_made(name: str, tmp_path: Path) -> None:
    loaded = experiment_with(name, tmp_path)
    for section, table in (("search", loaded.search), ("train", loaded.train)):
        check_optimizer(table.optimizer, f"{section}.optimizer")
    TrainingAugmentation(loaded.train.augmentation, loaded.data)


def test_the_documentation_lists_every_recipe() -> None:
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    table = "\n".join(line.split("|")[1] for line in rows)
    for name in recipe_names():
        assert f"`{name}`" in table


@pytest.mark.parametrize(
    ("name", "section", "lr", "batch_size", "epochs"),
    [
        ("mobilenetv3", "train", 0.064, 1024, 600),
        ("timm-ra4", "train", 0.001, 1024, 2400),
        ("proxylessnas", "search", 0.025, 256, 160),
        ("proxylessnas", "train", 0.05, 256, 300),
        ("spos", "search", 0.5, 1024, 125),
        ("spos", "train", 0.5, 1024, 240),
        ("fairnas", "search", 0.5, 1024, 100 / 6),
        ("fairnas", "train", 0.5, 1024, 240),
        ("once-for-all", "search", 0.03, 64, 590),
        ("darts", "search", 0.025, 64, 50),
        ("darts", "train", 0.025, 96, 600),
        ("pdarts", "search", 0.025, 96, 75),
        ("pdarts", "train", 0.025, 128, 600),
    ],
)
def test_rates_are_those_of_the_papers_at_their_batches(
    name: str, section: str, lr: float, batch_size: int, epochs: float, tmp_path: Path
) -> None:
    loaded = experiment(tmp_path, f'recipe = "{name}"\n')
    table: Any = getattr(loaded, section)
    assert table.optimizer.lr * batch_size / 256 == pytest.approx(lr, rel=1e-3)
    assert table.epochs == pytest.approx(epochs, rel=5e-3)


def test_mobilenetv3s_rate_falls_every_two_epochs(tmp_path: Path) -> None:
    train = experiment(tmp_path, 'recipe = "mobilenetv3"\n').train
    steps_per_epoch = 10
    steps = int(train.epochs) * steps_per_epoch
    for epoch in (0, 1, 2, 3, 5, 300, 599):
        step = epoch * steps_per_epoch + 4
        factor = lr_factor(step, steps, train.optimizer.warmup, train.optimizer.schedule)
        assert factor == pytest.approx(0.973 ** (epoch // 2))


@pytest.mark.parametrize(("name", "drop_path"), [("darts", 0.2), ("pdarts", 0.3)])
def test_darts_trains_with_cutout_and_drop_path(
    name: str, drop_path: float, tmp_path: Path
) -> None:
    train = experiment(tmp_path, f'recipe = "{name}"\n').train
    assert (train.augmentation.cutout, train.augmentation.erasing) == (16, 0.0)
    assert train.drop_path == drop_path


class Refusing(Progress):
    def warning(self, message: str) -> None:
        raise AssertionError(message)


def test_the_users_settings_win_over_the_recipes(tmp_path: Path) -> None:
    plain = experiment(tmp_path, 'recipe = "fbnet"\n')
    assert (plain.search.strategy.name, plain.search.epochs) == ("fbnet", 90)
    assert plain.search.optimizer.lr * 192 / 256 == pytest.approx(0.1, rel=1e-3)
    assert (plain.data.name, plain.data.held_out) == ("npz", 0.2)
    own = experiment(tmp_path, 'recipe = "fbnet"\n[search]\nepochs = 9\n', "train.epochs=3")
    assert (own.search.epochs, own.train.epochs) == (9, 3)
    assert own.search.optimizer == plain.search.optimizer
    other = experiment(tmp_path, 'recipe = "fbnet"\n', "search.optimizer={name='sgd', lr=0.5}")
    # another optimiser does not inherit this one's rate and decay
    assert other.search.optimizer.lr == 0.5
    assert other.search.optimizer.weight_decay != plain.search.optimizer.weight_decay


def test_a_recipe_is_one_option_of_the_command_line(tmp_path: Path) -> None:
    loaded = experiment(tmp_path, "", "recipe=pdarts")
    assert loaded.search.strategy.name == "pdarts"
    # the paper's 0.025 at batch 96, and 0.001 at the end
    config = loaded.search.optimizer
    assert config.lr * 96 / 256 == pytest.approx(0.025, rel=1e-3)
    schedule: Any = config.schedule
    assert config.lr * 96 / 256 * schedule.final == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("name", DETECTORS)
def test_recipes_of_detectors_are_for_detectors(name: str, tmp_path: Path) -> None:
    """What they are merged into has boxes, even if it does not say so."""
    loaded = load_experiment(None, [f"recipe={name}", "data.path=x", "data.classes=3"])
    assert (loaded.task, loaded.data.name, loaded.data.classes) == ("detect", "coco", 3)
    with pytest.raises(ConfigError, match=f"^recipe = '{name}': .* for 'npz'|'npz' has none"):
        experiment(tmp_path, f'recipe = "{name}"\n')


def test_the_rates_of_the_sources(tmp_path: Path) -> None:
    """torchvision: 0.15 for 8 x 24 images, 660 epochs, one of them warm-up; MobileDet: 0.8
    for 512 images, 400,000 steps on COCO, 2,000 of them warm-up.
    """
    ours = load_experiment(None, ["recipe=ssdlite-torchvision", "data.path=x"]).train
    assert ours.optimizer.lr * ours.batch_size / 256 == pytest.approx(0.15)
    assert ours.optimizer.warmup * ours.epochs == pytest.approx(1, abs=0.02)
    theirs = load_experiment(None, ["recipe=mobiledet", "data.path=x"]).train
    steps = theirs.epochs * 118_287 / theirs.batch_size
    assert theirs.optimizer.lr * theirs.batch_size / 256 == pytest.approx(0.8)
    assert steps == pytest.approx(400_000, rel=1e-3)
    assert theirs.optimizer.warmup * steps == pytest.approx(2000, rel=1e-3)


def test_a_run_folder_keeps_the_settings_and_not_the_name(tmp_path: Path) -> None:
    """Settings that the user has set back to their defaults stay so."""
    text = 'recipe = "small-data"\n[train]\npretrained = "a.pth"\naugmentation = {erasing = 0.0}\n'
    loaded = experiment(tmp_path, text)
    assert loaded.train.augmentation.erasing == 0.0
    content = loaded.model_dump(mode="json", by_alias=True)
    assert "recipe" not in content
    again = Experiment.model_validate(content)
    assert again == loaded.model_copy(update={"recipe": None})


@pytest.mark.parametrize("name", ["fbnett", "../quickstart", "", "[1]"])
def test_unknown_recipes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe = .* is unknown; (did you mean|known: darts)"):
        experiment(tmp_path, "", f"recipe={name!r}")
