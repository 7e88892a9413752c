"""Serve prompts with vLLM: `python vllm_serve.py SPECIFICATION RESULT`.

The specification has `model`, `arguments` of LLM, `prompts` and `tokens`. The result is a folder
with `tokens.json` and, where they are returned, `routed-<i>.npy` as vLLM gives them. With `actions`
it does those in turn instead, and `actions.json` has what came of each: `["generate", TOKENS]`,
`["session", FOLDER, PATTERN...]` for an update in parts, or a method of the workers, its arguments
and a dictionary of those that have names.
"""

import json
import sys
from pathlib import Path

import numpy as np


def main():
    from vllm import LLM

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
    if "actions" in options:
        done = []
        for action in options["actions"]:
            done.append(act(llm, options["prompts"], *action))
            (result / "actions.json").write_text(json.dumps(done))
            print("ACTION", action, str(done[-1])[:200], flush=True)
        return
    completions = generate(llm, options["prompts"], options["tokens"])
    for number, completion in enumerate(completions):
        if completion.routed_experts is not None:
            np.save(result / f"routed-{number}.npy", completion.routed_experts)
    tokens = [list(map(int, completion.token_ids)) for completion in completions]
    (result / "tokens.json").write_text(json.dumps(tokens))


def generate(llm, prompts, tokens):
    """Return the likeliest completions."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
    )
    return [output.outputs[0] for output in outputs]


def act(llm, prompts, name, *arguments):
    """Do an action; return what came of it, or the error in words."""
    try:
        if name == "generate":
            completions = generate(llm, prompts, *arguments)
            return [list(map(int, completion.token_ids)) for completion in completions]
        if name == "session":
            folder, *patterns = arguments
            llm.init_weight_transfer_engine({"init_info": {}})
            llm.start_weight_update()
            for pattern in patterns:
                llm.update_weights({"update_info": {"folder": folder, "pattern": pattern}})
            return llm.finish_weight_update()
        named = arguments[-1] if arguments and isinstance(arguments[-1], dict) else {}
        positional = tuple(value for value in arguments if value is not named)
        return llm.collective_rpc(name, args=positional, kwargs=named)
    except Exception as error:
        return repr(error)


if __name__ == "__main__":  # the engine's processes are spawned and import this file
    main()
