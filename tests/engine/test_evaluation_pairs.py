"""Two gaps in one request, and files beside the one that is filled."""

from tiny_infill import tiny_infiller

from infilld.engine.evaluation.contenders import make_contender
from infilld.engine.evaluation.items import cut_items
from infilld.engine.evaluation.pairs import pairs, run_pairs
from infilld.engine.request import InfillRequest, InfillResult
from infilld.engine.training.corpus import SourceFile

FILES = [
    SourceFile(package, f"{package}/{name}.py", f"def {name}(a, b):\n    return a + b\n\n\n" * 9)
    for package in ("one", "two")
    for name in ("first", "second", "third")
]


def test_pairs_are_two_line_ends_of_one_document() -> None:
    made = pairs(FILES, 8, seed=1)
    assert made == pairs(FILES, 8, seed=1)
    assert made != pairs(FILES, 8, seed=2)
    texts = {file.text for file in FILES}
    for pair in made:
        assert pair.before + pair.first + pair.between + pair.second + pair.after in texts
        assert pair.first.strip()
        assert pair.second.strip()
        assert "\n" in pair.between
        assert "\n" not in pair.first + pair.second


def test_both_gaps_of_a_pair_are_counted(monkeypatch) -> None:
    engine = tiny_infiller()
    made = pairs(FILES, 4, seed=1)
    figures = run_pairs(engine, made, 0, ["canvas", "each_alone", "oracle_length", "retrieval"])
    # What is no engine, or is told what nobody knows, takes no part.
    assert set(figures) == {"canvas", "each_alone"}
    for found in figures.values():
        assert found["items"] == 4
        assert found["both_exact"] <= found["exact_match"]
        # The files repeat themselves: what is found is right, whatever the weights are.
        assert found["exact_match"] > 0
    # Two prompts are read instead of one.
    alone, shared = figures["each_alone"], figures["canvas"]
    assert alone["mean_prompt_tokens"] > 1.5 * shared["mean_prompt_tokens"]


def test_items_with_context_bring_files_of_their_package(monkeypatch) -> None:
    items = cut_items(FILES, "context", 6, 3)
    for item in items:
        assert [each.path for each in item.context]
        assert item.source not in [each.path for each in item.context]
        assert {each.path.split("/")[0] for each in item.context} == {item.source.split("/")[0]}
    seen: list[InfillRequest] = []
    engine = tiny_infiller()
    contender = make_contender("canvas", engine, 0)
    plain = contender.engine.infill  # type: ignore[attr-defined]

    def spy(request: InfillRequest) -> InfillResult:
        seen.append(request)
        return plain(request)

    monkeypatch.setattr(contender.engine, "infill", spy)  # type: ignore[attr-defined]
    contender.answer(items[0])
    assert seen[0].context == items[0].context
