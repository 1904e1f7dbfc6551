import pytest
from torch import distributed

from ftaccum import DataError, LostProcessError
from ftaccum.runtime.process_group import lasting_process_group, report_lost_process

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


@pytest.mark.parametrize("is_between_devices", [False, True])
def test_objects_share_one_lasting_group_per_default_group(
    is_between_devices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    new_group = distributed.new_group
    monkeypatch.setattr(distributed, "new_group", lambda **arguments: made.append(1) or new_group(**arguments))
    if is_between_devices:
        monkeypatch.setattr(distributed, "get_backend", lambda: "nccl")
    groups = []
    for _ in range(2):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            groups.append(lasting_process_group(2))
            assert lasting_process_group(2) is groups[-1]
            assert not groups[-1].any(False)
        finally:
            distributed.destroy_process_group()
    assert groups[0] is not groups[1]
    assert len(made) == (2 if is_between_devices else 0)
