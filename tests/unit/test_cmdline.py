"""What does a QEMU command line say of a machine: its name, and where its QMP monitors listen?"""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kickcall.vmm.cmdline import SocketSpec, parse, split_options


def monitors(*arguments: str) -> tuple[SocketSpec, ...]:
    return parse(["qemu-system-x86_64", *arguments]).qmp


def name(*arguments: str) -> str:
    return parse(["qemu-system-x86_64", *arguments]).name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vm0", "vm0"),
        ("guest=vm0", "vm0"),
        ("vm0,process=qemu-vm0", "vm0"),
        ("guest=vm0,debug-threads=on", "vm0"),
        ("debug-threads=on,guest=vm0", "vm0"),
        ("a,,b", "a,b"),
        ("guest=a,,b,debug-threads=on", "a,b"),
        ("guest=a=b", "a=b"),
        ("process=only", ""),
        ("", ""),
    ],
)
def test_the_name_is_the_guests(text: str, expected: str) -> None:
    assert name("-name", text) == expected


def test_a_machine_without_a_name_has_none() -> None:
    assert name("-m", "256") == ""
    assert name("-name") == ""


def test_two_dashes_are_as_good_as_one() -> None:
    assert name("--name", "vm0") == "vm0"
    assert monitors("--qmp", "unix:/a,server") == (SocketSpec(path="/a"),)


def test_the_last_name_wins() -> None:
    assert name("-name", "a", "-name", "b") == "b"


def test_the_value_of_an_option_is_no_option() -> None:
    assert parse(["qemu", "-name", "-qmp", "unix:/a,server"]).qmp == ()
    assert name("-name", "-name", "vm0") == "-name"


@pytest.mark.parametrize("option", ["-qmp", "-qmp-pretty"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:/run/q.sock,server=on,wait=off", SocketSpec(path="/run/q.sock")),
        ("unix:/run/q.sock,server,nowait", SocketSpec(path="/run/q.sock")),
        ("unix:q.sock,server=on", SocketSpec(path="q.sock")),
        ("unix:path=/run/q.sock,server=on", SocketSpec(path="/run/q.sock")),
        ("unix:/run/a,,b.sock,server=on", SocketSpec(path="/run/a,b.sock")),
        ("unix:q,abstract=on,server=on", SocketSpec(abstract="q")),
        ("tcp:localhost:4444,server=on,wait=off", SocketSpec(tcp=("localhost", 4444))),
        ("tcp::4444,server,nowait", SocketSpec(tcp=("localhost", 4444))),
        ("tcp:[::1]:4444,server=on", SocketSpec(tcp=("::1", 4444))),
    ],
)
def test_qmp_names_a_socket(option: str, text: str, expected: SocketSpec) -> None:
    assert monitors(option, text) == (expected,)


@pytest.mark.parametrize(
    "text",
    [
        "stdio",
        "none",
        "pty",
        "vc",
        "null",
        "unix:/run/q.sock",  # QEMU is the client there
        "unix:/run/q.sock,server=off",
        "tcp:localhost:4444",
        "telnet:localhost:4444,server=on",
        "tcp:localhost:qmp,server=on",
        "file:/tmp/log",
        "chardev:missing",
        "",
    ],
)
def test_what_is_no_listening_socket_is_no_monitor_to_connect_to(text: str) -> None:
    assert monitors("-qmp", text) == ()


