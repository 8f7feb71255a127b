"""What our command makes of the config that Serve writes for HAProxy."""

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from cluster.haproxy import changed


def test_asks_again_with_the_whole_request() -> None:
    before = HAPROXY_CONFIG_TEMPLATE.splitlines()
    after = changed(HAPROXY_CONFIG_TEMPLATE).splitlines()
    assert [line for line in after if line not in before] == [
        "    retry-on conn-failure empty-response",
        "    option http-buffer-request",
    ]
    assert after.index("defaults") < after.index("    option http-buffer-request")
    assert after.index("    option http-buffer-request") < after.index("frontend http_frontend")


def test_another_config_is_refused() -> None:
    with pytest.raises(ValueError, match="retry-on"):
        changed("defaults\n    mode http\n")
