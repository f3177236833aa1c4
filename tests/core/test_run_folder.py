"""What is resumed must be the same job."""

from __future__ import annotations

import pytest

from rankopt import StudyError
from rankopt.core.run_folder import check_same


def test_the_first_setting_that_differs_is_named():
    check_same({"seed": 1, "more": 2}, {"seed": 1}, "study.db", "search", "Choose another")
    with pytest.raises(StudyError) as error:
        check_same({"seed": 1}, {"seed": 1, "budget": [0.5]}, "study.db", "search", "Choose another")
    assert str(error.value) == "study.db belongs to another search: its budget is None, asked is [0.5]. Choose another"
