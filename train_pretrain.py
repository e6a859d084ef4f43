r"""Pretraining: predict the next token of raw text. The first stage; all else starts from it.

The text is one long stream of tokens, cut into random blocks. No masks, no special tokens: the base
model learns the language and the facts, and every voice that the text speaks in.

Left out on purpose: gradient accumulation over devices, data streaming, muP, evaluation suites.

On CPU:  python train_pretrain.py          (7 CPU-minutes; held-out loss about 0.71 nats per token)
On GPU:  python train_pretrain.py --size gpt2 --block_size 1024 --batch_size 32 --lr 6e-4 \
             --num_steps 100000 --text my.txt --tokenizer gpt2          (not timed)
"""

from dataclasses import dataclass

import torch

from minirlhf.batches import random_blocks, token_streams
from minirlhf.masked import token_logprobs
from minirlhf.model import GPT, ModelConfig, named_config
from minirlhf.tokenizer import Tokenizer
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.formats import read_documents
from minirlhf.plumbing.optim import lr_at, make_optimizer, set_lr
from minirlhf.plumbing.runs import due, start_run
from minirlhf.look.plot import draw_curves


@dataclass
class Config:
    text: str = "data/toy/pretrain.txt"  # text files to learn from, separated by commas
    tokenizer: str = "data/toy/tokenizer.json"  # a tokenizer.json, or gpt2
    out: str = "out/pretrain"  # the run's folder
    size: str = ""  # a published size such as gpt2; keeps block_size, dropout, attention from below
    n_layer: int = 4  # blocks; above 0
    n_head: int = 4  # attention heads; above 0
    n_kv_head: int = 0  # key/value heads, fewer than n_head for grouped queries (0: n_head)
    n_embd: int = 128  # width of the residual stream; above 0
    n_hidden: int = 344  # width of the MLP (0: 4 * n_embd)
    block_size: int = 160  # longest sequence in tokens; above 1
    norm: str = "rmsnorm"  # layernorm | rmsnorm
    mlp: str = "swiglu"  # gelu | swiglu
    positions: str = "rope"  # learned | rope
    bias: bool = False  # biases in linear layers
    tied: bool = True  # share embedding and unembedding
    dropout: float = 0.0  # share of activations dropped in training; up to 1
    attention: str = "fused"  # fused | manual
    num_steps: int = 4500  # optimizer steps; above 0
    batch_size: int = 8  # blocks per step; above 0
    lr: float = 5e-3  # peak learning rate
    warmup: int = 100  # steps until the peak
    final_lr: float = 0.05  # last learning rate, as a share of the peak
    weight_decay: float = 0.1  # of matrices
    grad_clip: float = 1.0  # largest norm of the gradient; above 0
    eval_every: int = 500  # steps between evaluations; above 0
    save_every: int = 1000  # steps between checkpoints; above 0
    seed: int = 0  # of weights and data order
    device: str = ""  # cuda, cpu or mps (default: cuda where there is one)
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16, of the matrix products
    threads: int = 1  # CPU threads; one is the most efficient at this size
    tensorboard: bool = False  # write the log for TensorBoard, too (pip install tensorboard)
    resume: bool = False  # go on with the run in out, with its options
    overwrite: bool = False  # start anew where out holds a run


def loss_of(model, batch, cfg):
    """Negative log-likelihood in nats, summed over all tokens but the first of each row: ()."""
    tokens = batch["tokens"]  # (B, T)
    logits = model(tokens)  # (B, T, V)
    logprobs = token_logprobs(logits[:, :-1], tokens[:, 1:])  # (B, T-1)
    return -logprobs.sum(), {}


@torch.no_grad()
def evaluate(model, blocks, cfg, run):
    """Loss in nats per token on blocks (N, T) of held-out text."""
    model.eval()
    total = 0.0
    for part in blocks.split(cfg.batch_size):
        batch = {"tokens": part.to(run.device)}
        with run.autocast():
            losses, _ = loss_of(model, batch, cfg)
        total += losses.sum().item()
    model.train()
    return {"val_loss": total / blocks[:, 1:].numel()}


