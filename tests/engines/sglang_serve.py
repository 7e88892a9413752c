"""Serve prompts with SGLang: `python sglang_serve.py SPECIFICATION RESULT`.

The specification has `model`, `arguments` of Engine, `prompts` and `tokens`. With a recorder's mode
among the arguments the recorder runs while the prompts are served, and its dump stays in the
folder RESULT. `tokens.json` and `routed-<i>.npy` come from the answers, which are kept as they
are in `responses.json`. With `actions` it does those in turn instead, and `actions.json` has what
came of each: `["generate", TOKENS]`, `["disk", FOLDER]`, or `["tensors", FOLDER, PATTERN]`.
"""

import base64
import json
import os
import sys
from pathlib import Path

import numpy as np
import weights


def main():
    options = json.loads(Path(sys.argv[1]).read_text())
    result = Path(sys.argv[2])
    os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"] = str(result)
    import sglang

    engine = sglang.Engine(
        **{
            "model_path": options["model"],
            "device": "cpu",
            "dtype": "float32",
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "disable_radix_cache": True,
            "disable_cuda_graph": True,
            "max_total_tokens": 4096,
            "context_length": 256,
            "mem_fraction_static": 0.3,
            "watchdog_timeout": 900,
            "log_level": "info",
            "enable_return_routed_experts": True,
            **options["arguments"],
        }
    )
    if "actions" in options:
        done = []
        for action in options["actions"]:
            done.append(act(engine, options["prompts"], *action))
            (result / "actions.json").write_text(json.dumps(done))
            print("ACTION", action, str(done[-1])[:200], flush=True)
        engine.shutdown()
        return
    records = "expert_distribution_recorder_mode" in options["arguments"]
    if records:
        engine.start_expert_distribution_record()
    answers = engine.generate(
        input_ids=options["prompts"],
        sampling_params={"temperature": 0, "max_new_tokens": options["tokens"], "ignore_eos": True},
        return_routed_experts=True,
    )
    if records:
        engine.stop_expert_distribution_record()
        engine.dump_expert_distribution_record()
    config = json.loads((Path(options["model"]) / "config.json").read_text())
    shape = (config["num_hidden_layers"], config["num_experts_per_tok"])
    for number, answer in enumerate(answers):
        raw = base64.b64decode(answer["meta_info"]["routed_experts"])
        np.save(result / f"routed-{number}.npy", np.frombuffer(raw, np.int32).reshape(-1, *shape))
    (result / "responses.json").write_text(json.dumps(answers))
    (result / "tokens.json").write_text(json.dumps([answer["output_ids"] for answer in answers]))
    engine.shutdown()


def act(engine, prompts, name, *arguments):
    """Do an action; return what came of it."""
    if name == "generate":
        sampling = {"temperature": 0, "max_new_tokens": arguments[0], "ignore_eos": True}
        answers = engine.generate(input_ids=prompts, sampling_params=sampling)
        return [answer["output_ids"] for answer in answers]
    if name == "disk":
        return engine.update_weights_from_disk(*arguments)[0]
    # Without a beginning and an end, 0.5.23 changes nothing.
    engine.begin_weight_update()
    succeeded = engine.update_weights_from_tensor(list(weights.tensors(*arguments)))[0]
    engine.end_weight_update()
    return succeeded


if __name__ == "__main__":  # the engine's processes are spawned and import this file
    main()
