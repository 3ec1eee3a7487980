"""Are replies of the guest's agent told from what a serial line may carry besides?"""

from __future__ import annotations

from kickcall.lab.guest import find_reply


def test_a_reply_is_found_by_its_id_among_others() -> None:
    assert find_reply(b"\n= aa started -\n\n= bb done 3 -aGk=\n", "bb") == ["done", "3", "-aGk="]


def test_a_reply_that_is_still_coming_is_none() -> None:
    assert find_reply(b"\n= bb done 3 -aG", "bb") is None


def test_the_rest_of_a_reply_to_somebody_else_is_ignored() -> None:
    assert find_reply(b"Zm9vYmFy\n\n= bb running -\n", "bb") == ["running", "-"]


def test_a_request_that_the_terminal_echoed_is_no_reply() -> None:
    assert find_reply(b"\nping bb - .\n", "bb") is None


def test_bytes_that_are_no_text_are_survived() -> None:
    assert find_reply(b"\xff\xfe\n= bb pong x\n", "bb") == ["pong", "x"]
