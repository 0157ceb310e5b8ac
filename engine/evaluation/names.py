"""Names of gaps and of contenders, for the command line: nothing heavy is imported here."""

KINDS = {
    "rest_of_line": "the rest of a line of code",
    "line": "a whole line behind its indent",
    "lines": "2 to 4 lines, behind the first one's indent",
    "span": "1 to 40 characters, which may start and end within words",
    "benchmark": "the gaps of a benchmark's files",
}
"""Kinds of gaps; all but `benchmark` are cut out of held-out files."""

CONTENDERS = {
    "canvas": "the engine as it is shipped",
    "all_shown": "the engine, holding nothing back",
    "no_found_drafts": "the engine without found drafts",
    "causal_draft": "the engine with a draft of the encoder's too",
    "suffix_in_prompt": "the engine with the suffix in the prompt alone, nothing pinned",
    "oracle_length": "the engine, told the true number of tokens",
    "causal_greedy": "the same weights used causally: prefix only, greedy",
    "retrieval": "the best found draft as it stands, no model",
    "n_gram": "the document's own n-grams, longest context first, no model",
}
"""What answers, in the order of the report."""
