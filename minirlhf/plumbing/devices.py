"""Where the arithmetic runs: the device, the precision of its matrix products, its threads."""

import os

import torch

from minirlhf.plumbing.errors import UserError


def pick_device(name=""):
    """The device that `--device` names: cpu, cuda, cuda:1 or mps; without a name, cuda where there
    is one, else cpu.

    mps is the GPU of Apple's computers. At this project's sizes it need not be the faster one, so
    it is taken only where it is asked for.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: no such device; expected cpu, cuda, cuda:0 or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no GPU of Apple's; use --device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    if device.type != "cuda" and (device.index or 0) > 0:
        raise UserError(f"--device {name}: there is one such device; use --device {device.type}")
    return device


def pick_dtype(name, device):
    """The autocast type: 'auto' is bf16 on CUDA and on CPUs with bf16 instructions, else float32.

    A CPU without them emulates bf16 several times more slowly than float32; on Apple's GPUs, of
    which the older ones lack it, bf16 has to be asked for.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        has_bf16 = device.type == "cuda" or (device.type == "cpu"
                                             and torch.cpu._is_avx512_bf16_supported())
        return torch.bfloat16 if has_bf16 else torch.float32
    if name not in names:
        raise UserError(f"--dtype {name}: expected auto, {', '.join(names)}")
    return names[name]


def set_threads(threads):
    """Let PyTorch use so many CPU threads (0: as many as it likes).

    More than there are cores only wait for each other, and of many thousands the process dies.
    """
    most = max(64, os.cpu_count() or 1)
    if threads > most:
        raise UserError(f"--threads {threads}: expected at most {most}; this machine has "
                        f"{os.cpu_count()} cores")
    if threads > 0:
        torch.set_num_threads(threads)


def autocast(device, dtype):
    """The context in which models run forward: matrix products in `dtype`, sums in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def memory_of(device):
    """Bytes of memory that the device has in all; None where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def random_states(device):
    """What PyTorch's own random numbers go on from (dropout's, for one), on CPU and device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_random_states(states):
    """The inverse of `random_states`."""
    torch.set_rng_state(states["cpu"])
    for kind in states.keys() - {"cpu"}:
        getattr(torch, kind).set_rng_state(states[kind])
