"""Tags and fences: planted faults are found, what a whole document holds is left alone."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infilld.engine.silence.brackets import Faults
from infilld.engine.silence.markup import Markup
from infilld.engine.silence.surroundings import Objection, Surroundings

XML = """<?xml version="1.0"?>
<!DOCTYPE list [<!ENTITY more "<b>"> <!-- ] > -->]>
<list kind='a "b"'>
  <item n="1">one</item>
  <!-- <item> -->
  <item n="2"/><![CDATA[ </list> ]]>
</list>
"""
HTML = """<!doctype html>
<html><head><title>a <b> c</title>
<script>if (a < b) { document.write("</p>") }</script>
<body>
<p>One<br>two <IMG src=x.png>
<ul><li>a<li>b</ul>
<div class="wide"><span>x</span></div>
"""
MARKDOWN = """# Title

Call `run` or ``a ` b``, not \\` alone.

```python
x = `1`
~~~
```

- list

  ~~~~ sh
  ```
  ~~~~

> ```
> quoted
> ```
"""
WHOLE = {"xml": XML, "html": HTML, "markdown": MARKDOWN}


def objection(before: str, fill: str, after: str, language: str) -> Objection | None:
    return Surroundings(before, after, language=language).objection(fill)


@pytest.mark.parametrize("language", WHOLE)
def test_a_whole_document_has_no_faults(language: str) -> None:
    assert Markup("", WHOLE[language], language).faults("") == Faults(0, 0, 0)


@pytest.mark.parametrize(
    ("before", "fill", "after", "language", "what"),
    [
        ("<a>\n  ", "<b>one", "\n</a>\n", "xml", "opens a tag"),
        ("<a>\n  ", "one</b>", "\n</a>\n", "xml", "closes a tag"),
        ("<a>\n  ", '<b n="1>one</b>', "\n</a>\n", "xml", "leaves"),
        ("<a>\n  ", "<!-- one", "\n</a>\n", "xml", "leaves"),
        ("<a>\n  ", "<b n='1'", "\n</a>\n", "xml", "leaves"),
        ("<a>\n  ", "<b><c></b></c>", "\n</a>\n", "xml", "tag"),
        ("<div>\n  ", "<section><p>one", "\n</div>\n", "html", "opens a tag"),
        ("<div>\n  ", "one</div>", "\n</div>\n", "html", "closes a tag"),
        ("Text.\n\n", "```python\nx = 1", "\n\nMore.\n", "markdown", "opens a code fence"),
        ("Text.\n\n", "~~~\nx = 1\n```", "\n\nMore.\n", "markdown", "opens a code fence"),
        ("Call ", "`run and go", " on.\n\nMore.\n", "markdown", "leaves"),
        ('{"a": ', '[1, {"b": 2}', "\n}\n", "json", "opens a bracket"),
        ('{"a": ', "1]", "\n}\n", "json", "closes a bracket"),
        ('{"a": ', '"one', "\n}\n", "json", "leaves"),
    ],
)
def test_what_nothing_closes_is_objected_to(
    before: str, fill: str, after: str, language: str, what: str
) -> None:
    found = objection(before, fill, after, language)
    assert found is not None
    assert found.reason == "unbalanced"
    assert what in found.why


@pytest.mark.parametrize(
    ("before", "fill", "after", "language"),
    [
        ("<a>\n  <b>one", "</b>", "\n</a>\n", "xml"),
        ("<a>\n  <b", ' n="&lt;1>"', ">one</b>\n</a>\n", "xml"),
        ("<a>\n  <!-- one", " <b> -->", "\n</a>\n", "xml"),
        ("<a>\n  ", "<b/>", "\n</a>\n", "xml"),
        ("<ul>\n", "<li>one\n<li>two<br>", "\n</ul>\n", "html"),
        ("<div>\n", "<P>one</p></DIV><div>", "\n</div>\n", "html"),
        ("```python\nx = 1\n", "```", "\n\nMore.\n", "markdown"),
        ("Call `run", "`", " now.\n", "markdown"),
        ("It's ", "5 \\` high", " here.\n", "markdown"),
        ("```\n", "one ` and <b>", "\n```\n", "markdown"),
    ],
)
def test_what_belongs_there_is_left_alone(
    before: str, fill: str, after: str, language: str
) -> None:
    assert objection(before, fill, after, language) is None


@pytest.mark.parametrize("language", WHOLE)
def test_a_gap_may_be_anywhere(language: str) -> None:
    text = WHOLE[language]
    for at in range(len(text)):
        assert Markup(text[:at], text[at + 1 :], language).faults(text[at]) == Faults(0, 0, 0)


@settings(deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_no_part_of_a_whole_document_is_blamed(language: str, data: st.DataObject) -> None:
    text = WHOLE[language]
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    found = Markup(text[:start], text[end:], language).faults(text[start:end])
    assert found == Faults(0, 0, 0)


PIECES = ["<a>", "</a>", "<b", " n='1'", '"', "'", ">", "/>", "<!--", "-->", "<![CDATA[", "]]>"]
PIECES += [
    "<",
    "<!DOCTYPE a [",
    "]",
    "<script>",
    "</script>",
    "x",
    "\n",
    "`",
    "```",
    "\n```\n",
    "~~~",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@settings(deadline=None)
@given(st.sampled_from(sorted(WHOLE)), TEXTS, TEXTS, TEXTS)
def test_it_makes_no_difference_where_the_gap_is(
    language: str, before: str, fill: str, after: str
) -> None:
    """What was read before the gap is not read again, and says the same."""
    found = Markup(before, after, language).faults(fill)
    assert found == Markup("", "", language).faults(before + fill + after)


@pytest.mark.parametrize(
    "piece", ["<", "<!--", '<a "', "<a>", "</a", "<a '\"", "<script>", "`", "` `` ", "- ", "1. "]
)
@pytest.mark.parametrize("language", WHOLE)
def test_no_text_takes_long(piece: str, language: str) -> None:
    text = ("<!DOCTYPE [" if piece == "<!--" else "") + piece * (50_000 // len(piece))
    began = time.process_time()
    assert Markup(text, "</b>" * 5_000 + "```", language).faults("x") is not None
    assert time.process_time() - began < 2


def test_a_large_or_unknown_text_is_not_judged() -> None:
    assert Markup("<a>" * 30_000, "", "xml").faults("</a>") is None
    assert Markup("<a>", "", "python").faults("</b>") is None
