"""The report of a run folder whose documents are created here, in code."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hwnas.config import FORMATS, DataConfig, Experiment, ValidateConfig
from hwnas.core.arch import Architecture, Position
from hwnas.core.calibration import held_out_errors
from hwnas.core.caution import Caution
from hwnas.core.cost import CostModel
from hwnas.core.detection import with_detector
from hwnas.core.detector import PostProcessing
from hwnas.core.objective import AbsoluteObjective
from hwnas.core.space import MacroSpace
from hwnas.core.spaces import mobile32, published
from hwnas.core.ssdlite import SSDLiteSpec
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader
from hwnas.data.coco_eval import NUMBERS, CocoMetrics
from hwnas.errors import DocumentError
from hwnas.export.bundle import Bundle, BundleFile, DetectorPart, Preprocessing
from hwnas.export.target import target
from hwnas.report import charts, drawing, pictures, stage
from hwnas.report.charts import smoothed
from hwnas.report.documents import read
from hwnas.report.style import DARK, LIGHT
from hwnas.runs import JsonLines, StageContext, StageManifest
from hwnas.search.learning import Learning, Ranking, TrainingLog, learning_of
from hwnas.search.result import Candidate, SearchResult
from hwnas.task import Parity
from hwnas.tasks.pictures import Box, Picture, Pictures
from hwnas.train.result import TrainResult
from hwnas.unreadable import FILE, Unreadable
from hwnas.verdict import FileVerdict, Verdict

SECTIONS = ["files", "architecture", "pareto", "course", "table", "provenance"]
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """A parsed page: tags must close in order; ids, addresses and text are kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: Counter[str] = Counter()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "action", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def experiment(**changes: Any) -> Experiment:
    data = {"resolution": 16, "channels": 1, "classes": 10, "mean": [0.31], "std": [0.37]}
    return Experiment.model_validate(
        {"name": "quickstart", "data": data, "search": {"target_range": 0.35}, **changes}
    )


def small_space() -> MacroSpace:
    return mobile32(resolution=16, in_channels=1)


def make_table(space: MacroSpace) -> LatencyTable:
    rng = np.random.default_rng(1)
    entries = {}
    for op in space.ops:
        ms = 0.0012 + op.macs / 4.2e7 * (1 + 0.05 * op.kernel) * float(rng.normal(1, 0.05))
        noisy = bool(rng.random() < 0.06)
        entries[op.key] = Entry(
            ms=ms,
            p10_ms=0.97 * ms,
            p90_ms=1.2 * ms,
            runs=420,
            rounds=7,
            spread=0.14 if noisy else 0.02,
            noisy=noisy,
        )
    calibration = Calibration(intercept_ms=0.004, slope=1.07, networks=12)
    sums = [
        sum(entries[op.key].ms for op in space.decode(space.sample(rng)).ops()) for _ in range(8)
    ]
    measured = [(0.004 + 1.07 * ms) * float(rng.normal(1, 0.02)) for ms in sums]
    header = TableHeader(
        device="host", cpu="Intel(R) Xeon(R) Platinum 8481C @ 2.70GHz", machine="x86_64", runtime="litert", runtime_version="2.1.0",
        dtype="fp32", threads=1, cores=(3,), governor="unknown", layout="NHWC", batch=1, date="2026-01-31", space=space.name,
    )  # fmt: skip
    calibration = calibration.model_copy(
        update={"held_out": held_out_errors(calibration, [()] * len(sums), sums, measured)}
    )
    return LatencyTable(header=header, entries=entries, calibration=calibration)


