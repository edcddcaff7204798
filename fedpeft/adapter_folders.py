"""Adapter folders as stock peft saves and loads them: plain LoRA, read and written without torch.

`adapter_config.json` says how the factors are scaled, `adapter_model.safetensors` holds them. peft's keys are
`base_model.model.<module path>.` and one of the endings in `_LAYERS`; a tensor trained whole keeps its own name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from fedpeft.adapters import AdapterSpec, AdapterState, Family, ModuleSpec, absorbed, as_lora, lora
from fedpeft.errors import AdapterError, sentence
from fedpeft.files import write_atomically
from fedpeft.runs import write_folder

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_LAYERS: Mapping[str, Mapping[str, str]] = {
    "linear": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B"},
}
"""How peft ends the keys of A `(rank, in)` and B `(out, rank)`, by kind of layer; `in` of an embedding is its rows."""

_UNLIKE_LORA: Mapping[str, str] = {
    "use_dora": "magnitudes beside the product (DoRA)",
    "lora_bias": "biases beside the product",
    "target_parameters": "factors on bare parameters",
    "trainable_token_indices": "single trained rows of an embedding",
    "layer_replication": "repeated layers of the base",
    "alora_invocation_tokens": "an adapter that acts on some tokens only (aLoRA)",
    "use_qalora": "pooled inputs (QALoRA)",
    "use_bdlora": "block-diagonal factors (BD-LoRA)",
    "monteclora_config": "sampled factors (MonteCLoRA)",
    "arrow_config": "routing between adapters (Arrow)",
    "kasa_config": "a base that was changed (KaSA)",
}
"""Settings under which the change of a weight is not s B A alone, and what is stored then."""

_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base as it was; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change it."""

