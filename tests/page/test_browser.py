"""The page in a real browser, on a worker whose canvases are scripted."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page
from fake_worker import FakeWorker, Script
from live_server import LiveServer, live_server

from infilld.engine.errors import ContextTooLong
from infilld.engine.request import DraftSpan, InfillRequest, Span

pytestmark = pytest.mark.e2e

CONTROLS = {
    *("button", "combobox", "listbox", "option"),
    *("radio", "radiogroup", "spinbutton", "textbox"),
}
READY = "document.querySelector('#dot.ready') && health.textContent.includes('fake')"
FINISHED = "!document.querySelector('#answer').hidden"
HOSTILE = (
    "x = '</textarea></pre><script>window.hurt = 1</script>'\n"
    "y = \"&lt;img src=x onerror='window.hurt = 2'>\" # \N{RIGHT-TO-LEFT OVERRIDE}abc"
    " \N{HEBREW LETTER ALEF}\n"
    "z = '\N{LINE SEPARATOR}\N{GRINNING FACE}\N{FAMILY}' # " + "long " * 2000 + "\n"
    "\N{GRINNING FACE} = "
)
MARKUP = "<img src=x onerror='window.hurt = 3'>"


def open_link(page: Page, server: LiveServer) -> None:
    page.open(f"{server.url}/#token={server.token}")
    page.wait(READY)


def put(page: Page, text: str, start: int | None = None, end: int | None = None) -> None:
    """Give the editor a text and a selection, counted as the page's language does."""
    start = len(text.encode("utf-16-le")) // 2 if start is None else start
    page.run(
        f"setFile('own.py', {json.dumps(text)}); document.querySelector('#text').focus();"
        f"document.querySelector('#text').setSelectionRange({start}, {end or start}); showIntent()"
    )


def value(page: Page) -> str:
    found: str = page.run("document.querySelector('#text').value")
    return found


def states(page: Page) -> list[str]:
    found: list[str] = page.run(
        "[...document.querySelectorAll('#canvas .t')].map((chip) => chip.className.slice(2))"
    )
    return found


def ghosts(page: Page) -> list[str]:
    found: list[str] = page.run(
        "[...document.querySelectorAll('#preview .ghost')].map((each) => each.textContent)"
    )
    return found


def asked(server: LiveServer) -> InfillRequest:
    request = server.worker.jobs[-1].request
    assert isinstance(request, InfillRequest)
    return request


def told(server: LiveServer) -> list[tuple[str, int]]:
    return [(event, choice) for _, event, choice, _ in server.worker.told]


def test_the_link_s_token_leaves_the_address(page: Page, server: LiveServer) -> None:
    open_link(page, server)
    assert page.run("location.href") == f"{server.url}/"
    assert page.run("history.length") <= 2
    assert server.token not in page.run("document.documentElement.outerHTML")
    assert page.text("#health") == "fake on cpu: ready"
    page.reload()
    page.wait(READY)
    assert not page.run("document.querySelector('#token-ask').open")


def test_without_a_token_the_page_asks_and_asks_again(browser: Browser, server: LiveServer) -> None:
    # Its own tab: the browser itself notes every 401 in the console.
    with browser.page() as page:
        page.open(f"{server.url}/")
        page.wait("document.querySelector('#token-ask').open")
        assert "infilld status" in page.text("#token-ask")
        assert not page.is_shown("#token-why")
        page.type("wrong")
        page.press("Enter")
        page.wait("!document.querySelector('#token-why').hidden")
        assert "not, or no longer" in page.text("#token-why")
        assert page.run("sessionStorage.length") == 0
        page.type("böse")
        page.press("Enter")
        assert "neither" in page.text("#token-why")
        page.run("document.querySelector('#token').value = ''")
        page.type(f" {server.url}/#token={server.token}\n")
        page.click("#token-use")
        page.wait(READY)
        assert not page.run("document.querySelector('#token-ask').open")
        assert all("401" in each for each in page.complaints)


def test_a_token_that_was_changed_is_asked_for_and_the_link_pasted_over(
    browser: Browser, server: LiveServer
) -> None:
    with browser.page() as page:
        open_link(page, server)
        page.run("token = 'old'; start()")
        page.wait("document.querySelector('#token-ask').open")
        page.run(f"location.hash = 'token={server.token}'")
        page.wait("!document.querySelector('#token-ask').open")
        assert page.run("location.href") == f"{server.url}/"
        page.run("start()")
        page.wait(FINISHED)
        assert page.text("#verdict") == "Answer"


