"""What version 0.1.0 wrote is still read: adapters, learners, runs, dotted configurations, protocol folders."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "written_by_0_1_0"))

import check

import visionpeft as vp


@pytest.mark.parametrize(("function", "name"), check.CHECKS, ids=lambda value: getattr(value, "__name__", value))
def test_it_is_read(function, name):
    check.run_check(function, name)


@pytest.mark.parametrize(("method", "name"), [(vp.UniPELT, "unipelt"), (vp.ChildTuning, "child_tuning_d")])
def test_missing_fields_are_not_the_defaults_of_today(method, name, monkeypatch):
    """Read with today's defaults, adapters without the new fields would compute something else, or not load."""
    monkeypatch.setattr(method, "written_without", {})
    with pytest.raises((AssertionError, vp.StorageError)):
        check.run_check(check.check_adapter, name)
