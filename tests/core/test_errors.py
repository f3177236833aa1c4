"""Messages of errors stay readable whatever they quote."""

from __future__ import annotations

import pickle

from rankopt.core.errors import BudgetError, RankoptError


def test_a_message_is_cut_in_the_middle_and_says_what_to_do():
    error = RankoptError(f"momentum is {'y' * 100_000}: give a number from 0 to 1")
    assert str(error).startswith("momentum is yyy") and str(error).endswith("yyy: give a number from 0 to 1")
    assert len(str(error)) <= 1200
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(BudgetError("a short one")) == "a short one" and not str(RankoptError())
