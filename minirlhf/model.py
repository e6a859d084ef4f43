"""The transformer, in one file: GPT-2 and Llama-2 flavours, a scalar head, an actor with a critic.

Sequences are right-padded and positions are 0, 1, 2, ...; with causal attention, filler at the end
of a row cannot influence the row's real tokens, so the training forward needs no attention mask.
Only decoding with the KV cache masks: there each row stands at a position of its own.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.plumbing.errors import UserError


@dataclass
class ModelConfig:
    vocab_size: int = 1024
    block_size: int = 192  # the most tokens a sequence may have
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0  # grouped-query attention: key/value heads; 0 means n_head
    n_embd: int = 128
    n_hidden: int = 0  # width of the MLP; 0 means 4 * n_embd
    norm: str = "layernorm"  # layernorm | rmsnorm; always before the block ("pre-norm")
    norm_eps: float = 1e-5
    mlp: str = "gelu"  # gelu | swiglu
    positions: str = "learned"  # learned | rope
    rope_theta: float = 10000.0
    bias: bool = True  # biases in linear layers and LayerNorms
    tied: bool = True  # the unembedding is the embedding, transposed
    dropout: float = 0.0
    attention: str = "fused"  # fused (flash on CUDA) | manual (written out, to be read)

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or 4 * self.n_embd
        for name, value, allowed in (("norm", self.norm, ("layernorm", "rmsnorm")),
                                     ("mlp", self.mlp, ("gelu", "swiglu")),
                                     ("positions", self.positions, ("learned", "rope")),
                                     ("attention", self.attention, ("fused", "manual"))):
            if value not in allowed:
                raise UserError(f"model option {name} is {value!r}; expected one of {allowed}")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise UserError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, "
                            f"and n_head of n_kv_head {self.n_kv_head}")
        if self.positions == "rope" and self.n_embd // self.n_head % 2:
            raise UserError(f"rope turns pairs of dimensions, but a head has {self.n_embd} / "
                            f"{self.n_head}, an odd number; change n_embd or n_head")


def _gpt(n_layer, n_head, n_embd, vocab_size=50257, block_size=1024):
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size,
                block_size=block_size)


def _llama(n_layer, n_head, n_embd, n_hidden, n_kv_head=0):
    return dict(n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd,
                n_hidden=n_hidden, vocab_size=32000, block_size=4096, norm="rmsnorm", mlp="swiglu",
                positions="rope", bias=False, tied=False)


# GPT-1 was post-norm; built pre-norm here it has one final LayerNorm more (1,536 parameters).
# GPT-3's table (arXiv 2005.14165, Table 2.1) is rounded and inconsistent in two rows: 1.3B lists 24
# heads of 128 for a width of 2,048 (16 fit) and 13B a width of 5,140 (5,120 fits). Its sparse
# attention layers have the same parameters. Llama 2 34B (never released) follows arXiv 2307.09288
# and Code Llama's shape.
SIZES = {
    "gpt1": _gpt(12, 12, 768, 40478, 512),
    "gpt2": _gpt(12, 12, 768), "gpt2-medium": _gpt(24, 16, 1024),
    "gpt2-large": _gpt(36, 20, 1280), "gpt2-xl": _gpt(48, 25, 1600),
    "gpt3-125m": _gpt(12, 12, 768, block_size=2048),
    "gpt3-350m": _gpt(24, 16, 1024, block_size=2048),
    "gpt3-760m": _gpt(24, 16, 1536, block_size=2048),
    "gpt3-1.3b": _gpt(24, 16, 2048, block_size=2048),
    "gpt3-2.7b": _gpt(32, 32, 2560, block_size=2048),
    "gpt3-6.7b": _gpt(32, 32, 4096, block_size=2048),
    "gpt3-13b": _gpt(40, 40, 5120, block_size=2048),
    "gpt3-175b": _gpt(96, 96, 12288, block_size=2048),
    "llama2-7b": _llama(32, 32, 4096, 11008), "llama2-13b": _llama(40, 40, 5120, 13824),
    "llama2-34b": _llama(48, 64, 8192, 22016, 8), "llama2-70b": _llama(80, 64, 8192, 28672, 8),
}


def named_config(name):
    """The ModelConfig of a published size; `SIZES` lists the names."""
    if name not in SIZES:
        raise UserError(f"no model size called {name!r}; there are {', '.join(SIZES)}")
    return ModelConfig(**SIZES[name])


def count_parameters(cfg):
    """Number of distinct parameters of a GPT, without allocating them (meta device)."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(cfg).parameters())


