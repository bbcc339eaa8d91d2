"""A client that is not installed: skipped in `make test`, an error in `make test-clients`."""

import pytest
from client_cases import REQUIRE, absent

MESSAGE = "optimum is not installed: make test-clients installs it"


def test_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUIRE, raising=False)
    with pytest.raises(pytest.skip.Exception, match=MESSAGE):
        absent("optimum")


def test_fails_where_clients_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRE, "1")
    with pytest.raises(pytest.fail.Exception, match=MESSAGE):
        absent("optimum")
