"""Annotation files as texts: encodings, what is damaged, and pieces that make no difference."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hwnas.config import DataConfig
from hwnas.data import coco_text
from hwnas.data.images import load_images
from hwnas.errors import DataError
from tests.data.scenes import coco_config, load, scene, write_coco, write_json, write_scenes


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """The folder of ``write_scenes``."""
    write_scenes(tmp_path)
    return tmp_path


def refused(config: DataConfig, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_images(config, "all")
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_byte_order_mark_is_read(scenes: Path, encoding: str) -> None:
    path = scenes / "annotations" / "instances_train.json"
    expected = load(coco_config(scenes)).ground_truth()
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "Hündin"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    images = load(coco_config(scenes))
    assert images.names == ("cat", "Hündin")
    assert images.ground_truth()["annotations"] == expected["annotations"]


def test_json_that_python_cannot_hold_is_one_sentence(scenes: Path) -> None:
    path = scenes / "annotations" / "instances_train.json"
    whole = path.read_text()
    for value, words in (
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ("9" * 5_000, "an integer of more than 4300 digits"),
        ("-" + "9" * 5_000, "an integer of more than 4300 digits"),
    ):
        path.write_text('{"info": ' + value + "," + whole[1:])
        refused(coco_config(scenes), str(path), words)
        path.write_text(whole.replace('"iscrowd": 0', '"iscrowd": ' + value))
        refused(coco_config(scenes), str(path), words)
    # a value of 4,000 digits is read, and not shown in full
    path.write_text(whole.replace('"image_id": 6', '"image_id": ' + "9" * 4_000))
    with pytest.raises(DataError, match=r"image_id 9{57}\.\.\., but no such image"):
        load_images(coco_config(scenes), "all")


# outlines, which are cut out of the text


OUTLINES = [
    [[10.5, 20, 1e2, -3.25, 7, 8]],
    [],
    [[1, 2], [3, 4], []],
    {"counts": [1, 2, 3], "size": [100, 200]},
    {"counts": 'a]}[\\"b', "size": [100, 200]},
    [[1, float("nan")], [3, 4]],
    [[1, 2], "x", [3]],
    None,
]


@pytest.mark.parametrize("indent", [None, 1])
def test_outlines_make_no_difference(scenes: Path, indent: int | None) -> None:
    """Whatever they look like, and with their texts in other places."""
    path = scenes / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"] *= len(OUTLINES)
    path = write_json(scenes, content)
    expected = load(coco_config(scenes)).ground_truth()
    trap = 'a "segmentation": [1, 2], "b'
    content["info"] = {"segmentation": [[1, 2]], "a": [{"segmentation": [3]}], "b": trap}
    content["annotations"] = [
        {"segmentation": OUTLINES[number % len(OUTLINES)], **row, "segmentation ": trap}
        for number, row in enumerate(content["annotations"])
    ]
    content["annotations"][-1]["segmentation"] = OUTLINES[0]
    path.write_text(json.dumps(content, indent=indent))
    assert load(coco_config(scenes)).ground_truth() == expected


def test_outlines_across_blocks_are_cut_out(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is read in blocks, whose ends may be in an outline."""
    path = scenes / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    for row in content["annotations"]:
        row["segmentation"] = [[1.25] * 20, [3, 4]]
    write_json(scenes, content)
    for row in content["annotations"]:
        row["segmentation"] = 0
    for block_bytes in (1, 7, *range(100, 1_000, 37)):
        monkeypatch.setattr(coco_text, "BLOCK_BYTES", block_bytes)
        assert json.loads(coco_text._without_outlines(path)) == content


# pieces, in which the list of objects is parsed


