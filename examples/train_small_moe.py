"""Train a small Mixture-of-Experts language model and record its routing.

Enters: text that a Python installation already holds, namely the standard library, the C++
headers of torch, and the translation catalogues of three packages, cut into documents.
Leaves: a trace in safetensors, the experts that the trained routers chose for every byte of
documents that the model was not trained on. The `moetuner demo` trace was made this way.

    pip install moetuner torch "transformers>=5" django sphinx plone.app.locales
    python examples/train_small_moe.py --out small-moe.safetensors

Takes about five minutes on one core. Steps, seed and thread count are fixed, so a second run with
the same packages on the same machine gives the same trace; elsewhere it gives one of the same kind.
"""

import argparse
import ast
import gettext
import math
import sysconfig
import time
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

import moetuner as mt

LAYERS, EXPERTS, TOP_K = 8, 16, 2
SEQUENCE_BYTES = 256
SEQUENCES_PER_KIND = 2  # in one training batch
TRACED_PER_KIND = 40  # 6 kinds x 40 sequences x 256 bytes = 61 440 tokens
BALANCE_WEIGHT = 0.01
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50

LANGUAGES = {"french": "fr", "russian": "ru", "japanese": "ja"}
CATALOGUE_PACKAGES = ("Django", "Sphinx", "plone.app.locales")
CATALOGUE_DOCUMENT_BYTES = 1024
# Tests and installed packages are not the library, `encodings` is tables, and `pydoc_data` is the
# English that `english_prose` uses.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}

Documents = dict[str, str]  # name -> text


def library_sources() -> Documents:
    """Return the modules of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (p.relative_to(root) for p in sorted(root.rglob("*.py")))
    chosen = [p for p in paths if not SKIPPED_FOLDERS.intersection(p.parts)]
    return {p.as_posix(): (root / p).read_text("utf-8", "replace") for p in chosen}


def torch_headers() -> Documents:
    """Return the C++ headers of torch's core library."""
    root = Path(torch.__file__).parent / "include"
    paths = sorted((root / "c10").rglob("*.h"))
    return {p.relative_to(root).as_posix(): p.read_text("utf-8", "replace") for p in paths}


def english_prose(sources: Documents) -> Documents:
    """Return pydoc's topics and, under the module's name, the long docstrings of `sources`."""
    documents = dict(sorted(topics.items()))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name, source in sources.items():
        nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, documented))
        docstrings = [text for n in nodes if len(text := ast.get_docstring(n) or "") > 300]
        if docstrings:
            documents[name] = "\n\n".join(docstrings)
    return documents


def translations(language: str) -> Iterator[str]:
    """Yield the translated messages of the catalogue packages, each once."""
    seen: set[str] = set()
    for package in CATALOGUE_PACKAGES:
        for path in sorted(metadata.files(package) or []):
            if path.suffix != ".mo" or path.parts[-3:-1] != (language, "LC_MESSAGES"):
                continue
            with Path(str(path.locate())).open("rb") as file:
                # gettext has no public way to list a catalogue.
                messages = gettext.GNUTranslations(file)._catalog
            messages.pop("", None)  # the header
            for message in messages.values():
                if message not in seen:
                    seen.add(message)
                    yield message


def catalogue_prose(language: str) -> Documents:
    """Return runs of consecutive messages: whole catalogues are too few to hold some out."""
    documents: Documents = {}
    text = ""
    for message in translations(language):
        text += message + "\n"
        if len(text.encode()) >= CATALOGUE_DOCUMENT_BYTES:
            documents[f"{language}-{len(documents)}"] = text
            text = ""
    return documents


def gather() -> dict[str, Documents]:
    """Return the documents of each kind of text; the order of the kinds numbers the groups."""
    sources = library_sources()
    kinds = {"python": sources, "c++": torch_headers(), "english": english_prose(sources)}
    return kinds | {kind: catalogue_prose(code) for kind, code in LANGUAGES.items()}


def split(documents: Documents) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the training bytes in one piece and the held-out documents one by one.

    The name decides, so a module's source and its docstrings, which are English text and Python
    text at once, are on the same side.
    """
    train, held_out = [], []
    for name, text in documents.items():
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        if zlib.crc32(name.encode()) % 5:
            train.append(data)
        elif len(data) >= SEQUENCE_BYTES:
            held_out.append(data)
    return np.concatenate(train), held_out


def passage(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return SEQUENCE_BYTES consecutive bytes from a random place."""
    start = rng.integers(len(data) - SEQUENCE_BYTES + 1)
    return data[start : start + SEQUENCE_BYTES]


