"""Comparisons of a model that is computed elsewhere with the same model in this process."""

import numpy as np

from mlc_notebooks.alignment import METHODS, inclusion_bounds, zero_shot
from mlc_notebooks.engine import Node, PlainTree
from mlc_notebooks.probing import probe_steps

CLOSE = 1e-3  # of a probability


def written_alike(local_trace, trace):
    "The texts with the same answer; the others are flagged as near ties, and are few."
    ours, theirs = local_trace.items, trace.items
    same = ours["output"] == theirs["output"]
    for item in ours.index[~same]:
        flags = {*ours.loc[item, "flags"], *theirs.loc[item, "flags"]}
        assert "near_tie" in flags, f"{item}: {ours.loc[item]} and {theirs.loc[item]}"
    assert same.mean() > 0.9
    return ours.index[same]


def check_steps(local, lm, texts, **how):
    "Step distributions agree, and so do answers, but for near ties."
    traces = [probe_steps(model, texts, 0, progress=False, **how) for model in (local, lm)]
    alike = written_alike(*traces)
    frames = [trace.frame() for trace in traces]
    ours, theirs = [frame[frame["example"].isin(alike)] for frame in frames]
    assert len(ours) == len(theirs) >= len(alike) * len(texts.labels.outcomes)
    for column in ("example", "step", "label", "wrote"):
        assert ours[column].fillna("").tolist() == theirs[column].fillna("").tolist()
    for column in ("prob", "mass", "go", "stop", "p_go"):
        np.testing.assert_allclose(theirs[column], ours[column], atol=CLOSE, err_msg=column)


def check_method(local, lm, texts, name):
    "The marginals of a zero-shot method agree."
    ours, theirs = [
        zero_shot(model, texts, [name], 0, progress=False)[name] for model in (local, lm)
    ]
    assert (ours.index == theirs.index).all()
    apart = (ours - theirs).abs().max(axis=1)
    assert apart.max() < CLOSE, apart


METHODS_ON_MORE_TEXTS = ("unary_breakdown", "binary_breakdown")
FEW = 2  # texts, for the other methods, which ask the same kinds of questions, and many


def check_marginals(local, lm, texts):
    "Inclusion marginals agree, and so do their bounds, with six looks at the tree per text."
    ours, theirs = [
        inclusion_bounds(model, texts, 0, most_looks=6, progress=False) for model in (local, lm)
    ]
    for name in ("low", "estimate"):
        apart = (getattr(ours, name) - getattr(theirs, name)).abs().max(axis=1)
        assert apart.max() < CLOSE, apart


# They look at the same tree as `check_marginals`, many more times.
OVER_THE_TREE = (
    "marginals",
    "marginals_calibrated",
    "marginals_sampled",
    "depth_first",
    "marginals_stop_calibrated",
    "marginals_shrunken",
    "written_or_tree",
    "marginals_tempered",
    "marginals_order_averaged",
    "annotators_in_context",
)


def methods_on_few_texts():
    "The names of the other methods that ask the model themselves."
    asking = [name for name, method in METHODS.items() if method.needs == "model"]
    left_out = METHODS_ON_MORE_TEXTS + OVER_THE_TREE
    return [name for name in asking if name not in left_out]


def check_watching_many(local, lm):
    "More tokens than a request may name."
    row = local.encode_text('What a day! I am so happy.\n{"label": ["')
    watch = list(range(100, 400))
    tree = PlainTree(local)
    ours = tree.compute([Node(tree.root, row)], watch)
    theirs = lm.read_next([row], watch)
    assert theirs.logprobs.shape == (1, 300)
    np.testing.assert_allclose(theirs.logprobs, ours.logprobs, atol=CLOSE)
    assert theirs.best == ours.best
    assert theirs.margin <= ours.margin + CLOSE


def check_writing_on(local, lm, rows):
    "What is written greedily is what the local model writes, and is read like rows of their own."
    watch = local.encode_text(' the of\n"')
    found = lm.write_on(rows, watch, most=6, stop=())
    for row, written in zip(rows, found):
        places = [[*row, *written.ids[:at]] for at in range(len(written.ids))]
        tree = PlainTree(local)
        ours = tree.compute([Node(tree.root, place) for place in places], watch)
        sure = ours.margin > CLOSE
        assert (ours.best == written.ids)[sure].all()
        assert (written.next.best == written.ids).all()
        np.testing.assert_allclose(written.next.logprobs, ours.logprobs, atol=CLOSE)
        assert len(written.ids) == 6 or written.ids[-1] in local.end_ids


ODD_TEXTS = [
    "😀🇫🇷 ok",
    "a\n\nb\r\n",
    "2024 1,000",
    "e\u0301\u00e9 ﷽",
    "<|im_start|>user <|im_end|>",
]


def check_odd_texts(local, lm):
    "Emoji, newlines, digits, accents and special tokens in texts have the same ids and numbers."
    rows = [local.encode_text(text) for text in ODD_TEXTS]
    assert [lm.encode_text(text) for text in ODD_TEXTS] == rows
    tree = PlainTree(local)
    watch = local.encode_text(' the of\n"')
    ours = tree.compute([Node(tree.root, row) for row in rows], watch)
    theirs = lm.read_next(rows, watch)
    np.testing.assert_allclose(np.exp(theirs.logprobs), np.exp(ours.logprobs), atol=CLOSE)
    assert (theirs.best == ours.best).all()