def test_a_daemon_without_tokens_is_not_asked_for_one(page: Page, tmp_path: Path) -> None:
    with live_server(tmp_path / "open", auth=False) as server:
        page.open(server.url)
        page.wait(READY)
        page.run("start()")
        page.wait(FINISHED)
        page.run("document.querySelector('#as-curl').open = true")
        page.wait("document.querySelector('#curl').textContent")
        assert "Authorization" not in page.text("#curl")
        page.leave()


def test_a_gap_is_filled_before_one_s_eyes(page: Page, server: LiveServer) -> None:
    drafts = ("rxturn q z", "return q z", "return a z")
    server.worker.script = Script(texts=["return a + b"], drafts=drafts, pass_s=0.01)
    open_link(page, server)
    page.run("pace.value = '300'")
    put(page, "def f(a, b):\n    \n", 17)
    assert page.text("#run-label") == "Fill the gap at 2:5"
    page.press("Enter", ctrl=True)
    page.wait("document.querySelectorAll('#strip button').length")
    page.click("#pause")
    page.click("#strip button:nth-child(1)")
    assert page.text("#pause") == "Go on"
    assert page.text("#progress").startswith("pass 1")
    assert states(page) == ["noise", "accepted", "accepted", "accepted filler", "given"]
    assert ghosts(page) == ["rxturn q z"]
    assert not page.is_shown("#answer")
    page.click("#pause")
    page.wait(FINISHED)
    assert ghosts(page) == ["return a + b"]
    labels = page.run("[...document.querySelectorAll('#strip button')].map((e) => e.ariaLabel)")
    assert labels[1] == "Pass 2: mean entropy 1.20 nats, 1 of 4 settled"
    assert labels[-1] == "The answer"
    assert page.text("#sure").split("\n")[0].startswith("90 % sure")
    # Back in time, with the keyboard.
    page.click("#strip button:nth-child(3)")
    assert states(page)[:2] == ["settled", "settled"]
    page.press("ArrowLeft")
    assert page.text("#progress").startswith("pass 2 of 3")
    assert ghosts(page) == ["return q z"]
    assert asked(server).shows_tokens


def test_insert_is_one_edit_and_is_told(page: Page, server: LiveServer) -> None:
    server.worker.script = Script(texts=["return 1", "return 2"])
    open_link(page, server)
    page.run("document.querySelector('#n').value = '2'")
    text = "\N{GRINNING FACE} = <|gap|>\nz = <|gap|>\n"
    put(page, text)
    assert page.text("#run-label") == "Fill 2 gaps"
    page.press("Enter", ctrl=True)
    page.wait(FINISHED)
    request = asked(server)
    assert (request.text, request.alternatives) == ("\N{GRINNING FACE} = \nz = \n", 2)
    assert request.spans == (Span(4, 4), Span(9, 9))
    page.click("#choices button:nth-child(2)")
    assert ghosts(page) == ["return 2", "return 2"]
    page.run("document.querySelector('#preview').focus()")
    page.press("Enter")
    assert value(page) == "\N{GRINNING FACE} = return 2\nz = return 2\n"
    assert not page.is_shown("#preview")
    page.wait_for(lambda: len(server.worker.told) == 3)
    assert told(server) == [("shown", 0), ("shown", 1), ("inserted", 1)]
    page.run("document.execCommand('undo')")
    assert value(page) == text


def test_a_selection_is_written_anew_as_it_is_asked(page: Page, server: LiveServer) -> None:
    open_link(page, server)
    put(page, "a = 1\nb = 2\n", 0, 5)
    assert page.text("#run-label") == "Write 1 line anew"
    options = {
        "instruction": "use 9",
        "boldness": "0.25",
        "deadline": "5000",
        "most": "12",
        "seed": str(2**63 - 1),
    }
    for name, text in options.items():
        page.run(f"document.querySelector('#{name}').value = {json.dumps(text)}")
    page.run("start()")
    page.wait(FINISHED)
    request = asked(server)
    assert (request.spans, request.path) == ((Span(0, 5),), "own.py")
    assert (request.instruction, request.boldness) == ("use 9", 0.25)
    assert (request.deadline_ms, request.max_tokens) == (5000, 12)
    # More than a double holds, there and back.
    assert request.seed == 2**63 - 1
    assert f"{2**63 - 1} use again" in page.text("#facts")
    page.press("Escape")
    assert value(page) == "a = 1\nb = 2\n"
    page.wait_for(lambda: told(server) == [("shown", 0), ("dismissed", 0)])


