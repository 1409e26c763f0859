"""The planted faults can still be planted: what each of them changes is in the package, once."""

from pathlib import Path

import pytest
from planted_faults import FAULTS, ROOT

SOURCES = [path.read_text(encoding="utf-8") for path in Path(ROOT, "visionpeft").rglob("*.py")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_its_text_is_there_once(fault):
    assert sum(source.count(fault.old) for source in SOURCES) == 1
    assert fault.new != fault.old


def test_a_text_that_is_nowhere_is_not_found():
    """The negative control."""
    assert not any("self.scaling * self.scaling * F.linear" in source for source in SOURCES)