def make_search(space: MacroSpace, table: LatencyTable) -> SearchResult:
    rng, cost = np.random.default_rng(2), CostModel.of_table(space, table)
    low, high = cost.range()
    target = low + 0.35 * (high - low)

    def candidates(count: int, quality: float) -> tuple[Candidate, ...]:
        accepted: list[Candidate] = []
        while len(accepted) < count:
            picks = space.sample(rng)
            latency = cost.cost(picks)
            if abs(latency / target - 1) < 0.02:
                accuracy = float(rng.normal(quality, 0.008))
                reward = accuracy - abs(latency / target - 1) / 10
                accepted.append(
                    Candidate(picks=picks, predicted=latency, quality=accuracy, reward=reward)
                )
        return tuple(sorted(accepted, key=lambda candidate: -candidate.reward))

    return SearchResult(
        strategy="tunas", space_sha256=space.sha256, objective=AbsoluteObjective(), tolerance=0.02, target=target,
        reachable=(low, high), table_sha256=table.sha256, steps=800, seed=0,
        candidates=candidates(8, 0.952), random=candidates(8, 0.935), random_anywhere=candidates(4, 0.93),
    )  # fmt: skip


def search_rows(target: float, steps: int) -> list[dict[str, float]]:
    rng, rows = np.random.default_rng(3), []
    for step in range(steps):
        t = step / steps
        learnt = 1 - 0.85 * np.exp(-5 * t) + rng.normal(0, 0.05)
        row = {
            "step": step,
            "loss": 0.6 + 1.8 * np.exp(-5 * t) + rng.normal(0, 0.08),
            "train_accuracy": np.clip(learnt, 0, 1),
        }
        if t >= 0.25:
            quality, latency = (
                0.95 - 0.4 * np.exp(-5 * t) + rng.normal(0, 0.03),
                target * (1 + rng.normal(0, 0.25 * (1.2 - t))),
            )
            row |= {
                "quality": quality,
                "latency_ms": latency,
                "reward": quality - 0.1 * abs(latency / target - 1),
            }
        row |= {"entropy": 14.2 - 8 * max(0, t - 0.25), "expected_ms": target * (1 + 0.3 * (1 - t))}
        rows.append({key: value if key == "step" else float(value) for key, value in row.items()})
    return rows


def in_words(data: DataConfig) -> Preprocessing:
    """A description in words only, as for a plug-in's data."""
    return Preprocessing(
        resolution=data.resolution,
        channels=data.channels,
        mean=data.mean,
        std=data.std,
        resize="bilinear",
    )


def make_bundle(config: Experiment, arch: Architecture) -> Bundle:
    files = []
    for kind in FORMATS:
        file_kind = target(kind)
        name, runtime, dtype = file_kind.file, file_kind.runtime, file_kind.dtype
        int8 = dtype == "int8"
        parity = Parity(
            images=64, relative_error=0.031 if int8 else 4.1e-7, agreement=0.984 if int8 else 1.0
        )
        content = {
            "name": name,
            "format": kind,
            "runtime": runtime,
            "dtype": dtype,
            "sha256": "0" * 64,
            "parity": parity,
        }
        files.append(
            BundleFile.model_validate(
                {**content, "size_bytes": arch.params * (1 if int8 else 4) + 9000}
            )
        )
    return Bundle(
        architecture=arch, labels=tuple("0123456789"), preprocessing=in_words(config.data),
        macs=arch.macs, params=arch.params, task="classify", metric="accuracy",
        metrics={"accuracy": 0.9806}, test_images=360, files=tuple(files),
        versions={"hwnas": "0.1.0", "torch": "2.14.1", "onnx": "1.19.0"},
    )  # fmt: skip


