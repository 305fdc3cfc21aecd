"""Master bundles: a folder of weights.safetensors (LoRA and functional rows), vocabulary.json and card.md; and merging one
into its base weights to a single GGUF that plain llama.cpp loads. numpy and gguf only: no torch, seconds.

It knows the layout of llama-family GGUF files and of bundles. It does not train, and it does not run a model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmgraph.assets import ELSEWHERE, atomic, digest_of
from lmgraph.errors import AssetError, VocabularyMismatch
from lmgraph.tokens import Vocabulary

Progress = Callable[[int, int], None]
NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
"""names of linear layers: Hugging Face -> GGUF"""
KEY = "lmgraph.vocabulary"
CONTROL, NORMAL = 3, 1
"""token types of GGUF (llama.cpp: LLAMA_TOKEN_TYPE_*)"""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. `metrics` holds what its card reports."""

    name: str
    folder: Path
    vocabulary: Vocabulary
    metrics: Mapping[str, Any]

    @property
    def weights(self) -> Path:
        """LoRA and rows."""
        return self.folder / "weights.safetensors"

    @property
    def walk(self) -> Path:
        """What the master puts on along a walk (`adapters.between`); not every bundle has it."""
        return self.folder / "walk.safetensors"

    @property
    def digest(self) -> str:
        """sha256 over weights and vocabulary: what a merged GGUF is named by."""
        return hashlib.sha256((digest_of(self.weights) + self.vocabulary.digest).encode()).hexdigest()


def builtin_folder() -> Path:
    """Where the bundles inside the package lie."""
    return Path(__file__).parent / "data" / "bundles"


def builtin() -> list[str]:
    """Names of the bundles inside the package."""
    folder = builtin_folder()
    return sorted(p.name for p in folder.iterdir() if (p / "vocabulary.json").exists()) if folder.is_dir() else []


def read(name: str, beside: Path | None = None) -> Bundle:
    """A built-in bundle by name, or a folder (relative ones: beside the graph). Raises AssetError, VocabularyMismatch."""
    folder = builtin_folder() / name if name in builtin() else (beside or Path()) / Path(name).expanduser()
    for file in ("vocabulary.json", "weights.safetensors"):
        if not (folder / file).is_file():
            raise AssetError(
                f"Master bundle {name!r} not found: no {file} in {folder}.",
                f"Valid: {', '.join(builtin()) or '(none built in)'}, or a folder made by: lmgraph train tune",
            )
    vocabulary, written = read_vocabulary(folder / "vocabulary.json")
    if written and written != vocabulary.digest:
        raise VocabularyMismatch(
            f"{folder / 'vocabulary.json'} was edited by hand: its digest does not fit.",
            "Nodes are added with: lmgraph train heads --node NAME --examples FILE",
        )
    metrics = json.loads((folder / "metrics.json").read_text()) if (folder / "metrics.json").exists() else {}
    return Bundle(folder.name, folder, vocabulary, metrics)


def read_vocabulary(path: Path) -> tuple[Vocabulary, str]:
    """(vocabulary, the digest written in the file or '')."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise VocabularyMismatch(f"{path} cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise VocabularyMismatch(f"{path} holds no object.")
    return Vocabulary.from_json(data), str(data.get("digest", ""))


def write_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    """vocabulary.json with its digest, atomically."""
    with atomic(path) as part:
        part.write_text(json.dumps({**vocabulary.to_json(), "digest": vocabulary.digest}, indent=2) + "\n")


def copy(bundle: Bundle, folder: Path, vocabulary: Vocabulary, tensors: Mapping[str, np.ndarray]) -> Bundle:
    """A new bundle: the old one's files with another vocabulary and tensors. Along a walk a node that is new has its row as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("card.md", "metrics.json", "recipe.json", "anchors.npz"):
        if (bundle.folder / file).exists():
            shutil.copyfile(bundle.folder / file, folder / file)
    write_tensors(tensors, folder / "weights.safetensors")
    write_vocabulary(vocabulary, folder / "vocabulary.json")
    if bundle.walk.is_file():
        known = [
            vocabulary.end_id - vocabulary.first_id,
            *(t for name, t in vocabulary.nodes.items() if bundle.vocabulary.nodes.get(name) == t),
        ]
        worn = read_tensors(bundle.walk)
        write_tensors(
            {key: only(value, known) if key.endswith("_rows") else value for key, value in worn.items()}, folder / bundle.walk.name
        )
    return Bundle(folder.name, folder, vocabulary, bundle.metrics)