@pytest.mark.parametrize(
    ("chardev", "expected"),
    [
        ("socket,id=c,path=/q,server=on,wait=off", SocketSpec(path="/q")),
        ("socket,id=c,path=/q,server,nowait", SocketSpec(path="/q")),
        ("backend=socket,path=/q,server=on,id=c", SocketSpec(path="/q")),
        ("socket,id=c,path=/a,,b,server=on", SocketSpec(path="/a,b")),
        ("socket,id=c,path=q,abstract=on,server=on", SocketSpec(abstract="q")),
        ("socket,id=c,host=127.0.0.1,port=4444,server=on", SocketSpec(tcp=("127.0.0.1", 4444))),
        ("socket,id=c,port=4444,server=on", SocketSpec(tcp=("localhost", 4444))),
        ("socket,id=c,fd=33,server=on,wait=off", SocketSpec(fd=33)),
    ],
)
@pytest.mark.parametrize(
    "monitor",
    [
        ("-mon", "chardev=c,mode=control"),
        ("-mon", "c,mode=control,pretty=on"),
        ("-mon", "mode=control,id=m,chardev=c"),
        ("-mon", '{"chardev": "c", "mode": "control", "id": "m"}'),
        ("-qmp", "chardev:c"),
        ("-qmp-pretty", "chardev:c"),
    ],
)
def test_a_monitor_is_found_by_its_chardev(
    chardev: str, expected: SocketSpec, monitor: tuple[str, str]
) -> None:
    assert monitors("-chardev", chardev, *monitor) == (expected,)
    assert monitors(*monitor, "-chardev", chardev) == (expected,)


@pytest.mark.parametrize(
    "chardev",
    [
        "socket,id=c,path=/q",  # QEMU connects to it, somebody else listens
        "socket,id=c,path=/q,server=off",
        "socket,id=c,port=4444,server=on,telnet=on",
        "socket,id=c,port=4444,server=on,websocket=on",
        "socket,id=c,port=4444,server=on,tls-creds=tls0",
        "file,id=c,path=/var/log/qmp,server=on",
        "pipe,id=c,path=/tmp/fifo",
        "udp,id=c,host=h,port=1",
        "stdio,id=c",
        "socket,id=other,path=/q,server=on",
    ],
)
def test_a_chardev_that_does_not_listen_for_qmp_is_no_monitor(chardev: str) -> None:
    assert monitors("-chardev", chardev, "-mon", "chardev=c,mode=control") == ()


@pytest.mark.parametrize("mode", ["", ",mode=readline"])
def test_a_human_monitor_is_none_for_qmp(mode: str) -> None:
    chardev = "socket,id=c,path=/q,server=on"
    assert monitors("-chardev", chardev, "-mon", f"chardev=c{mode}") == ()
    assert monitors("-monitor", "unix:/q,server") == ()


def test_a_socket_that_is_no_monitor_is_left_alone() -> None:
    assert monitors("-chardev", "socket,id=agent,path=/agent,server=on") == ()
    assert monitors("-serial", "unix:/serial,server", "-vnc", "unix:/vnc") == ()


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        (
            {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": "/q"}}}},
            SocketSpec(path="/q"),
        ),
        (
            {
                "type": "socket",
                "data": {"addr": {"type": "unix", "data": {"path": "q", "abstract": True}}},
            },
            SocketSpec(abstract="q"),
        ),
        (
            {
                "type": "socket",
                "data": {
                    "addr": {"type": "inet", "data": {"host": "h", "port": "4444"}},
                    "server": True,
                },
            },
            SocketSpec(tcp=("h", 4444)),
        ),
        (
            {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": "7"}}}},
            SocketSpec(fd=7),
        ),
    ],
)
def test_a_chardev_in_json_is_qapis(backend: dict[str, object], expected: SocketSpec) -> None:
    text = json.dumps({"id": "c", "backend": backend})
    assert monitors("-chardev", text, "-mon", "c,mode=control") == (expected,)


def test_a_client_socket_in_json_is_no_monitor() -> None:
    data = {"addr": {"type": "unix", "data": {"path": "/q"}}, "server": False}
    text = json.dumps({"id": "c", "backend": {"type": "socket", "data": data}})
    assert monitors("-chardev", text, "-mon", "c,mode=control") == ()


LIBVIRT = """
/usr/bin/qemu-system-x86_64 -name guest=web,debug-threads=on -S
-object {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/k.aes"}
-machine pc-q35-7.2,usb=off -uuid 9728432e-0b15-4e79-bf6f-2a1046814fd3 -no-user-config -nodefaults
-chardev socket,id=charmonitor,fd=30,server=on,wait=off
-mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc
-chardev socket,id=charchannel0,fd=29,server=on,wait=off
-device {"driver":"virtserialport","chardev":"charchannel0"}
"""


