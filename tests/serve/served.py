"""Continues prompts with vLLM: run by the Python of vLLM's environment, which has nothing else of this repository.

Reads from stdin a JSON object with `folder`, `prompts` (token ids), `tokens` (how many more) and `rounds`: for each,
`options` of vLLM's LLM, `times`, and perhaps whether prompts are `scored`. Writes to a file, for each time
of every round, the tokens, the number of prompt tokens that came from the prefix cache, and if they are scored the
log-probability of each prompt's tokens but the first.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def served(job: dict[str, Any], options: dict[str, Any], times: int, scored: bool = False) -> list[dict[str, Any]]:
    llm = LLM(job["folder"], **{"dtype": "float32", "block_size": 32, "disable_log_stats": True} | options)
    sampling = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False,
        prompt_logprobs=0 if scored else None,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    found = []
    for _ in range(times):
        results = llm.generate(prompts, sampling, use_tqdm=False)
        tokens = [list(result.outputs[0].token_ids) for result in results]
        cached = sum(result.num_cached_tokens or 0 for result in results)
        scores = [
            [next(iter(each.values())).logprob for each in (result.prompt_logprobs or [])[1:]] for result in results
        ]
        found.append({"tokens": tokens, "cached": cached, "scores": scores})
    llm.llm_engine.engine_core.shutdown()
    return found


if __name__ == "__main__":
    told = json.load(sys.stdin)
    rounds = [served(told, **entry) for entry in told["rounds"]]
    Path(sys.argv[1]).write_text(json.dumps(rounds))
