"""Run texts through a model of transformers, and record how it routes them."""

from __future__ import annotations

import codecs
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from moetuner._checks import one_of, shown
from moetuner.files import LONGEST_TEXT, naming, size_of
from moetuner.files.lines import fields_of
from moetuner.torch.record.capture import UNNAMED, capture
from moetuner.trace import RoutingTrace

# Surrogates, the halves of UTF-16 characters: JSON can contain one alone, no encoding can.
SURROGATE = re.compile("[\ud800-\udfff]")

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Document(NamedTuple):
    """A text, and its group; None without one."""

    text: str
    group: str | None


def read_texts(path: str | Path) -> Iterator[Document]:
    """Yield the texts of a file: one per line, or JSON objects with "text" and perhaps "group".

    The file is of JSON lines if its first line begins with a brace. Empty lines and texts are left
    out. An error names file and line.
    """
    is_json: bool | None = None
    size_of(Path(path))
    with Path(path).open("rb") as file, naming(path):
        for number, raw in enumerate(iter(lambda: file.readline(LONGEST_TEXT + 1), b""), 1):
            if len(raw) > LONGEST_TEXT:
                raise ValueError(f"line {number}: must have at most {LONGEST_TEXT} bytes")
            line = raw.removeprefix(codecs.BOM_UTF8).strip()
            if not line:
                continue
            is_json = line.startswith(b"{") if is_json is None else is_json
            try:
                fields = fields_of(line, number) if is_json else {"text": line.decode().strip()}
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number}: must be UTF-8: {error.reason}") from None
            text, group = fields.get("text"), fields.get("group")
            if not isinstance(text, str) or not (group is None or isinstance(group, str)):
                rule = 'an object with "text" and perhaps "group", both texts'
                raise ValueError(f"line {number}: must be {rule}, got {shown(fields)}")
            for value in filter(None, (text, group)):
                if (surrogate := SURROGATE.search(value)) is not None:
                    letter = f"half of a letter (\\u{ord(surrogate[0]):x})"
                    raise ValueError(f"line {number}: must be whole letters, got {letter}")
            if text.strip():
                yield Document(text, group)


@contextmanager
def _loading(model: str) -> Iterator[None]:
    """Raise errors of a model's files as ValueError with its name: libraries raise any kind."""
    try:
        yield
    except (ImportError, MemoryError, OSError, RuntimeError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{model}: cannot be loaded: {type(error).__name__}: {text}") from error


def collect(
    model: str,
    dataset: str | Path,
    out: str | Path,
    *,
    max_tokens: int = 100_000,
    batch_size: int = 8,
    sequence_length: int = 1024,
    dtype: str = "auto",
    device: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> RoutingTrace:
    """Record the routing of texts by a model of transformers.

    Parameters
    ----------
    model
        Folder of the model and its tokenizer, or their name on the hub.
    dataset
        Texts, as ``read_texts`` reads them.
    out
        Trace to write, ending in ``.safetensors``.
    max_tokens
        Tokens after which to stop.
    batch_size
        Texts in a batch.
    sequence_length
        Longest text, in tokens; longer ones are cut.
    dtype
        Type of the weights: one of "auto" (as they are stored), "float32", "bfloat16", "float16".
    device
        Device to run on; "auto" spreads the model over all devices. By default CUDA if present.
    progress
        Called with the number of tokens after every batch.

    Raises
    ------
    ImportError
        If transformers is missing.
    ValueError
        If the model has no MoE layers or is damaged, or the dataset has no texts.
    OSError
        If model, tokenizer or dataset cannot be read.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError("collecting needs transformers: pip install transformers") from None
    one_of("dtype", dtype, DTYPES)
    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    documents = read_texts(dataset)
    batch = list(islice(documents, batch_size))
    if not batch:
        raise ValueError(f"{dataset}: must hold at least one text")
    device_map = {"device_map": "auto"} if device == "auto" else {}
    with _loading(model):
        tokenizer = library.AutoTokenizer.from_pretrained(model)
        network = library.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **device_map)
    if not device_map:
        network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Logits of every token would take more memory than the model's own work.
    arguments = inspect.signature(network.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}
    first_device = next(network.parameters()).device
    tokens_read, name = 0, Path(model).resolve().name
    with torch.inference_mode(), capture(network.eval(), path=out, name=name) as recorder:
        while batch and tokens_read < max_tokens:
            rows, groups = [], []
            for document in batch:
                length = min(sequence_length, max_tokens - tokens_read)
                ids = tokenizer(document.text)["input_ids"][:length]
                if ids:
                    rows.append(torch.tensor(ids))
                    groups.append(document.group or UNNAMED)
                    tokens_read += len(ids)
            if rows:
                padded = pad_sequence(rows, batch_first=True, padding_value=-1).to(first_device)
                mask, tokens = (padded >= 0).long(), padded.clamp(min=0)
                with recorder.group(groups):
                    network(input_ids=tokens, attention_mask=mask, use_cache=False, **last_only)
            if progress is not None:
                progress(tokens_read)
            batch = list(islice(documents, batch_size))
    return recorder.trace()