class RMSNorm(nn.Module):
    """x / rms(x) * weight: LayerNorm without the mean and the bias (arXiv 1910.07467)."""

    def __init__(self, n_embd, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()  # squares of bf16 lose too much
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def make_norm(cfg):
    if cfg.norm == "rmsnorm":
        return RMSNorm(cfg.n_embd, cfg.norm_eps)
    return nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.bias)


def rope_angles(positions, head_dim, theta, dtype):
    """cos and sin of RoPE (arXiv 2104.09864, Eq. 34) at positions (...): each (..., head_dim).

    Pair i turns by position * theta^(-2i / head_dim). Angles are computed in float64: at position
    4,000 a float32 angle is already wrong in the fourth digit of its sine. Dimension i is paired
    with i + head_dim / 2, as in Hugging Face's Llama; Meta's own code pairs neighbours, which is
    the same model with the rows of the query and key matrices permuted.
    """
    device = positions.device
    if device.type == "mps":  # Apple's GPU has no float64: the angles come from the CPU
        positions = positions.cpu()
    half = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions[..., None].double() * theta**-half  # (..., head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)  # (..., head_dim)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def apply_rope(x, cos, sin):
    """Rotate queries or keys. x: (B, n_head, T, head_dim); cos, sin: broadcastable to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def manual_attention(q, k, v, mask, dropout=0.0):
    """softmax(q k^T / sqrt(head_dim)) v, written out: what the fused kernel computes.

    q: (B, H, Tq, D); k, v: (B, H, Tk, D); mask: broadcastable to (B, H, Tq, Tk), True = may look.
    """
    att = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, Tq, Tk)
    att = att.masked_fill(~mask, float("-inf"))
    att = F.dropout(att.softmax(dim=-1), dropout)
    return att @ v  # (B, H, Tq, D)


def fused_attention(q, k, v, mask, dropout=0.0):
    """The same by PyTorch's kernel (flash attention on CUDA); mask None is the causal triangle.

    On CPU it runs in float32 even under bf16 autocast: the kernel's bf16 backward pass was measured
    ten times slower there at this project's sizes, and cost a third of a training step.
    """
    if q.device.type == "cpu" and q.dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=q.device.type != "cpu" and
                        torch.is_autocast_enabled(q.device.type)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                              is_causal=mask is None)


class KVCache:
    """Keys and values of the tokens so far, a (B, n_kv_head, T, head_dim) pair per layer."""

    def __init__(self, cfg, batch_size, length, device, dtype):
        shape = (batch_size, cfg.n_kv_head, length, cfg.n_embd // cfg.n_head)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.n_layer)]
        self.values = [torch.zeros_like(k) for k in self.keys]

    def write(self, layer, k, v, positions=None):
        """Store k, v (B, n_kv_head, T, head_dim): from 0 on, or at positions[b]."""
        k, v = k.to(self.keys[layer].dtype), v.to(self.keys[layer].dtype)
        if positions is None:
            self.keys[layer][:, :, : k.shape[2]] = k
            self.values[layer][:, :, : v.shape[2]] = v
        else:
            rows = torch.arange(len(positions), device=positions.device)
            self.keys[layer][rows, :, positions] = k[:, :, 0]
            self.values[layer][rows, :, positions] = v[:, :, 0]

    def keep_rows(self, rows):
        """Forget the rows that have ended; rows: bool (B,) or int indices."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]


