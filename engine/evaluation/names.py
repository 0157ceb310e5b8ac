"""Names of gaps and of contenders, for the command line: nothing heavy is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = {
    "rest_of_line": "the rest of a line of code",
    "line": "a whole line behind its indent",
    "lines": "2 to 4 lines, behind the first one's indent",
    "span": "1 to 40 characters, which may start and end within words",
    "silent": "places where nothing is missing, and nothing ought to be shown",
    "context": "the rest of a line of code, with other files of its package",
    "pairs": "the ends of two lines near each other, in one request",
    "typing": "lines typed key by key, asked at every pause; one document stays warm",
    "benchmark": "the gaps of a benchmark's files",
    "repository": "statements of a repository whose own tests fail without them",
}
"""Kinds of gaps; all but `benchmark` and `repository` are cut out of held-out files."""

CUT_KINDS = ("rest_of_line", "line", "lines", "span", "silent", "context")
"""Kinds whose items are cut out of held-out files, one by one."""


@dataclass(frozen=True)
class Switch:
    """The engine with something changed.

    Attributes:
        about: in the words of the report. changes: fields of `FillMethod` that are not as shipped.
        knows_length: it is told the true number of tokens.
    """

    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    knows_length: bool = False


# One line for each mechanism: what it is called, what the engine then does without it or with it.
SWITCHES = {
    "canvas": Switch("the engine as it is shipped"),
    "all_shown": Switch("the engine, holding nothing back", {"holds_back": False}),
    "no_found_drafts": Switch("the engine without found drafts", {"found_drafts": 0}),
    "causal_draft": Switch("the engine with a draft of the encoder's too", {"causal_draft": True}),
    "suffix_in_prompt": Switch(
        "the engine with the suffix in the prompt alone, nothing pinned", {"pins_suffix": False}
    ),
    "no_healing": Switch("the engine, leaving an unfinished word as it is", {"heals": False}),
    "nothing_told": Switch(
        "the engine, its first pass not told what is given or drafted", {"tells_given": False}
    ),
    "drafts_renoised": Switch(
        "the engine, re-noising drafts like anything else", {"holds_drafts": False}
    ),
    "no_plateau": Switch("the engine, done with a canvas only when sure", {"plateau": False}),
    "samples": Switch("the engine, sampling what it accepts", {"samples": True}),
    "exact_lengths": Switch(
        "the engine, trying exact lengths, as without filler tokens", {"searches_length": True}
    ),
    "starts_anew": Switch("the engine, using nothing again after typing", {"follows": False}),
    "each_alone": Switch("the engine, each span on a canvas of its own", {"several": False}),
    "no_context": Switch("the engine, reading nothing from other files", {"reads_context": False}),
    "no_trims": Switch("the engine, cutting off no repeated suffix", {"trims": False}),
    "no_checks": Switch("the engine, showing what repeats or breaks", {"checks": False}),
    "oracle_length": Switch("the engine, told the true number of tokens", knows_length=True),
}
"""The engine as shipped, and with one mechanism switched."""

CONTENDERS = {name: switch.about for name, switch in SWITCHES.items()} | {
    "causal_greedy": "the same weights used causally: prefix only, greedy",
    "retrieval": "the best found draft as it stands, no model",
    "n_gram": "the document's own n-grams, longest context first, no model",
}
"""What answers, in the order of the report."""
