"""Requests as bytes. Owns how one is written, right or wrong as asked."""

from collections.abc import Sequence

Header = tuple[str | bytes, str | bytes]


def http_request(
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    headers: Sequence[Header] = (),
    version: str = "1.1",
    content_type: str | None = "application/json",
    content_length: bool = True,
) -> bytes:
    """A request that asks for the connection to be closed after it."""
    lines: list[Header] = [("Host", "127.0.0.1"), ("Connection", "close")]
    if body is not None:
        if content_type is not None:
            lines.append(("Content-Type", content_type))
        if content_length:
            lines.append(("Content-Length", str(len(body))))
    lines += headers
    head = [_bytes(f"{method} {path} HTTP/{version}")]
    head += [_bytes(name) + b": " + _bytes(value) for name, value in lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + (body or b"")


def chunked(body: bytes, *, size: int) -> bytes:
    """A body in chunks of `size` bytes, with its end."""
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in pieces) + b"0\r\n\r\n"


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
