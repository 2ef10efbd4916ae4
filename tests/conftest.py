import pytest
import torch

from mlc_notebooks.models import load_lm


@pytest.fixture(scope="session")
def base_lm():
    "SmolLM2-135M-Instruct as it comes."
    return load_lm("smollm2-135m")


@pytest.fixture(scope="session")
def tuned_lm():
    "The same with the embedded adapter."
    return load_lm("smollm2-135m-emotions")


@pytest.fixture(scope="session")
def next_logprobs():
    "Full-vocabulary log-probabilities after some ids: one plain forward pass of transformers."
    @torch.inference_mode()
    def compute(lm, ids):
        return lm.model(torch.tensor([list(ids)])).logits[0, -1].float().log_softmax(-1).numpy()
    return compute
