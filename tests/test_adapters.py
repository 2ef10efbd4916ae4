"""Adapters of every kind: merged as peft merges them, or refused by name."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mlc_notebooks.models import MERGED_KINDS, adapter_folder, load_lm, merge_adapter

peft = pytest.importorskip("peft")

SHAPE = dict(
    vocab_size=257,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    eos_token_id=0,
    bos_token_id=None,
    pad_token_id=0,
)
GPT2 = dict(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
QV = ["q_proj", "v_proj"]
TARGETS = ("q_proj", "v_proj", "down_proj")


def lora(targets=TARGETS, **settings):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **settings)


# name: (model, settings of the adapter)
MERGED = {
    "plain": ("llama", lora()),
    "negative alpha": ("llama", peft.LoraConfig(r=4, lora_alpha=-3, target_modules=QV)),
    "gaussian": ("llama", lora(init_lora_weights="gaussian")),
    "rslora": ("llama", lora(use_rslora=True)),
    "rank_pattern": ("llama", lora(rank_pattern={"q_proj": 2})),
    "alpha_pattern": ("llama", lora(alpha_pattern={"q_proj": 64})),
    "dora": ("llama", lora(use_dora=True)),
    "pissa": ("llama", lora(init_lora_weights="pissa")),
    "olora": ("llama", lora(init_lora_weights="olora")),
    "embeddings": ("llama", lora(["q_proj", "embed_tokens"])),
    "output": ("llama", lora(["q_proj", "lm_head"])),
    "bias all": ("qwen2", lora(bias="all")),
    "bias lora_only": ("qwen2", lora(bias="lora_only")),
    "lora_bias": ("qwen2", lora(["q_proj"], lora_bias=True)),
    "fan_in_fan_out": ("gpt2", lora(["c_attn", "c_proj"], fan_in_fan_out=True)),
    "modules_to_save": ("llama", lora(modules_to_save=["lm_head"])),
    "modules_to_save, tied": ("tied", lora(modules_to_save=["lm_head"])),
    "embedding saved, tied": ("tied", lora(modules_to_save=["embed_tokens"])),
    "layers_to_transform": ("llama", lora(layers_to_transform=[1], layers_pattern="layers")),
    "exclude_modules": ("llama", lora(exclude_modules=["layers.0.self_attn.q_proj"])),
    "regular expression": (
        "llama",
        peft.LoraConfig(r=4, target_modules=r".*layers\.1\..*_proj"),
    ),
    "target_parameters": ("llama", lora(["q_proj"], target_parameters=["mlp.down_proj.weight"])),
    "trainable_token_indices": ("llama", lora(trainable_token_indices=[3, 5])),
    "trainable_token_indices, tied": ("tied", lora(trainable_token_indices=[3, 5])),
    "ADALORA": ("llama", peft.AdaLoraConfig(target_modules=QV, total_step=10)),
    "FOURIERFT": ("llama", peft.FourierFTConfig(target_modules=QV, n_frequency=50)),
    "HRA": ("llama", peft.HRAConfig(target_modules=QV, r=4)),
    "IA3": (
        "llama",
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "LN_TUNING": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "LOHA": ("llama", peft.LoHaConfig(target_modules=QV, r=4)),
    "LOKR": ("llama", peft.LoKrConfig(target_modules=QV, r=4)),
    "MISS": ("llama", peft.MissConfig(target_modules=QV, r=4)),
    "OFT": ("llama", peft.OFTConfig(target_modules=QV, oft_block_size=8)),
    "RANDLORA": ("llama", peft.RandLoraConfig(target_modules=["q_proj", "o_proj"], r=4)),
    "ROAD": ("llama", peft.RoadConfig(target_modules=["q_proj"], group_size=8)),
    "SHIRA": ("llama", peft.ShiraConfig(target_modules=QV, r=2)),
    "TRAINABLE_TOKENS": ("llama", peft.TrainableTokensConfig(token_indices=[3, 5])),
    "VBLORA": (
        "llama",
        peft.VBLoRAConfig(target_modules=["q_proj"], r=4, num_vectors=16, vector_length=8, topk=2),
    ),
    "VERA": ("llama", peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=4)),
}
REFUSED = {
    "embeddings, tied": ("tied", lora(["embed_tokens"]), "tied to the model's output"),
    "output, tied": ("tied", lora(["lm_head"]), "tied to the model's output"),
    "layer_replication": (
        "llama",
        lora(layer_replication=[[0, 2], [1, 2]]),
        "adapters with layer_replication are not merged",
    ),
    "alora": (
        "llama",
        lora(alora_invocation_tokens=[3, 4]),
        "adapters with alora_invocation_tokens are not merged",
    ),
    "PROMPT_TUNING": (
        "llama",
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "of the kind 'PROMPT_TUNING', which cannot be merged",
    ),
    "PREFIX_TUNING": (
        "llama",
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "of the kind 'PREFIX_TUNING', which cannot be merged",
    ),
    "P_TUNING": (
        "llama",
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
        ),
        "of the kind 'P_TUNING', which cannot be merged",
    ),
    "ADAPTION_PROMPT": (
        "llama",
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
        "of the kind 'ADAPTION_PROMPT', which cannot be merged",
    ),
}


@pytest.fixture(scope="module")
def bases(tiny_folder, tmp_path_factory):
    "Folders of tiny models with random weights, by name."
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "tied": LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**GPT2, eos_token_id=0, bos_token_id=None)),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folders[name])
    return folders


def base_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_adapter(base: Path, config, folder: Path) -> Path:
    "An adapter with random numbers, as peft saves it."
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_model(base), config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.2 * torch.randn_like(weight)
        model.save_pretrained(folder)
    edit_settings(folder, base_model_name_or_path=str(base))
    return folder


def edit_settings(folder: Path, **changed):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@torch.inference_mode()
def logits(model):
    return model(torch.arange(1, 25)[None]).logits


@pytest.mark.parametrize("kind", MERGED)
def test_an_adapter_gives_what_peft_gives(kind, bases, tmp_path):
    base, config = MERGED[kind]
    save_adapter(bases[base], config, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_adapter = peft.PeftModel.from_pretrained(base_model(bases[base]), tmp_path)
        beside = logits(with_adapter)
        merged = logits(with_adapter.merge_and_unload())
    lm = load_lm(tmp_path)
    assert (logits(lm.model) - merged).abs().max() < 1e-4
    assert (logits(lm.model) - beside).abs().max() < 5e-4
    assert (logits(lm.model) - logits(base_model(bases[base]))).abs().max() > 0.1


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_cannot_be_merged_is_refused(kind, bases, tmp_path):
    base, config, message = REFUSED[kind]
    save_adapter(bases[base], config, tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        load_lm(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_every_kind_that_is_merged_was_compared():
    compared = {config.peft_type.value for _, config in MERGED.values()}
    assert compared == set(MERGED_KINDS)


def test_an_adapter_on_the_real_model(tmp_path):
    "rsLoRA with a pattern of alphas and a trained norm, on the embedded model's base."
    torch.manual_seed(0)
    base = load_lm("smollm2-135m")
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        alpha_pattern={"v_proj": 64},
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["norm"],
    )
    model = peft.get_peft_model(base.model, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_B" in name:
                weight += 0.01 * torch.randn_like(weight)
    model.save_pretrained(tmp_path)
    edit_settings(tmp_path, base_model_name_or_path="smollm2-135m")
    merged = model.merge_and_unload().eval()
    ids = torch.tensor([base.encode_text("Input: What a day!\n")])
    with torch.inference_mode():
        ours = load_lm(tmp_path).model(ids).logits
        assert (ours - merged(ids).logits).abs().max() < 1e-4
        assert (ours - load_lm("smollm2-135m").model(ids).logits).abs().max() > 0.1


def test_adapters_stand_on_one_another(bases, tmp_path):
    first = save_adapter(bases["llama"], lora(), tmp_path / "first")
    second = save_adapter(bases["llama"], lora(["k_proj"], use_rslora=True), tmp_path / "second")
    edit_settings(second, base_model_name_or_path=str(first))
    model = base_model(bases["llama"])
    for folder in (first, second):
        model = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    lm = load_lm(second)
    assert (logits(lm.model) - logits(model)).abs().max() < 1e-4
    assert all(weight.requires_grad for weight in lm.model.parameters())

    edit_settings(first, base_model_name_or_path=str(second))
    with pytest.raises(ValueError, match="leads back to the adapter itself"):
        load_lm(second)
    edit_settings(first, base_model_name_or_path=str(first))
    with pytest.raises(ValueError, match="leads back to the adapter itself"):
        load_lm(first)


def test_a_trained_head_survives_saving(bases, tmp_path):
    "Output and embedding are no longer one weight, and the saved model knows it."
    save_adapter(bases["tied"], lora(modules_to_save=["lm_head"]), tmp_path / "adapter")
    lm = load_lm(tmp_path / "adapter")
    lm.model.save_pretrained(tmp_path / "whole")
    lm.tokenizer.save_pretrained(tmp_path / "whole")
    again = load_lm(tmp_path / "whole")
    assert torch.equal(logits(again.model), logits(lm.model))


def without(name):
    "The file loses its tensors of this name."

    def change(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        kept = {key: tensor for key, tensor in tensors.items() if name not in key}
        assert len(kept) < len(tensors)
        save_file(kept, path)

    return change


def with_tensors(change_tensors):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change_tensors(tensors)
        save_file(tensors, path)

    return change


def first_nan(tensors):
    next(iter(tensors.values()))[0] = torch.nan


def one_more(tensors):
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)


def wider(tensors):
    for name in tensors:
        if "lora_A" in name:
            tensors[name] = torch.ones(4, 33)


def settings(**changed):
    return lambda folder: edit_settings(folder, **changed)


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


DAMAGES = {
    "settings cut off": (written("adapter_config.json", b'{"r": 8, "lo'), "adapter_config.json is"),
    "settings empty": (written("adapter_config.json", b""), "adapter_config.json is damaged"),
    "settings a list": (written("adapter_config.json", b"[]"), "adapter_config.json is damaged"),
    "settings not UTF-8": (written("adapter_config.json", b"\xff\xfe{"), "config.json is damaged"),
    "settings nested": (written("adapter_config.json", b"[" * 10**5), "config.json is damaged"),
    "no base": (settings(base_model_name_or_path=None), "which model the adapter belongs to"),
    "base no text": (settings(base_model_name_or_path=["a"]), "which model the adapter belongs to"),
    "base is nowhere": (settings(base_model_name_or_path="/no/where"), "is an adapter on '/no/wh"),
    "revision": (settings(revision="v2"), "asks for the revision 'v2'"),
    "r = 0": (settings(r=0), "r is 0"),
    "r too large": (settings(r=5), "belongs to another model"),
    "r no number": (settings(r="four"), "r is 'four'"),
    "alpha NaN": (settings(lora_alpha=float("nan")), "lora_alpha is nan"),
    "alpha missing": (settings(lora_alpha=None), "lora_alpha is None"),
    "alpha_pattern NaN": (settings(alpha_pattern={"q_proj": float("nan")}), "NaN"),
    "unknown kind": (settings(peft_type="LORA2"), "of the kind 'LORA2'"),
    "no kind": (settings(peft_type=None), "of the kind None"),
    "kind is a list": (settings(peft_type=["LORA"]), "of the kind"),
    "another kind": (settings(peft_type="IA3"), "does not know bias"),
    "future setting": (settings(use_hyper={"depth": 3}), "does not know use_hyper"),
    "targets missing": (settings(target_modules=["k_proj", *TARGETS]), "lacks in the file"),
    "targets too few": (settings(target_modules=["q_proj"]), "has no place for"),
    "targets of nobody": (settings(target_modules=["nobody"]), "peft cannot put"),
    "a module to import": (settings(megatron_config={"a": 1}), "with megatron_config are not"),
    "a file to read": (settings(corda_config={"cache_file": "x"}), "with corda_config are not"),
    "rsLoRA without r": (settings(use_rslora=True, r=None), "belongs to another model"),
    "half a pair": (without("lora_B"), "lacks in the file"),
    "a layer missing": (without("layers.1"), "lacks in the file"),
    "one more tensor": (with_tensors(one_more), r"layers.7.mlp.up_proj.lora_A.weight \(1"),
    "other width": (with_tensors(wider), "belongs to another model"),
    "NaN weights": (with_tensors(first_nan), "holds NaN or infinity"),
    "no tensors": (with_tensors(dict.clear), "holds no tensors"),
    "file cut off": (cut, "adapter_model.safetensors is damaged"),
    "file empty": (
        written("adapter_model.safetensors", b""),
        "adapter_model.safetensors is damage",
    ),
    "file missing": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model"),
    "a pickle": (pickled, "pickle files .* are never read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_named(damage, bases, tmp_path):
    spoil, message = DAMAGES[damage]
    save_adapter(bases["llama"], lora(), tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as refused:
        load_lm(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_the_embedded_adapter_needs_no_peft_and_others_say_so(bases, tmp_path):
    save_adapter(bases["llama"], lora(use_dora=True), tmp_path)
    code = f"""
