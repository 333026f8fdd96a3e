"""The table of Triton's releases."""

from __future__ import annotations

from build.releases import RELEASES, numbers, release_of


def test_the_table_of_releases_is_in_order_and_has_sources() -> None:
    versions = [numbers(release.triton) for release in RELEASES]
    assert versions == sorted(versions)
    assert all(release.source.startswith("https://docs.nvidia.com/") for release in RELEASES)
    assert release_of("2.60.0") == RELEASES[2]
    assert release_of("2.6.0") is None
    assert release_of("") is None