def make_verdict(bundle: Bundle, predicted: float, *, passed: bool = True) -> Verdict:
    files = []
    for file, factor, loss in zip(
        bundle.files, (1.012, 0.6, 0.9), (0.0, 0.0055 if passed else 0.031, 0.0), strict=True
    ):
        has_prediction = file.name == "model-fp32.tflite"
        files.append(FileVerdict(
            name=file.name, runtime=file.runtime, runtime_version="2.0", dtype=file.dtype, measured_ms=predicted * factor, spread=0.011,
            predicted_ms=predicted if has_prediction else None, latency_error=factor - 1 if has_prediction else None,
            latency_passed=True if has_prediction else None, parity_passed=None, metrics={"accuracy": 0.9806 - loss}, loss=loss,
            quality_passed=loss < 0.02,
        ))  # fmt: skip
    return Verdict(
        device="host",
        cpu="test",
        cores=(0,),
        governor="unknown",
        threads=1,
        date="2026-01-01",
        bundle_sha256=bundle.sha256,
        table="host/litert-fp32-1t",
        table_sha256=None,
        unpredicted=None,
        drift=1.0,
        tolerances=ValidateConfig(),
        images=360,
        task="classify",
        metric="accuracy",
        metrics={"accuracy": 0.9806},
        files=tuple(files),
        passed=passed,
    )


def fill(
    root: Path, config: Experiment, *, until: str = "validate", passed: bool = True
) -> StageContext:
    """A run folder with the documents of the stages up to ``until``."""
    order = ["profile", "search", "train", "export", "validate"]
    wanted = order[: order.index(until) + 1]
    space = small_space()
    table = make_table(space)
    search = make_search(space, table)
    arch = space.decode(search.candidates[0].picks, f"{space.name}-tunas")
    bundle = make_bundle(config, arch)
    for name in wanted:
        (root / name).mkdir(parents=True)
        StageManifest(stage=name, state="done", hwnas="0.1.0", inputs={}, seconds=61.2).save(
            root / name / "stage.json"
        )
    table.save(root / "profile" / "table.json")
    if "search" in wanted:
        search.save(root / "search" / "search.json")
        arch.save(root / "search" / "arch.json")
        JsonLines(root / "search" / "metrics.jsonl").rewrite(search_rows(search.target, 800))
    if "train" in wanted:
        TrainResult(
            architecture_sha256=arch.sha256,
            weights="scratch",
            steps=500,
            seed=0,
            task="classify",
            metric="accuracy",
            metrics={"accuracy": 0.9806},
            guess=0.1,
            test_images=360,
            class_names=tuple("0123456789"),
        ).save(root / "train" / "train.json")
        rows = [
            {key: row[key] for key in ("step", "loss", "train_accuracy")}
            for row in search_rows(1.0, 500)
        ]
        JsonLines(root / "train" / "metrics.jsonl").rewrite(rows)
    if "export" in wanted:
        bundle.save(root / "export" / "bundle.json")
    if "validate" in wanted:
        make_verdict(bundle, search.candidates[0].predicted, passed=passed).save(
            root / "validate" / "verdict.json"
        )
    return StageContext(config, root, root / "report")


def written(ctx: StageContext, space: MacroSpace | None = None) -> str:
    stage.write(ctx, read(ctx, space or small_space(), ctx.root / "profile" / "table.json"))
    return (ctx.folder / "report.html").read_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(fill(tmp_path_factory.mktemp("run") / "quickstart", experiment()))


def test_a_full_run_has_every_section_in_order(full: str) -> None:
    page = Page(full)
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    # drawing, pareto, four search and two training curves, held-out, entries
    assert page.tags["svg"] == 10
    assert (
        "✓ passed" in page.text
        and "not validated" not in page.text
        and "Not finished" not in page.text
    )
    for words in (
        "model-int8.tflite",
        "mobile32-tunas",
        "Spearman",
        "hwnas run quickstart",
        "2.1.0",
        "98.06%",
        '"target_range": 0.35',
    ):
        assert words in page.text


def test_the_file_is_self_contained(full: str) -> None:
    page = Page(full)
    assert all(address.startswith("#") for address in page.addresses)
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert (
        "http:" not in full
        and "https:" not in full
        and "@import" not in full
        and "@font-face" not in full
    )
    assert full.count("<style") == 1  # matplotlib's own would apply to the whole page


