"The texts, demonstrations and questions of the benchmark: the same for every contender."

import itertools

from mlc_notebooks.alignment import inclusion_marginals
from mlc_notebooks.data import (
    AnnotatedTexts,
    binary_demonstrations,
    binary_prompts,
    draw_demonstrations,
    load_task,
    unary_demonstrations,
    unary_prompts,
)
from mlc_notebooks.engine import PackedTree, PlainTree, packs
from mlc_notebooks.models import LM, AnswerTokens
from mlc_notebooks.probing import ask_for_lists

DRAWS = {
    f"steps_{seed}": seed for seed in (1, 2, 3, 4)
}  # step probing with other demonstrations, by the seed that draws them


def benchmark_task(texts: int) -> AnnotatedTexts:
    "GoEmotions with its seven groups."
    return load_task("goemotions").sample(texts, seed=0)


def demonstrations(task: AnnotatedTexts, shots: int = 10) -> dict:
    """What the prompts of each kind show, and the pairs that are asked about: the same for up to
    1,024 texts, since the
    length of the common beginning decides how much of it vLLM keeps (README.md)."""
    hidden = [*benchmark_task(1024).texts, *task.texts]

    def shown(seed):
        return draw_demonstrations(task.pool, shots, seed, exclude=hidden)

    return {
        "demonstrations": shown(0),
        **{part: shown(seed) for part, seed in DRAWS.items()},
        "unary_shown": unary_demonstrations(task.pool, shots, 0, hidden),
        "binary_shown": binary_demonstrations(task.pool, shots, 0, hidden),
        "pairs": list(itertools.combinations(task.labels.outcomes, 2)),
    }


def prepared_prompts(
    lm: LM, task: AnnotatedTexts, shown: dict, marginal_texts: int
) -> dict[str, dict]:
    """For each part what a rival is given: `rows` of token ids (for all parts but steps a list of
    them a text) and the
    tokens to `watch`; for steps also the mark that closes a list and the `limit` of new tokens."""

    def questions(prompts):
        return [[lm.encode_prompt(prompt) for prompt in of_text] for of_text in prompts]

    def first(*answers):
        return [lm.encode_text(" " + answer)[0] for answer in answers]

    unary = [
        unary_prompts(text, task.labels, shown["unary_shown"], task.label_noun)[:-1]
        for text in task.texts
    ]
    binary = [
        binary_prompts(text, shown["pairs"], shown["binary_shown"], task.label_noun)
        for text in task.texts
    ]
    tokens = AnswerTokens(lm, task.labels)
    every = sorted({token for form in tokens.first + tokens.later for token in form.ids})
    return {
        "steps": steps_prompts(lm, task, shown["demonstrations"]),
        **{part: steps_prompts(lm, task, shown[part]) for part in DRAWS},
        "unary": {"rows": questions(unary), "watch": first("reasonable", "unreasonable")},
        "binary": {"rows": questions(binary), "watch": first("a", "b")},
        "marginals": {
            **marginal_reads(lm, task.select(range(marginal_texts)), shown, every),
            "watch": every,
        },
    }


def steps_prompts(lm: LM, task: AnnotatedTexts, shown) -> dict:
    "What a rival is given of step probing."
    asked = ask_for_lists(lm, task, demonstrations=shown)
    spelt = [form.ids[: form.lead + 1][-1] for form in asked.answer_tokens.first]
    return {
        "rows": list(asked.rows),
        "watch": spelt,
        "outcomes": [form.outcome for form in asked.answer_tokens.first],
        "names": [lm.decode([token]) for token in spelt],
        "opening": asked.answer_tokens.opening,
        "limit": asked.answer_tokens.longest_answer,
        "stop": "]",
    }


def marginal_reads(lm: LM, task: AnnotatedTexts, shown: dict, watch: list[int]) -> dict:
    """Every path that the search for the exact marginals reads, text by text, and what it read
    there: a rival is spared the search.
    """
    packs(lm)  # its check is no part of the search
    rows, found, originals = [], [], {tree: tree.compute for tree in (PackedTree, PlainTree)}

    def recording(compute):
        def record(self, nodes, watched=(0,), *args, **kwargs):
            reading = compute(self, nodes, watched, *args, **kwargs)
            if len(nodes) and nodes[0].parent is not None:
                again = {int(token): place for place, token in enumerate(watched)}
                rows[-1].extend(node.path() for node in nodes)
                found[-1].extend(reading.logprobs[:, [again[token] for token in watch]].tolist())
            return reading

        return record

    for tree, compute in originals.items():
        tree.compute = recording(compute)
    try:
        for i in range(len(task)):
            rows.append([])
            found.append([])
            inclusion_marginals(
                lm, task.select([i]), demonstrations=shown["demonstrations"], progress=False
            )
    finally:
        for tree, compute in originals.items():
            tree.compute = compute
    return {"rows": rows, "read": found}