def test_what_stays_as_it_is_is_no_answer(page: Page, server: LiveServer) -> None:
    server.worker.script = Script(texts=[["1", ""]], drafts=[["2", ""]])
    open_link(page, server)
    put(page, "x = <|gap|>\ny = <|gap|>\n")
    page.run("start()")
    page.wait(FINISHED)
    page.run("run.reply.choices[0].spans[1].confidence = 0; showChoice(run, 0)")
    assert page.text("#sure") == "90 % sure"
    assert page.text("#fills").split("\n")[-1] == "stays as it is"
    page.run("run.reply.choices[0].spans[0].confidence = 0; showChoice(run, 0)")
    assert page.text("#sure") == "how sure is not told"


class Twice(FakeWorker):
    """An engine whose canvases side by side tell of every pass one after another."""

    def submit(self, request: Any, on_canvas: Any = None) -> Any:
        def told(update: Any) -> None:
            on_canvas(replace(update, spans=(DraftSpan("half", 0),)))
            on_canvas(update)
            # The job waits before its next canvas.
            self.hold()

        return super().submit(request, told)


def test_a_pass_that_is_told_twice_is_one(page: Page, tmp_path: Path) -> None:
    with live_server(tmp_path / "twice", Twice()) as server:
        open_link(page, server)
        put(page, "x = ")
        page.press("Enter", ctrl=True)
        for draft in ("rxturn q", "return q"):
            page.wait(f"document.querySelector('.ghost')?.textContent === '{draft}'")
            server.worker.release()
        page.wait(FINISHED)
        shown = page.run("[...document.querySelectorAll('#strip button')].map((e) => e.innerText)")
        assert [each.split()[-1] for each in shown] == ["1", "2", "end"]
        page.click("#strip button:nth-child(1)")
        assert ghosts(page) == ["rxturn q"]
        page.leave()


def test_who_types_goes_on_with_the_file(page: Page, server: LiveServer) -> None:
    open_link(page, server)
    put(page, "x = ")
    page.press("Enter", ctrl=True)
    page.wait(FINISHED)
    page.press("y")
    assert value(page) == "x = y"
    page.wait_for(lambda: told(server) == [("shown", 0), ("dismissed", 0)])


def test_escape_cancels_within_a_pass(page: Page, server: LiveServer) -> None:
    server.worker.hold()
    open_link(page, server)
    put(page, "x = ")
    page.press("Enter", ctrl=True)
    server.worker.wait_for(lambda: len(server.worker.jobs) == 1)
    assert page.text("#progress") == "reading the file"
    page.press("Escape")
    assert page.text("#progress") == "cancelled"
    server.worker.wait_for(lambda: server.worker.stats()["cancelled"] == 1)
    assert value(page) == "x = "
    # The next one is not disturbed by it.
    server.worker.release()
    page.press("Enter", ctrl=True)
    page.wait(FINISHED)
    assert ghosts(page) == ["return 1"]


def test_silence_has_its_reason(page: Page, server: LiveServer) -> None:
    server.worker.script = Script(reason="low_confidence", why="Nothing was likely enough.")
    open_link(page, server)
    put(page, "x = ")
    page.run("start()")
    page.wait(FINISHED)
    assert page.text("#verdict") == "No suggestion: low_confidence"
    assert page.text("#why") == "Nothing was likely enough."
    assert not page.is_shown("#insert")
    assert page.text("#status").startswith("No suggestion: low_confidence")
    page.press("Escape")
    assert server.worker.told == []


def test_errors_have_their_remedy(browser: Browser, server: LiveServer) -> None:
    with browser.page() as page:
        open_link(page, server)
        server.worker.script = Script(error=ContextTooLong("too long", remedy="Send less."))
        page.run("start()")
        page.wait(FINISHED)
        assert page.text("#verdict") == "Error: context_too_long"
        assert page.text("#why") == "too long Send less."
        page.run("document.querySelector('#boldness').value = '7'; start()")
        page.wait(f"{FINISHED} && verdict.textContent !== 'Error: context_too_long'")
        assert "boldness" in page.text("#why")
        assert value(page).count("<|gap|>") == 2


