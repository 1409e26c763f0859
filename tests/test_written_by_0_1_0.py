"""What version 0.1.0 wrote is still read: adapters, learners, runs, dotted configurations, protocol folders."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "written_by_0_1_0"))

import check


@pytest.mark.parametrize(("function", "name"), check.CHECKS, ids=lambda value: getattr(value, "__name__", value))
def test_it_is_read(function, name):
    check.run_check(function, name)
