"""Requests go up and replies come back with ids, lists and arguments as they should be."""

from __future__ import annotations

import json

import msgspec
import pytest

from kickcall.model import DeviceEvent
from kickcall.qmp import event_command, listing, message
from kickcall.qmp.event_command import BadArgumentsError, EventRequest
from kickcall.qmp.upstream import Lines

# As QEMU 7.2 writes them.
RETURN = b'{"return": {"id": [7, 1]}, "id": %b}'
ERROR = b'{"id": %b, "error": {"class": "GenericError", "desc": "a \\"id\\": [7, 1] b"}}'


@pytest.mark.parametrize("form", [RETURN, ERROR])
@pytest.mark.parametrize("echo", [b"1", b'"x"', b"null", b'{"id": [3, 4]}', b'[1, "]}"]', b'""'])
def test_a_clients_id_comes_back_byte_for_byte(form: bytes, echo: bytes) -> None:
    answer = message.answer(form % (b"[42, %b]" % echo))
    assert answer.number == 42
    assert answer.echo == echo
    assert answer.line == form % echo


def test_a_reply_to_a_request_without_id_has_none() -> None:
    answer = message.answer(RETURN % b"42")
    assert (answer.number, answer.echo) == (42, None)
    assert answer.line == b'{"return": {"id": [7, 1]}}'
    assert json.loads(message.answer(ERROR % b"42").line).keys() == {"error"}


def test_an_unfamiliar_order_of_members_is_understood() -> None:
    answer = message.answer(b'{"id": [42, 5] , "return": [1.50]}')
    assert json.loads(answer.line) == {"return": [1.5], "id": 5}


def test_a_request_goes_up_with_our_id_around_the_clients() -> None:
    members = {"execute": b'"stop"', "id": b'{"a":1}', "x\n": b"1"}
    assert message.request(members, 9) == b'{"execute":"stop","x\\n":1,"id":[9,{"a":1}]}\n'
    assert message.request({"execute": b'"stop"'}, 9) == b'{"execute":"stop","id":9}\n'


@pytest.mark.parametrize(
    ("members", "oob", "expected"),
    [
        ({"execute": b'"a"', "id": b"1", "arguments": b"{}"}, False, None),
        ({"exec-oob": b'"a"'}, True, None),
        ({"exec-oob": b'"a"'}, False, "QMP input member 'exec-oob' is unexpected"),
        ({"execute": b"1"}, False, "QMP input member 'execute' must be a string"),
        (
            {"execute": b'"a"', "exec-oob": b'"a"'},
            True,
            "QMP input member 'exec-oob' clashes with 'execute'",
        ),
        (
            {"execute": b'"a"', "arguments": b"[]"},
            False,
            "QMP input member 'arguments' must be an object",
        ),
        ({}, False, "QMP input lacks member 'execute'"),
    ],
)
def test_shapes_are_refused_in_qemus_words(
    members: dict[str, bytes], oob: bool, expected: str | None
) -> None:
    assert message.check(members, oob) == expected


def test_the_depth_of_an_id_is_counted_outside_of_strings() -> None:
    assert message.id_is_too_deep({"id": b"[" * 257 + b"]" * 257})
    assert not message.id_is_too_deep({"id": b"[" * 256 + b"]" * 256})
    assert not message.id_is_too_deep({"id": b'["\\"' + b"[" * 1000 + b'"]'})
    assert not message.id_is_too_deep({})


def test_the_command_is_listed_first() -> None:
    line = b'{"return": [{"name": "stop"}], "id": 3}'
    assert listing.with_command(line) == (
        b'{"return": [{"name": "x-debug-device-event"}, {"name": "stop"}], "id": 3}'
    )
    assert listing.with_command(b'{"id": 3, "error": {}}') == b'{"id": 3, "error": {}}'


