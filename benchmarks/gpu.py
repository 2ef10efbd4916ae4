"""The local engine on a GPU, beside transformers' padded batches and vLLM.

    python benchmarks/gpu.py --shape llama-8b --dtype bfloat16 --texts 256

It needs no model: weights are random, in a shape that people use, and a tokenizer is read from a
folder or a short name. So it says how fast the same work is done, and whether two ways of doing it
agree, and nothing about labels. Answers are guided (random weights write no list by themselves).
Every part prints its rows as soon as it is done, so a run that is cut off has told what it knows.
"""

import argparse
import gc
import json
import platform
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from benchmark_task import benchmark_task
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mlc_notebooks.engine import BACKENDS, Backend, Node, PackedTree, PlainTree, backend_of
from mlc_notebooks.models import LM, model_folder
from mlc_notebooks.probing import probe_steps

SHAPES = {
    "small": dict(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    ),
    "llama-8b": dict(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}
SHOTS = 10


def random_model(shape: str, dtype: str, device: str, tokenizer) -> LM:
    "A Llama of this shape with random weights."
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 8192} | SHAPES[shape]
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    torch.set_default_dtype(torch.float32)
    return LM(f"{shape}, random weights", model, tokenizer)


def wait(lm: LM):
    "Until the device has done all that it was given."
    if lm.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(lm: LM, work) -> tuple[float, object]:
    "How long some work takes, and what it returns."
    wait(lm)
    started = time.perf_counter()
    found = work()
    wait(lm)
    return time.perf_counter() - started, found


class Counter:
    "Counts passes, tokens and seconds of a model, as it is called."

    def __init__(self, lm: LM):
        self.passes = self.tokens = 0
        self.hook = lm.model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module, given):
        self.passes += 1
        self.tokens += given[0].numel()


@cache
def texts_of(texts: int):
    "The texts, loaded once."
    return benchmark_task(texts)


def probe(lm: LM, texts: int):
    "A guided run over so many texts, read exactly."
    task = texts_of(texts)
    return probe_steps(lm, task, shots=SHOTS, decoding="guided", progress=False)


def tell(out: Path, **row):
    "Print a row of the table, and keep it."
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = float(f"{value:.4g}")
    print(json.dumps(row), flush=True)
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def agreement(lm: LM, out: Path):
    "How far packed passes are from plain ones: log-probabilities of 64 nodes behind one prefix."
    rng = np.random.default_rng(0)
    high = min(lm.vocabulary_size, 40_000)
    runs = [rng.integers(0, high, n).tolist() for n in (200, *rng.integers(1, 40, 32))]

    def read(tree):
        texts = [Node(tree.root, run) for run in runs[1:]]
        tries = [Node(text, [int(rng.integers(high))]) for text in texts]
        return tree.compute([*texts, *tries], np.arange(512)).logprobs

    rng = np.random.default_rng(1)
    plain = read(PlainTree(lm, runs[0]))
    for name, shared_prefix in (("shared prefix", True), ("masks", False)):
        rng = np.random.default_rng(1)
        tree = PackedTree(lm, runs[0], shared_prefix=shared_prefix)
        apart = np.abs(read(tree) - plain)
        tell(
            out,
            part="agreement",
            way=name,
            used=tree.shared_prefix == shared_prefix,
            dtype=lm.dtype,
            mean_apart=float(apart.mean()),
            largest=float(apart.max()),
        )


def own_engine(lm: LM, texts: int, out: Path, way: str, **settings):
    "Texts a second of the engine, with what it computed."
    counter = Counter(lm)
    seconds, trace = seconds_of(lm, lambda: probe(lm, texts))
    counter.hook.remove()
    weights = sum(weight.numel() for weight in lm.model.parameters())
    peak = torch.cuda.max_memory_allocated() / 2**30 if lm.device.type == "cuda" else float("nan")
    tell(
        out,
        part="engine",
        way=way,
        texts=texts,
        seconds=seconds,
        texts_a_second=texts / seconds,
        steps=len(trace.steps),
        passes=counter.passes,
        tokens_a_text=counter.tokens / texts,
        tokens_a_second=counter.tokens / seconds,
        teraflops=2e-12 * weights * counter.tokens / seconds,
        peak_gib=peak,
        **settings,
    )
    return trace


def recorded_rows(lm: LM, texts: int) -> tuple[list[list[int]], list[int]]:
    "All rows of tokens that a run asks for, and the watched tokens: what a rival is given."
    rows = []
    watched = []
    compute = PackedTree.compute

    def record(tree, nodes, watch=(0,), *args, **kwargs):
        if nodes and nodes[0].parent is not None:
            rows.extend(node.path() for node in nodes)
            watched[:] = [int(token) for token in watch]
        return compute(tree, nodes, watch, *args, **kwargs)

    PackedTree.compute = record
    try:
        probe(lm, texts)
    finally:
        PackedTree.compute = compute
    return rows, watched


