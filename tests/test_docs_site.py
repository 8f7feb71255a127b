"""The documentation site: links as the repository has them become links of the site."""

import pytest

from tools.docs_site import repository_path, site_path, translate_links


@pytest.mark.parametrize(
    ("place", "is_elsewhere", "link", "expected"),
    [
        pytest.param("index.md", True, "docs/routing.md", "routing.md", id="home-to-page"),
        pytest.param("index.md", True, "SECURITY.md", "SECURITY.md", id="home-to-file"),
        pytest.param("routing.md", False, "../README.md", "index.md", id="page-to-home"),
        pytest.param("routing.md", False, "scaling.md#why", "scaling.md#why", id="anchor"),
        pytest.param("adr/0001.md", False, "../routing.md", "../routing.md", id="from-folder"),
        pytest.param("adr/0001.md", False, "../../SECURITY.md", "../SECURITY.md", id="out"),
        pytest.param("SECURITY.md", True, "docs/api.md#a", "api.md#a", id="file-to-page"),
        pytest.param(
            "benchmarks/results/chaos.md", True, "chaos.png", "chaos.png", id="within-results"
        ),
        pytest.param("api.md", False, "http://a.b/docs/c.md", "http://a.b/docs/c.md", id="address"),
    ],
)
def test_links(place: str, is_elsewhere: bool, link: str, expected: str) -> None:
    source = repository_path(place, is_elsewhere=is_elsewhere)

    assert translate_links(f"[text]({link})", place, source) == f"[text]({expected})"
    assert site_path(source) == place