def test_ids_are_unique_and_references_resolve(full: str) -> None:
    page = Page(full)
    assert len(set(page.ids)) == len(page.ids)
    used = {
        *re.findall(r"url\(#([^)]+)\)", full),
        *(address[1:] for address in page.addresses),
        *re.findall(r'labelledby="([^"]+)"', full),
    }
    assert used <= set(page.ids)


def test_figures_carry_descriptions_and_theme_colours(full: str) -> None:
    assert len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]{40,}"', full)) == full.count(
        "<svg "
    )
    drawings = "".join(re.findall(r"<svg.*?</svg>", full, flags=re.DOTALL))
    assert "var(--ink)" in drawings
    assert not re.search(r"#[0-9a-f]{6}\b", drawings), "a colour that the dark theme cannot reach"


@pytest.mark.slow
def test_the_same_documents_give_the_same_bytes(tmp_path: Path, full: str) -> None:
    assert written(fill(tmp_path / "quickstart", experiment())) == full


@pytest.mark.slow
@pytest.mark.parametrize(
    ("until", "expected", "missing"),
    [
        ("profile", ["table", "provenance"], ["search", "train", "export", "validate"]),
        (
            "search",
            ["architecture", "pareto", "course", "table", "provenance"],
            ["train", "export", "validate"],
        ),
        ("export", SECTIONS, ["validate"]),
    ],
)
def test_a_partial_run_shows_what_exists_and_names_what_is_missing(
    tmp_path: Path, until: str, expected: list[str], missing: list[str]
) -> None:
    page = Page(written(fill(tmp_path / "run", experiment(), until=until)))
    assert [name for name in page.ids if name in SECTIONS] == expected
    assert f"Not finished yet: {', '.join(missing)}. Resume with: hwnas run run" in page.text
    assert "not validated yet" in page.text


@pytest.mark.slow
def test_an_empty_and_an_interrupted_run(tmp_path: Path) -> None:
    ctx = StageContext(experiment(), tmp_path, tmp_path / "report")
    assert [name for name in Page(written(ctx)).ids if name in SECTIONS] == ["provenance"]
    JsonLines(tmp_path / "search" / "metrics.jsonl").rewrite(search_rows(0.2, 120))
    page = Page(written(ctx))
    assert "search (interrupted at step 120)" in page.text and "course" in page.ids


@pytest.mark.slow
def test_a_failed_verdict_says_why(tmp_path: Path) -> None:
    page = Page(written(fill(tmp_path / "run", experiment(), passed=False)))
    assert "✗ FAILED" in page.text
    assert (
        "model-int8.tflite loses 3.10 points of top-1 against PyTorch; 2.00 are allowed."
        in page.text
    )


NOTHING = Caution(
    headline="the search learned nothing",
    text="the super-net's loss ended at 2.303: raise search.epochs.",
)


@pytest.mark.slow
def test_a_search_that_learned_nothing_has_no_green_badge(tmp_path: Path) -> None:
    """Whether the verdict says so or, if an earlier hwnas validated, the search."""
    for source in ("verdict", "search"):
        ctx = fill(tmp_path / source, experiment())
        if source == "verdict":
            path = ctx.path("validate", "verdict.json")
            Verdict.load(path).model_copy(update={"warnings": (NOTHING,)}).save(path)
        else:
            path = ctx.path("search", "search.json")
            SearchResult.load(path).model_copy(
                update={"learning": Learning(learned=False, cautions=(NOTHING,))}
            ).save(path)
        page = Page(text := written(ctx))
        assert (
            '<span class="badge caution">✓ passed · search learned nothing</span>' in text
            and "badge good" not in text
        )
        assert (
            "The search learned nothing" in page.text
            and "The super-net's loss ended at 2.303: raise search.epochs." in page.text
        )


@pytest.mark.slow
def test_a_network_that_guesses_has_no_green_badge(tmp_path: Path) -> None:
    ctx = fill(tmp_path, experiment())
    path = ctx.path("train", "train.json")
    TrainResult.load(path).model_copy(update={"metrics": {"accuracy": 0.1}, "guess": 0.1}).save(
        path
    )
    text = written(ctx)
    assert '<span class="badge caution">✓ passed · trained network learned nothing</span>' in text


