import pytest

from ftaccum import DataError, LostProcessError
from ftaccum.runtime.process_group import report_lost_process

_HEARD = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:41174."


def watched(error: Exception, *, alone: bool = False) -> None:
    with report_lost_process(alone, lambda: "7 updates are complete."):
        raise error


def test_a_collective_that_lost_a_peer_raises_a_lost_process_error() -> None:
    with pytest.raises(LostProcessError, match=r"does not respond.* 7 updates are complete\. .*closed by peer"):
        watched(RuntimeError(_HEARD))


def test_a_lost_process_is_not_blamed_on_the_rows() -> None:
    error = DataError("The loss of the first rows cannot be computed.")
    error.__cause__ = RuntimeError(_HEARD)
    with pytest.raises(LostProcessError, match=r"The error was: .*closed by peer"):
        watched(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), DataError(f"Row 3 is {_HEARD!r}.")])
def test_other_errors_are_raised_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        watched(error)
    assert raised.value is error


def test_a_single_process_reports_no_lost_process() -> None:
    with pytest.raises(RuntimeError, match="closed by peer") as raised:
        watched(RuntimeError(_HEARD), alone=True)
    assert not isinstance(raised.value, LostProcessError)


def test_a_lost_process_is_reported_once() -> None:
    with pytest.raises(LostProcessError) as raised, report_lost_process(False, lambda: "Elsewhere."):
        watched(RuntimeError(_HEARD))
    assert "Elsewhere" not in str(raised.value)
