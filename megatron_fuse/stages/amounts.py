"""How much text a recipe's examples hold. The stages' costs are counted in it; pipeline/estimates.py finds it out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Amounts:
    """Of a recipe's examples; the tokens of all of them together.

    prompt_tokens: what is read and not learned; response_tokens: what is learned of the ground truth; question_tokens: what a model
    reads before it answers; answer_tokens: of one model's own answers. These are taken to be as long as the ground truth if
    responses.max_new_tokens allows that.
    """

    examples: int
    held_out: int
    prompt_tokens: float
    response_tokens: float
    question_tokens: float
    answer_tokens: float

    def read(self, mode: str) -> float:
        """Tokens that a model reads of all conversations in a mode."""
        if mode == "inference":
            return self.question_tokens + self.answer_tokens
        return self.prompt_tokens + self.response_tokens

    def learned(self, mode: str) -> float:
        """Tokens of these that are supervised: those whose distributions are stored."""
        return self.answer_tokens if mode == "inference" else self.response_tokens
