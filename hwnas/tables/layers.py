"""Tables with one row per layer of a space and one column per block: Single-Path NAS's
JSON and FBNet's text.

Sources: Single-Path NAS (arXiv 1904.02877), ``nas-search/pixel1_runtime_model.json``;
FBNet as re-implemented by A. Araslanova, ``supernet_functions/lookup_table.txt``
(microseconds). Both have a row for each of the 22 layers between the stem and the last
1 x 1 convolution. Neither covers stem, head or classifier.

Equal blocks at different positions were measured separately. Our entry is their median,
and its spread says how much they differ.
"""

from __future__ import annotations

from hwnas.core.families import fbnet as fbnet_space
from hwnas.core.families import proxylessnas_original
from hwnas.core.ops import Op
from hwnas.core.space import MacroSpace, Term
from hwnas.tables.reading import CLAMPS, Reading, Source, TimedOp, entries_of

_SINGLE_PATH = ("ir_k3_e3", "ir_k3_e6", "ir_k5_e3", "ir_k5_e6")
"""The options that the columns "0" to "3" stand for."""
_FBNET = (
    "ir_k3_e1",
    "ir_k3_s2",
    "ir_k3_e3",
    "ir_k3_e6",
    "ir_k5_e1",
    "ir_k5_s2",
    "ir_k5_e3",
    "ir_k5_e6",
    "skip",
)
"""The header of the file, in the order of our space's options. ``s2`` marks the shuffled
blocks with 2 groups.
"""
MS_PER_US = 1e-3


def single_path(source: Source, column: str) -> Reading:
    """Single-Path NAS's JSON: ``{"0": {"0": ms, ...}, ... "21": ...}``.

    Layer 0 is the separable block, which is not searched: its four columns are four
    measurements of the same block. The activation is not given, so each block is entered
    for ReLU and for ReLU6.
    """
    _check_no_column(source, column)
    content = source.json_object()
    timed: list[TimedOp] = []
    unmapped: dict[str, str] = {}
    for act in CLAMPS:
        layers = _layers(proxylessnas_original(act=act))
        for number, term in enumerate(layers):
            row = content.get(str(number))
            if not isinstance(row, dict) or row.keys() != {"0", "1", "2", "3"}:
                raise source.wrong(
                    f"has no layer {number} with blocks 0 to 3: it was cut off, or needs another"
                    " --format."
                )
            for code, searched_option in enumerate(_SINGLE_PATH):
                option = term.options[0] if number == 0 else searched_option
                op = _op(term, option)
                assert op is not None
                ms = source.ms(row[str(code)], f"block {code} of layer {number}")
                timed.append(TimedOp(op, ms))
        expected = set(map(str, range(len(layers))))
        for key in sorted(content.keys() - expected):
            unmapped[f"layer {key}"] = "the backbone has 22 layers"
    covers = (
        "inverted residuals only, no stem or head; layer 0 is one fixed block; blocks are entered"
        " for relu and relu6"
    )
    return Reading("proxylessnas_original", covers, entries_of(timed), unmapped=unmapped)


def fbnet(source: Source, column: str) -> Reading:
    """FBNet's text: a line of nine names, then 22 lines of nine times in microseconds.

    If the shape changes, ``skip`` is our 1 x 1 convolution. Elsewhere it runs nothing, so
    its values are not mapped.
    """
    _check_no_column(source, column)
    lines = [line.split() for line in source.text.splitlines() if line.strip()]
    layers = _layers(fbnet_space())
    if not lines or tuple(lines[0]) != _FBNET:
        raise source.wrong(
            f"does not begin with the line '{' '.join(_FBNET)}': choose another --format."
        )
    if len(lines) != 1 + len(layers) or any(len(line) != len(_FBNET) for line in lines):
        raise source.wrong(
            f"does not hold {len(layers)} lines of {len(_FBNET)} numbers: it is corrupt or was cut"
            " off; fetch it again."
        )
    timed: list[TimedOp] = []
    unmapped: dict[str, str] = {}
    for number, (term, values) in enumerate(zip(layers, lines[1:], strict=True)):
        for option, name, value in zip(term.options, _FBNET, values, strict=True):
            op = _op(term, option)
            label = f"{name} of layer {number}"
            ms = source.ms(value, label, MS_PER_US)
            if op is None:
                unmapped[label] = f"nothing is run there, {ms:.4f} ms in the source"
            else:
                timed.append(TimedOp(op, ms))
    return Reading(
        "fbnet",
        "the 22 searched layers only, no stem or head",
        entries_of(timed),
        unmapped=unmapped,
    )


def _layers(space: MacroSpace) -> tuple[Term, ...]:
    """The terms between the stem and the last convolution."""
    # The last two are that convolution and the classifier.
    return space.terms()[1:-2]


def _op(term: Term, option: str) -> Op | None:
    return term.ops[term.options.index(option)]


def _check_no_column(source: Source, column: str) -> None:
    if column:
        raise source.wrong(f"has no columns to choose from: leave ':{column}' out of --format.")
