"""Input of other programs, damaged: published tables, measured networks, accuracies,
images and annotations.
"""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hwnas.errors import HwnasError
from hwnas.study.truth import read_truth
from hwnas.tables.networks import read_networks
from tests.conftest import digits_space
from tests.fuzz.damage import damaged, damaged_json, fuzzed
from tests.fuzz.driving import survives
from tests.tables.test_formats import BLOCK, OFA_BLOCK, coefficients, mean, tunas_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the damaged files of one example after the other."""
    return tmp_path_factory.mktemp("fuzz")


OTHER_BLOCK = BLOCK.replace("28x28x40", "28x28x24")
TFNAS_BLOCK = {"base": 3.0, "MBInvertedResBlock_56_24_48_24_k3_s1_relu": {"24": 0.2, "48": 0.3}}
PUBLISHED = {
    "proxylessnas": yaml.safe_dump({BLOCK: mean(1.0), OTHER_BLOCK: mean(2.0)}),
    "ofa": yaml.safe_dump({OFA_BLOCK: mean(1.0)}),
    "proxylessnas:gpu": f"block_name,gpu,cpu\n{BLOCK},1.5,2\n{OTHER_BLOCK},2.5,3\n",
    "tfnas:cpu": json.dumps({"cpu": TFNAS_BLOCK}),
    "single_path": json.dumps({BLOCK: 1.0}),
    "fbnet": "ir_k3_e1 ir_k3_s2 ir_k3_e3 ir_k3_e6 ir_k5_e1 ir_k5_s2 ir_k5_e3 ir_k5_e6 skip\n"
    + "1 2 3 4 5 6 7 8 0\n" * 22,
    "tunas": tunas_file(coefficients()),
}
"""Format -> the text of a small table in it."""

BOMBS = (
    gzip.compress(bytes(2**20)) * 300,
    b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (n + 1, n + 1, n, n) for n in range(97, 120)),
    b"a: &a {x: 1}\n" + b"".join(b"%c: &%c {<<: [*%c, *%c]}\n" % (n + 1, n + 1, n, n) for n in range(97, 120)),
    b"a: !!python/object/apply:os.system ['touch pwned']",
    b"cos\nsystem\n(S'touch pwned'\ntR.",
)  # fmt: skip
"""Files that would fill the memory, or run something, if they were believed."""


@fuzzed(40)
@given(data=st.data())
def test_published_tables(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(PUBLISHED)))
    content = data.draw(damaged(PUBLISHED[name].encode()))
    if data.draw(st.booleans()):
        content = data.draw(damaged(gzip.compress(content, mtime=0)))
    (folder / "source").write_bytes(content)
    imported = folder / "imported.json"
    imported.unlink(missing_ok=True)
    survives(
        folder, "table", "import", folder / "source", "--format", name, "--out", imported,
        writes=("imported.json",),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["proxylessnas", "tfnas:cpu", "tunas"])
@pytest.mark.parametrize("bomb", range(len(BOMBS)))
def test_bombs_and_commands_in_tables_are_refused(
    folder: Path, name: str, bomb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "source").write_bytes(BOMBS[bomb])
    outcome = survives(
        folder, "table", "import", folder / "source", "--format", name, "--out", folder / "x.json"
    )
    assert outcome.code == 2
    assert not (folder / "pwned").exists()


SPACE = digits_space()
NETWORKS = "architecture,ms\n0 0 0,1.5\n1 2 3,2.5\n2 4 1,1.25\n0 4 3,1.75\n"
TRUTH = "architecture,acc1,acc2\n0 0 0,93.5,93\n1 2 3,94,95\n2 4 1,90,91.5\n0 4 3,91,90\n"
TRUTH_JSON = {"0 0 0": [0.93, 0.94], "1 2 3": [0.95, 0.94], "2 4 1": [0.9, 0.91]}


@fuzzed(60)
@given(content=damaged(NETWORKS.encode()))
def test_measured_networks(folder: Path, content: bytes) -> None:
    (folder / "networks.csv").write_bytes(content)
    try:
        networks = read_networks(folder / "networks.csv", SPACE)
    except HwnasError as error:
        assert "\n" not in str(error)
    else:
        assert all(0 < ms < np.inf for _, ms in networks)


@fuzzed(60)
@given(content=st.one_of(damaged(TRUTH.encode()), damaged_json(TRUTH_JSON)))
def test_accuracies(folder: Path, content: bytes) -> None:
    (folder / "truth").write_bytes(content)
    try:
        truth = read_truth(folder / "truth", SPACE)
    except HwnasError as error:
        assert "\n" not in str(error)
    else:
        assert truth.accuracy_NR.min() >= 0 and truth.accuracy_NR.max() <= 1


def checked_images(folder: Path, name: str) -> None:
    """``hwnas data`` on what is in the folder ``images``."""
    config = folder / "data.toml"
    task = "detect" if name == "coco" else "classify"
    config.write_text(
        f'task = "{task}"\n[data]\nname = "{name}"\npath = "{folder / "images"}"\nclasses = 2\n'
        "resolution = 16\n"
    )
    survives(folder, "data", config, "-q")


PICTURE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, kind)
    return buffer.getvalue()


ANNOTATIONS = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 12, "height": 12} for i in range(3)],
    "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog", "supercategory": "animal"}],
    "annotations": [
        {"id": i, "image_id": i, "category_id": 3 if i else 8, "bbox": [1, 1, 6.5, 7], "iscrowd": 0, "area": 45.5}
        for i in range(3)
    ],
}  # fmt: skip


@fuzzed(20)
@given(content=damaged_json(ANNOTATIONS))
def test_annotations(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("coco")
    for part in ("train", "val"):
        (folder / "images" / part).mkdir(parents=True)
        for i in range(3):
            (folder / "images" / part / f"{i}.png").write_bytes(encoded("PNG"))
    (folder / "images" / "annotations").mkdir()
    (folder / "images/annotations/instances_train.json").write_bytes(content)
    (folder / "images/annotations/instances_val.json").write_text(json.dumps(ANNOTATIONS))
    checked_images(folder, "coco")


@fuzzed(20)
@given(content=st.sampled_from([encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP")]).flatmap(damaged))  # fmt: skip
def test_images(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("images")
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / "images" / part / label).mkdir(parents=True)
            for i in range(2):
                (folder / "images" / part / label / f"{i}.png").write_bytes(encoded("PNG"))
    (folder / "images/train/cat/0.png").write_bytes(content)
    checked_images(folder, "folder")


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.stack([PICTURE] * 8), y=np.arange(8) % 2)
    return buffer.getvalue()


@fuzzed(20)
@given(content=damaged(arrays()))
def test_arrays(folder: Path, content: bytes) -> None:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "train.npz").write_bytes(content)
    (folder / "images" / "test.npz").write_bytes(arrays())
    checked_images(folder, "npz")


class Trap:
    """An object whose pickle runs a command."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("pwned"),)


def test_a_pickle_in_arrays_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "images").mkdir(exist_ok=True)
    trap = np.array([Trap()], dtype=object)
    np.savez(folder / "images" / "train.npz", x=trap, y=trap)
    checked_images(folder, "npz")
    assert not (folder / "pwned").exists()
