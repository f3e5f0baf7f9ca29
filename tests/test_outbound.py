"""HTTP to addresses that clients name: real sockets and certificates, name servers that lie."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import ipaddress
import socket
import ssl
import threading

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from receiver import Answer, Receiver

from gateway import outbound
from gateway.outbound import AddressRefused, AnswerRefused, check_url, client, fetch, is_public
from runtime.errors import InvalidInput

INSIDE = [
    "127.0.0.1",
    "127.8.9.10",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%lo",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "ff0e::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::10.0.0.1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
]
OUTSIDE = ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::1"]


@pytest.fixture
def receiver():
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def names(monkeypatch):
    """What the name server says: name -> addresses, one list an answer; the last one stays."""
    told: dict[str, list[list[str]]] = {}
    asked: list[str] = []
    real = socket.getaddrinfo

    def look_up(host, port, *args, **kwargs):
        if host not in told:
            return real(host, port, *args, **kwargs)
        asked.append(host)
        answers = told[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [entry for address in addresses for entry in real(address, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    told["asked"] = asked
    return told


def get(url, *, allow_private=True, timeout_s=10.0, max_bytes=1000, **more):
    async def main():
        async with client(allow_private=allow_private, timeout_s=timeout_s, max_bytes=max_bytes, **more) as http:
            return await http.get(url)

    return asyncio.run(main())


def fetched(url, **more):
    return asyncio.run(fetch("image", url, **({"max_bytes": 1000, "allow_private": True} | more)))


@pytest.mark.parametrize("address", INSIDE)
def test_an_address_inside_a_network_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", OUTSIDE)
def test_an_address_of_the_internet_is_public(address):
    assert is_public(address)


WAYS_HOME = ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "[::1]"]
WAYS_HOME += ["[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "LOCALHOST", "localhost.", "①②⑦.⓪.⓪.①"]


@pytest.mark.parametrize("host", WAYS_HOME)
def test_no_spelling_of_our_own_host_is_taken(host, receiver):
    url = f"http://{host}:{receiver.port}/"
    with pytest.raises(InvalidInput, match=r"^webhook_url: ") as refused:
        asyncio.run(check_url("webhook_url", url))
    assert refused.value.code == "invalid_url"
    with pytest.raises(InvalidInput, match=r"^image: "):
        fetched(url, allow_private=False)
    assert receiver.received == []


WRONG = [
    ("ftp://example.org/a", "http://host/path"),
    ("file:///etc/passwd", "http://host/path"),
    ("gopher://127.0.0.1/", "http://host/path"),
    ("http://", "http://host/path"),
    ("example.org/a.png", "http://host/path"),
    ("http://user:secret@example.org/", "user name or password"),
    ("http://exa mple.org/", ""),
    ("http://[::1/", "no URL"),
    ("http://a\x00b/", "no URL"),
    ("http://" + "a" * 70 + ".invalid/", "does not resolve"),
    ("http://nowhere.invalid/", "does not resolve"),
    ("http://example.org/" + "a" * 9000, "at most 8192"),
    ("http://example.org:99999/", ""),
]


@pytest.mark.parametrize(("url", "words"), WRONG)
def test_what_is_no_address_is_refused_by_field(url, words):
    with pytest.raises(InvalidInput, match=r"^webhook_url: ") as refused:
        asyncio.run(check_url("webhook_url", url))
    assert words in str(refused.value)
    with pytest.raises(InvalidInput, match=r"^image: "):
        fetched(url)


def test_what_was_checked_is_what_is_connected_to(names, receiver, monkeypatch):
    """A name server that says something else the second time is not asked a second time."""
    monkeypatch.setattr(outbound, "is_public", lambda address: address == "127.0.0.1")
    names["rebound.test"] = [["127.0.0.1"], ["127.0.0.2"]]
    answer = get(f"http://rebound.test:{receiver.port}/hook?a=1", allow_private=False)
    assert answer.status_code == 200
    assert names["asked"] == ["rebound.test"]
    [received] = receiver.received
    assert received.headers["host"] == f"rebound.test:{receiver.port}"
    assert received.path == "/hook?a=1"
    with pytest.raises(AddressRefused):
        get(f"http://rebound.test:{receiver.port}/hook", allow_private=False)
    assert len(receiver.received) == 1


def test_one_bad_address_of_a_name_is_enough(names, receiver):
    names["mixed.test"] = [["1.1.1.1", "127.0.0.1"]]
    with pytest.raises(InvalidInput, match="public internet"):
        asyncio.run(check_url("webhook_url", f"http://mixed.test:{receiver.port}/"))


def test_an_address_that_does_not_answer_is_not_the_last_one(names, receiver):
    """The second address of the name takes over; the body is sent again."""
    names["two.test"] = [["::1", "127.0.0.1"]]

    async def main():
        async with client(allow_private=True, timeout_s=10, max_bytes=10) as http:
            return await http.post(f"http://two.test:{receiver.port}/", content=b"hello")

    assert asyncio.run(main()).status_code == 200
    assert [received.body for received in receiver.received] == [b"hello"]


def test_redirects_are_checked_like_everything_else(names, receiver, monkeypatch):
    monkeypatch.setattr(outbound, "is_public", lambda address: address == "127.0.0.1")
    names["outside.test"], names["inside.test"] = [["127.0.0.1"]], [["127.0.0.2"]]
    places = {
        "/inside": f"http://inside.test:{receiver.port}/secret",
        "/file": "file:///etc/passwd",
        "/once": f"http://outside.test:{receiver.port}/here",
        "/loop": "/loop",
        "/odd": "http://[::1",
    }

    def answer(received):
        place = places.get(received.path)
        return Answer(302, {"location": place}) if place else Answer(body=b"picture")

    receiver.answer = answer
    start = f"http://outside.test:{receiver.port}"
    assert fetched(f"{start}/once", allow_private=False) == b"picture"
    for path in ("/inside", "/file", "/loop", "/odd"):
        with pytest.raises(InvalidInput, match=r"^image: "):
            fetched(f"{start}{path}", allow_private=False)
    paths = [received.path for received in receiver.received]
    assert "/secret" not in paths
    assert paths.count("/loop") == outbound.MAX_REDIRECTS + 1
    assert get(f"{start}/once", allow_private=False).status_code == 302, "who asks for no redirects gets none"


def test_a_body_is_read_to_its_bound_and_no_further(receiver):
    receiver.answer = lambda _received: Answer(body=b"x" * 1000)
    assert fetched(receiver.url) == b"x" * 1000
    with pytest.raises(InvalidInput, match="more than 999 bytes"):
        fetched(receiver.url, max_bytes=999)
    sent = []

    def endless(_received):
        def parts():
            while True:
                sent.append(1)
                yield b"x" * 100_000

        return Answer(body=parts())

    receiver.answer = endless
    with pytest.raises(AnswerRefused):
        get(receiver.url)
    assert len(sent) < 1000, "the connection was closed"


def test_a_compressed_answer_is_refused(receiver):
    """A kilobyte may be a gigabyte."""
    receiver.answer = lambda _received: Answer(headers={"content-encoding": "gzip"}, body=gzip.compress(b"x" * 9000))
    with pytest.raises(InvalidInput, match="compressed"):
        fetched(receiver.url)


def test_slow_servers_are_given_up(receiver):
    ended = threading.Event()

    def drips(_received):
        def parts():
            while not ended.wait(0.05):
                yield b"x"

        return Answer(body=parts())

    receiver.answer = drips
    try:
        with pytest.raises(httpx2.TimeoutException, match=r"0\.4 s"):
            get(receiver.url, timeout_s=0.4)
        with pytest.raises(InvalidInput, match=r"0\.4 s"):
            fetched(receiver.url, timeout_s=0.4)
    finally:
        ended.set()


def test_an_answer_that_is_none_says_so(receiver):
    receiver.answer = lambda _received: Answer(404, body=b"no")
    with pytest.raises(InvalidInput, match="it answers 404"):
        fetched(receiver.url)
    port = receiver.port
    receiver.close()
    with pytest.raises(InvalidInput, match="cannot be fetched"):
        fetched(f"http://127.0.0.1:{port}/")


def test_proxies_of_the_environment_are_not_used(receiver, names, monkeypatch):
    with Receiver() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        names["direct.test"] = [["127.0.0.1"]]
        assert get(f"http://direct.test:{receiver.port}/").status_code == 200
        assert proxy.received == []


@pytest.fixture
def certificate(tmp_path):
    """(server context, client context) of a certificate for good.test."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "good.test")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("good.test"), x509.IPAddress(ipaddress.ip_address("127.0.0.9"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = tmp_path / "cert.pem", tmp_path / "key.pem"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    secret.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem, secret)
    return server, ssl.create_default_context(cafile=pem)


def test_tls_verifies_the_name_not_the_address(certificate, names):
    server, trusting = certificate
    names["good.test"] = names["other.test"] = [["127.0.0.1"]]
    with Receiver(tls=server) as receiver:

        async def both() -> None:
            async with client(allow_private=True, timeout_s=10, max_bytes=100, tls=trusting) as http:
                assert (await http.get(f"https://good.test:{receiver.port}/")).status_code == 200
                with pytest.raises(httpx2.ConnectError, match=r"other\.test"):
                    await http.get(f"https://other.test:{receiver.port}/")

        asyncio.run(both())
        with pytest.raises(httpx2.ConnectError, match="certificate"):
            get(f"https://good.test:{receiver.port}/")
        assert len(receiver.received) == 1