def test_loading_is_waited_for(browser: Browser, tmp_path: Path) -> None:
    # Its own tab: the browser itself notes every 503 in the console.
    worker = FakeWorker(is_loading=True)
    with live_server(tmp_path / "slow", worker) as server, browser.page() as page:
        page.open(f"{server.url}/#token={server.token}")
        page.wait("document.querySelector('#dot.loading')")
        page.run("void start()")
        page.wait("progress.textContent === 'waits for the model'")
        worker.finish_loading()
        page.wait(FINISHED)
        assert page.text("#verdict") == "Answer"
        page.wait(READY)


def test_a_daemon_that_goes_away_is_told_of(browser: Browser, tmp_path: Path) -> None:
    with browser.page() as page:
        with live_server(tmp_path / "gone") as server:
            open_link(page, server)
            put(page, "x = ")
        page.run("start()")
        page.wait(FINISHED)
        assert "lost" in page.text("#why")
        page.wait("document.querySelector('#dot.away')")
        assert value(page) == "x = "


def test_text_is_never_markup(page: Page, server: LiveServer) -> None:
    server.worker.script = Script(texts=[MARKUP + "\N{RIGHT-TO-LEFT OVERRIDE}"], drafts=[MARKUP])
    open_link(page, server)
    put(page, HOSTILE)
    page.press("Enter", ctrl=True)
    page.wait(FINISHED)
    request = asked(server)
    assert request.text == HOSTILE
    assert request.spans == (Span(len(HOSTILE), len(HOSTILE)),)
    assert ghosts(page) == [MARKUP + "\N{RIGHT-TO-LEFT OVERRIDE}"]
    # What turns text around is spelled out on the canvas and cannot turn its neighbours.
    page.run(
        "showToken(run, document.querySelector('#canvas .t'), "
        "{text: '\\u202e<b>\\n', state: 'noise', entropy: 1}, 0)"
    )
    assert page.text("#canvas .t") == "⟨202E⟩<b>↵"
    page.run("document.querySelector('#preview').focus()")
    page.press("Enter")
    assert value(page) == HOSTILE + MARKUP + "\N{RIGHT-TO-LEFT OVERRIDE}"
    assert page.run("window.hurt") is None
    assert page.run("document.querySelectorAll('img, script').length") == 1


def test_the_curl_command_is_the_request_without_the_token(page: Page, server: LiveServer) -> None:
    open_link(page, server)
    text = "a = 'JSON'\nJSON\n$(rm) `x` \N{GRINNING FACE} <|gap|>\n"
    put(page, text)
    page.click("#as-curl summary")
    page.wait("document.querySelector('#curl').textContent")
    shown = page.run("document.querySelector('#curl').textContent")
    assert server.token not in page.run("document.documentElement.outerHTML")
    assert "$(cat TOKEN_FILE)" in shown
    body = re.fullmatch(r".*<<'JSON'\n(.*)\nJSON\n", shown, re.DOTALL)
    assert body is not None
    assert json.loads(body[1])["text"] == text.replace("<|gap|>", "")
    command = shown.replace("TOKEN_FILE", str(server.settings.token_file))
    if subprocess.run(["which", "curl"], capture_output=True).returncode == 0:
        done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
        assert done.stdout.split(b"\n\n")[-2].startswith(b"event: done")


def test_a_file_is_read_in_the_browser_alone(page: Page, server: LiveServer) -> None:
    open_link(page, server)
    before = len(page.requests)
    drop = """(name, parts) => {
      const carried = new DataTransfer();
      carried.items.add(new File(parts, name));
      const told = {dataTransfer: carried, bubbles: true, cancelable: true};
      document.querySelector('#text').dispatchEvent(new DragEvent('drop', told));
    }"""
    page.run(f"({drop})('lib.rs', ['fn main() {{\\r\\n}}\\n'])")
    page.wait("path.value === 'lib.rs'")
    assert (value(page), page.text("#language")) == ("fn main() {\n}\n", "Rust")
    page.run(f"({drop})('a.bin', ['\\0'])")
    page.wait(FINISHED)
    assert "binary" in page.text("#why")
    assert value(page) == "fn main() {\n}\n"
    assert not [url for url in page.requests[before:] if not url.endswith(("/health", "/models"))]