class RoutedModel:
    """A Mixtral-like model over bytes that keeps what its routers said in the last forward pass."""

    def __init__(self) -> None:
        config = MixtralConfig(
            vocab_size=256,
            hidden_size=96,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            max_position_embeddings=SEQUENCE_BYTES,
            tie_word_embeddings=True,
            use_cache=False,
        )
        self.network = MixtralForCausalLM(config)
        self.logits: list[torch.Tensor] = []  # per layer [tokens, experts]
        self.experts: list[torch.Tensor] = []  # per layer [tokens, top_k]
        for layer in self.network.model.layers:
            layer.mlp.gate.register_forward_hook(self._keep)

    def _keep(
        self, _router: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]
    ) -> None:
        logits, _scores, experts = output
        self.logits.append(logits)
        self.experts.append(experts)

    def byte_losses(self, sequences: np.ndarray) -> torch.Tensor:
        """Return the loss of every next byte [sequences, SEQUENCE_BYTES - 1]."""
        self.logits, self.experts = [], []
        inputs = torch.from_numpy(sequences.astype(np.int64))
        predicted = self.network(input_ids=inputs).logits[:, :-1]
        return functional.cross_entropy(predicted.mT, inputs[:, 1:], reduction="none")

    def balance_loss(self) -> torch.Tensor:
        """Return E * sum_e f_e p_e, mean over layers: 1 when each layer uses its experts evenly.

        The loss built into transformers pools the layers first, so it balances the expert index
        and leaves each layer skewed.
        """
        losses = []
        for logits, experts in zip(self.logits, self.experts, strict=True):
            share = torch.bincount(experts.flatten(), minlength=EXPERTS) / experts.numel()
            losses.append(EXPERTS * (share * logits.softmax(-1).mean(0)).sum())
        return torch.stack(losses).mean()


def train(
    model: RoutedModel,
    texts: dict[str, np.ndarray],
    checks: dict[str, np.ndarray],
    steps: int,
    rng: np.random.Generator,
) -> None:
    """Train on `texts`, all kinds equally, and print the loss on `checks` ten times."""
    network = model.network
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, 0.55 + 0.45 * math.cos(math.pi * step / steps)),
    )
    print("  step " + "".join(f"{kind:>10}" for kind in checks) + "   balance     CPU")
    for step in range(1, steps + 1):
        batch = [passage(text, rng) for text in texts.values() for _ in range(SEQUENCES_PER_KIND)]
        loss = model.byte_losses(np.stack(batch)).mean()
        balance = model.balance_loss()
        optimizer.zero_grad()
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0 or step == steps:
            with torch.inference_mode():
                losses = [model.byte_losses(check).mean().item() for check in checks.values()]
            row = "".join(f"{value:10.3f}" for value in losses)
            print(f"{step:6d} {row}{balance.item():10.2f}{time.process_time():6.0f} s", flush=True)


def record(model: RoutedModel, sequences: np.ndarray) -> np.ndarray:
    """Return the chosen experts [tokens, layers, top_k] of `sequences`, in order."""
    rows = []
    with torch.inference_mode():
        for batch in np.array_split(sequences, max(1, len(sequences) // 12)):
            model.byte_losses(batch)
            rows.append(torch.stack(model.experts, dim=1).to(torch.uint8).numpy())
    return np.concatenate(rows)


def main() -> None:
    """Gather, train, record and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)

    texts, passages = {}, {}
    for kind, documents in gather().items():
        texts[kind], held_out = split(documents)
        chosen = rng.permutation(len(held_out))[:TRACED_PER_KIND]
        passages[kind] = np.stack([passage(held_out[i], rng) for i in chosen])
        print(f"{kind:9} {len(texts[kind]):9,} bytes to train, {len(held_out):4} held out")

    model = RoutedModel()
    train(model, texts, {k: p[:12] for k, p in passages.items()}, options.steps, rng)

    # Served requests of different kinds arrive mixed, not one kind after the other.
    sequences = np.concatenate(list(passages.values()))
    group = np.repeat(np.arange(len(passages)), [len(p) for p in passages.values()])
    order = rng.permutation(len(sequences))
    mt.RoutingTrace.from_arrays(
        record(model, sequences[order]),
        num_experts=EXPERTS,
        sequence=np.repeat(np.arange(len(order), dtype=np.int32), SEQUENCE_BYTES),
        group=np.repeat(group[order].astype(np.int16), SEQUENCE_BYTES),
        group_names=list(passages),
        model=f"small-moe-{LAYERS}x{EXPERTS}-top{TOP_K}",
    ).save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
