"""Gives the blocks of an existing PyTorch model MUDD connections: torch's own encoder layers, unchanged."""

import torch
from torch import nn

from muddformer.nn import MUDDStack

torch.manual_seed(0)
dim = 32
blocks = nn.ModuleList(nn.TransformerEncoderLayer(dim, 4, 64, 0.0, norm_first=True, batch_first=True) for _ in range(6))
stack = MUDDStack(blocks, dim)  # in place of: for block in blocks: x = block(x)

x = torch.randn(2, 16, dim)
plain = x
for block in blocks:
    plain = block(plain)
print(f"fresh, the stack computes what the blocks compute: {torch.allclose(stack(x), plain, atol=1e-5)}")

head = nn.Linear(dim, dim)
optimizer = torch.optim.AdamW([*stack.parameters(), *head.parameters()], lr=5e-3)
for step in range(1, 61):
    x = torch.randn(8, 16, dim)
    loss = nn.functional.mse_loss(head(stack(x)), x - x.mean(1, keepdim=True))  # something to learn
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
newest = [f"{prior[0, -1].item():.3f}" for prior in stack.dense_bs]
print(f"static weight of the newest hidden state, 1 at the start: {' '.join(newest)}")