class Attention(nn.Module):
    """Causal self-attention; with n_kv_head < n_head several query heads share a key/value head."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        head_dim = cfg.n_embd // cfg.n_head
        self.qkv = nn.Linear(cfg.n_embd, (cfg.n_head + 2 * cfg.n_kv_head) * head_dim, bias=cfg.bias)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x, rope=None, cache=None, positions=None):
        cfg = self.cfg
        B, T, C = x.shape
        D = C // cfg.n_head
        q, k, v = self.qkv(x).split([C, cfg.n_kv_head * D, cfg.n_kv_head * D], dim=-1)
        q = q.view(B, T, cfg.n_head, D).transpose(1, 2)  # (B, n_head, T, D)
        k = k.view(B, T, cfg.n_kv_head, D).transpose(1, 2)  # (B, n_kv_head, T, D)
        v = v.view(B, T, cfg.n_kv_head, D).transpose(1, 2)  # (B, n_kv_head, T, D)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            cache.write(self.layer, k, v, positions)
        mask = None  # None stands for the causal triangle
        if positions is not None:
            # One query per row against the cache: it may look at keys up to its own position.
            # is_causal=True would align the triangle at the top left, and show it key 0 alone.
            length = int(positions.max()) + 1
            k = cache.keys[self.layer][:, :, :length].to(q.dtype)  # (B, n_kv_head, length, D)
            v = cache.values[self.layer][:, :, :length].to(q.dtype)
            mask = torch.arange(length, device=x.device) <= positions[:, None]  # (B, length)
            mask = mask[:, None, None, :]  # (B, 1, 1, length)
        if cfg.n_kv_head < cfg.n_head:
            k = k.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=1)  # (B, n_head, ., D)
            v = v.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=1)
        dropout = cfg.dropout if self.training else 0.0
        if cfg.attention == "fused":
            y = fused_attention(q, k, v, mask, dropout)  # (B, n_head, T, D)
        else:
            if mask is None:
                mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()  # (T, T)
            y = manual_attention(q, k, v, mask, dropout)  # (B, n_head, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.proj(y), dropout)


class MLP(nn.Module):
    """GELU: down(gelu(up(x))). SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, cfg):
        super().__init__()
        self.dropout = cfg.dropout
        self.up = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=cfg.bias)
        self.gate = (nn.Linear(cfg.n_embd, cfg.n_hidden, bias=cfg.bias)
                     if cfg.mlp == "swiglu" else None)
        self.down = nn.Linear(cfg.n_hidden, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        if self.gate is None:
            h = F.gelu(self.up(x), approximate="tanh")  # GPT-2's approximation
        else:
            h = F.silu(self.gate(x)) * self.up(x)
        return F.dropout(self.down(h), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.norm1, self.attn = make_norm(cfg), Attention(cfg, layer)
        self.norm2, self.mlp = make_norm(cfg), MLP(cfg)

    def forward(self, x, rope=None, cache=None, positions=None):
        x = x + self.attn(self.norm1(x), rope, cache, positions)
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    """Embeddings, blocks and the final norm: everything but a head."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd) if cfg.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm_f = make_norm(cfg)
        self.apply(self._init)
        # GPT-2: each block adds to the residual stream twice, so those projections start smaller,
        # and the stream's variance does not grow with depth.
        for name, p in self.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer))

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, cache=None, positions=None):
        """idx: (B, T) int64 -> (B, T, n_embd).

        With a cache and no positions (prefill), keys and values of all T tokens are stored. With
        positions (B,) (decoding), T is 1 and row b's token stands at positions[b].
        """
        B, T = idx.shape
        if T > self.cfg.block_size:
            raise UserError(f"a sequence of {T} tokens does not fit block_size "
                            f"{self.cfg.block_size}; shorten the text or train a longer model")
        where = torch.arange(T, device=idx.device) if positions is None else positions[:, None]
        x = self.wte(idx)  # (B, T, C)
        rope = None
        if self.wpe is not None:
            x = x + self.wpe(where)  # where: (T,) or (B, 1)
        else:
            head_dim = self.cfg.n_embd // self.cfg.n_head
            cos, sin = rope_angles(where, head_dim, self.cfg.rope_theta, x.dtype)
            # (T, D) broadcasts over rows and heads; (B, 1, D) needs a head dimension.
            rope = (cos, sin) if positions is None else (cos[:, None], sin[:, None])
        x = F.dropout(x, self.cfg.dropout, self.training)
        for block in self.blocks:
            x = block(x, rope, cache, positions)
        return self.norm_f(x)


class GPT(nn.Module):
    """A causal language model: trunk and unembedding."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.trunk = Trunk(cfg)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tied:
            self.lm_head.weight = self.trunk.wte.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, idx, cache=None, positions=None):
        """idx: (B, T) -> logits (B, T, V); logits[:, t] predicts token t + 1. See Trunk.forward."""
        return self.lm_head(self.trunk(idx, cache, positions))

    def make_cache(self, batch_size, length):
        weight = self.trunk.wte.weight
        return KVCache(self.cfg, batch_size, length, weight.device, weight.dtype)


def scalar_head(head, h):
    """One number per position, (B, T, C) -> (B, T), in the weights' own precision.

    Not in bf16, even under autocast: with 8 bits a score near 2 comes in steps of 0.016, close
    answers tie, and the differences of values that GAE takes are mostly rounding.
    """
    with torch.autocast(h.device.type, enabled=False):
        return head(h.to(head.weight.dtype)).squeeze(-1)


class ScalarModel(nn.Module):
    """A trunk with one number per position: reward model (read at the last token) or critic.

    `score_mean` and `score_std` are the raw scores' statistics on the SFT model's answers, measured
    once after training the reward model. `forward` returns (raw - mean) / std, so a critic copied
    from a reward model speaks in the units of the normalised scores from its first step on.
    """

    def __init__(self, cfg, trunk=None):
        super().__init__()
        self.cfg = cfg
        self.trunk = Trunk(cfg) if trunk is None else copy.deepcopy(trunk)
        self.head = nn.Linear(cfg.n_embd, 1)
        nn.init.zeros_(self.head.weight)  # a new head starts at zero: no opinion at all
        nn.init.zeros_(self.head.bias)
        self.register_buffer("score_mean", torch.zeros(()))
        self.register_buffer("score_std", torch.ones(()))

    def forward(self, idx):
        """idx: (B, T) -> (B, T) normalised, the value after reading tokens 0..t."""
        return (self.raw(idx) - self.score_mean) / self.score_std

    def raw(self, idx):
        """idx: (B, T) -> (B, T), the head's own output, in float32 at least."""
        return scalar_head(self.head, self.trunk(idx))

    def score(self, idx, lengths):
        """One raw score per row, (B,), read at the row's last real token, lengths - 1."""
        return self.raw(idx).gather(1, (lengths - 1)[:, None]).squeeze(1)


class ActorCritic(nn.Module):
    """A policy and its values, from two separate models or from one trunk with two heads."""

    def __init__(self, policy, critic=None):
        super().__init__()
        self.policy, self.critic = policy, critic
        if critic is None:
            self.value_head = nn.Linear(policy.cfg.n_embd, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, idx):
        """idx: (B, T) -> logits (B, T, V), values (B, T); values[:, t] has read tokens 0..t."""
        if self.critic is not None:
            return self.policy(idx), self.critic(idx)
        h = self.policy.trunk(idx)  # (B, T, C)
        return self.policy.lm_head(h), scalar_head(self.value_head, h)
