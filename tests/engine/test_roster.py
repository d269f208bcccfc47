"""The list of a lane's rows by itself: who waits, and in which order."""

from __future__ import annotations

import math

import pytest

from engine.checkpoints.loading import LoadedModel
from engine.generation.draws import Pick
from engine.generation.prompt import TokenizedPrompt
from engine.generation.roster import Roster
from engine.generation.row import Generation, Row, RowState
from engine.ticket import Ticket
from stoker.contract import GenerateRequest


@pytest.fixture
def rows(model: LoadedModel) -> list[Row]:
    request = GenerateRequest(model="tiny", prompt_ids=(3,), n=5)
    return Generation(Ticket("job", "generate"), request, TokenizedPrompt([3]), model.tokenizer, 64).rows


def admitted(rows: list[Row], had_their_turn: int) -> Roster:
    roster = Roster()
    roster.admit(rows)
    for row in rows[:had_their_turn]:
        roster.waiting.remove(row)
        row.state, row.cached = RowState.DECODING, 7
    return roster


def test_rows_that_are_put_back_go_first_in_their_order(rows: list[Row]) -> None:
    roster = admitted(rows, 3)
    roster.put_back(rows[:3])
    assert list(roster.waiting) == rows
    assert all(row.state is RowState.WAITING for row in rows)
    assert not any(row.cached for row in rows), "their keys and values are gone"


def test_a_row_that_has_ended_is_not_put_back(rows: list[Row]) -> None:
    roster = admitted(rows, 3)
    roster.end(rows[1])
    roster.put_back(rows[:3])
    assert list(roster.waiting) == [rows[0], *rows[2:]]
    assert rows[1].state is RowState.ENDED


def test_a_row_that_ends_while_it_waits_waits_no_more(rows: list[Row]) -> None:
    roster = admitted(rows, 0)
    for row in rows:
        roster.end(row)
        assert row not in roster.waiting
    assert not roster


@pytest.mark.parametrize(("most", "context"), [(5, 64), (64, 6), (5, 6)])
def test_a_row_ends_at_its_last_token_or_where_its_context_ends(model: LoadedModel, most: int, context: int) -> None:
    request = GenerateRequest(model="tiny", prompt_ids=(3,), max_tokens=most)
    (row,) = Generation(Ticket("job", "generate"), request, TokenizedPrompt([3]), model.tokenizer, context).rows
    assert [row.ends_within(ahead) for ahead in (4, 5)] == [False, True]


def test_a_token_that_the_model_rules_out_is_no_alternative(rows: list[Row]) -> None:
    pick = Pick(5, 1.0, -0.5, 0.6, ((5, -0.5), (6, -1.5), (7, -math.inf)))
    token = rows[0].accept(pick, 0)
    assert [alternative.token_id for alternative in token.alternatives] == [5, 6]
