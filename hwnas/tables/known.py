"""Known published files, by the sha256 of their bytes: device, conditions and licence,
which the files themselves do not state.
"""

from __future__ import annotations

from hwnas.tables.reading import Publication, PublishedConditions

# The texts below are part of the provenance of imported tables, so changing them changes
# the hashes of those tables.
PIXEL1 = "pixel1"
_ARM = "an ARM board that its author does not name"
_PIPE = "github.com/AnissL93/pipe-proxylessnas at 4414154"
_OFA = "github.com/han-cai/files at a7c9bcd, ofa/note10/{}_lookup_table.yaml"
_PIPE_COLUMNS = {
    "cpu_b": PublishedConditions(cpu=f"big cores of {_ARM}"),
    "cpu_s": PublishedConditions(cpu=f"small cores of {_ARM}"),
    "gpu": PublishedConditions(cpu=f"GPU of {_ARM}"),
}
_NOTE10 = {
    160: "a2671a45e9400542679ed03de946b45d6a35010f9ab21834af3e7ba8341d36d1",
    176: "34223ae037d5719a5f33261bdfd9341f590a2999edf520f174309605dc06307c",
    192: "0ff5ca0649e56ad34a42d6a8a6f20adb5121c8d12d135299397b310472db79e2",
    208: "41aa63af766a8298354e6aa5ae69d512ac68656a6e7d0a4fa5dc725c8d438633",
    224: "c13a9bcb3f4becae844bce4897129c4e42975984c1029cbd5acb48c970136530",
}

KNOWN: dict[str, Publication] = {
    "f12bc87e4e378534cd04268e44c880ff863f27b44dd2f4747b2f4d6ed3e54805": Publication(
        origin=f"{_PIPE}, search/mobile_trim.yaml",
        licence="MIT",
        columns={"mean": PublishedConditions(device=PIXEL1)},
        remark=(
            "another fork of the repository holds block values that differ by a median of 5 % (0.61"
            " to 1.57 times)"
        ),
    ),
    "30f31134003af28524ec90bb74fd5baabb593027450f5499f242ed6e9bf408b0": Publication(
        origin=f"{_PIPE}, search/data/latency.yaml",
        licence="MIT",
        columns={
            "mean": PublishedConditions(device=PIXEL1),
            "big": _PIPE_COLUMNS["cpu_b"],
            "small": _PIPE_COLUMNS["cpu_s"],
            "gpu": _PIPE_COLUMNS["gpu"],
        },
        remark="mean, big and gpu of the four 48-channel entries are copies of the 32-channel ones",
    ),
    "1b41a4d0398fb66efb7a1d580f2ef9bae175a5ee9abfbe37283c19cce4442c8d": Publication(
        origin=f"{_PIPE}, search/data/cifar10/latency1.csv", licence="MIT", columns=_PIPE_COLUMNS
    ),
    "eacf1a5182285cf45b657144352053c393ead141208dae3ca3d7e05d2b1cfe3b": Publication(
        origin=f"{_PIPE}, search/data/tiny/latency.csv", licence="MIT", columns=_PIPE_COLUMNS
    ),
    "59e0d2d1aea3a09b3e6d6fa9f3a0adb567b416e92cb093c769f557bea23b98f5": Publication(
        origin=(
            "github.com/dstamoulis/single-path-nas at 21c1f3e, nas-search/pixel1_runtime_model.json"
        ),
        licence="Apache-2.0",
        columns={"": PublishedConditions(device=PIXEL1, runtime="tflite")},
    ),
    "cc75d2d286f0bda6486a1eb5665608325dc3d5708ed396ad9e5669a397162351": Publication(
        origin="github.com/AberHu/TF-NAS at 08b31a2, latency_pkl/latency_{cpu,gpu}.pkl as JSON",
        licence="MIT",
        columns={
            "cpu": PublishedConditions(
                device="xeon-gold-6130", cpu="Xeon Gold 6130", threads=1, batch=1
            ),
            "gpu": PublishedConditions(device="titan-rtx", batch=32),
        },
        remark="gpu: milliseconds of a batch of 32",
    ),
    "f5387425013949ae81d97cff1a0757b242fc204ca54bfd18fb3a346e76848fb8": Publication(
        origin="github.com/AnnaAraslanova/FBNet at ad683c6, supernet_functions/lookup_table.txt",
        licence="none stated",
        columns={
            "": PublishedConditions(
                cpu="a desktop CPU that its author does not name", runtime="pytorch"
            )
        },
    ),
    **{
        sha256: Publication(
            origin=_OFA.format(size),
            licence="none stated (once-for-all itself: MIT)",
            columns={"mean": PublishedConditions(device="samsung-note10")},
        )
        for size, sha256 in _NOTE10.items()
    },
}
