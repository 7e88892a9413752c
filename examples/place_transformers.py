"""Record a model of transformers, ask whether a placement pays, and renumber its experts.

    pip install 'moetuner[torch]'
    python examples/place_transformers.py                # a tiny model of random weights
    python examples/place_transformers.py --model FOLDER --texts FILE --out placed

Enters: a Mixture-of-Experts model and texts, one on each line. Leaves: the same model with experts
in the order of a placement, so that an engine which puts contiguous experts on a device runs it.
Its logits are those of before.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

import moetuner as mt
from moetuner.torch import apply_placement, capture


def tiny_model() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """Make a model of 4 layers and 16 experts, top-2, and batches of prompts of two kinds."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=2,
        eos_token_id=0,
    )
    # Either kind has half of the words for itself, as two languages have.
    words = torch.randint(1, 256, (8, 16, 32))
    words[:, ::2] += 256
    return OlmoeForCausalLM(config).eval(), list(words)


def load(folder: Path, texts: Path) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """Load a model, and the tokens [1,tokens] of each line of a file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [line for line in texts.read_text().splitlines() if line.strip()]
    prompts = [tokenizer(line, return_tensors="pt").input_ids for line in lines]
    return AutoModelForCausalLM.from_pretrained(folder).eval(), prompts


def main() -> None:
    """Capture, advise, solve, apply, and compare the logits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="FOLDER")
    parser.add_argument("--texts", type=Path, metavar="FILE")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="Save the renumbered model.")
    options = parser.parse_args()
    if (options.model is None) != (options.texts is None):
        parser.error("--model and --texts go together")
    model, prompts = tiny_model() if options.model is None else load(options.model, options.texts)
    topology = mt.Topology(options.devices)

    # Every row of a batch is a sequence of the trace.
    with torch.inference_mode(), capture(model) as recorder:
        for prompt in prompts:
            model(prompt)
    trace = recorder.trace()
    print(trace)

    print(mt.advise(trace, topology, engine="transformers").sentence)

    # Renumbering knows no copies and as many experts on every device: the engine's settings.
    statistics = mt.RoutingStatistics.from_trace(trace, window=512)
    settings = mt.engine_settings("transformers", statistics, topology)
    result = mt.solve(mt.Problem(statistics, topology, **settings))

    with torch.inference_mode():
        before = model(prompts[0]).logits
        apply_placement(model, result.placement)
        after = model(prompts[0]).logits
    print(f"largest difference of a logit: {(after - before).abs().max():.1e}")
    if options.out is not None:
        model.save_pretrained(options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
