"""The programs that `compare.py` sets against each other, each in a process of its own.

    python benchmarks/contenders.py NAME JOB.json

compare.py starts it, in the environment that NAME needs.

A contender reads one line of JSON for each thing it is asked to do and answers with one line.
Nothing but the standard library is imported here before a contender is made, since vLLM and
llama.cpp live in environments without this package. Every contender gets the same prompts as token
ids. `generate` answers greedily until the list is closed; `read` gives the log-probabilities of
watched tokens behind each prompt.
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path


def log_softmax(logits, watch):
    "Of one row of logits, at the watched tokens, as floats."
    logits = logits.float()
    return (logits[watch] - logits.logsumexp(-1)).tolist()


def plain_float(value):
    "A number that JSON can hold, or None."
    return None if value is None else float(value)


class TokenCounter:
    """Counts the tokens that a torch model computes, padding included, where they enter its
    embedding.
    """

    def __init__(self, model):
        self.tokens = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.tokens += args[0].numel()

    def take(self) -> int:
        counted, self.tokens = self.tokens, 0
        return counted


class Ours:
    "This package's public functions; they tokenise and make their tables within the time."

    def __init__(self, job):
        import torch
        from benchmark_task import benchmark_task

        from mlc_notebooks.models import load_lm

        self.torch, self.job, self.texts = torch, job, benchmark_task(job["texts"])
        self.lm = load_lm(job["model"], dtype=job["dtype"])
        self.counter = TokenCounter(self.lm.model)

    def run(self, part, texts):
        task = self.texts.select(range(texts))
        self.counter.take()
        started = time.perf_counter()
        answer = (
            self.steps(task, shown=part) if part in self.job else getattr(self, part)(task)
        )  # a draw's demonstrations have its name
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": self.counter.take(), **answer()}

    def steps(self, task, reading="first_token", shown="demonstrations"):
        from mlc_notebooks.probing import probe_steps

        trace = probe_steps(
            self.lm, task, demonstrations=self.job[shown], reading=reading, progress=False
        )
        first = trace.logprobs[(trace.steps["step"] == 1).to_numpy()]
        return lambda: {
            "outputs": list(trace.items["output"]),
            "first": first.tolist(),
            "generated": trace.steps["generated_tokens"].tolist(),
            "examples": [trace.items.index.get_loc(item) for item in trace.steps["example"]],
            "wrote": trace.steps["wrote"].tolist(),
        }

    def steps_exact(self, task):
        return self.steps(task, "exact")

    def unary(self, task):
        from mlc_notebooks.alignment import ask_questions
        from mlc_notebooks.data import unary_prompts

        prompts = [
            unary_prompts(text, task.labels, self.job["unary_shown"], task.label_noun)[:-1]
            for text in task.texts
        ]
        asked = ask_questions(self.lm, prompts, ("reasonable", "unreasonable"), progress=False)
        return lambda: {"read": [rows.tolist() for rows in asked.logprobs]}

    def binary(self, task):
        from mlc_notebooks.alignment import ask_questions
        from mlc_notebooks.data import binary_prompts

        prompts = [
            binary_prompts(text, self.job["pairs"], self.job["binary_shown"], task.label_noun)
            for text in task.texts
        ]
        asked = ask_questions(self.lm, prompts, ("a", "b"), progress=False)
        return lambda: {"read": [rows.tolist() for rows in asked.logprobs]}

    def marginals(self, task):
        from mlc_notebooks.alignment import inclusion_marginals

        scores = inclusion_marginals(
            self.lm, task, demonstrations=self.job["demonstrations"], progress=False
        )
        return lambda: {"marginals": scores.to_numpy().tolist()}

    def multiply(self, part, texts):
        "Matrix products a second: the MLP shapes of the model, 512 rows, best of 20 of each."
        config, dtype = self.lm.model.config.get_text_config(), self.lm.model.dtype
        best, work = 0.0, 0
        for wide, narrow in (
            (config.intermediate_size, config.hidden_size),
            (config.hidden_size, config.intermediate_size),
        ):
            rows, weight = (
                self.torch.randn(512, narrow, dtype=dtype),
                self.torch.randn(wide, narrow, dtype=dtype),
            )
            with self.torch.inference_mode():
                best += min(self._timed(rows, weight) for _ in range(20))
            work += 2 * 512 * wide * narrow
        return {"flops": work / best}

    def _timed(self, rows, weight):
        started = time.perf_counter()
        self.torch.nn.functional.linear(rows, weight)
        return time.perf_counter() - started


class Rival:
    "Runs the prepared prompts of a part: lists are generated, the others are read."

    def __init__(self, job):
        self.job = job
        self.prompts = {
            part: json.loads(Path(path).read_text()) for part, path in job["prompts"].items()
        }
        self.load(job)

    def run(self, part, texts):
        asked = self.prompts[part]
        rows = asked["rows"][:texts]
        self.prepare()
        started = time.perf_counter()
        if "limit" in asked:
            answer = self.generate(rows, asked)
        else:
            flat, tokens = self.read(
                [row for questions in rows for row in questions], asked["watch"]
            )
            answer = {"flat": flat, "tokens": tokens}
        answer["seconds"] = time.perf_counter() - started
        if "flat" in answer:
            found = iter(answer.pop("flat"))
            answer["read"] = [[next(found) for _ in questions] for questions in rows]
        return answer

    def prepare(self):
        "Forget what an earlier run left behind, outside the time."


class Transformers(Rival):
    """`generate` of transformers, one text at a time, stopped at the end of the answer, with the
    logits only.
    """

    rows_at_once = 1

    def load(self, job):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(job["model_folder"])
        self.model = AutoModelForCausalLM.from_pretrained(
            job["model_folder"], dtype=getattr(torch, job["dtype"])
        ).eval()
        self.pad = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.tokenizer.eos_token_id
        )
        self.counter = TokenCounter(self.model)

    def padded(self, rows):
        "Ids and mask of a batch, padded on the left."
        width = max(map(len, rows))
        ids = self.torch.tensor([[self.pad] * (width - len(row)) + row for row in rows])
        mask = self.torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    def batches(self, rows):
        return [rows[i : i + self.rows_at_once] for i in range(0, len(rows), self.rows_at_once)]

    def generate(self, rows, asked):
        self.counter.take()
        outputs, logprobs = [], []
        for batch in self.batches(rows):
            ids, mask = self.padded(batch)
            out = self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                return_dict_in_generate=True,
                pad_token_id=self.pad,
                **self.options(asked, ids.shape[1]),
            )
            scores = out.logits if out.logits is not None else out.scores
            for row in range(len(batch)):
                outputs.append(out.sequences[row, ids.shape[1] :].tolist())
                logprobs.append([log_softmax(step[row], asked["watch"]) for step in scores])
        return {"ids": outputs, "logprobs": logprobs, "tokens": self.counter.take()}

    def options(self, asked, width):
        from transformers import StoppingCriteriaList

        return {
            "max_new_tokens": asked["limit"],
            "output_logits": True,
            "stopping_criteria": StoppingCriteriaList([self.list_is_closed(asked["stop"], width)]),
        }

    def list_is_closed(self, stop, width):
        "A stopping criterion: the answer, from `width` on, holds the mark that closes the list."
        from transformers import StoppingCriteria

        torch, tokenizer = self.torch, self.tokenizer

        class Closed(StoppingCriteria):
            def __call__(self, ids, scores, **ignored):
                return torch.tensor(
                    [stop in text for text in tokenizer.batch_decode(ids[:, width:])]
                )

        return Closed()

    def read(self, rows, watch):
        self.counter.take()
        found = []
        with self.torch.inference_mode():
            for batch in self.batches(rows):
                ids, mask = self.padded(batch)
                out = self.model(
                    ids,
                    attention_mask=mask,
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                    logits_to_keep=1,
                    **self.reading_options(),
                )
                found += [log_softmax(row, watch) for row in out.logits[:, -1]]
        return found, self.counter.take()

    def reading_options(self):
        return {"use_cache": False}


class Batched(Transformers):
    "The same in batches of 16, padded on the left."

    rows_at_once = 16


class Published(Transformers):
    """The published code's way: one text, the full prompt, 18 new tokens, and everything returned.

    A question of a breakdown takes one new token here, which is in its favour.
    """

    def load(self, job):
        super().load(job)
        self.model.set_attn_implementation("eager")  # attentions are returned

    def options(self, asked, width):
        return {
            "max_new_tokens": 18,
            "min_new_tokens": 18,
            "output_scores": True,
            "output_hidden_states": True,
            "output_attentions": True,
        }

    def reading_options(self):
        return {"output_hidden_states": True, "output_attentions": True}


class VLLM(Rival):
    """vLLM's CPU build with prefix caching, all prompts handed over at once; it returns the watched
    tokens' log-probabilities only.
    """

    options = {}

    def load(self, job):
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, job["cores"])),
        }
        from vllm import LLM

        self.llm = LLM(
            job["model_folder"],
            dtype=job["dtype"],
            enable_prefix_caching=True,
            max_model_len=2048,
            max_logprobs=128,
            disable_log_stats=True,
            **self.options,
        )

    def prepare(self):
        self.llm.reset_prefix_cache()

    def ask(self, rows, watch, **sampling):
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0, logprob_token_ids=watch, **sampling)
        return self.llm.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)

    @staticmethod
    def computed(answers):
        "Prompt tokens that were not in the prefix cache, and those generated but the last."
        return sum(
            len(a.prompt_token_ids) - (a.num_cached_tokens or 0) + len(a.outputs[0].token_ids) - 1
            for a in answers
        )

    def generate(self, rows, asked):
        answers = self.ask(
            rows,
            asked["watch"],
            max_tokens=asked["limit"],
            stop=[asked["stop"]],
            include_stop_str_in_output=True,
        )

        def read(step):
            return [step[token].logprob for token in asked["watch"]]

        return {
            "ids": [list(a.outputs[0].token_ids) for a in answers],
            "logprobs": [[read(step) for step in a.outputs[0].logprobs] for a in answers],
            "tokens": self.computed(answers),
        }

    def read(self, rows, watch):
        answers = self.ask(rows, watch, max_tokens=1, detokenize=False)
        return [
            [a.outputs[0].logprobs[0][token].logprob for token in watch] for a in answers
        ], self.computed(answers)


class VLLM32(VLLM):
    """The same with a cache in blocks of 32 tokens, the smallest that its attention takes here,
    instead of 128.
    """

    options = {"block_size": 32}


class LlamaCpp(Rival):
    """llama-cpp-python on the original 4-bit file: what a prompt shares with the one before stays
    in its cache.

    Answers come from `create_completion` without probabilities; a question is read off the last
    token's logits.
    """

    logits_all = False

    def load(self, job):
        import llama_cpp
        import numpy

        self.llama_cpp, self.np = llama_cpp, numpy
        self.avoid_amx(llama_cpp.llama_cpp)
        self.llm = llama_cpp.Llama(
            job["gguf"],
            n_ctx=2048,
            n_threads=job["threads"],
            n_threads_batch=job["threads"],
            logits_all=self.logits_all,
            verbose=False,
        )
        self.computed, inner = 0, self.llm.eval

        def counting(tokens):
            self.computed += len(tokens)
            inner(tokens)

        self.llm.eval = counting

    @staticmethod
    def avoid_amx(library):
        """llama.cpp's AMX kernels end with a segmentation fault on this model (ggml-org/llama.cpp
        issue 20824): the others are taken.
        """
        cpu, defaults = Path("/proc/cpuinfo"), library.llama_model_default_params
        if cpu.exists() and "amx_int8" in cpu.read_text():

            def without_repacking():
                parameters = defaults()
                parameters.use_extra_bufts = False
                return parameters

            library.llama_model_default_params = without_repacking

    def prepare(self):
        self.llm.reset()
        self.computed = 0

    def generate(self, rows, asked):
        answers = [self.complete(row, asked) for row in rows]
        return {
            "texts": [a["text"] + asked["stop"] * (a["finish_reason"] == "stop") for a in answers],
            "named": [self.named(a) for a in answers],
            "tokens": self.computed,
        }

    @staticmethod
    def named(answer):
        """The tokens written and, for each, the likeliest ones' log-probabilities by their text;
        None without probabilities.
        """
        found = answer.get("logprobs")
        return found and {
            "tokens": found["tokens"],
            "top": [
                {text: plain_float(value) for text, value in (top or {}).items()}
                for top in found["top_logprobs"]
            ],
        }

    def complete(self, row, asked):
        return self.llm.create_completion(
            row, max_tokens=asked["limit"], temperature=0.0, stop=[asked["stop"]]
        )["choices"][0]

    def read(self, rows, watch):
        found = []
        for row in rows:
            next(self.llm.generate(row, temp=0.0))
            logits = self.np.ctypeslib.as_array(
                self.llama_cpp.llama_get_logits_ith(self.llm.ctx, -1), (self.llm.n_vocab(),)
            )
            shifted = logits.astype(float) - logits.max()
            found.append((shifted[watch] - self.np.log(self.np.exp(shifted).sum())).tolist())
        return found, self.computed


class LlamaCppTop20(LlamaCpp):
    """The same with the 20 likeliest tokens' log-probabilities, for which llama-cpp-python keeps
    all logits (logits_all).
    """

    logits_all = True

    def complete(self, row, asked):
        return self.llm.create_completion(
            row, max_tokens=asked["limit"], temperature=0.0, stop=[asked["stop"]], logprobs=20
        )["choices"][0]

    def read(self, rows, watch):
        names = [
            self.llm.detokenize([token], prev_tokens=rows[0]).decode("utf-8", "ignore")
            for token in watch
        ]
        tops = [
            self.llm.create_completion(row, max_tokens=1, temperature=0.0, logprobs=20)["choices"][
                0
            ]["logprobs"]["top_logprobs"][0]
            for row in rows
        ]
        return [[plain_float(top.get(name)) for name in names] for top in tops], self.computed


CONTENDERS = {
    "ours": Ours,
    "published": Published,
    "generate": Transformers,
    "generate x16": Batched,
    "vllm": VLLM,
    "vllm 32": VLLM32,
    "llama.cpp": LlamaCpp,
    "llama.cpp top 20": LlamaCppTop20,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("job", type=Path)
    arguments = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    contender = CONTENDERS[arguments.name](json.loads(arguments.job.read_text()))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        do = contender.multiply if asked["part"] == "multiply" else contender.run
        answer = do(asked["part"], asked["texts"])
        print(json.dumps(answer), file=replies, flush=True)
        del answer
        gc.collect()
