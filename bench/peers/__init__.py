"""Other programs that run Qwen3 on the CPU, measured beside this one: `python -m bench.peers --help`.

Each is installed into an environment of its own outside the repository and kept loaded in a process of its own; the
processes take turns, so that whatever slows the machine slows all of them.
"""