@torch.inference_mode()
def padded_batches(lm: LM, rows, watch, size: int = 32):
    "The usual way: whole prompts in batches, padded on the left, each with its own keys."
    watch = torch.tensor(watch, device=lm.device)
    found = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        longest = max(map(len, some))
        ids = torch.zeros((len(some), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(some):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        given = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
        given = {name: value.to(lm.device) for name, value in given.items()}
        logits = lm.model(**given, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        found.append((logits[:, watch] - logits.logsumexp(-1, keepdim=True)).cpu())
    return torch.cat(found).numpy()


def rivals(lm: LM, texts: int, out: Path, tokenizer: str, with_vllm: bool):
    "The same rows for transformers' batches, and for vLLM where it is installed."
    rows, watch = recorded_rows(lm, texts)
    rows_a_text = len(rows) / texts
    padded_batches(lm, rows[:32], watch)  # warm
    seconds, _ = seconds_of(lm, lambda: padded_batches(lm, rows, watch))
    tell(
        out,
        part="rival",
        way="transformers, padded batches of 32",
        texts=texts,
        rows_a_text=rows_a_text,
        seconds=seconds,
        texts_a_second=texts / seconds,
    )
    if not with_vllm:
        tell(out, part="rival", way="vLLM", left_out="not asked for: --vllm")
        return
    folder = Path("runs/gpu_model")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    from mlc_notebooks.models import load_lm

    vllm = load_lm(f"vllm:{folder}", dtype=lm.dtype)
    vllm.read_next(rows[:32], watch)  # warm
    started = time.perf_counter()
    vllm.read_next(rows, watch)
    seconds = time.perf_counter() - started
    tell(
        out, part="rival", way="vLLM", texts=texts, seconds=seconds, texts_a_second=texts / seconds
    )


def short_memory(lm: LM, texts: int, out: Path):
    "The same answers where memory runs out: the card is made small for this process."
    halved = []
    halve = PackedTree._halve_passes

    def counted(tree, pieces):
        halve(tree, pieces)
        halved.append(tree.tokens_per_pass)

    PackedTree._halve_passes = counted
    whole = probe(lm, texts)
    total = torch.cuda.get_device_properties(0).total_memory
    for spare in (4096, 992, 608, 480):
        gc.collect()
        torch.cuda.empty_cache()
        halved.clear()
        taken = torch.cuda.memory_allocated()
        torch.cuda.set_per_process_memory_fraction((taken + spare * 2**20) / total)
        row = dict(part="short memory", spare_mib=spare, taken_mib=taken >> 20)
        try:
            short = probe(lm, texts)
        except torch.OutOfMemoryError:
            tell(out, **row, finished=False, halved_to=list(halved))
            continue
        same = short.items["outcomes"].equals(whole.items["outcomes"])
        apart = float(np.abs(short.probs - whole.probs).max()) if same else float("nan")
        tell(out, **row, finished=True, halved_to=list(halved), same=bool(same), apart=apart)
    torch.cuda.set_per_process_memory_fraction(1.0)
    PackedTree._halve_passes = halve


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rival-texts", type=int, default=8)
    parser.add_argument("--tokenizer", default="smollm2-135m", help="a short name or a folder")
    parser.add_argument("--vllm", action="store_true", help="also vLLM, which must be installed")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.jsonl"))
    return parser.parse_args()


def main():
    asked = parsed()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    folder = asked.tokenizer if Path(asked.tokenizer).is_dir() else model_folder(asked.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    on_gpu = asked.device.startswith("cuda")
    card = torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU"
    tell(asked.out, part="machine", card=card, torch=torch.__version__)

    exact = random_model("small", "float32", asked.device, tokenizer)
    agreement(exact, asked.out)
    if on_gpu:
        short_memory(exact, 256, asked.out)

    lm = random_model(asked.shape, asked.dtype, asked.device, tokenizer)
    agreement(lm, asked.out)
    tell(asked.out, part="check", **vars(backend_of(lm)))
    BACKENDS[lm.model] = Backend(True, shared_prefix=True)
    probe(lm, min(32, asked.texts))  # warm
    trace = own_engine(lm, asked.texts, asked.out, "shared prefix")
    own_engine(lm, asked.texts, asked.out, "shared prefix, again")
    tell(asked.out, part="made by", **{k: trace.settings[k] for k in ("dtype", "device", "packed")})
    rivals(lm, asked.rival_texts, asked.out, asked.tokenizer, asked.vllm)
    BACKENDS[lm.model] = Backend(True, shared_prefix=False)
    own_engine(lm, asked.texts, asked.out, "masks")


if __name__ == "__main__":
    main()