def many_objects(folder: Path, **keys: Any) -> dict[str, Any]:
    """The content of an annotation file with 200 objects in one image, whose boxes tell
    their positions, and ``keys`` in each.
    """
    write_coco(folder, {"a.png": scene(500, 500)}, [(0, 3, [n, 1, 9, 9]) for n in range(200)])
    path = folder / "annotations" / "instances_train.json"
    content: dict[str, Any] = json.loads(path.read_text())
    for row in content["annotations"]:
        row |= keys
    return content


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lists of objects are parsed in pieces of 1,000 bytes; how many were, file by file."""
    counts: list[int] = []
    whole = coco_text._pieces

    def counted(content: bytes, key: str, convert: Any) -> Any:
        pieces, rest = whole(content, key, convert)
        counts.append(len(pieces))
        return pieces, rest

    monkeypatch.setattr(coco_text, "PIECE_BYTES", 1_000)
    monkeypatch.setattr(coco_text, "_pieces", counted)
    yield counts


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"name": "}, {", "other": 'a"}, {"b'},
        {"parts": [{"a": 1}, {"b": {}}], "more": [[{}, {}], {}]},
        {"iscrowd": None, "area": None},
        {"iscrowd": "no"},
        # Python's reader takes it, pydantic's does not
        {"name": "\ud800"},
        {"annotations": [{"a": 1}, {"a": 2}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_pieces_make_no_difference(
    tmp_path: Path, small_pieces: list[int], keys: dict[str, Any], indent: int | None
) -> None:
    content = many_objects(tmp_path, **keys)
    path = tmp_path / "annotations" / "instances_train.json"
    path.write_text(json.dumps(content, indent=indent))
    rows = load(coco_config(tmp_path)).ground_truth()["annotations"]
    assert [row["bbox"] for row in rows] == [row["bbox"] for row in content["annotations"]]
    assert {row["iscrowd"] for row in rows} == {0}
    assert len(rows) == 200
    assert (small_pieces[0] > 10) == (keys.get("name") != "\ud800")


def test_lists_with_the_same_key_are_not_mixed_up(tmp_path: Path, small_pieces: list[int]) -> None:
    """A list deeper in the file, or one that a later key replaces."""
    content = many_objects(tmp_path)
    path = tmp_path / "annotations" / "instances_train.json"
    path.write_text(json.dumps(content))
    expected = load(coco_config(tmp_path)).ground_truth()
    others = {"annotations": [{**row, "bbox": None} for row in content["annotations"]]}
    whole = json.dumps(content)
    for text in (
        json.dumps({"info": others, **content}),
        f"{json.dumps(others)[:-1]}, {whole[1:]}",
    ):
        path.write_text(text)
        assert load(coco_config(tmp_path)).ground_truth() == expected
        assert small_pieces[-1] > 10
    path.write_text(whole[:-1] + ', "annotations": 7}')
    refused(coco_config(tmp_path), "annotations = 7", "valid list")


def test_positions_are_those_in_the_whole_list(tmp_path: Path, small_pieces: list[int]) -> None:
    content = many_objects(tmp_path)
    content["annotations"][150]["bbox"][2] = -1
    content["annotations"][170]["bbox"][2] = -1
    write_json(tmp_path, content)
    refused(coco_config(tmp_path), "(annotations.150.bbox.2 = -1: ")
    content["annotations"][120]["bbox"] = None
    write_json(tmp_path, content)
    refused(coco_config(tmp_path), "without a bbox (number 120 in its list, id 120)")
    content["annotations"][110]["category_id"] = 17
    content["annotations"][120]["bbox"] = content["annotations"][150]["bbox"] = [1, 1, 2, 2]
    content["annotations"][170]["bbox"] = [1, 1, 2, 2]
    write_json(tmp_path, content)
    refused(coco_config(tmp_path), "(number 110 in its list) with category_id 17")
    assert min(small_pieces) > 10


def test_a_file_that_is_cut_off_says_where(tmp_path: Path, small_pieces: list[int]) -> None:
    content = many_objects(tmp_path, segmentation=[[1, 2, 3, 4]])
    path = tmp_path / "annotations" / "instances_train.json"
    whole = json.dumps(content)
    for end in (len(whole) - 1, whole.index("categories") + 5, whole.rindex("bbox"), 2_000, 70):
        path.write_text(whole[:end])
        refused(coco_config(tmp_path), str(path), "not JSON", "after ", "cut off")
    path.write_text(whole.replace('"bbox": [150,', '"bbox": [150 x,'))
    refused(coco_config(tmp_path), "not JSON (Expecting ',' delimiter after ", '"bbox": [150 \')')
    assert max(small_pieces) > 10


def test_the_search_for_garbage_goes_on_afterwards(scenes: Path) -> None:
    load(coco_config(scenes))
    assert gc.isenabled()
    (scenes / "annotations" / "instances_train.json").write_text("{")
    refused(coco_config(scenes), "not JSON")
    assert gc.isenabled()