def test_libvirts_monitor_is_told_from_those_that_anybody_may_use() -> None:
    said = parse([*LIBVIRT.split(), "-qmp", "unix:/a,server"])
    assert said.name == "web"
    assert said.uuid == "9728432e-0b15-4e79-bf6f-2a1046814fd3"
    assert said.libvirt == SocketSpec(fd=30)
    assert said.qmp == (SocketSpec(path="/a"),)


def test_a_monitor_that_is_only_called_like_libvirts_is_anybodys() -> None:
    said = parse(LIBVIRT.replace("-uuid", "-smbios").split())
    assert said.libvirt is None
    assert said.qmp == (SocketSpec(fd=30),)


def test_older_libvirts_command_line() -> None:
    path = "/var/lib/libvirt/qemu/domain-1-web/monitor.sock"
    said = parse(
        [
            *("qemu-system-x86_64", "-name", "guest=web", "-uuid", "9728432e-0b15-4e79"),
            *("-chardev", f"socket,id=charmonitor,path={path},server,nowait"),
            *("-mon", "chardev=charmonitor,id=monitor,mode=control"),
        ]
    )
    assert said.libvirt == SocketSpec(path=path)
    assert said.qmp == ()


def test_several_monitors_come_in_the_order_in_which_they_were_given() -> None:
    found = monitors(
        *("-qmp", "unix:/a,server", "-chardev", "socket,id=c,path=/b,server=on"),
        *("-mon", "c,mode=control", "-qmp", "unix:/c,server"),
    )
    assert [spec.path for spec in found] == ["/a", "/b", "/c"]


def test_options_are_split_as_qemu_splits_them() -> None:
    assert split_options("path=/a,,b,server,nowait,id=x=y") == {
        "path": "/a,b",
        "server": "on",
        "wait": "off",
        "id": "x=y",
    }
    assert split_options("a,b=c", implied="first") == {"first": "a", "b": "c"}


WORDS = st.one_of(
    st.sampled_from(["-name", "-qmp", "-qmp-pretty", "-mon", "-chardev", "--", "-", ""]),
    st.text(alphabet=st.sampled_from(",={}[]:\"'\0²٣ "), max_size=20),
    st.text(max_size=30),
    st.builds(
        lambda value: json.dumps(value),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ["id", "backend", "data", "addr", "path", "port", "type", "fd"]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        ),
    ),
)


@given(st.lists(WORDS, max_size=8))
@example(["-qmp", "tcp:localhost:²,server=on"])
@example(["-qmp", f"tcp:localhost:{'9' * 5000},server=on"])
@example(["-chardev", "socket,id=c,fd=³,server=on"])
@example(["-chardev", '{"a":' * 100_000])
@example(["-chardev", '{"a":' * 900 + "1" + "}" * 900])
@example(["-chardev", "{}", "-mon", "{}"])
@example(["-mon", '{"mode": "control"}'])
@example([])
def test_nonsense_never_raises(arguments: list[str]) -> None:
    said = parse(arguments)
    for spec in said.qmp:
        given_parts = [spec.path, spec.abstract, spec.tcp, spec.fd]
        assert sum(part is not None for part in given_parts) == 1


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1))
def test_any_name_and_path_survive_when_their_commas_are_doubled(text: str) -> None:
    quoted = text.replace(",", ",,")
    assert name("-name", f"guest={quoted}") == text
    assert monitors("-qmp", f"unix:path={quoted},server=on") == (SocketSpec(path=text),)


def test_proxmoxs_command_line_has_a_number_and_one_monitor_to_use() -> None:
    """As `qm showcmd` prints it, of PVE 8."""
    said = parse(
        [
            *("/usr/bin/kvm", "-id", "100", "-name", "web,debug-threads=on", "-no-shutdown"),
            "-chardev",
            "socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off",
            *("-mon", "chardev=qmp,mode=control"),
            "-chardev",
            "socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5",
            *("-mon", "chardev=qmp-event,mode=control"),
            *("-pidfile", "/var/run/qemu-server/100.pid", "-daemonize"),
        ]
    )
    assert (said.name, said.number) == ("web", "100")
    assert said.qmp == (SocketSpec(path="/var/run/qemu-server/100.qmp"),)
    assert said.libvirt is None
