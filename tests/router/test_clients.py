"""Which requests are taken for one client's."""

from typing import Any

import pytest

from router.clients import CLIENT, ClientIdentityMiddleware, client_of


def scope(*headers: tuple[bytes, bytes], client: Any = ("10.0.0.1", 5)) -> dict[str, Any]:
    return {"type": "http", "headers": list(headers), "client": client}


VIA = (b"x-pdserve-client", b"1.1.1.1")
KEY = (b"authorization", b"Bearer k")


@pytest.mark.parametrize(
    ("one", "other", "has_keys", "are_one"),
    [
        pytest.param(scope(), scope(client=("10.0.0.1", 6)), False, True, id="other-port"),
        pytest.param(scope(), scope(client=("10.0.0.2", 5)), False, False, id="other-address"),
        pytest.param(scope(VIA), scope(VIA, client=None), False, True, id="through-haproxy"),
        pytest.param(
            scope(VIA), scope((VIA[0], b"2.2.2.2"), VIA), False, True, id="its-own-word-first"
        ),
        pytest.param(scope(VIA, KEY), scope(VIA), False, True, id="invented-key"),
        pytest.param(scope(VIA, KEY), scope(VIA, (KEY[0], b"Bearer x")), True, False, id="other"),
        pytest.param(scope(VIA, KEY), scope(VIA, KEY, (KEY[0], b"x")), True, True, id="one-more"),
        pytest.param(scope(VIA, KEY), scope(VIA, (KEY[0], b"bEARER k")), True, True, id="case"),
    ],
)
def test_who_is_one_client(one: Any, other: Any, has_keys: bool, are_one: bool) -> None:
    names = {client_of(each, has_keys=has_keys) for each in (one, other)}
    assert (len(names) == 1) == are_one


async def test_the_app_does_not_see_the_header() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["headers"], CLIENT.get()))

    nobody: Any = None
    await ClientIdentityMiddleware(app, has_keys=False)(scope(KEY, VIA), nobody, nobody)
    assert seen == [([KEY], "b'1.1.1.1'")]
