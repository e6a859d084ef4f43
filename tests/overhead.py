"""What saving and checking cost a PPO run: their share of its processor time.

    python tests/overhead.py                    (with any options of train_ppo.py)

Counted are the checkpoints (written, flushed, read back), the looks for NaN, the hashes of what the
run reads, and the checks of what it loads; not preflight, which is shown beside them.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_ppo  # noqa: E402
from minirlhf.plumbing import checkpoints, runs  # noqa: E402
from minirlhf.plumbing.config import command_line  # noqa: E402

COUNTED = [(runs.Run, "save"), (runs.Run, "check_finite"), (runs, "hash_inputs"),
           (checkpoints, "check_model"), (runs.Run, "preflight")]


def main(cfg):
    seconds = {}

    def timed(owner, name):
        work = getattr(owner, name)

        def measured(*args, **options):
            started = time.process_time()
            try:
                return work(*args, **options)
            finally:
                seconds[name] = seconds.get(name, 0) + time.process_time() - started
        setattr(owner, name, measured)

    for owner, name in COUNTED:
        timed(owner, name)
    started = time.process_time()
    train_ppo.main(cfg)
    total = time.process_time() - started
    preflight = seconds.pop("preflight")
    print(f"{total:.1f} CPU-seconds in all, of which saving and checking "
          f"{100 * sum(seconds.values()) / total:.2f}%: "
          + ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in seconds.items())
          + f"; preflight {100 * preflight / total:.1f}%")


if __name__ == "__main__":
    command_line(main, train_ppo.Config, __doc__)
