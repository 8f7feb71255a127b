"""Who is let in by a greeting, and which tricks are not enough."""

import random
import socket
import threading

import pytest

from kvtransfer.errors import GreetingFailed
from kvtransfer.greeting import (
    MAX_GREETING_BYTES,
    Admitted,
    Challenge,
    ClientGreeting,
    Hello,
    Lobby,
    Refusal,
    ServerGreeting,
    greet,
    pack_greeting,
    printable,
)


def server(
    name: str = "replica", secret: str = "s", purpose: str = "test", version: int = 8
) -> ServerGreeting:
    return ServerGreeting(name, secret=secret, purpose=purpose, version=version)


def client(
    wanted: str = "replica", secret: str = "s", purpose: str = "test", version: int = 8
) -> ClientGreeting:
    return ClientGreeting("router", wanted, secret=secret, purpose=purpose, version=version)


def meet(server: ServerGreeting, client: ClientGreeting) -> None:
    hello = client.feed(server.begin())
    client.feed(server.feed(hello))


def test_both_know_each_other_then() -> None:
    one, other = server(), client()
    meet(one, other)
    assert one.is_done
    assert other.is_done
    assert (one.peer_name, other.peer_name) == ("router", "replica")


@pytest.mark.parametrize("seed", range(20))
def test_however_the_bytes_are_cut(seed: int) -> None:
    rng = random.Random(seed)
    one, other = server(), client()

    def feed(side: ServerGreeting | ClientGreeting, stream: bytes) -> bytes:
        answers = b""
        while stream:
            size = rng.choice([1, side.num_wanted, 5, 1000])
            answers += side.feed(stream[:size])
            stream = stream[size:]
        return answers

    admitted = feed(one, feed(other, one.begin()) + b"more of the client")
    feed(other, admitted + b"more of the server")
    assert one.is_done
    assert other.is_done
    assert one.take_rest() == b"more of the client"
    assert other.take_rest() == b"more of the server"
    assert one.take_rest() == b""


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        pytest.param(
            server(), client(secret="t"), "does not know this application's secret", id="secret"
        ),
        pytest.param(server(), client(purpose="p"), "does not know", id="another channel"),
        pytest.param(server("a"), client("b"), "this is a, not b", id="identity"),
        pytest.param(server(version=7), client(), "protocol 7 meets protocol 8", id="older server"),
        pytest.param(server(version=9), client(), "protocol 9 meets protocol 8", id="newer server"),
    ],
)
def test_both_sides_learn_why_not(one: ServerGreeting, other: ClientGreeting, reason: str) -> None:
    said, refused = one.begin(), None
    for side, far in ((other, one), (one, other)):
        try:
            said = side.feed(said)
        except GreetingFailed as failure:
            refused, said = far, failure.farewell
            break
    assert refused is not None
    with pytest.raises(GreetingFailed, match=f"the other side refuses: .*{reason}"):
        refused.feed(said)
    assert not one.is_done
    assert not other.is_done


def test_a_proof_does_not_fit_another_connection() -> None:
    one, other = server(), client()
    hello = other.feed(one.begin())
    one.feed(hello)
    assert one.is_done
    again = server()
    again.begin()
    with pytest.raises(GreetingFailed, match="secret"):
        again.feed(hello)


def test_a_challenge_is_not_answered_by_its_own_answer() -> None:
    # A server is asked for the proof that it wants to see: its own is another one.
    victim, oracle = server(), server()
    challenge = victim.begin()
    oracle.begin()
    with pytest.raises(GreetingFailed):
        oracle.feed(challenge)
    attacker = ClientGreeting("router", "replica", secret="", purpose="test", version=8)
    attacker.feed(challenge)
    proof = server()._prove("server", victim._nonce, "router", "replica", attacker._nonce)
    forged = Hello(8, "router", "replica", attacker._nonce, proof)
    with pytest.raises(GreetingFailed, match="secret"):
        victim.feed(pack_greeting(forged))


def test_a_client_believes_no_server_without_proof() -> None:
    other = client()
    hello = other.feed(server().begin())
    assert b"router" in hello
    for answer in (Admitted(b""), Admitted(other._nonce)):
        impostor = client()
        impostor.feed(server().begin())
        with pytest.raises(GreetingFailed, match="secret"):
            impostor.feed(pack_greeting(answer))
    # Nor its own proof, sent back.
    proof = other._prove("client", *other._said(other._challenge or b""))
    with pytest.raises(GreetingFailed, match="secret"):
        other.feed(pack_greeting(Admitted(proof)))


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="http"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="tls"),
        pytest.param((MAX_GREETING_BYTES + 1).to_bytes(4, "big"), id="too long"),
        pytest.param(bytes(20), id="zeros"),
        pytest.param(b"\x00\x00\x00\x07\x02\x01\x00\x00\x00\x01\xc1", id="no msgpack"),
        pytest.param(b"\x00\x00\x00\x07\x63\x01\x00\x00\x00\x01\x80", id="unknown kind"),
        pytest.param(b"\x00\x00\x00\x07\x02\x02\x00\x00\x00\x01\x80", id="two buffers"),
        pytest.param(b"\x00\x00\x00\x07\x02\x01\x00\x00\x00\x09\x80", id="length lies"),
        pytest.param(pack_greeting(Challenge(8, b"n")), id="a challenge"),
        pytest.param(pack_greeting(Admitted(b"p")), id="admits itself"),
        pytest.param(pack_greeting(Refusal("\x1b[31mno")), id="refuses"),
        pytest.param(
            b"\x00\x00\x0f\xff\x02\x01\x00\x00\x0f\xf9" + b"\x91" * 4089, id="deeply nested"
        ),
    ],
)
def test_what_is_no_greeting_is_refused(said: bytes) -> None:
    one = server()
    one.begin()
    with pytest.raises(GreetingFailed) as failure:
        one.feed(said)
    assert str(failure.value).isprintable()


def test_a_refusal_is_one_short_printable_line() -> None:
    assert printable("a\nb\x1b" + "c" * 1000) == "a?b?" + "c" * 296


def test_over_blocking_sockets_not_a_byte_more_is_read() -> None:
    here, there = socket.socketpair()
    one = server()

    def serve() -> None:
        greet(here, one, timeout_s=5)
        here.sendall(b"hello")

    thread = threading.Thread(target=serve)
    thread.start()
    with here, there:
        greet(there, client(), timeout_s=5)
        assert there.recv(100) == b"hello"
        thread.join()
    assert one.take_rest() == b""


@pytest.mark.parametrize("said", [b"", b"\x00\x00"])
def test_who_is_slow_or_hangs_up_is_given_up(said: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(said)
        with pytest.raises(TimeoutError):
            greet(here, server(), timeout_s=0.05)
        there.close()
        with pytest.raises((GreetingFailed, BrokenPipeError)):
            greet(here, server(), timeout_s=5)


def test_the_oldest_stranger_makes_room() -> None:
    lobby, gone = Lobby(size=2), list[str]()
    for name in ("a", "b", "c"):
        lobby.enter(name, lambda name=name: gone.append(name))  # type: ignore[misc]
    assert gone == ["a"]
    lobby.leave("b")
    lobby.leave("a")
    lobby.enter("d", lambda: gone.append("d"))
    assert gone == ["a"]
    assert len(lobby) == 2
