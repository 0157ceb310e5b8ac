"""Tags and code fences around a gap: which ones a fill leaves without a partner.

Elements of XML and HTML, fences and code spans of Markdown; nothing else of their grammars. A text
is read once from left to right, whatever stands in it.

Sources: XML 1.0, fifth edition, sections 2 and 3; the HTML standard, 13.1.2 (void elements,
optional tags); CommonMark 0.31.2, 4.5 (fenced code blocks) and 6.1 (code spans).
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass, field

from infilld.engine.silence.brackets import Faults

# More text around the gap is not read: 60,000 characters of XML take 8 ms.
_MOST_CHARS = 60_000

_VOID = re.compile(r"area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr")
# Their ends may be left out, or follow from what comes next: nothing can be said of them.
_OPTIONAL = re.compile(
    r"body|caption|colgroup|dd|dt|head|html|li|optgroup|option|p|rp|rt|tbody|td|tfoot|th|thead|tr"
)
_RAW_ENDS = {
    name: re.compile(rf"</{name}\b", re.IGNORECASE)
    for name in ("script", "style", "textarea", "title")
}

_MARKUP = re.compile(r"<(?:!--|!\[CDATA\[|\?|!(?=[A-Za-z])|/(?=[^\W\d]|:)|(?=[^\W\d]|:))")
_ENDS = {"<!--": "-->", "<![CDATA[": "]]>", "<?": "?>"}
_NAME = re.compile(r"[\w:.-]+")
# A value of XML holds no "<": where one comes, a quote or a tag before it was left open.
_IN_TAG = {
    "xml": re.compile(r"""(?P<value>"[^"<]*"|'[^'<]*')|(?P<quote>["'])|(?P<end>/?>)|(?P<open><)"""),
    "html": re.compile(r"""(?P<value>"[^"]*"|'[^']*')|(?P<quote>["'])|(?P<end>/?>)|(?P<open><)"""),
}
_IN_DECLARATION = re.compile(r"""<!--|"[^"]*"|'[^']*'|[\[\]>]""")

_FENCE = re.compile(r"[ \t>]*(?:(?:[-+*]|\d{1,9}[.)])[ \t]+)*(?P<mark>`{3,}|~{3,})(?P<info>[^\n]*)")
_TICKS = re.compile(r"\\`|`+")
_BLANK = re.compile(r"[ \t>]*")


class Markup:
    """The tags, or the code fences, around a gap.

    Args:
        prefix, suffix: of the document, with LF line ends. language: as `language_of` names it;
            of languages other than xml, html and markdown nothing is known.
    """

    def __init__(self, prefix: str, suffix: str, language: str | None) -> None:
        self._prefix, self._suffix, self._language = prefix, suffix, language
        is_known = language in ("xml", "html", "markdown")
        self._is_judged = is_known and max(len(prefix), len(suffix)) <= _MOST_CHARS

    def faults(self, fill: str) -> Faults | None:
        """What has no partner with a fill in the gap; None where that cannot be said.

        Tags and fences count as openers and closers; as quotes what never ends: quotes, comments,
        tags without `>`, code spans.
        """
        if not self._is_judged or len(fill) > _MOST_CHARS:
            return None
        if self._language == "markdown":
            return _fences(f"{self._prefix}{fill}{self._suffix}")
        before = self._before
        scan = before.copy()
        scan.over(f"{self._prefix[before.at :]}{fill}{self._suffix}")
        return scan.faults()

    @property
    def kind(self) -> str:
        """What an opener is called."""
        return "code fence" if self._language == "markdown" else "tag"

    @functools.cached_property
    def _before(self) -> "_Tags":
        """The scan as far as the fill cannot change it."""
        scan = _Tags(is_html=self._language == "html")
        scan.over(self._prefix)
        return scan