def only(rows: np.ndarray, known: Sequence[int]) -> np.ndarray:
    """Rows (N, D) of which only those named are left, the others 0."""
    found = np.zeros_like(rows)
    found[list(known)] = rows[list(known)]
    return found


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a bundle by name. Raises AssetError for a damaged file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise AssetError(f"{path} is damaged: {error}.", "Re-install lmgraph, or make the bundle again.") from error


def write_tensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Write tensors atomically, readable like any other file."""
    from safetensors.numpy import save

    with atomic(path) as part:
        part.write_bytes(save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))


def alike(first: Bundle, second: Bundle) -> None:
    """Raise VocabularyMismatch where two bundles name other nodes, or belong to other bases; their temperatures may differ."""
    if first.vocabulary.digest != replace(second.vocabulary, temperature=first.vocabulary.temperature).digest:
        raise VocabularyMismatch(f"{first.name} and {second.name} name other nodes, or belong to other bases.")


def merged_path(bundle: Bundle, cache: Path) -> Path:
    """Where the merged GGUF of a bundle lies (or will lie): named by digest, so an old one is never taken for a new one."""
    return cache / "masters" / f"{bundle.name}-{bundle.digest[:16]}.gguf"


def merge(bundle: Bundle, base: Path, target: Path, progress: Progress | None = None, hint: str = ELSEWHERE) -> Path:
    """Base weights + LoRA + rows -> one GGUF (linear layers and embeddings in Q8_0, norms as they are).

    Tokens `<fn_i>` and `<fn_end>` are appended as control tokens, the end token also as end-of-turn; the vocabulary is
    written into the file's metadata, so that the file is a master by itself. Raises AssetError, VocabularyMismatch.
    """
    import gguf

    tensors = read_tensors(bundle.weights)
    vocabulary = bundle.vocabulary
    reader = gguf.GGUFReader(base)
    architecture, heads, kv_heads = form(reader)
    size = len(reader.fields["tokenizer.ggml.tokens"].data)
    if size != vocabulary.first_id:
        raise VocabularyMismatch(f"{base.name} has {size} tokens, the bundle was trained on a base with {vocabulary.first_id}.")
    with atomic(target, hint) as part:
        writer = gguf.GGUFWriter(part, architecture)
        _metadata(reader, writer, vocabulary, bundle.name)
        made = _tensors(reader, tensors, heads, kv_heads)
        total = len(reader.tensors) + 1
        for number, (name, data, kind) in enumerate(made, 1):
            writer.add_tensor(name, data, raw_dtype=kind)
            if progress:
                progress(number, total)
        flush(writer)
    return target


def form(reader: Any) -> tuple[str, int, int]:
    """(architecture, heads, key-value heads) of a GGUF."""
    architecture = str(reader.fields["general.architecture"].contents())
    heads, kv_heads = (int(reader.fields[f"{architecture}.attention.{key}"].contents()) for key in ("head_count", "head_count_kv"))
    return architecture, heads, kv_heads


def flush(writer: Any) -> None:
    """Write all that a GGUF writer was given, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(reader: Any, writer: Any, vocabulary: Vocabulary, name: str) -> None:
    from gguf import GGUFValueType

    names = [vocabulary.name(i) for i in range(vocabulary.size)] + [vocabulary.end_name]
    extended: dict[str, list[Any]] = {
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [CONTROL] * len(names),
        "tokenizer.ggml.scores": [-1000.0] * len(names),
    }
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in (
            "general.architecture",
            f"{writer.arch}.vocab_size",
            "general.file_type",
            "general.quantization_version",
            "tokenizer.ggml.eot_token_id",
            KEY,
        ):
            continue
        value = field.contents()
        if key in extended:
            value = list(value) + extended[key]
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=field.types[-1])
        else:
            writer.add_key_value(key, value, field.types[0])
    writer.add_vocab_size(vocabulary.first_id + len(names))
    writer.add_file_type(7)
    writer.add_quantization_version(2)
    writer.add_eot_token_id(vocabulary.end_id)
    writer.add_string(KEY, json.dumps({**vocabulary.to_json(), "name": name}))


