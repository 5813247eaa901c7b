"""Settings: ``true`` and ``false`` are only values of keys that are true or false."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from hwnas.core.settings import Settings


class Inner(Settings):
    on: bool = False
    count: int = 0


class Outer(Settings):
    number: float = 0.0
    either: int | None = None
    channels: Literal[1, 3] = 1
    several: tuple[Annotated[int, Field(ge=0)], ...] = ()
    named: dict[str, float] = {}
    renamed: int = Field(0, alias="count")
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    anything: dict[str, Any] = {}
    number_or_on: int | bool = 0


@pytest.mark.parametrize(
    "content",
    [
        {"number": True}, {"either": False}, {"channels": True}, {"several": [0, True]}, {"named": {"a": True}},
        {"count": True}, {"inner": {"count": True}}, {"inners": [{"count": False}]},
    ],
)  # fmt: skip
def test_truth_is_no_number(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="true and false are not possible for"):
        Outer.model_validate(content)


@pytest.mark.parametrize(
    "content",
    [{"inner": {"on": True}}, {"inners": [{"on": True}]}, {"anything": {"a": [True]}}, {"number_or_on": True}, {"count": 1}],
)  # fmt: skip
def test_truth_is_a_value_where_the_type_has_it(content: dict[str, Any]) -> None:
    assert Outer.model_validate(content).model_dump(
        mode="json", by_alias=True, exclude_unset=True
    ) == (content)


def test_numbers_are_finite_and_keys_are_known() -> None:
    for content in ({"number": float("nan")}, {"number": float("inf")}, {"numbr": 1}):
        with pytest.raises(ValidationError):
            Outer.model_validate(content)
