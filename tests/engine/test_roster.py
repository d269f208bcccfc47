"""The list of a lane's rows by itself: who waits, and in which order."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.loading import LoadedModel
from engine.generation.draws import Pick
from engine.generation.prompt import TokenizedPrompt
from engine.generation.roster import Roster
from engine.generation.row import Generation, Row, RowState
from engine.text.tokenizer import Tokenizer
from engine.ticket import Ticket
from stoker.contract import GenerateRequest

FOLDERS = json.loads((Path(__file__).parents[1] / "goldens" / "text" / "folders.json").read_text())


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


@pytest.fixture
def spelling(tmp_path: Path) -> Tokenizer:
    """A byte-level vocabulary: a character of three bytes is three tokens."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(FOLDERS["bases"]["bytes"]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"extra_special_tokens": ["<user>"], "eos_token": "<|im_end|>"})
    )
    return Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("stop", [(), ("never", "b\ufffd!")], ids=["no stop strings", "stop strings"])
@pytest.mark.parametrize(
    ("how", "options", "context"),
    [("length", {"max_tokens": 3}, 100), ("context", {}, 4), ("stop", {}, 100), ("stop_token", {}, 100)],
)
def test_however_an_answer_ends_its_text_is_that_of_its_tokens_without_the_one_that_ends_it(
    spelling: Tokenizer, how: str, options: dict[str, Any], context: int, stop: tuple[str, ...]
) -> None:
    """What was held back, because a character or a stop string could have come of it, is given out with the last."""
    ids = spelling.encode("b漢", special=False)[:3]
    end = {"stop": spelling.main_eos_id, "stop_token": spelling.encode("z", special=False)[0]}.get(how)
    asked = GenerateRequest(model="m", prompt="p", stop=stop, **options)
    if how == "stop_token":
        asked = asked.model_copy(update={"stop_token_ids": (end,)})
    (row,) = Generation(Ticket("job", "generate"), asked, TokenizedPrompt([5]), spelling, context).rows
    tokens = [row.accept(Pick(index, 1.0, -0.5, 0.6), 0) for index in [*ids, *([] if end is None else [end])]]
    assert [token.finish_reason for token in tokens] == [None] * (len(tokens) - 1) + [how]
    assert "".join(token.text for token in tokens) == row.completion().text == spelling.decode(ids) == "b\ufffd"


def test_a_token_that_the_model_rules_out_is_no_alternative(rows: list[Row]) -> None:
    pick = Pick(5, 1.0, -0.5, 0.6, ((5, -0.5), (6, -1.5), (7, -math.inf)))
    token = rows[0].accept(pick, 0)
    assert [alternative.token_id for alternative in token.alternatives] == [5, 6]
