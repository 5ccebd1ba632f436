"""Gives a model of transformers MUDD connections, trains it, saves it, reads it again (pip install muddformer[hf])."""

import tempfile

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from muddformer.hf import attach, load_attached

torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, eos_token_id=None,
)  # fmt: skip
model = Qwen3ForCausalLM(config)  # or AutoModelForCausalLM.from_pretrained(...)

ids = torch.randint(64, (2, 24))
before = model(ids).logits
attach(model)  # one line; options of the connections as keywords
print(f"fresh, it computes what it did: {torch.equal(model(ids).logits, before)}")

connections = list(model.model.connections.parameters())
others = [p for name, p in model.named_parameters() if "connections." not in name]
optimizer = torch.optim.AdamW([{"params": others}, {"params": connections, "weight_decay": 0.0}], lr=2e-3)
for step in range(1, 31):
    start = torch.randint(64, (8, 1))
    ids = (start + 3 * torch.arange(24)) % 64  # something to learn: counting in threes
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = load_attached(folder).eval()
prompt = torch.tensor([[1, 4, 7, 10]])
print("generated:", again.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist())
