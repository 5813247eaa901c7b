"""Pages in a real browser, as wide as on a desktop and on a phone: nothing is cut off,
and no table has to be scrolled.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hwnas.config import FORMATS, NMS_FORMATS, ValidateConfig
from hwnas.core.arch import Architecture
from hwnas.core.detector import PostProcessing
from hwnas.data.coco_eval import NUMBERS, CocoMetrics
from hwnas.export.bundle import Bundle, BundleFile, DetectorPart
from hwnas.export.target import target
from hwnas.report import charts
from hwnas.runs import JsonLines, StageContext
from hwnas.task import Parity
from hwnas.train.result import TrainResult
from hwnas.verdict import FileVerdict, Verdict
from tests.report import test_comparing, test_ranking, test_shrinking
from tests.report.test_report import Page, experiment, fill, fill_detection, in_words, written

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDTHS = (1280, 400)
METHODS = (
    "spos",
    "fairnas",
    "tunas",
    "evolution",
    "nsga2",
    "progressive_shrinking",
    "random",
    "darts",
    "proxylessnas",
    "fbnet",
)

MEASURE = """
<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(each => each.open = true);
  const found = [];
  for (const each of document.querySelectorAll("body, body *")) {
    if (each.closest("svg") || !each.clientWidth) continue;
    const table = each.matches("table") || each.querySelector("table");
    if (each.scrollWidth > each.clientWidth + 1)
      found.push({tag: each.tagName, name: each.className || each.id, figure: !table && each.matches(".scroll"),
                  scroll: each.scrollWidth, client: each.clientWidth, text: each.textContent.trim().slice(0, 60)});
    const right = each.getBoundingClientRect().right;
    if (right > innerWidth + 1 && !each.closest(".scroll"))
      found.push({tag: each.tagName, name: each.className, figure: false, right: right, text: each.textContent.trim().slice(0, 60)});
  }
  parent.postMessage({width: innerWidth, found: found, tables: document.querySelectorAll("table").length}, "*");
});
</script>
"""


def detector_run(root: Path, classes: int = 80) -> StageContext:
    """The run of a detector with many classes, all six files validated, and a
    validation curve.
    """
    ctx = fill_detection(root)
    names = [
        f"class {number} {'of a long name ' * (number % 3)}".strip() for number in range(classes)
    ]
    numbers = {name: 0.05 * number + 0.2 for number, name in enumerate(NUMBERS)}
    coco = CocoMetrics.model_validate(
        {
            **numbers,
            "AP_per_class": {name: (7 * i % classes) / classes for i, name in enumerate(names)},
        }
    )
    result = TrainResult.load(ctx.path("train", "train.json"))
    result.model_copy(update={"metrics": coco.by_name, "per_class": coco.AP_per_class}).save(
        ctx.path("train", "train.json")
    )
    points = [
        {"step": 4 * i, "epoch": float(i), "images": 40, "test_ap": 0.02 * i, "test_ap50": 0.04 * i}
        for i in range(1, 11)
    ]
    JsonLines(ctx.path("train", "validation.jsonl")).rewrite(points)
    files, verdicts = [], []
    for kind in (*FORMATS, *NMS_FORMATS):
        file_kind = target(kind)
        name, runtime, dtype = file_kind.file, file_kind.runtime, file_kind.dtype
        parity = Parity(images=8, relative_error=0.0313, agreement=0.984)
        common = {"name": name, "runtime": runtime, "dtype": dtype}
        size = {"format": kind, "size_bytes": 4_123_456, "sha256": "0" * 64, "parity": parity}
        files.append(BundleFile.model_validate({**common, **size}))
        times: dict[str, Any] = {"app_post_processing_ms": 0.301, "post_processing_ms": 6.52}
        if file_kind.graph != "decoded":
            times = {"app_ms": 2.41, "timed_on": "test image"}
        verdicts.append(FileVerdict.model_validate({
            **common, **times, "runtime_version": "2.0", "measured_ms": 12.53, "spread": 0.012, "predicted_ms": 12.1,
            "latency_error": 0.035,
            "latency_passed": True, "parity_passed": None, "metrics": {"AP": 0.321}, "loss": 0.001, "quality_passed": True,
        }))  # fmt: skip
    arch = Architecture.load(ctx.path("train", "arch.json"))
    bundle = Bundle(
        architecture=arch, labels=tuple(names), preprocessing=in_words(ctx.experiment.data), macs=arch.macs,
        params=arch.params, task="detect", metric="AP", metrics={"AP": 0.32}, test_images=40, files=tuple(files), versions={},
        detector=DetectorPart(anchors=5, post_processing=PostProcessing()),
    )  # fmt: skip
    bundle.save(ctx.path("export", "bundle.json"))
    Verdict(
        device="host", cpu="test", cores=(0,), governor="unknown", threads=1, date="2026-01-01", bundle_sha256=bundle.sha256, table=None,
        table_sha256=None, unpredicted=None, drift=1.0, tolerances=ValidateConfig(), images=40,
        task="detect", metric="AP", metrics={"AP": 0.32}, min_score=0.001,
        app_score=0.3, files=tuple(verdicts), passed=True,
    ).save(ctx.path("validate", "verdict.json"))  # fmt: skip
    return ctx


def classifier_run(root: Path) -> StageContext:
    """A complete run of a classifier, with a validation curve."""
    ctx = fill(root, experiment())
    points = [
        {"step": 50 * i, "epoch": float(i), "images": 360, "test_accuracy": 0.98 - 0.5 / i**2}
        for i in range(1, 11)
    ]
    JsonLines(ctx.path("train", "validation.jsonl")).rewrite(points)
    return ctx


def pages(root: Path) -> dict[str, str]:
    """A page of every kind, each with all that it can have."""
    shrink = root / "shrink" / "shrink"
    shrink.mkdir(parents=True)
    test_shrinking.make_study().save(shrink / "shrink.json")
    test_shrinking.StageManifest(stage="shrink", state="done", hwnas="0.1.0", inputs={}).save(
        shrink / "stage.json"
    )
    shrinking = StageContext(experiment(), root / "shrink", root / "shrink" / "report")
    several = tuple(
        test_comparing.method(name, (12, 40, 7 + number)) for number, name in enumerate(METHODS)
    )
    pairs = [(first, second) for i, first in enumerate(METHODS) for second in METHODS[i + 1 :]]
    [pair] = test_comparing.make_study().pairwise
    pairwise = tuple(
        pair.model_copy(update={"first": first, "second": second}) for first, second in pairs
    )
    comparison = test_comparing.make_study(methods=several, pairwise=pairwise)
    return {
        "classifier": written(classifier_run(root / "classifier")),
        "detector": written(detector_run(root / "detector")),
        "ranking": test_ranking.written(root / "ranking", test_ranking.make_study((0, 1))),
        "comparison": test_comparing.written(root / "comparison", comparison),
        "shrinking": written(shrinking),
    }


def measured(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What is too wide in a window of ``width``. The window is a frame, as headless
    windows are at least 500 px wide.
    """
    (folder / "page.html").write_text(page.replace("</body>", MEASURE + "</body>"))
    (folder / "frame.html").write_text(
        '<!doctype html><title>waiting</title><iframe src="page.html"'
        f' style="border:0;width:{width}px;height:900px"></iframe><pre'
        ' id="found"></pre><script>addEventListener("message", e => found.textContent ='
        " JSON.stringify(e.data))</script>"
    )
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += [
        f"--window-size={max(width, 500)},1000",
        "--virtual-time-budget=20000",
        "--dump-dom",
        (folder / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180)
    [message] = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert message, "the page did not measure anything"
    content: dict[str, Any] = json.loads(html.unescape(message))
    assert content["width"] == width
    return content


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
def test_no_table_is_cut_off(tmp_path: Path) -> None:
    """Neither on a desktop nor on a phone. On a phone only drawings scroll, in frames
    that show it.
    """
    for name, page in pages(tmp_path).items():
        for width in WIDTHS:
            content = measured(page, width, tmp_path)
            assert content["tables"] > 1, name
            wrong = [
                element for element in content["found"] if width > 1000 or not element["figure"]
            ]
            assert wrong == [], (name, width)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
def test_a_table_that_is_cut_off_would_be_found(tmp_path: Path) -> None:
    table = (
        "<div class='scroll'><table><tr><td style='white-space:nowrap'>"
        + "wide " * 200
        + "</td></tr></table></div>"
    )
    content = measured(
        written(classifier_run(tmp_path / "run")).replace("</main>", table + "</main>"),
        1280,
        tmp_path,
    )
    assert [(element["tag"], element["figure"]) for element in content["found"]] == [("DIV", False)]


@pytest.mark.slow
def test_the_ap_of_every_class_is_visible(tmp_path: Path) -> None:
    text = written(detector_run(tmp_path / "run"))
    closed = "".join(re.findall(r"<details.*?</details>", text, flags=re.DOTALL))
    rows = re.findall(r"<li><span>(class \d+)[^<]*</span><span>([\d.]+)%</span></li>", text)
    assert len(rows) == 80 and "class 79" not in closed
    values = [float(value) for _, value in rows]
    assert values == sorted(values, reverse=True) and values[0] == pytest.approx(98.8)


def test_post_processing_is_shown_at_both_thresholds(tmp_path: Path) -> None:
    page = Page(written(detector_run(tmp_path / "run")))
    text = " ".join(page.text.split())
    assert (
        "after 0.301 ms of post-processing in NumPy for scores of 0.3 or more (6.52 ms for scores of"
        " 0.001 or more, as AP needs)" in text
    )
    assert (
        text.count("+ 0.301 at 0.3+ 6.52 at 0.001") == 3
        and text.count("in graph2.41 in all at 0.3") == 3
    )
    assert "files with NMS ran on a test image" in text


@pytest.mark.slow
def test_the_validation_curve_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    real = charts.inline_svg

    def keep(figure: Any, name: str, description: str) -> Any:
        drawn[name] = {
            line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines
        }
        return real(figure, name, description)

    monkeypatch.setattr(charts, "inline_svg", keep)
    page = Page(written(classifier_run(tmp_path / "classifier")))
    assert (
        "Accuracy on test images during training" in page.text
        and "Test images: 360 at each point" in page.text
    )
    assert "they select nothing, the last weights are kept" in page.text
    points = drawn["trainaccuracy"]["test images"]
    assert (
        points == [[50.0 * i, pytest.approx(98 - 50 / i**2)] for i in range(1, 11)]
        and "training batch" in drawn["trainaccuracy"]
    )
    page = Page(written(detector_run(tmp_path / "detector")))
    assert "AP on test images during training" in page.text
    assert drawn["trainap"]["AP50"][-1] == [40.0, pytest.approx(40.0)]