_CARRIED = ("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "lora_dropout", "revision", "task_type")
"""Settings that hold for any adapter of the same base and task."""


def _from_bfloat16(data: bytes) -> np.ndarray:
    wide: np.ndarray = np.frombuffer(data, "<u2").astype(np.uint32) << 16
    return wide.view(np.float32)


_DTYPES: Mapping[str, Callable[[bytes], np.ndarray]] = {
    "F64": lambda data: np.frombuffer(data, "<f8"),
    "F32": lambda data: np.frombuffer(data, "<f4"),
    "F16": lambda data: np.frombuffer(data, "<f2"),
    "BF16": _from_bfloat16,
}


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA adapter as a folder holds it.

    `state` is float32 with each module's scale folded into B; tensors that are trained whole are of kind `full`.
    `config` is `adapter_config.json` as read. `embeddings` are the paths of those adapted modules that are
    embeddings, which peft stores under other names.
    """

    folder: Path
    config: Mapping[str, Any]
    state: AdapterState
    embeddings: frozenset[str]


def read_adapter_folder(folder: Path) -> StoredAdapter:
    """The adapter that stock peft saved in `folder`.

    Raises:
        AdapterError: a file is missing or broken, the adapter is not plain LoRA, or its tensors contradict each
            other or the configuration.
    """
    config = _read_config(folder / _CONFIG)
    scaling = _Scaling.of(config, f"{folder / _CONFIG}")
    place = f"{folder / _WEIGHTS}"
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, value in _read_weights(folder).items():
        path, kind, tensor = _locate(scaling.family, key, place)
        found.setdefault((path, kind), {})[tensor] = value
    tensors: dict[str, np.ndarray] = {}
    modules, embeddings = [], set()
    for (path, kind), group in sorted(found.items()):
        layer, rank, scale = "", 0, 1.0
        if kind == "lora":
            layer = _layer(group, f"{place}, module {path}")
            rank, scale = scaling.at(path)
            group = _folded(group, _LAYERS[layer], rank, scale, f"{place}, module {path}")
        if layer == "embedding":
            embeddings.add(path)
        shapes = tuple((name, group[name].shape) for name in sorted(group))
        modules.append(ModuleSpec(path, kind, rank, scale, shapes))
        tensors |= {f"{path}.{name}": value for name, value in group.items()}
    if not any(module.kind == "lora" for module in modules):
        raise _error(place, "the factors of at least one module", f"{len(found)} without any", "check the path")
    spec = AdapterSpec(str(config.get("base_model_name_or_path") or ""), scaling.family.name, tuple(modules))
    state = AdapterState(spec, {key: tensors[key] for key in spec.shapes})
    return StoredAdapter(folder, config, state, frozenset(embeddings))


def write_adapter_folder(
    folder: Path, state: AdapterState, like: Mapping[str, Any], embeddings: Collection[str] = ()
) -> None:
    """`folder` holds `state` as stock peft loads it, or, if that failed, nothing.

    Every module's scale is 1. What does not follow from `state` is taken from `like`, a peft configuration: base,
    task, and in `modules_to_save` the modules that are kept apart from the base. Modules of rank 0 are left out.
    `embeddings` are the paths of adapted modules that are embeddings.

    Raises:
        AdapterError: the folder is not empty, or the adapter is not one that peft could load.
        RunFolderError: the disk is full or not writable.
    """
    _require_empty(folder)
    state = as_lora(absorbed(state))
    state.spec.require(state.tensors, f"adapter for {folder}")
    ranks, keys = _ranks(state.spec, str(folder)), {}
    for module in state.spec.modules:
        layer = _LAYERS["embedding" if module.path in embeddings else "linear"]
        for name, _ in module.shapes:
            if module.kind == "full":
                keys[f"{_saved_path(module.path, ranks)}.{name}"] = f"{module.path}.{name}"
            elif module.path in ranks:
                keys[f"{module.path}.{layer[name]}"] = f"{module.path}.{name}"
    saved = _modules_to_save(state.spec, ranks, like, str(folder))
    prefix = "base_model.model."
    weights = {f"{prefix}{key}": np.asarray(state.tensors[own], order="C") for key, own in keys.items()}
    files = {
        _CONFIG: json.dumps(_config(ranks, saved, like), indent=2, sort_keys=True).encode(),
        _WEIGHTS: bytes(save(weights, metadata={"format": "pt"})),
    }

    def fill(scratch: Path) -> None:
        for name, data in files.items():
            write_atomically(scratch / name, data)

    write_folder(folder.resolve(), fill)


@dataclass(frozen=True)
class _Scaling:
    """Ranks and alphas of a configuration, and how peft finds a module's own among them."""

    family: Family
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    place: str

    @staticmethod
    def of(config: Mapping[str, Any], place: str) -> _Scaling:
        """Raises AdapterError unless the configuration is of plain LoRA. Absent settings have peft's defaults."""
        _require_plain(config, place)
        rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
        stabilised = bool(config.get("use_rslora"))
        family = lora(rank=rank, alpha=alpha, dropout=0.0, rank_stabilised=stabilised, target_modules=(), layers=())
        patterns = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        if not all(isinstance(pattern, dict) for pattern in patterns):
            raise _error(f"{place}, rank_pattern or alpha_pattern", "an object", "something else", "correct it")
        return _Scaling(family, *patterns, place)

    def at(self, path: str) -> tuple[int, float]:
        """Rank of the module at `path`, and what its factors' product is multiplied by."""
        rank = self._own(self.ranks, path, self.family.peft["r"])
        alpha = self._own(self.alphas, path, self.family.peft["lora_alpha"])
        if type(rank) is not int or rank < 1:
            raise _error(f"{self.place}, rank of {path}", "a whole number above 0", rank, "correct it")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise _error(f"{self.place}, alpha of {path}", "a finite number", alpha, "correct it")
        return rank, alpha / (math.sqrt(rank) if self.family.peft["use_rslora"] else rank)

    def _own(self, pattern: Mapping[str, Any], path: str, default: Any) -> Any:
        """The value of the first key that, as a pattern, matches the whole path or the end of it."""
        try:
            matches = (key for key in pattern if re.match(rf"(.*\.)?({key})$", path))
            return pattern.get(next(matches, path), default)
        except re.error as error:
            raise _error(f"{self.place}, patterns", "regular expressions", error, "correct them") from error


def _error(place: str, expected: str, found: object, remedy: str) -> AdapterError:
    return AdapterError(sentence(place, expected=expected, found=found, remedy=remedy))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        remedy = "name a folder that peft's save_pretrained wrote"
        raise _error(str(path), "a file", error.strerror or error, remedy) from error
    except ValueError as error:
        raise _error(str(path), "JSON", error, "save the adapter again") from error
    if not isinstance(config, dict):
        raise _error(str(path), "a JSON object", type(config).__name__, "save the adapter again")
    return config


def _require_plain(config: Mapping[str, Any], place: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _error(f"{place}, peft_type", "LORA", kind, "leave this adapter out")
    for name, what in _UNLIKE_LORA.items():
        if config.get(name):
            raise _error(f"{place}, {name}", "plain LoRA", what, "leave this adapter out, or train it without")
    bias = config.get("bias", "none")
    if bias != "none":
        raise _error(f"{place}, bias", "none", f"{bias!r}: trained biases", "leave this adapter out")
    initial = config.get("init_lora_weights", True)
    if initial not in _INITIAL:
        remedy = "save it with path_initial_model_for_weight_conversion, which makes it plain LoRA, or leave it out"
        raise _error(f"{place}, init_lora_weights", "one that leaves the base unchanged", repr(initial), remedy)


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    """The folder's tensors by key, float32 and finite."""
    path = folder / _WEIGHTS
    if not path.exists() and (folder / _PICKLE).exists():
        remedy = "save it again with safe_serialization=True, since reading a pickle runs code from it"
        raise _error(str(folder), _WEIGHTS, f"{_PICKLE}, a pickle", remedy)
    try:
        stored = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except OSError as error:
        remedy = "name a folder that peft's save_pretrained wrote"
        raise _error(str(path), "a file", error.strerror or error, remedy) from error
    except SafetensorError as error:
        raise _error(str(path), "a whole safetensors file", error, "copy or save the adapter again") from error
    return {key: _widened(entry, f"{path}, tensor {key}") for key, entry in sorted(stored)}


def _widened(entry: Mapping[str, Any], place: str) -> np.ndarray:
    decode = _DTYPES.get(entry["dtype"])
    if decode is None:
        raise _error(place, f"one of {', '.join(_DTYPES)}", entry["dtype"], "save the adapter in float32")
    with np.errstate(over="ignore"):
        value = decode(entry["data"]).astype(np.float32).reshape(entry["shape"])
    return _finite(value, place)


def _finite(value: np.ndarray, place: str) -> np.ndarray:
    if not np.isfinite(value).all():
        raise _error(place, "finite numbers in float32", "NaN or infinity", "leave this adapter out")
    return value


def _locate(family: Family, key: str, place: str) -> tuple[str, str, str]:
    """(module path, kind, tensor) of a key; the tensor of a factor is still under peft's name."""
    path, kind, tensor = family.locate(key)
    own = key.removeprefix(f"{family.prefix}{path}.")
    if own == key:
        raise _error(f"{place}, tensor {key}", f"a name that begins with {family.prefix}", "another", "check the file")
    if kind != family.kind and any(part.startswith("lora_") for part in (*path.split("."), tensor)):
        raise _error(f"{place}, tensor {key}", "the factors A and B alone", "more", "leave this adapter out")
    if kind == family.kind and "base_layer" in path.split("."):
        raise _error(f"{place}, tensor {key}", "a layer of its own", "a part of one", "leave this adapter out")
    return path, kind, own if kind == family.kind else tensor


def _layer(group: Mapping[str, np.ndarray], place: str) -> str:
    for layer, names in _LAYERS.items():
        if group.keys() == set(names.values()):
            return layer
    pairs = " or ".join(" and ".join(names.values()) for names in _LAYERS.values())
    raise _error(place, pairs, ", ".join(sorted(group)), "save the adapter again")


def _folded(
    group: Mapping[str, np.ndarray], names: Mapping[str, str], rank: int, scale: float, place: str
) -> dict[str, np.ndarray]:
    """A and the scaled B, whose shapes chain at `rank`."""
    a, b = group[names["A"]], group[names["B"]]
    if a.ndim != 2 or b.ndim != 2:
        found = f"{a.shape} and {b.shape}"
        raise _error(place, "factors with two axes", found, "leave out adapters of convolutions")
    if a.shape[0] != rank or b.shape[1] != rank:
        expected = f"factors (rank, in) and (out, rank) of rank {rank}, as the configuration says"
        remedy = "correct r or rank_pattern, of which the first match counts and which peft sorts when it saves"
        raise _error(place, expected, f"{a.shape} and {b.shape}", remedy)
    with np.errstate(over="ignore", invalid="ignore"):
        return {"A": a, "B": _finite(b * np.float32(scale), f"{place}, scaled B")}


def _require_empty(folder: Path) -> None:
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise _error(str(folder), "a folder that can be read", error, "choose another") from error
    if taken:
        raise _error(str(folder), "no such folder yet, or an empty one", "something there", "choose another")


def _ranks(spec: AdapterSpec, place: str) -> dict[str, int]:
    """Rank of each low-rank module by path, those of rank 0 left out."""
    ranks = {}
    for module in spec.modules:
        shapes = dict(module.shapes)
        if module.kind == "lora" and shapes.keys() == {"A", "B"}:
            ranks[module.path] = shapes["A"][0]
        elif module.kind != "full":
            found = f"kind {module.kind} with {', '.join(shapes)}"
            raise _error(f"{place}, module {module.path}", "factors A and B", found, "leave it out")
    if not any(ranks.values()):
        raise _error(place, "an adapter with a module of rank 1 or more", "none", "merge at a higher rank")
    return {path: rank for path, rank in ranks.items() if rank}


def _saved_path(path: str, ranks: Mapping[str, int]) -> str:
    """Where a tensor of the base is, which peft wraps into `base_layer` only where there are factors beside it."""
    owner = path.removesuffix(".base_layer")
    return path if owner in ranks else owner


def _modules_to_save(
    spec: AdapterSpec, ranks: Mapping[str, int], like: Mapping[str, Any], place: str
) -> list[str] | None:
    """Those of the names in `like` for which `spec` has tensors; peft would look in vain for the others."""
    whole = [module.path for module in spec.modules if module.kind == "full"]
    named = like.get("modules_to_save") or []
    saved = sorted(name for name in named if any(_covers(name, path) for path in whole))
    for path in ranks:
        if path in whole or any(_covers(name, path) for name in saved):
            remedy = "give all adapters the same target_modules and modules_to_save"
            raise _error(f"{place}, module {path}", "low-rank factors or a module trained whole", "both", remedy)
    return saved or None


def _covers(name: str, path: str) -> bool:
    """Whether peft, told to save `name`, saves the module at `path`: it is one whose path ends so, or inside one."""
    parts = path.split(".")
    return any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts) + 1))


def _config(ranks: Mapping[str, int], saved: list[str] | None, like: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration under which peft puts factors of these ranks, unscaled, on these modules and no others."""
    # The greatest rank is the general one, because servers of adapters reserve room for it.
    rank = max(ranks.values())
    own = {f"^{re.escape(path)}": other for path, other in sorted(ranks.items()) if other != rank}
    return {
        **{name: like[name] for name in _CARRIED if name in like},
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": own,
        "alpha_pattern": own,
        "use_rslora": False,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": _targets(ranks),
        "modules_to_save": saved,
    }


def _targets(ranks: Mapping[str, int]) -> list[str] | str:
    # peft takes an entry of a list for the end of a path, and a string for a pattern of whole paths. The end of a
    # longer path names one module; a path of one part would also be the end of others.
    paths = sorted(ranks)
    return paths if all("." in path for path in paths) else "|".join(re.escape(path) for path in paths)