@pytest.mark.slow
def test_proposals_are_compared_with_random_networks_in_a_sentence(tmp_path: Path) -> None:
    """That of hwnas.search.learning; a policy's advantage is mentioned beside it."""
    ctx = fill(tmp_path, experiment())
    path = ctx.path("search", "search.json")
    search = SearchResult.load(path)
    assert "of the same latency" not in written(ctx)  # from before there was such a sentence
    qualities = (
        [candidate.quality for candidate in group] for group in (search.candidates, search.random)
    )
    ranking = Ranking(
        "accuracy", *qualities, images=360, evaluation_images=360, evaluated=0, chance=0.1
    )
    for course in (None, TrainingLog(search_rows(search.target, 800), "rl_lr", 2.3)):
        learning = learning_of(course, ranking)
        if course is None:
            learning = learning_of(None, replace(ranking, evaluated=30))
        assert learning.against_random is not None
        search.model_copy(update={"learning": learning}).save(path)
        text = Page(written(ctx)).text
        assert (
            learning.against_random.sentence in text
            and "standard error over 8 proposals and 8 random networks" in text
        )
        assert ("trained on the policy’s own paths" in text) == (course is not None)


@pytest.mark.slow
def test_a_loss_is_not_written_as_a_percentage(tmp_path: Path) -> None:
    ctx = fill(tmp_path, experiment())
    path = ctx.path("search", "search.json")
    search = SearchResult.load(path).model_copy(update={"metric": "1 / (1 + loss)"})
    search.save(path)
    page = Page(text := written(ctx))
    best, mean = (
        search.candidates[0].quality,
        np.mean([candidate.quality for candidate in search.random]),
    )
    assert (
        f"Chosen: {best:.3f} at" in page.text and f"same budget: {mean:.3f} on average" in page.text
    )
    assert (
        "1 / (1 + loss) is that of the shared weights" in page.text
        and "super-net 1 / (1 + loss), held-out images" in text
    )
    pareto = re.search(r'aria-label="(Scatter plot of super-net[^"]*)"', text)
    assert pareto is not None and f"and {best:.3f}; budget" in pareto[1] and "%" not in pareto[1]


def test_images_that_are_left_out_are_listed(tmp_path: Path) -> None:
    ctx = StageContext(experiment(), tmp_path, tmp_path / "report")
    assert "left out" not in written(ctx)
    Unreadable(images={"train/cat/<7>.png": "image file is truncated"}).save(tmp_path / FILE)
    page = Page(text := written(ctx))
    assert "Images that are left out, because they do not decode: 1" in page.text
    assert "train/cat/<7>.png: image file is truncated" in page.text and "<7>" not in text


@pytest.mark.slow
def test_names_are_escaped(tmp_path: Path) -> None:
    name = '<script>alert("1")<b> & $x$'
    page = Page(text := written(fill(tmp_path / "a<b>&", experiment(name=name))))
    assert page.tags["script"] == page.tags["b"] == 0
    assert "<script>" not in text and name in page.text


@pytest.mark.slow
def test_documents_that_do_not_belong_together_are_reported(tmp_path: Path) -> None:
    ctx = fill(tmp_path, experiment())
    space = small_space()
    space.decode(space.sample(np.random.default_rng(9)), "other").save(
        tmp_path / "search" / "arch.json"
    )
    search = json.loads((tmp_path / "search" / "search.json").read_text())
    (tmp_path / "search" / "search.json").write_text(
        json.dumps({**search, "table_sha256": "0" * 64})
    )
    text = Page(written(ctx)).text
    assert "files contain an earlier architecture" in text and "different latency table" in text


