"""Every command in the README and in docs/ runs as written, or shortened if it would
take minutes; every link leads somewhere.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest

from hwnas.cli import app
from hwnas.config import Experiment, load_experiment
from hwnas.core.cost import latency_ms
from hwnas.core.published import NETWORKS
from hwnas.core.spaces import proxylessnas
from hwnas.core.table import LatencyTable
from hwnas.experiments import experiment_space
from hwnas.search.settings import search_context
from tests.commands import run

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
SHORTER = (
    "-s profile.rounds=1 -s profile.max_rounds=1 -s profile.fit_networks=3 -s"
    " profile.test_networks=0 -s profile.min_ms=0.1"
)


def commands() -> list[list[str]]:
    """The ``hwnas`` commands in indented blocks, without comments. The table of
    commands has two to a line.
    """
    words = []
    for line in "\n".join(page.read_text() for page in PAGES).splitlines():
        if line.startswith("    ") and "hwnas " in line:
            for part in re.split(r"\s{3,}(?=hwnas )", line.strip()):
                words.append(shlex.split(re.split(r"\s{3,}", part)[0], comments=True))
    return words


def timed_networks(folder: Path) -> None:
    """Write what the command that fits a table reads: the table profiled by an earlier
    command, and five networks with made-up timings.
    """
    table = LatencyTable.load(folder / "runs/profile-224/profile/table.json")
    table.save(folder / "other.json")
    space = proxylessnas()
    networks = [space.decode(space.sample(np.random.default_rng(seed))) for seed in range(5)]
    lines = ["architecture,ms"]
    for i, arch in enumerate(networks):
        arch.save(folder / f"{i}.json")
        lines.append(f"{i}.json,{latency_ms(arch, table):.4f}")
    (folder / "timed.csv").write_text("\n".join(lines))


def test_every_verb_is_listed() -> None:
    verbs = {
        (command.name or command.callback.__name__)
        for command in app.registered_commands
        if command.callback
    } | {"table", "study"}
    assert {command[1] for command in commands()} == verbs


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    """In the order of the pages, in a folder that is empty but for a link to the
    configurations, as in a checkout.
    """
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ran = 0
    for command in commands():
        text = " ".join(command[1:])
        # the synopsis: its verbs are checked above
        if "CONFIG" in text or "TABLE" in text or "[" in text:
            continue
        # needs those photographs; tests/train trains detectors on other images
        if "data/raccoon" in text:
            continue
        # needs the reader's photographs, whose classes are counted, as in tests/data
        if "path=~/photos" in text:
            continue
        # needs a finished run and a phone's table; tests/search/test_stage.py has both
        if "search.weights" in text:
            continue
        # needs CIFAR-10, its accuracies and an hour; tests/study does it on digits
        if "study.truth" in text:
            continue
        # needs a board or a phone (see tests/devices); a plan checks the settings
        if "device.name" in text:
            command = [command[0], "run", *command[2:], "--plan", "-q"]
        elif text.startswith("profile"):
            command += shlex.split(SHORTER)
        elif text.startswith("table fit"):
            timed_networks(tmp_path)
        elif text.startswith("run") and "--plan" not in text:
            command += ["--plan", "-q"]
        output = run(command[1:], tmp_path).stdout
        ran += 1
        if text.startswith("space"):
            assert "72 of 72 ops" in output
    assert ran >= 6


def test_links_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *PAGES]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 12_000, (
        "it has what a newcomer needs; the rest belongs in docs/"
    )


def test_no_placeholder_is_left() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *PAGES]:
        assert not re.search(r"\b[A-Z]+_(TABLE|ROWS?)\b|TODO|TBD", document.read_text()), document


def test_the_budget_and_the_limits_in_the_readme_can_be_met() -> None:
    """Except the latency limit, whose table is the reader's own."""
    [block] = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    search = tomllib.loads(block)["search"]
    limits = [limit for limit in search["limits"] if limit["kind"] != "latency"]
    assert len(limits) == len(search["limits"]) - 1
    experiment = load_experiment(ROOT / "configs/experiments/cifar10-npz.toml")
    content = experiment.model_dump(mode="json", by_alias=True)
    content["search"] |= {"budget": search["budget"], "limits": limits}
    changed = Experiment.model_validate(content)
    assert search_context(changed, experiment_space(changed), None).target == 20_000_000


def test_published_networks_are_listed_by_their_names() -> None:
    listed = re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs/spaces.md").read_text())
    assert set(NETWORKS) <= set(listed)
