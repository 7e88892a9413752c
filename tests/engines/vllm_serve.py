"""Serve prompts with vLLM: `python vllm_serve.py SPECIFICATION RESULT`.

The specification has `model`, `arguments` of LLM, `prompts` and `tokens`. The result is a folder
with `tokens.json` and, where they are returned, `routed-<i>.npy` as vLLM gives them.
"""

import json
import sys
from pathlib import Path

import numpy as np


def main():
    from vllm import LLM, SamplingParams

    options = json.loads(Path(sys.argv[1]).read_text())
    result = Path(sys.argv[2])
    llm = LLM(
        **{
            "model": options["model"],
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "seed": 0,
            "enable_return_routed_experts": True,
            **options["arguments"],
        }
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in options["prompts"]],
        SamplingParams(temperature=0, max_tokens=options["tokens"], ignore_eos=True),
    )
    completions = [output.outputs[0] for output in outputs]
    for number, completion in enumerate(completions):
        if completion.routed_experts is not None:
            np.save(result / f"routed-{number}.npy", completion.routed_experts)
    tokens = [list(map(int, completion.token_ids)) for completion in completions]
    (result / "tokens.json").write_text(json.dumps(tokens))


if __name__ == "__main__":  # the engine's processes are spawned and import this file
    main()
