"""Texts of greedy answers."""

from palu.evaluation.inference import continuations


def greedy_answers(model, tok, prompts, **options):
    """The text of each prompt's likeliest continuation."""
    return [one.text for one in continuations(model, tok, prompts, **options)]
