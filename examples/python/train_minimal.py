"""Trains a small MUDDFormer on its own source text with a plain PyTorch loop."""

from pathlib import Path

import torch

import muddformer

torch.manual_seed(0)
text = torch.tensor(list(Path(__file__).read_bytes()))  # a token per byte
config = muddformer.MUDDFormerConfig(
    vocab_size=256, block_size=64, n_layer=4, dim=64, n_head=4, intermediate_size=256, ffn_reallocation=False
)
model = muddformer.build_model(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)

for step in range(1, 61):
    starts = torch.randint(len(text) - config.block_size, (8,)).tolist()
    rows = torch.stack([text[start : start + config.block_size + 1] for start in starts])
    loss = model(rows[:, :-1], targets=rows[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f} nats per byte")