import sys
sys.modules["peft"] = None
from mlc_notebooks.models import load_lm
load_lm()
try:
    load_lm({str(tmp_path)!r})
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "more than a plain LoRA adapter (use_dora)" in done.stdout, done.stderr
    assert 'pip install "mlc_notebooks[train]"' in done.stdout


def test_nothing_from_an_adapter_is_run(bases, tmp_path, monkeypatch):
    save_adapter(bases["llama"], lora(), tmp_path / "adapter")
    (tmp_path / "trap.py").write_text("raise SystemExit('the trap was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    auto = {"base_model_class": "Trap", "parent_library": "trap"}
    edit_settings(tmp_path / "adapter", megatron_core="trap", auto_mapping=auto)
    load_lm(tmp_path / "adapter")
    edit_settings(tmp_path / "adapter", use_rslora=True)
    load_lm(tmp_path / "adapter")
    assert "trap" not in sys.modules


def test_merging_changes_the_model_in_place(bases, tmp_path):
    save_adapter(bases["llama"], lora(), tmp_path)
    model = base_model(bases["llama"])
    assert merge_adapter(model, tmp_path) is model


def test_a_copy_of_the_embedded_adapter_is_loaded(tuned_lm, tmp_path):
    shutil.copytree(adapter_folder("smollm2-135m-emotions"), tmp_path / "mine")
    edit_settings(tmp_path / "mine", base_model_name_or_path="smollm2-135m")
    assert load_lm(tmp_path / "mine").fingerprint == tuned_lm.fingerprint
