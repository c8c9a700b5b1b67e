"""The figures behind the bars: ``pytest tests/samplers -s`` prints them, one line a claim."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


class Figures:
    """What tests measured, by claim."""

    def __init__(self) -> None:
        self._worst: dict[str, tuple[float, float, str, int]] = {}
        self._listed: dict[str, dict[str, str]] = {}

    def worst(self, claim: str, found: float, bar: float, where: str) -> None:
        """Keep the largest of many, beside its bar, and where it was found."""
        most, _, at, count = self._worst.get(claim, (-1.0, bar, where, 0))
        most, at = (found, where) if found > most else (most, at)
        self._worst[claim] = most, bar, at, count + 1

    def each(self, claim: str, name: str, found: str) -> None:
        """Keep every one of a few."""
        self._listed.setdefault(claim, {})[name] = found

    def lines(self) -> Iterator[str]:
        for claim, (most, bar, where, count) in self._worst.items():
            yield f"{claim}: at most {most:.1e} in {count} tests (bar {bar:g}; {where})"
        for claim, found in self._listed.items():
            yield f"{claim}: {', '.join(f'{name} {value}' for name, value in found.items())}"


@pytest.fixture(scope="session")
def figures() -> Iterator[Figures]:
    measured = Figures()
    yield measured
    print("", *measured.lines(), sep="\n")


@pytest.fixture
def here(request: pytest.FixtureRequest) -> str:
    """The running test and its parameters."""
    return request.node.name.removeprefix("test_")
