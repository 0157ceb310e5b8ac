import json

from infilld.server.http import sse


def test_a_frame_is_one_line_of_ascii_data_whatever_the_text() -> None:
    text = "a\r\nb\u2028c\u0085d\x0be \N{GRINNING FACE}\n\nf"
    framed = sse.frame("canvas", {"text": text})
    head, data, *rest = framed.split(b"\n")
    assert head == b"event: canvas"
    assert rest == [b"", b""]
    assert json.loads(data.removeprefix(b"data: "))["text"] == text
    assert len(framed.decode("ascii").splitlines()) == 3
