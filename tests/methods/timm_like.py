"""A vision transformer with the attribute names of timm's (which is not installed on CPU machines), as small as can be."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qk_norm=False):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None):
        batch, tokens, channels = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, channels))


class Block(nn.Module):
    def __init__(self, dim, num_heads, qk_norm=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, attn_mask=None):
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(
        self, dim=32, depth=6, num_heads=4, class_token=True, reg_tokens=0, global_pool="token", qk_norm=False
    ):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.randn(1, reg_tokens, dim)) if reg_tokens else None
        self.num_prefix_tokens, self.global_pool = int(class_token) + reg_tokens, global_pool
        self.pos_embed = nn.Parameter(torch.randn(1, 16 + self.num_prefix_tokens, dim) * 0.1)
        self.blocks = nn.Sequential(*(Block(dim, num_heads, qk_norm) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def tokens(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        return torch.cat([*prefix, x], 1) + self.pos_embed

    def forward(self, images):
        x = self.norm(self.blocks(self.tokens(images)))
        x = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(1)
        return self.head(x)
