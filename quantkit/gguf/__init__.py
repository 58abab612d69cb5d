# SPDX-License-Identifier: Apache-2.0
"""A model as one GGUF file, as llama.cpp and what is built on it read it."""
