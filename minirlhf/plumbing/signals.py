"""Ctrl-C and SIGTERM: a training loop finishes its step and saves; a second one leaves at once."""

import signal
import sys
import threading


class Stopped(KeyboardInterrupt):
    """The user, or the system, asked the program to end: by the signal `number`."""

    def __init__(self, number, message="stopped"):
        super().__init__(message)
        self.number = number


patient = False  # whether a loop is at work that looks at `received` after each step
received = None  # the signal's number, once one came


def on_signal(number, _):
    global received
    if not patient or received is not None:
        raise Stopped(number)
    received = number
    print("\nstopping after this step (once more: at once, and this step is lost)",
          file=sys.stderr, flush=True)


def listen():
    """Handle both signals; only the main program does so, a notebook keeps its own ways."""
    if threading.current_thread() is not threading.main_thread():
        return  # Python lets no other thread do it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
