"""What the bodies of OpenAI's and Mistral's completions have in common."""

from infilld.engine.request import Grammar
from infilld.server.compat import fields, grammars
from infilld.server.compat.asking import Asked, gap_of
from infilld.server.wire import Text


class Completing(grammars.Constrained):
    """A request for text between a prompt and a suffix; keys of samplers are taken and ignored."""

    model: Text | None = None
    suffix: Text | None = None
    max_tokens: fields.Whole | None = None
    min_tokens: fields.Whole | None = None
    n: fields.Whole | None = None
    stop: fields.Stop | None = None
    stream: fields.Flag | None = None
    seed: fields.Whole | None = None
    temperature: fields.Number | None = None
    top_p: fields.Number | None = None
    presence_penalty: fields.Number | None = None

    def gap(self, prompt: str, seed: int | None, grammar: Grammar | None) -> Asked:
        """The gap behind a prompt.

        Raises:
            UnknownOption: see `fields.stops`.
        """
        gap = gap_of(prompt, self.suffix)
        return Asked(
            prefix=gap.prefix,
            suffix=gap.suffix,
            context=gap.context,
            path=gap.path,
            n=1 if self.n is None else self.n,
            max_tokens=fields.bound(self.max_tokens),
            min_tokens=fields.bound(self.min_tokens),
            stop=fields.stops(self.stop),
            seed=fields.seed_of(seed),
            grammar=grammar,
        )