def _tensors(reader: Any, tensors: Mapping[str, np.ndarray], heads: int, kv_heads: int) -> Any:
    """Yield (name, data, quantisation) of every tensor of the merged file."""
    from gguf import GGMLQuantizationType as Q
    from gguf import quants

    changes: dict[str, list[str]] = {}
    for key in tensors:
        parts = key.split(".")
        if parts[0] == "blk":
            changes.setdefault(f"blk.{parts[1]}.{NAMES[parts[2]]}.weight", [f"blk.{parts[1]}.{parts[2]}", parts[2]])
    tied = not any(t.name == "output.weight" for t in reader.tensors)
    for tensor in reader.tensors:
        kind = Q(tensor.tensor_type)
        if tensor.name in changes:
            key, layer = changes.pop(tensor.name)
            weight = quants.dequantize(tensor.data, kind)
            a, b = tensors[f"{key}.lora_a"].astype(np.float32), tensors[f"{key}.lora_b"].astype(np.float32)
            if layer in ("q_proj", "k_proj"):
                b = permute(b, heads if layer == "q_proj" else kv_heads)
            yield tensor.name, quants.quantize(weight + b @ a, Q.Q8_0), Q.Q8_0
        elif tensor.name in ("token_embd.weight", "output.weight"):
            rows = {"token_embd.weight": "input_rows", "output.weight": "output_rows"}
            yield tensor.name, _append(tensor.data, kind, tensors[rows[tensor.name]]), Q.Q8_0
            if tied and tensor.name == "token_embd.weight":
                yield "output.weight", _append(tensor.data, kind, tensors["output_rows"]), Q.Q8_0
        else:
            yield tensor.name, tensor.data, kind
    if changes:
        raise VocabularyMismatch(f"The base has no tensors {', '.join(sorted(changes))}: the bundle belongs to another base.")


def _append(data: np.ndarray, kind: Any, rows: np.ndarray) -> np.ndarray:
    from gguf import GGMLQuantizationType as Q
    from gguf import quants

    quantised = data if kind == Q.Q8_0 else quants.quantize(quants.dequantize(data, kind), Q.Q8_0)
    return np.concatenate([quantised, quants.quantize(rows.astype(np.float32), Q.Q8_0)])


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix (out, in) from Hugging Face's rotary order into GGUF's (halves -> interleaved)."""
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def patch(source: Path, target: Path, rows: Mapping[int, np.ndarray], vocabulary: Vocabulary, name: str) -> Path:
    """A copy of a merged GGUF with some output rows (functional token -> (D,)) replaced and another vocabulary written in.

    Seconds instead of a full merge: nothing else is touched.
    """
    import gguf
    from gguf import GGMLQuantizationType as Q
    from gguf import quants

    reader = gguf.GGUFReader(source)
    with atomic(target) as part:
        writer = gguf.GGUFWriter(part, str(reader.fields["general.architecture"].contents()))
        base = Vocabulary(first_id=vocabulary.first_id, size=vocabulary.size, end_id=vocabulary.end_id)
        _copy_metadata(reader, writer, vocabulary, name)
        for tensor in reader.tensors:
            data = tensor.data
            if tensor.name == "output.weight":
                data = np.array(data)
                for token, row in rows.items():
                    data[base.first_id + token] = quants.quantize(row.astype(np.float32)[None], Q.Q8_0)[0]
            writer.add_tensor(tensor.name, data, raw_dtype=Q(tensor.tensor_type))
        flush(writer)
    return target


def _copy_metadata(reader: Any, writer: Any, vocabulary: Vocabulary, name: str) -> None:
    from gguf import GGUFValueType

    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", KEY):
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_key_value(key, field.contents(), GGUFValueType.ARRAY, sub_type=field.types[-1])
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_string(KEY, json.dumps({**vocabulary.to_json(), "name": name}))


def vocabulary_size(base: Path) -> int:
    """Number of token ids of a GGUF: the first functional token takes the next."""
    import gguf

    return len(gguf.GGUFReader(base).fields["tokenizer.ggml.tokens"].data)


def vocabulary_of(path: Path) -> Vocabulary:
    """The vocabulary inside a merged GGUF, or of the file `vocabulary.json` beside it. Raises VocabularyMismatch."""
    import gguf

    try:
        field = gguf.GGUFReader(path).fields.get(KEY)
    except (OSError, ValueError) as error:
        raise AssetError(f"{path} cannot be read as GGUF: {error}.") from error
    if field is not None:
        return Vocabulary.from_json(json.loads(str(field.contents())))
    beside = path.with_name("vocabulary.json")
    if beside.exists():
        return read_vocabulary(beside)[0]
    raise VocabularyMismatch(
        f"{path.name} is no master: it holds no vocabulary and there is no vocabulary.json beside it.",
        'Write one: {"first_id": ..., "size": ..., "end_id": ..., "nodes": {name: token}, "dialect": ...}',
    )


def ready(bundle: Bundle, base: Path, cache: Path, progress: Progress | None = None) -> Path:
    """The merged GGUF of a bundle, made on first use."""
    target = merged_path(bundle, cache)
    return target if target.is_file() else merge(bundle, base, target, progress)
