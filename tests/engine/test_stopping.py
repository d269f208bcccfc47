"""Stop strings: found wherever the borders of the pieces lie, and never half shown."""

from __future__ import annotations

import random

import pytest

from engine.generation.stopping import StopScanner


def shown(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    scanner, text = StopScanner(stops), ""
    for piece in pieces:
        more, stop = scanner.add(piece)
        text += more
        if stop is not None:
            return text, stop
    return text + scanner.finish(), None


@pytest.mark.parametrize("seed", range(30))
def test_the_pieces_do_not_matter(seed: int) -> None:
    """Against the definition: the first place where any stop string is complete."""
    chance = random.Random(seed)
    text = "".join(chance.choice("ab\n") for _ in range(60))
    stops = ["".join(chance.choice("ab\n") for _ in range(chance.randint(1, 5))) for _ in range(chance.randint(1, 3))]
    pieces, rest = [], text
    while rest:
        size = chance.randint(0, 4)
        pieces.append(rest[:size])
        rest = rest[size:]
    scanner, seen = StopScanner(stops), ""
    for piece in pieces:
        more, stop = scanner.add(piece)
        seen += more
        assert not any(one in seen for one in stops)
        if stop is not None:
            assert text.startswith(seen + stop)
            return
    assert seen + scanner.finish() == text
    assert not any(one in text for one in stops)


def test_what_might_become_a_stop_string_is_held_and_then_given_out() -> None:
    scanner = StopScanner(["END"])
    assert scanner.add("the E") == ("the ", None)
    assert scanner.add("N") == ("", None)
    assert scanner.add("T") == ("ENT", None)
    assert scanner.add("E") == ("", None)
    assert scanner.finish() == "E"


def test_behind_a_stop_string_nothing_is_left_to_be_given_out() -> None:
    scanner = StopScanner(["END", "<user>"])
    assert scanner.add("the END of E") == ("the ", "END")
    assert scanner.finish() == ""
    assert scanner.add("hot", "<user>") == ("hot", "<user>")
    assert scanner.finish() == ""


def test_the_first_place_wins_and_there_the_longest() -> None:
    assert shown(["abcdef"], ["cd", "bc", "bcde"]) == ("a", "bcde")


def test_a_name_that_is_not_shown_completes_a_stop_string() -> None:
    scanner = StopScanner(["<end>", "\n<user> Q"])
    assert scanner.add("hot", "<end>") == ("hot", "<end>")
    scanner = StopScanner(["\n<user> Q"])
    assert scanner.add("hot\n", "<user>") == ("hot", None)
    assert scanner.add(" Q: ") == ("", "\n<user> Q")


def test_a_name_that_is_not_shown_stays_hidden_where_no_stop_string_comes_of_it() -> None:
    scanner = StopScanner(["<user> Q", "b<user>c"])
    assert scanner.add("ab", "<user>") == ("a", None)
    assert scanner.add(" no") == ("b no", None)
    assert scanner.add("b", "<user>") == ("", None)
    assert scanner.finish() == "b"
    assert scanner.add("x", "<user>") == ("x", None)
    assert scanner.add("", "<user>") == ("", None)
    assert scanner.add("y") == ("y", None)


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopScanner([]).add("text") == ("text", None)