@dataclass
class _Tags:
    """A scan over the tags of a text.

    Attributes:
        is_html: else XML. stack: names of the elements that are open. at: where the next scan goes
            on: before what the text may have cut off.
        openers, closers, quotes: those without a partner, before that place.
        pending: what is left open behind it.
    """

    is_html: bool
    stack: list[str] = field(default_factory=list)
    at: int = 0
    openers: int = 0
    closers: int = 0
    quotes: int = 0
    pending: int = 0
    # Of a deep stack nobody wants to look through all for every tag.
    _open_names: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        """Count the names."""
        self._open_names = Counter(self.stack)

    def copy(self) -> "_Tags":
        """The same state, to go on from more than once; texts begin where it stands."""
        return _Tags(self.is_html, list(self.stack), 0, self.openers, self.closers, self.quotes, 0)

    def faults(self) -> Faults:
        """What has no partner if the text ends here."""
        return Faults(self.openers + len(self.stack), self.closers, self.quotes + self.pending)

    def over(self, text: str) -> None:
        """Read a text from its start to its end, or to what does not end in it."""
        at = 0
        while (found := _MARKUP.search(text, at)) is not None:
            self.at, mark = found.start(), found[0]
            if mark in _ENDS:
                end = text.find(_ENDS[mark], found.end())
                after = end + len(_ENDS[mark]) if end >= 0 else None
            elif mark == "<!":
                after = _declaration_end(text, found.end())
            else:
                after = self._tag(text, found.end(), is_end=mark == "</")
            if after is None:
                self.pending = 1
                return
            at = after
        # The next text may go on with what begins here.
        last = text.rfind("<", max(at, len(text) - len("<![CDATA[")))
        self.at = last if last >= 0 else len(text)

    def _tag(self, text: str, at: int, *, is_end: bool) -> int | None:
        """Where a tag ends; None: it does not."""
        name = _NAME.match(text, at)
        word = name[0] if name else ""
        word = word.lower() if self.is_html else word
        at, quotes = name.end() if name else at, 0
        pattern = _IN_TAG["html" if self.is_html else "xml"]
        while (found := pattern.search(text, at)) is not None:
            at = found.end()
            if found.lastgroup == "quote":
                quotes += 1
            elif found.lastgroup == "open":
                # The tag before it was never finished.
                self.quotes += quotes + 1
                return found.start()
            elif found.lastgroup == "end":
                self.quotes += quotes
                if is_end:
                    self._close(word)
                elif found[0] == ">":
                    return self._open(word, text, at)
                return at
        return None

    def _open(self, word: str, text: str, at: int) -> int | None:
        if self.is_html and _is_unpaired(word):
            return at
        if self.is_html and word in _RAW_ENDS:
            end = _RAW_ENDS[word].search(text, at)
            if end is None:
                return None
            at = end.start()
        self.stack.append(word)
        self._open_names[word] += 1
        return at

    def _close(self, word: str) -> None:
        if self.is_html and _is_unpaired(word):
            return
        if not self._open_names[word]:
            self.closers += 1
            return
        while (name := self.stack.pop()) != word:
            self._open_names[name] -= 1
            self.openers += 1
        self._open_names[word] -= 1


def _is_unpaired(word: str) -> bool:
    return bool(_VOID.fullmatch(word) or _OPTIONAL.fullmatch(word))


def _declaration_end(text: str, at: int) -> int | None:
    """Behind a document type and its own declarations in brackets; None: it does not end."""
    depth = 0
    while (found := _IN_DECLARATION.search(text, at)) is not None:
        at = found.end()
        if found[0] == "<!--":
            end = text.find("-->", at)
            if end < 0:
                return None
            at = end + len("-->")
        depth += {"[": 1, "]": -1}.get(found[0], 0)
        if found[0] == ">" and depth <= 0:
            return at
    return None


def _fences(text: str) -> Faults:
    """Fences and code spans of a Markdown text that nothing closes."""
    fence = ""
    quotes = 0
    runs: list[str] = []
    for line in text.split("\n"):
        found = _FENCE.match(line) if "```" in line or "~~~" in line else None
        if fence:
            is_end = found is not None and found["mark"].startswith(fence)
            fence = "" if is_end and found and not found["info"].strip() else fence
        elif found is not None and not (found["mark"][0] == "`" and "`" in found["info"]):
            fence = found["mark"]
            quotes, runs = quotes + _unpaired(runs), []
        elif _BLANK.fullmatch(line):
            # A code span ends with its paragraph at the latest.
            quotes, runs = quotes + _unpaired(runs), []
        elif "`" in line:
            runs += _TICKS.findall(line)
    return Faults(int(bool(fence)), 0, quotes + _unpaired(runs))


def _unpaired(runs: list[str]) -> int:
    """Runs of backticks of a paragraph that open a code span which nothing closes."""
    # The last place of each length: a run is closed by the next one that is as long.
    last = {run: place for place, run in enumerate(runs)}
    open_runs, opened = 0, ""
    for place, run in enumerate(runs):
        if opened:
            opened = "" if run.removeprefix("\\") == opened else opened
        elif run == "\\`":
            continue
        elif last[run] > place or (run == "`" and last.get("\\`", -1) > place):
            opened = run
        else:
            open_runs += 1
    return open_runs