def test_tokens_can_be_read_with_the_keyboard(page: Page, server: LiveServer) -> None:
    open_link(page, server)
    put(page, "x = ")
    page.run("start()")
    page.wait(FINISHED)
    page.run("document.querySelector('#canvas .t').focus()")
    assert page.text("#readout") == 'position 1 · "return " · settled · entropy 0.05 nats'
    page.press("ArrowRight")
    assert page.text("#readout").startswith('position 2 · "q" · noise')
    label = page.run("document.activeElement.ariaLabel")
    assert label == '"q", noise, entropy 3.50 nats'


def test_every_control_has_a_name(page: Page, server: LiveServer) -> None:
    open_link(page, server)
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.run("document.querySelector('#n').value = '2'; start()")
    page.wait(FINISHED)
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in nodes if node.get("role", {}).get("value") in CONTROLS]
    assert {node["role"]["value"] for node in controls} == CONTROLS
    assert [node for node in controls if not node["name"]["value"]] == []


@pytest.mark.parametrize("width", [360, 700, 1280])
def test_nothing_sticks_out(page: Page, server: LiveServer, width: int) -> None:
    page.resize(width, 800)
    server.worker.script = Script(texts=["word " * 80], drafts=["word " * 80, "w" * 300])
    open_link(page, server)
    put(page, "x = " + "y" * 500)
    page.run("start()")
    page.wait(FINISHED)
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.run("document.documentElement.scrollWidth") == width
    outside = page.run(
        "[...document.querySelectorAll('button, input, select, .card, summary')].filter((e) => {"
        "const box = e.getBoundingClientRect();"
        "return box.width && !e.closest('#strip') && (box.left < 0 || box.right > innerWidth); })"
        ".map((e) => e.outerHTML)"
    )
    assert outside == []


CONTRAST = """(() => {
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = (color) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = color;
    paint.fillRect(0, 0, 1, 1);
    const part = [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3).map((each) =>
      each / 255 <= 0.03928 ? each / 255 / 12.92 : ((each / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (color !== 'rgba(0, 0, 0, 0)' && !/\\/ 0?\\.|, 0?\\.\\d+\\)/.test(color)) return color;
    }
    return 'white';
  };
  const found = {};
  for (const name of SELECTORS) {
    const node = document.querySelector(name);
    const both = [light(getComputedStyle(node).color), light(ground(node))].sort((a, b) => b - a);
    found[name] = (both[0] + 0.05) / (both[1] + 0.05);
  }
  return found;
})()"""
READ = [
    "#legend .given b",
    "#legend .settled b",
    "#legend .accepted b",
    "#legend .noise b",
    "#legend",
    "#progress",
    "#language",
    "#insert",
    "#verdict",
    "#backdrop .k",
    "#backdrop .s",
    "#backdrop .n",
    "#backdrop .c",
    "#facts dt",
    "summary",
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(page: Page, server: LiveServer, scheme: str) -> None:
    page.prefer(color_scheme=scheme, reduced_motion="reduce")
    open_link(page, server)
    put(page, "return 'a' + 1  # it is\n")
    page.run("start()")
    page.wait(FINISHED)
    ratios: dict[str, Any] = page.run(CONTRAST.replace("SELECTORS", json.dumps(READ)))
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_big_files_are_sent_whole_and_shown_without_colours(page: Page, server: LiveServer) -> None:
    open_link(page, server)
    lines = "value = 1\n" * 7_000
    put(page, lines, 0)
    assert page.run("document.querySelectorAll('#backdrop .n, #text.painted').length") == 0
    page.run("start()")
    page.wait(FINISHED)
    assert asked(server).text == lines
    assert page.run("document.querySelector('#numbers').textContent").endswith("\n7001")
    put(page, "value = 1\n")
    assert page.run("document.querySelectorAll('#backdrop .n, #text.painted').length") == 2


class WithoutTokens(FakeWorker):
    """An engine that tells no tokens, as one elsewhere does."""

    def submit(self, request: Any, on_canvas: Any = None) -> Any:
        return super().submit(request, lambda update: on_canvas(replace(update, tokens=())))


def test_without_tokens_words_are_shown(page: Page, tmp_path: Path) -> None:
    worker = WithoutTokens(Script(texts=["return a"], drafts=["return q"]))
    with live_server(tmp_path / "worded", worker) as server:
        open_link(page, server)
        put(page, "x = ")
        page.run("start()")
        page.wait(FINISHED)
        assert states(page) == ["settled", "noise"]
        assert "words" in page.text("#sums")
        assert ghosts(page) == ["return a"]
        page.leave()
