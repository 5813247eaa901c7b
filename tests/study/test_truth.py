"""Ground truth from a user's file: its forms, and the errors for wrong ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from hwnas.core.spaces import nasbench201, nasbench_macro
from hwnas.errors import DocumentError, TableError
from hwnas.study.truth import read_truth

SPACE = nasbench_macro()
CSV = "arch,acc1,acc2,params\n22212220,93.1,93.0,7\n00000000,45.3,45.5,3\n11111111,90,91,5\n"


def written(tmp_path: Path, text: str, name: str = "truth.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_csv_file_of_digits(tmp_path: Path) -> None:
    truth = read_truth(written(tmp_path, CSV), SPACE)
    assert truth.names == ("22212220", "00000000", "11111111")
    assert truth.columns == ("acc1", "acc2")
    assert SPACE.index(truth.picks[0]).tolist() == [2, 2, 2, 1, 2, 2, 2, 0]
    assert truth.mean.tolist() == pytest.approx([0.9305, 0.454, 0.905])


def test_gzip_a_named_column_and_separate_positions(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv.gz"
    path.write_bytes(
        gzip.compress(
            b"\xef\xbb\xbfarchitecture,top1\n2 2 2 1 2 2 2 0,0.93\n0 0 0 0 0 0 0 0,0.45\n"
        )
    )
    truth = read_truth(path, SPACE, ["top1"])
    assert truth.mean.tolist() == [0.93, 0.45]
    assert truth.agreement() is None


def test_json_of_lists_of_objects_and_of_numbers(tmp_path: Path) -> None:
    picks = json.dumps({choice.key: choice.options[0] for choice in SPACE.choices})
    contents = (
        {
            "22212220": {"test_acc": [93.1, 93.0], "mean_acc": 1},
            "00000000": {"test_acc": [45.3, 45.5], "mean_acc": 2},
        },
        {"22212220": [93.1, 93.0], picks: [45.3, 45.5]},
        {"22212220": 93.05, "00000000": 45.4},
    )
    for content in contents:
        truth = read_truth(written(tmp_path, json.dumps(content), "truth.json"), SPACE)
        assert truth.mean.tolist() == pytest.approx([0.9305, 0.454])
        assert SPACE.index(truth.picks[1]).tolist() == [0] * 8


def test_the_strings_of_nasbench201(tmp_path: Path) -> None:
    space = nasbench201()
    best = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
    none = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
    path = written(
        tmp_path, f"idx,arch_str,cifar10_test_200\n6111,{best},94.37\n5374,{none},10.0\n"
    )
    truth = read_truth(path, space, ["cifar10_test_200"])
    assert truth.names == (best, none)
    assert truth.mean.tolist() == pytest.approx([0.9437, 0.1])
    # edges node by node, options in the benchmark's order
    assert space.index(truth.picks[0]).tolist() == [3, 3, 3, 1, 3, 2]
    with pytest.raises(TableError, match=r"line 2: edge c\.e0-1 .* cannot be 'conv'"):
        read_truth(
            written(tmp_path, "arch,acc\n|conv~0|+|none~0|none~1|+|none~0|none~1|none~2|,94\n"),
            space,
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no column architecture"]),
        ("arch,params\n00000000,3\n", ["no column that looks like an accuracy", "study.accuracies"]),
        (CSV + "2221222,1,1,1\n", ["line 5", "7 positions", "8 choices"]),
        (CSV + "22212229,1,1,1\n", ["line 5", "position 9", "0 to 2"]),
        (CSV + "conv,1,1,1\n", ["line 5", "'conv' is not an architecture"]),
        (CSV + "22212220,1,1,1\n", ["line 5", "same network as 22212220"]),
        (CSV + "22212221,x,1,1\n", ["'x'", "22212221"]),
        (CSV + "22212221,1,nan,1\n", ["nan", "22212221"]),
        (CSV + "22212221,101,1,1\n", ["101", "22212221", "0 to 100"]),
        (CSV + "22212221,1\n", ["line 5", "2 cells"]),
        ("arch,acc\n00000000,3\n", ["contains 1 architectures"]),
        ('{"00000000": 3, "00000001": [3, 4]}', ["2 accuracies of 00000001"]),
        ('{"00000000": {"acc": 3}, "00000001": 4}', ["'00000001' has no 'acc'"]),
        ('{"00000000": 3, "00000001": ', ["not valid JSON"]),
        ('{"{\\"s1.b0\\": 3": 3}', ["not valid JSON", "picks"]),
        ('{"{\\"s1.b0\\": \\"cn_k3\\"}": 3}', ["s1.b0"]),
    ],
)  # fmt: skip
def test_a_wrong_file_gets_one_sentence(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(TableError) as raised:
        read_truth(written(tmp_path, text), SPACE)
    for word in ["truth.csv", *words]:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_misspelt_column_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TableError, match=r"no column 'acc3' of study\.accuracies; did you mean 'acc"
    ):
        read_truth(written(tmp_path, CSV), SPACE, ["acc3"])
    with pytest.raises(DocumentError, match="does not exist"):
        read_truth(tmp_path / "none.csv", SPACE)


def test_repeats_show_how_much_agreement_can_be_expected(tmp_path: Path) -> None:
    lines = "".join(
        f"{name},{a},{b}\n"
        for name, a, b in (
            ("00000000", 1, 1),
            ("00000001", 2, 3),
            ("00000002", 3, 2),
            ("00000010", 4, 4),
        )
    )
    truth = read_truth(written(tmp_path, "arch,acc1,acc2\n" + lines), SPACE)
    # the best tenth is two here: 4 before 2 or 3
    assert truth.agreement() == pytest.approx((4 / 6, 1.0))


def test_means_of_the_same_accuracies_are_ties(tmp_path: Path) -> None:
    truth = read_truth(
        written(
            tmp_path, "arch,acc1,acc2,acc3\n00000000,90.1,90.2,90.3\n00000001,90.3,90.2,90.1\n"
        ),
        SPACE,
    )
    assert truth.mean[0] == truth.mean[1]


def test_a_larger_sample_begins_with_the_smaller_one(tmp_path: Path) -> None:
    truth = read_truth(
        written(tmp_path, "arch,acc\n" + "".join(f"{i:08d},{i}\n" for i in (0, 1, 2, 10, 11, 12))),
        SPACE,
    )
    assert truth.sample(5)[:3].tolist() == truth.sample(3).tolist()
    assert sorted(truth.sample(6).tolist()) == list(range(6))
    assert isinstance(truth.mean, np.ndarray)