def test_the_schema_describes_the_command_with_types_of_its_own() -> None:
    known = [
        {"name": "stop", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
        {"name": "0", "meta-type": "object", "members": []},
        {"name": "14", "meta-type": "object", "members": [], "tag": "t", "variants": []},
        {"name": "11", "meta-type": "enum", "values": ["a"]},
        {"name": "[14]", "meta-type": "array", "element-type": "14"},
    ]
    raw = json.dumps(known).encode()
    line = listing.with_schema(b'{"return": ' + raw + b"}", msgspec.Raw(raw))
    schema = json.loads(line)["return"]
    assert schema[3:] == known
    entities = {entity["name"]: entity for entity in schema}
    assert len(entities) == len(schema)
    command = entities["x-debug-device-event"]
    assert command["meta-type"] == "command"
    assert command["features"] == ["unstable"]
    assert command["ret-type"] == "0"
    arguments = entities[command["arg-type"]]
    assert [member["name"] for member in arguments["members"]] == ["dev", "event", "queue"]
    event = entities[arguments["members"][1]["type"]]
    # Before QEMU 6.2 an enum has `values` only.
    assert event == {"name": event["name"], "meta-type": "enum", "values": ["kick", "call"]}


GOOD = {"dev": "vs0", "event": "kick", "queue": 3}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "Parameter 'dev' is missing"),
        (GOOD | {"dev": 1}, "Invalid parameter type for 'dev', expected: string"),
        ({"dev": "a"}, "Parameter 'event' is missing"),
        (GOOD | {"event": "poke"}, "Parameter 'event' does not accept value 'poke'"),
        (GOOD | {"event": None}, "Invalid parameter type for 'event', expected: string"),
        ({"dev": "a", "event": "call"}, "Parameter 'queue' is missing"),
        (GOOD | {"queue": "3"}, "Invalid parameter type for 'queue', expected: integer"),
        (GOOD | {"queue": True}, "Invalid parameter type for 'queue', expected: integer"),
        (GOOD | {"queue": 3.0}, "Invalid parameter type for 'queue', expected: integer"),
        (GOOD | {"queue": 2**63}, "Invalid parameter type for 'queue', expected: integer"),
        (GOOD | {"queue": [[]]}, "Invalid parameter type for 'queue', expected: integer"),
        (GOOD | {"x": 1}, "Parameter 'x' is unexpected"),
    ],
)
def test_arguments_are_refused_in_qemus_words(given: dict[str, object], expected: str) -> None:
    with pytest.raises(BadArgumentsError) as refused:
        event_command.from_qmp(json.dumps(given).encode())
    assert str(refused.value) == expected


def test_arguments_are_read() -> None:
    expected = EventRequest("vs0", DeviceEvent.KICK, 3)
    assert event_command.from_qmp(json.dumps(GOOD).encode()) == expected
    for line in (
        "x-debug-device-event vs0 kick 3",
        '  x-debug-device-event "vs0"  kick 0x3 ',
        "x-debug-device-event vs0 kick 03\n",
    ):
        assert event_command.from_hmp(line) == expected
    assert event_command.from_hmp(r'x-debug-device-event "a\"b" call -1').dev == 'a"b'


HELP = '\r\nTry "help x-debug-device-event" for more information\r\n'


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("", "x-debug-device-event: string expected" + HELP),
        ("a", "x-debug-device-event: string expected" + HELP),
        ('"a kick 1', "x-debug-device-event: string expected" + HELP),
        ("a kick", "unexpected end of expression" + HELP),
        ("a kick b", "invalid char 'b' in expression" + HELP),
        ("a kick 1 2", "x-debug-device-event: extraneous characters at the end of line" + HELP),
        ("a kick 08", "x-debug-device-event: extraneous characters at the end of line" + HELP),
        ("a kick 99999999999999999999", "number too large" + HELP),
        ("a poke 1", "Error: Parameter 'event' does not accept value 'poke'\r\n"),
    ],
)
def test_hmp_lines_are_refused_in_qemus_words(rest: str, expected: str) -> None:
    # The same faults of `sum`, `device_del` and `set_link` read so in QEMU 7.2.
    with pytest.raises(BadArgumentsError) as refused:
        event_command.from_hmp(f"x-debug-device-event {rest}")
    assert str(refused.value) == expected


def test_messages_of_a_pretty_monitor_come_out_on_one_line() -> None:
    lines = Lines()
    pretty = b'{\n    "return": {\n        "n": 1.50\n    },\n    "id": [\n    4,\n    1\n ]\n}\n'
    data = (pretty + b'{"a": 1}\n').replace(b"\n", b"\r\n")
    found = [line for byte in data for line in lines.feed(bytes([byte]))]
    assert found == [b'{"return": {"n": 1.50}, "id": [4, 1]}', b'{"a": 1}']
    assert lines.feed(data) == found
