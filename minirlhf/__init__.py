"""minirlhf: a from-scratch, readable reference implementation of RLHF."""
