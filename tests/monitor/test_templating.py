"""Flower's templates, with Stoker's lines in them."""

from __future__ import annotations

import pytest

from stoker.errors import ConfigError
from stoker.monitor.templating import CHANGES, THEIRS, Change, Loader, changed


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_flowers_template_has_the_line_that_is_changed(change: Change) -> None:
    before = (THEIRS / change.name).read_text()
    after = changed(change.name, before)
    assert change.new in after
    assert Loader().load(change.name).name == change.name


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_a_release_of_flower_without_that_line_is_one_clear_error(change: Change) -> None:
    text = (THEIRS / change.name).read_text()
    for other in (text.replace(change.old, ""), text + change.old):
        with pytest.raises(ConfigError, match=r"pip install '\.\[monitor\]', from a checkout"):
            changed(change.name, other)


def test_every_template_of_flowers_loads() -> None:
    loader = Loader()
    for file in THEIRS.glob("*.html"):
        loader.load(file.name)
    loader.load("stoker.html")
