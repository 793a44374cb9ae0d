"""The amounts of text in a recipe's examples.

Stages compute their costs from them; pipeline/estimates.py estimates them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Amounts:
    """Numbers of examples, and numbers of tokens in all examples of a recipe together.

    prompt_tokens: context, which is read and not learned. response_tokens: supervised tokens of the ground
    truth.
    question_tokens: tokens that a model reads before it answers. answer_tokens: tokens of one model's own
    answers. Answers are assumed to be as long as the ground truth, but at most responses.max_new_tokens.
    """

    examples: int
    validation_examples: int
    prompt_tokens: float
    response_tokens: float
    question_tokens: float
    answer_tokens: float

    def read(self, mode: str) -> float:
        """Tokens that a model reads in all conversations of a mode."""
        if mode == "inference":
            return self.question_tokens + self.answer_tokens
        return self.prompt_tokens + self.response_tokens

    def learned(self, mode: str) -> float:
        """The supervised ones among these tokens. Their distributions are stored."""
        return self.answer_tokens if mode == "inference" else self.response_tokens