def shape_of(cfg):
    """The model's config. UserError where --size names one and another option would change it."""
    own = {name: getattr(cfg, name) for name in ModelConfig.__annotations__ if hasattr(cfg, name)}
    if not cfg.size:
        return ModelConfig(**own)
    model_cfg = named_config(cfg.size)
    for name, value in own.items():
        free = name in ("block_size", "dropout", "attention")
        if not free and value not in (getattr(Config, name), getattr(model_cfg, name)):
            raise UserError(f"--size {cfg.size} has {getattr(model_cfg, name)} for --{name}; leave "
                            "one of the two out")
    model_cfg.block_size = cfg.block_size
    model_cfg.dropout, model_cfg.attention = cfg.dropout, cfg.attention
    return model_cfg


def main(cfg):
    # 1. Set-up: the folder, the tokenizer, the model's shape.
    run = start_run(cfg, needs={}, reads=["text", "tokenizer"])
    run.tokenizer = Tokenizer.open(cfg.tokenizer)
    model_cfg = shape_of(cfg)
    model_cfg.vocab_size = run.tokenizer.n_vocab
    run.check_size(model_cfg)

    # 2. Data: two streams of tokens; documents with 2% of the tokens are held out.
    documents = (text for path in cfg.text.split(",") for text in read_documents(path))
    train, rest = token_streams(run.tokenizer, documents, 0.02, run.data_order)  # (N,), (M,)
    starts = random_blocks(train, cfg.num_steps, cfg.batch_size, cfg.block_size, run.data_order)
    if len(rest) < cfg.block_size:
        raise UserError(f"{cfg.text} gives {len(train) + len(rest)} tokens, of which {len(rest)} "
                        f"could be held out in whole documents; --block_size {cfg.block_size} "
                        f"needs {cfg.block_size} of them: give about {50 * cfg.block_size} tokens "
                        "or more, in 50 documents or more, with blank lines between")
    held_out = rest[: len(rest) // cfg.block_size * cfg.block_size].view(-1, cfg.block_size)[:32]
    held_out = held_out.long()  # (at most 32, T)

    # 3. Model and optimizer.
    model = GPT(model_cfg).to(run.device)
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    print(f"data   | {len(train):,} training tokens, {len(rest):,} held out, "
          f"{cfg.num_steps * cfg.batch_size * cfg.block_size / len(train):.1f} epochs")
    print(f"model  | {sum(p.numel() for p in model.parameters()):,} parameters")

    longest = train[: cfg.block_size].long().repeat(cfg.batch_size, 1)  # (B, T)
    run.preflight(model, lambda: loss_of(model, {"tokens": longest.to(run.device)}, cfg)[0],
                  options="--batch_size or --block_size")
    run.restore(cfg.num_steps, model=model, optimizer=optimizer)

    # 4. The loop.
    model.train()
    num_tokens = 0
    for step in run.steps():
        blocks = train[starts[step - 1][:, None] + torch.arange(cfg.block_size)].long()  # (B, T)
        set_lr(optimizer, lr_at(step - 1, cfg.num_steps, cfg.lr, cfg.warmup, cfg.final_lr))
        denominator = blocks[:, 1:].numel()  # each block's first token is predicted by nothing
        batch = {"tokens": blocks.to(run.device)}
        with run.autocast():
            losses, _ = loss_of(model, batch, cfg)
        loss = losses.sum() / denominator
        run.check_finite(model, batch, loss=loss)
        run.scaler.scale(loss).backward()
        num_tokens += blocks.numel()
        run.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        run.check_finite(model, batch, grad_norm=grad_norm)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)

        if due(step, cfg.eval_every, cfg.num_steps):
            run.log(num_tokens, loss=loss, **evaluate(model, held_out, cfg, run),
                    grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])
            num_tokens = 0
        if run.save_due():
            run.save(model=model, optimizer=optimizer)
    draw_curves(run.folder)
    return run.history


if __name__ == "__main__":
    command_line(main, Config, __doc__)
