"""Of the form of nanoGPT's train.py: tied weights, fused AdamW, accumulated and clipped gradients, resuming."""

import math
import sys
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = sys.argv[2] if len(sys.argv) > 2 else "float32"
device_type = "cuda" if "cuda" in device else "cpu"
ptdtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
context = nullcontext() if dtype == "float32" else torch.amp.autocast(device_type=device_type, dtype=ptdtype)
VOCABULARY, BLOCK, WIDTH = 32, 16, 32


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x):
        batch, time, _ = x.size()
        q, k, v = self.attention(self.ln_1(x)).split(WIDTH, dim=2)
        q, k, v = (part.view(batch, time, 2, WIDTH // 2).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).contiguous().view(batch, time, WIDTH))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.drop, self.blocks = nn.Dropout(0.1), nn.ModuleList([Block(), Block()])
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)

    def forward(self, idx, targets):
        position = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(position))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


order = torch.Generator().manual_seed(2)
data = torch.cumsum(torch.randint(0, 3, (5000,), generator=order), 0) % VOCABULARY


def get_batch():
    ix = torch.randint(len(data) - BLOCK, (8,), generator=order)
    x = torch.stack([data[i : i + BLOCK] for i in ix])
    y = torch.stack([data[i + 1 : i + 1 + BLOCK] for i in ix])
    if device_type == "cuda":
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


def make(state=None):
    model = Gpt()
    if state is not None:
        model.load_state_dict(state["model"])
    model.to(device)
    assert model.wte.weight is model.lm_head.weight
    decay = [p for p in model.parameters() if p.dim() >= 2]
    groups = [
        {"params": decay, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


torch.set_num_threads(1)
torch.manual_seed(1337)
torch.backends.cuda.matmul.allow_tf32 = True
torch.backends.cudnn.allow_tf32 = True
scaler = torch.amp.GradScaler(device_type, enabled=(dtype == "float16"))
model, optimizer = make()
torch.manual_seed(1)
for step in range(20):
    if step == 10:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, sys.argv[1])
        model, optimizer = make(torch.load(sys.argv[1], map_location=device))
        torch.manual_seed(2)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * 0.5 * (1.0 + math.cos(math.pi * step / 20))
    for _ in range(2):
        x, y = get_batch()
        with context:
            loss = model(x, y) / 2
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    print("loss", loss.item() * 2)
