from collections.abc import Iterator

from infilld.engine import errors
from infilld.server import problems


def family(root: type[errors.InfilldError]) -> Iterator[type[errors.InfilldError]]:
    yield root
    for child in root.__subclasses__():
        yield from family(child)


def test_every_error_has_a_status_of_its_own() -> None:
    ours = {kind for kind in family(errors.InfilldError) if kind.__module__.startswith("infilld.")}
    assert ours == set(problems.STATUS)
    for kind, status in problems.STATUS.items():
        assert 400 <= status < 600
        assert (status == 400) == issubclass(kind, errors.RequestError)


def test_what_may_succeed_later_says_when() -> None:
    for status in (429, 503):
        assert problems.response(status, {}).headers["retry-after"] == "1"
    assert "retry-after" not in problems.response(400, {}).headers
