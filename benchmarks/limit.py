"The work that cannot be avoided: each distinct token once, the vocabulary only where it is read."

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlc_notebooks.data import LabelSet
from mlc_notebooks.engine import common_prefix
from mlc_notebooks.models import LM, AnswerTokens


@dataclass
class Needed:
    "What a part needs, counted from its prompts and answers and not from what an engine did."

    tokens: int  # distinct nodes: the common beginning once, then each different continuation
    reads: int  # of them, those whose prediction is read
    looks: int  # sum over the distinct nodes of the tokens that each attends to

    def multiply_adds(self, lm: LM) -> dict[str, float]:
        "By kind; attention is QK' and AV with every earlier token of the path."
        config, embedding = (
            lm.model.config.get_text_config(),
            lm.model.get_input_embeddings().weight,
        )
        unique = {
            id(p): p.numel()
            for name, p in lm.model.named_parameters()
            if "embed" not in name and p is not embedding
        }
        head = getattr(lm.model.get_output_embeddings(), "weight", embedding)
        unique.pop(id(head), None)
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ) * config.num_attention_heads
        return {
            "weights": sum(unique.values()) * self.tokens,
            "vocabulary": head.numel() * self.reads,
            "attention": 2 * width * config.num_hidden_layers * self.looks,
        }


def count_needed(paths: Iterable[Sequence[int]], reads: int) -> Needed:
    """Of token paths from the beginning on, whose ends (`reads` of them) are read; beginnings that
    paths share count once.
    """
    paths = [tuple(path) for path in paths]
    shared = common_prefix(paths) if len(set(paths)) > 1 else 0
    nodes = {
        path[:end] for path in {path[shared:] for path in paths} for end in range(1, len(path) + 1)
    }
    looks = shared * (shared + 1) // 2 + sum(shared + len(node) for node in nodes)
    return Needed(shared + len(nodes), reads, looks)


def step_paths(
    lm: LM,
    row: Sequence[int],
    output: str,
    steps: Sequence[tuple[int, str]],
    tokens: AnswerTokens,
    reading: str,
) -> list[tuple[int, ...]]:
    """What must be computed for a text's steps, as paths that are read: the prompt's end; the
    answer but its last token; in the exact reading every spelling at each step; behind each label a
    bare quote, which decides whether the list goes on.

    steps: (tokens of the answer before the label, label) each.
    """
    row, answer = tuple(row), tuple(lm.encode_text(output))
    paths = [row + answer[:end] for end in range(len(answer))]
    for number, (before, label) in enumerate(steps):
        forms = tokens.later if number else tokens.first
        context = row + answer[:before]
        for form in forms:
            length = len(form.ids) if reading == "exact" else form.lead
            paths += [context + form.ids[:end] for end in range(1, length + 1)]
        written = [
            form
            for form in forms
            if answer[before : before + len(form.ids)] == form.ids
            and _names(tokens.labels, form) == label
        ]
        if written and tokens.bare is not None:
            longest = max(written, key=lambda form: len(form.ids))
            paths.append(context + longest.ids + (tokens.bare,))
    return list(dict.fromkeys(paths))


def _names(labels: LabelSet, form) -> str:
    return labels.outcomes[form.outcome]