def test_a_published_network_needs_no_search_and_no_table(tmp_path: Path) -> None:
    config = experiment(train={"arch": "mobilenet_v2"})
    arch = published("mobilenet_v2", resolution=96, classes=10)
    make_bundle(config, arch).save(tmp_path / "export" / "bundle.json")
    page = Page(written(StageContext(config, tmp_path, tmp_path / "report")))
    assert "architecture" in page.ids and "pareto" not in page.ids
    assert "Not finished yet: train, validate." in page.text


def test_the_rows_of_a_log_share_their_keys(tmp_path: Path) -> None:
    """Keys of their own would be most of the memory that long logs take."""
    ctx = fill(tmp_path, experiment())
    documents = read(ctx, small_space(), tmp_path / "profile" / "table.json")
    for rows in (documents.search_rows, documents.train_rows):
        keys = [key for row in rows for key in row]
        assert len({id(key) for key in keys}) == len(set(keys))


def test_skipped_slots_keep_their_place_in_the_drawing(tmp_path: Path) -> None:
    ctx = fill(tmp_path, experiment())
    space = small_space()
    documents = read(ctx, space, tmp_path / "profile" / "table.json")
    positions = documents.positions()
    assert documents.arch is not None
    assert [position.slot for position in positions] == [
        *(slot.key for slot in space.slots),
        "classifier",
    ]
    assert (
        tuple(position.op for position in positions if position.op is not None)
        == documents.arch.ops()
    )
    assert len(positions) > len(documents.arch.ops()), (
        "the fixture's architecture should skip something"
    )


def fill_detection(root: Path) -> StageContext:
    """The run folder of a detector that was trained but not exported, with pictures of
    uniform colour.
    """
    config = experiment(
        task="detect",
        data={"name": "coco", "path": "data", "resolution": 64, "classes": 2, "augment": "none"},
        train={"arch": "mobilenet_v2"},
    )
    arch = with_detector(published("mobilenet_v2"), 2, SSDLiteSpec(extras=(64, 32)), resolution=64)
    arch.save(root / "train" / "arch.json")
    numbers = {name: 0.05 * number + 0.2 for number, name in enumerate(NUMBERS)} | {
        "APs": None,
        "ARs": None,
    }
    coco = CocoMetrics.model_validate({**numbers, "AP_per_class": {"<cat>": 0.3, "dog": None}})
    result = {
        "architecture_sha256": arch.sha256,
        "weights": "backbone",
        "steps": 40,
        "seed": 0,
        "test_images": 40,
    }
    numbers = {
        "task": "detect",
        "metric": "AP",
        "metrics": coco.by_name,
        "per_class": coco.AP_per_class,
    }
    TrainResult(**result, **numbers, class_names=("<cat>", "dog")).save(
        root / "train" / "train.json"
    )
    rows = [
        {
            "step": step,
            "loss": 5 / (step + 1),
            "class_loss": 3 / (step + 1),
            "box_loss": 2 / (step + 1),
        }
        for step in range(40)
    ]
    JsonLines(root / "train" / "metrics.jsonl").rewrite(rows)
    cat = Box(corners=(0.1, 0.05, 0.6, 0.8), label="<cat>")
    shown = []
    for number in range(5):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 48 + 8 * number), (40 * number, 80, 120)).save(buffer, "JPEG")
        detected = (cat.model_copy(update={"score": 0.875, "label": "dog"}),) * (number > 0)
        shown.append(
            Picture(
                jpeg=base64.b64encode(buffer.getvalue()),
                truth=(cat,) * (number != 2),
                found=detected,
            )
        )
    Pictures(pictures=tuple(shown)).save(root / "train" / "pictures.json")
    return StageContext(config, root, root / "report")


