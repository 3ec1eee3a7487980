"""QMP input is cut into messages as QEMU cuts it. Expected texts are what QEMU 7.2 answers."""

from __future__ import annotations

import itertools
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kickcall.qmp import stream, text
from kickcall.qmp.stream import BadInput, Message, MessageStream

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(st.characters(min_codepoint=0x20, max_codepoint=0xD7FF), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.sampled_from("ab'\"\\é"), max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from(["execute", "arguments", "id", "x"]), JSON_VALUES)


def read(data: bytes, cuts: list[int] | None = None, **limits: int) -> list[Message | BadInput]:
    """Feed `data` in pieces that end at `cuts`."""
    messages = MessageStream(**limits)
    found = []
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts or ()), len(data)]
    for start, end in itertools.pairwise(edges):
        messages.push(data[start:end])
        while (message := messages.next()) is not None:
            found.append(message)
    return found


def faults(data: bytes) -> list[str]:
    return [item.description for item in read(data) if isinstance(item, BadInput)]


def members(data: bytes) -> dict[str, object]:
    (message,) = read(data)
    assert isinstance(message, Message)
    assert message.members is not None
    return {name: msgspec.json.decode(value) for name, value in message.members.items()}


@given(st.lists(OBJECTS, min_size=1, max_size=4), st.lists(st.integers(0), max_size=8))
def test_any_split_of_a_stream_yields_the_same_messages(
    objects: list[dict[str, object]], cuts: list[int]
) -> None:
    data = b"".join(json.dumps(value, indent=1).encode() for value in objects)
    found = read(data, cuts)
    assert found == read(data)
    assert [
        {name: msgspec.json.decode(raw) for name, raw in (message.members or {}).items()}
        for message in found
        if isinstance(message, Message)
    ] == objects


@given(st.binary(max_size=300), st.lists(st.integers(0), max_size=5))
def test_garbage_never_raises_and_splits_alike(data: bytes, cuts: list[int]) -> None:
    assert read(data, cuts) == read(data)


@given(
    st.lists(st.sampled_from([*"{}[],:\"'\\0e1.-tan %é", "true", '"a"', "\xff", "\n"]), max_size=60)
)
def test_after_an_ff_byte_the_stream_is_in_step_again(pieces: list[str]) -> None:
    # QEMU: docs/interop/qmp-spec.txt, "Compatibility considerations" of the guest agent.
    data = "".join(pieces).encode("utf-8", "surrogateescape") + b'\xff{"execute": "stop"}'
    assert read(data)[-1] == Message({"execute": b'"stop"'})


@given(st.text(st.characters(max_codepoint=0xD7FF)))
def test_text_survives_being_written_and_read(value: str) -> None:
    assert text.decode(text.encode(value)) == value


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"}", "JSON parse error, expecting value"),
        (b"{]}", "JSON parse error, expecting value"),
        (b"{1: 2}", "JSON parse error, key is not a string in object"),
        (b'{"a"}', "JSON parse error, missing : in object pair"),
        (b'{"a": }', "JSON parse error, expecting value"),
        (b'{"a": 1 "b"}', "JSON parse error, expected separator in dict"),
        (b'{"a": 1, "a": 2}', "JSON parse error, duplicate key"),
        (b"[1 2]", "JSON parse error, expected separator in list"),
        (b"nul ", "JSON parse error, invalid keyword 'nul'"),
        (b"01\n", "JSON parse error, stray '01'"),
        (b"%d\n", "JSON parse error, stray '%'"),
        (b'"a\x00"\n', "JSON parse error, stray '\"a'"),
        (b"\xff", "JSON parse error, stray '\N{REPLACEMENT CHARACTER}'"),
        (rb'"\x"', "JSON parse error, invalid escape sequence in string"),
        (b'"\xed\xa0\x80"', "JSON parse error, invalid UTF-8 sequence in string"),
        (rb'"\ud83d"', r"JSON parse error, \ud83d is not a valid Unicode character"),
    ],
)
def test_a_fault_is_named_in_qemus_words(data: bytes, expected: str) -> None:
    assert faults(data)[0] == expected


def test_single_quotes_and_their_escape_are_taken() -> None:
    assert members(rb"{'execute': 'it\'s \"so\"', 'id': 'a\u00e9\n'}") == {
        "execute": 'it\'s "so"',
        "id": "aé\n",
    }


def test_numbers_keep_every_digit() -> None:
    (message,) = read(b'{"id": [18446744073709551615, -9223372036854775808, 1.10, 1e400]}')
    assert message == Message({"id": b"[18446744073709551615,-9223372036854775808,1.10,1e400]"})


def test_a_value_that_is_no_object_is_a_message_without_members() -> None:
    assert read(b'[1] "a" true 7 ') == [Message(None)] * 4


def test_nesting_is_bounded_at_1024() -> None:
    inner = stream.MAX_NESTING - 1
    assert read(b'{"id": ' + b"[" * inner + b"]" * inner + b"}") != []
    assert faults(b"[" * 1025) == ["JSON nesting depth limit exceeded"]


def test_size_is_bounded_whatever_the_pieces() -> None:
    found = read(b'{"a": "' + b"x" * 500 + b'"}', list(range(0, 500, 7)), max_bytes=100)
    assert found[0] == BadInput("JSON token size limit exceeded")
    found = read(b"[" + b'"x", ' * 50, max_bytes=100)
    assert found[0] == BadInput("JSON token size limit exceeded")


def test_blanks_cost_nothing() -> None:
    assert read(b'{"a":' + b" \n" * 500 + b"1}", max_bytes=100) == [Message({"a": b"1"})]


def test_tokens_are_bounded() -> None:
    assert faults(b"[" + b"1," * stream.MAX_TOKENS)[0] == "JSON token count limit exceeded"


def test_half_a_message_is_no_message() -> None:
    assert read(b'{"execute": "quit"') == []
