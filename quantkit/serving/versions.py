# SPDX-License-Identifier: Apache-2.0
"""The engines, and the version of each whose loaders were read. Light, so that the command line has their names."""

VERSIONS = {
    "vllm": "vLLM 0.32",
    "sglang": "SGLang 0.5.23",
    "transformers": "transformers 5.23.0",
    "gptqmodel": "GPTQModel 7.7.0",
    "llama.cpp": "llama.cpp's converter",
}