@pytest.mark.slow
def test_a_detector_has_its_ap_and_pictures_instead_of_top_1(tmp_path: Path) -> None:
    page = Page(text := written(fill_detection(tmp_path / "boxes")))
    assert [name for name in page.ids if name in (*SECTIONS, "detections")] == [
        "detections",
        "architecture",
        "course",
        "provenance",
    ]
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert sum(address.startswith("data:") for address in page.addresses) == page.tags["image"] == 5
    assert (
        text.count("dog 0.88") == 4
        and "5 test images with the 4 boxes of their annotations and 4 boxes" in text
    )
    assert "Top-1, " not in page.text and "right at the end" not in page.text
    assert (
        page.text.index("AP75")
        < page.text.index("APs")
        < page.text.index("APl")
        < page.text.index("AR1")
    )
    assert "weights from backbone, AP 20.0%, AP50 25.0% on 40 test images at the end" in page.text
    for words in (
        *NUMBERS,
        "<cat>",
        "AP by class",
        "hwnas run boxes --out boxes-again",
        "extra 1",
        "head 3",
        "Parts of the loss",
    ):
        assert words in page.text, words
    assert "Not finished yet: export, validate. Resume with: hwnas run boxes" in page.text
    drawings = "".join(
        re.findall(r"<svg.*?</svg>", re.sub(r"base64,[^\"]*", "", text), flags=re.DOTALL)
    )
    assert not re.search(r"#[0-9a-f]{6}\b", drawings), "a colour that the dark theme cannot reach"
    assert written(fill_detection(tmp_path / "again" / "boxes")) == text


@pytest.mark.slow
@pytest.mark.parametrize("loss", [0.004, 0.031])
def test_the_verdict_of_a_detector(loss: float, tmp_path: Path) -> None:
    """One file without NMS in its graph, and one with it, which loses ``loss``."""
    ctx = fill_detection(tmp_path / "boxes")
    arch = Architecture.load(ctx.path("train", "arch.json"))
    parity = Parity(images=8, relative_error=2.3e-7, agreement=0.75)
    files, verdicts = [], []
    for kind, lost, ms in (("tflite-fp32", 0.0, 0.25), ("tflite-int8-tasks", loss, None)):
        file_kind = target(kind)
        name, runtime, dtype = file_kind.file, file_kind.runtime, file_kind.dtype
        common = {"name": name, "runtime": runtime, "dtype": dtype}
        files.append(
            BundleFile.model_validate(
                {**common, "format": kind, "size_bytes": 9000, "sha256": "0" * 64, "parity": parity}
            )
        )
        verdicts.append(FileVerdict.model_validate({
            **common, "runtime_version": "2.0", "measured_ms": 2.5, "spread": 0.01, "predicted_ms": None, "latency_error": None,
            "latency_passed": None, "parity_passed": None, "metrics": {"AP": 0.32 - lost}, "loss": lost, "quality_passed": lost < 0.03,
            "post_processing_ms": ms,
        }))  # fmt: skip
    bundle = Bundle(
        architecture=arch, labels=("<cat>", "dog"), preprocessing=in_words(ctx.experiment.data), macs=arch.macs,
        params=arch.params, task="detect", metric="AP", metrics={"AP": 0.32}, test_images=40, files=tuple(files), versions={},
        detector=DetectorPart(anchors=5, post_processing=PostProcessing()),
    )  # fmt: skip
    bundle.save(ctx.path("export", "bundle.json"))
    passed = loss < 0.03
    Verdict(
        device="host", cpu="test", cores=(0,), governor="unknown", threads=1, date="2026-01-01", bundle_sha256=bundle.sha256, table=None,
        table_sha256=None, unpredicted="there is no table of this device", drift=None, tolerances=ValidateConfig(), images=40,
        task="detect", metric="AP", metrics={"AP": 0.32}, files=tuple(verdicts), passed=passed,
    ).save(ctx.path("validate", "verdict.json"))  # fmt: skip
    page = Page(text := written(ctx))
    assert (
        "takes 2.50 ms on host, and finds objects with an AP of 32.0% on 40 test images, after"
        " 0.250 ms of post-processing" in page.text
    )
    assert (
        "AP, model-int8-tasks.tflite" in page.text
        and "in graph" in page.text
        and "Top-1, " not in page.text
    )
    assert ("✓ passed" in text, "✗ FAILED" in text) == (passed, not passed)
    assert ("loses 3.10 points of AP against PyTorch; 3.00 are allowed." in page.text) == (
        not passed
    )


