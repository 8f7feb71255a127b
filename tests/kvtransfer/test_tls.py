"""Encrypted connections: who is taken, and that new certificates need no restart."""

import logging
import os
import shutil
import socket
import ssl
from pathlib import Path

import pytest
from certificates import Authority

from kvtransfer.errors import GreetingFailed, PeerUnreachable
from kvtransfer.side_channel import SideChannel, ask
from kvtransfer.tls import Tls, TlsFiles

HOST = "127.0.0.1"


def folder(path: Path, name: str) -> Path:
    (path / name).mkdir()
    return path / name


def served(tls: Tls, payload: bytes = b"payload") -> SideChannel:
    return SideChannel(HOST, {(0, 0): payload}, engine_id="e", secret="s", tls=tls)


def asked(port: int, tls: Tls | None, secret: str = "s") -> bytes:
    return ask(HOST, port, [(0, 0)], engine_id="e", secret=secret, tls=tls)[0, 0].payload


def shown(port: int, tls: Tls) -> bytes:
    """The certificate that a listener shows."""
    with socket.create_connection((HOST, port)) as sock, tls.client().wrap_socket(sock) as secure:
        return secure.getpeercert(binary_form=True) or b""


def test_members_of_one_authority_meet(tmp_path: Path) -> None:
    authority = Authority("ca")
    here = Tls(authority.files(folder(tmp_path, "here")))
    there = Tls(authority.files(folder(tmp_path, "there")))
    channel = served(here, b"large" * 1_000_000)
    assert asked(channel.port, there) == b"large" * 1_000_000
    channel.stop()


def test_a_certificate_does_not_replace_the_secret(tmp_path: Path) -> None:
    tls = Tls(Authority("ca").files(tmp_path))
    channel = served(tls)
    with pytest.raises(GreetingFailed, match="secret"):
        asked(channel.port, tls, secret="guessed")
    channel.stop()


def test_strangers_are_not_taken_by_either_side(tmp_path: Path) -> None:
    ours = Tls(Authority("ca").files(folder(tmp_path, "ours")))
    others = Tls(Authority("ca").files(folder(tmp_path, "others")))
    channel, impostor = served(ours), served(others)
    for port, tls in ((channel.port, others), (impostor.port, ours)):
        with pytest.raises(PeerUnreachable):
            asked(port, tls)
    with pytest.raises((PeerUnreachable, GreetingFailed)):
        asked(channel.port, None)
    assert asked(channel.port, ours) == b"payload"
    channel.stop()
    impostor.stop()


def test_who_shows_no_certificate_hears_nothing(tmp_path: Path) -> None:
    files = Authority("ca").files(tmp_path)
    channel = served(Tls(files))
    context = ssl.create_default_context(cafile=files.ca)
    context.check_hostname = False
    with (
        socket.create_connection((HOST, channel.port)) as sock,
        context.wrap_socket(sock) as secure,
        pytest.raises(ssl.SSLError),
    ):
        secure.recv(1)
    channel.stop()


def test_new_connections_show_new_certificates(tmp_path: Path) -> None:
    authority = Authority("ca")
    live = folder(tmp_path, "live")
    tls = Tls(authority.files(live))
    channel = served(tls)
    first = shown(channel.port, tls)
    authority.files(live)
    second = shown(channel.port, tls)
    assert first != second
    assert asked(channel.port, tls) == b"payload"
    # As an orchestrator does it: the whole folder is replaced.
    other = Authority("another ca")
    replace(live, other.files(folder(tmp_path, "next")))
    assert shown(channel.port, tls) not in (first, second)
    assert asked(channel.port, tls) == b"payload"
    channel.stop()


def replace(live: Path, files: TlsFiles) -> None:
    for path in (files.certificate, files.key, files.ca):
        shutil.copy(path, live / "tmp")
        os.replace(live / "tmp", live / Path(path).name)


def test_files_that_do_not_fit_yet_leave_the_old_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority("ca")
    live = folder(tmp_path, "live")
    tls = Tls(authority.files(live))
    channel = served(tls)
    first = shown(channel.port, tls)
    new = authority.files(folder(tmp_path, "next"))
    shutil.copy(new.certificate, live / "certificate.pem")  # Its key has not come yet.
    with caplog.at_level(logging.WARNING):
        assert shown(channel.port, tls) == first
    assert "the old are" in caplog.text
    shutil.copy(new.key, live / "key.pem")
    assert shown(channel.port, tls) != first
    (live / "key.pem").unlink()
    assert asked(channel.port, tls) == b"payload"
    channel.stop()


def test_files_that_are_missing_at_the_start_are_named(tmp_path: Path) -> None:
    files = Authority("ca").files(tmp_path)
    Path(files.key).unlink()
    with pytest.raises(FileNotFoundError, match=r"key\.pem"):
        Tls(files)
