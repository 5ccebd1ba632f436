"""Trains a MUDDFormer to count for a few seconds, saves it, loads it and lets it go on with a sequence."""

import tempfile

import torch

import muddformer

torch.manual_seed(0)
config = muddformer.MUDDFormerConfig(
    vocab_size=32, block_size=32, n_layer=3, dim=32, n_head=2, intermediate_size=128, ffn_reallocation=False
)
model = muddformer.build_model(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(150):
    rows = (torch.randint(32, (16, 1)) + torch.arange(17)) % 32
    loss = model(rows[:, :-1], targets=rows[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.4f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # model.safetensors and config.json
    model = type(model).from_pretrained(folder)

prompt = torch.tensor([[5, 6, 7], [29, 30, 31]])
for sequence in muddformer.generate(model, prompt, max_new_tokens=10):
    print(f"greedy:  {sequence.tolist()}")
sampled = muddformer.generate(model, prompt[:1], max_new_tokens=10, temperature=1.0, top_p=0.9, seed=0)
print(f"sampled: {sampled[0].tolist()}")
