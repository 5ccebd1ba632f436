"""Loads a directory with transformers, continues a prompt, fine-tunes it with LoRA and evaluates it before and after.

Give it the directory of a release or of ours, with a tokenizer; without one it makes up a tiny model of letters.
"""

import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments

import muddformer
import muddformer.hf  # registers the classes

TEXTS = ["abcdefgh" * 8, "bcdefgha" * 8]


def make_up(folder: str) -> None:
    config = muddformer.MUDDFormerConfig(
        vocab_size=28, block_size=128, n_layer=3, dim=32, n_head=2, intermediate_size=64, ffn_reallocation=False
    )
    muddformer.build_model(config).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<unk>", "<pad>", *map(chr, range(97, 123))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


@torch.no_grad()
def loss_of(model: torch.nn.Module, rows: list[dict]) -> float:
    return sum(model.eval()(**{k: v[None].to(model.device) for k, v in row.items()}).loss.item() for row in rows) / 2


with tempfile.TemporaryDirectory() as scratch:
    folder = sys.argv[1] if len(sys.argv) > 1 else scratch
    if folder == scratch:
        make_up(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    print(f"loss before {loss_of(model, rows):.3f}")

    targets = ["wq", "wk", "wv", "wo", "dynamic_dense.0.w1", "dynamic_dense.0.w2"]  # connections may have adapters too
    lora = LoraConfig(r=8, target_modules=targets, modules_to_save=["tok_embeddings", "output"], task_type="CAUSAL_LM")
    settings = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 20}
    args = TrainingArguments(output_dir=scratch, learning_rate=2e-2, per_device_train_batch_size=2, **settings)
    model = get_peft_model(model, lora)
    Trainer(model=model, args=args, train_dataset=rows).train()
    print(f"loss after {loss_of(model, rows):.3f}")

    model = model.merge_and_unload()
    prompt = tokenizer("abcde", return_tensors="pt")["input_ids"].to(model.device)
    print("continues:", tokenizer.decode(model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=1)[0]))
