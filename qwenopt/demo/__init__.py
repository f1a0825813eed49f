"""Two tiny Qwen3 models that come with the package, and everything that made them.

``demo_model("dense")`` and ``demo_model("moe")`` give trained ``Qwen3ForCausalLM`` and
``Qwen3MoeForCausalLM`` models with their tokenizer.  They answer one synthetic task (a chain of
steps modulo ten) in Qwen3's chat format, with and without thinking, and run on a laptop CPU.

Importing this package loads neither torch nor transformers; the functions import them when called.
"""

from qwenopt.demo.load import DEMO_NAMES, demo_model, demo_path

__all__ = ["DEMO_NAMES", "demo_model", "demo_path"]