def test_boxes_are_drawn_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In pixels of each image. The last places of the grid have no image."""
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "inline_svg", lambda figure, *_: drawn.append(figure))
    shown = Pictures.load(fill_detection(tmp_path).path("train", "pictures.json")).pictures
    pictures.detections(shown)
    corners = [
        [box.get_bbox().extents.round(1).tolist() for box in axes.patches] for axes in drawn[0].axes
    ]
    box = [[6.4, 0.05 * height, 38.4, 0.8 * height] for height in (48, 56, 64, 72, 80)]
    assert corners == [
        np.round(boxes, 1).tolist()
        for boxes in ([box[0]], [box[1]] * 2, [box[2]], [box[3]] * 2, [box[4]] * 2, [], [], [])
    ]


def test_a_detector_that_is_still_in_training(tmp_path: Path) -> None:
    ctx = fill_detection(tmp_path / "boxes")
    for name in ("train.json", "arch.json", "pictures.json"):
        (tmp_path / "boxes" / "train" / name).unlink()
    page = Page(written(ctx))
    assert (
        "Not finished yet: train (interrupted at step 40), export, validate. Resume with: hwnas run"
        " boxes" in page.text
    )
    assert "detections" not in page.ids and "course" in page.ids


def test_every_kind_of_block_can_be_drawn() -> None:
    for name in ("mobilenet_v3_small", "ssdlite320_mobilenet_v3_large"):
        arch = published(name)
        positions = tuple(Position.of(f"block {i}", op) for i, op in enumerate(arch.ops()))
        assert (
            ">pool<" in drawing.architecture(positions, [None] * len(positions))
            or arch.detector is not None
        )


def test_a_corrupt_document_is_named(tmp_path: Path) -> None:
    ctx = fill(tmp_path, experiment())
    (tmp_path / "validate" / "verdict.json").write_text("{")
    with pytest.raises(DocumentError, match=r"verdict\.json"):
        written(ctx)


def test_both_themes_have_every_colour_and_no_two_share_one() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_long_curves_stay_small_and_keep_their_spikes() -> None:
    rows: list[dict[str, Any]] = [{"step": i, "loss": 1.0 + (i == 77_777)} for i in range(100_000)]
    svg = charts.plot_curves("loss", "loss", rows, [charts.Series("loss", "loss")])
    assert svg is not None and len(svg) < 80_000
    assert charts.plot_curves("reward", "reward", rows, [charts.Series("reward", "reward")]) is None


def test_a_large_network_can_be_drawn() -> None:
    arch = published("mnasnet_b1")
    positions = tuple(Position.of(f"block {i}", op) for i, op in enumerate(arch.ops()))
    svg = drawing.architecture(positions, [None] * len(positions))
    assert ">1280<" in svg and "latency" not in svg


def test_smoothing_keeps_a_constant_and_the_length() -> None:
    assert np.allclose(smoothed(np.full(97, 3.0)), 3.0)
    assert len(smoothed(np.arange(2.0))) == 2


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (1.5, "1.50"), (0.012, "0.0120"), (123.4, "123"), (0.0, "0")]
)
def test_milliseconds_have_three_digits(value: float | None, text: str) -> None:
    assert stage.ms(value) == text


def test_counts_keep_three_digits() -> None:
    assert [stage.big(count) for count in (999, 345_338, 330_000_000, 1_204_000_000)] == [
        "999",
        "345 k",
        "330 M",
        "1.20 G",
    ]
    assert [stage.huge(count) for count in (12_345, 3 * 6**6 * 7**15)] == ["12,345", "6.6 × 10¹⁷"]
