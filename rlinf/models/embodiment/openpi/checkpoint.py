"""Published weights of π0 and π0.5 → `Pi0`, and back.

openpi's PyTorch files name a parameter by its place in transformers' modules. Our name is a prefix away (`RULES`). The
other layouts in the wild are spellings of openpi's names (`SPELLINGS`):

    openpi, LeRobot's published pi0_base and pi05_base       as they are
    what LeRobot saves after training                        a leading `model.`
    the same under transformers 5                            `vision_tower.` without `vision_model.`
    LeRobot's first pi0                                      `paligemma.language_model.model.` and so on

Loading is strict: every parameter must be there once, in its shape, and nothing else may be. Left out by name are
(`is_dead`) the expert's `lm_head`, which no model uses, and the statistics among LeRobot's first weights; and the
language model's `lm_head`, which is the token embedding again, where both are stored. The report lists them.

Files are read tensor by tensor, the largest first, into memory of their own: loading takes about as much as the model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlinf.core.errors import CheckpointError, first_line
from rlinf.core.tensor_file import save_tensors
from rlinf.models.embodiment.openpi.config import GEMMA_NAMES, Pi0Config
from rlinf.models.embodiment.openpi.model import Pi0, empty_pi0, stays_float32

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
REMEDY = "download it again, or write the path of a folder with pi0's weights in safetensors"

_PALIGEMMA = "paligemma_with_expert.paligemma."
_EXPERT = "paligemma_with_expert.gemma_expert."
_TOWER = f"{_PALIGEMMA}model.vision_tower.vision_model."

RULES: tuple[tuple[str, str], ...] = (
    ("vision.patch_embedding.", f"{_TOWER}embeddings.patch_embedding."),
    ("vision.position_embedding.", f"{_TOWER}embeddings.position_embedding."),
    ("vision.layers.", f"{_TOWER}encoder.layers."),
    ("vision.post_layernorm.", f"{_TOWER}post_layernorm."),
    ("projector.", f"{_PALIGEMMA}model.multi_modal_projector.linear."),
    ("vlm.", f"{_PALIGEMMA}model.language_model."),
    ("expert.", f"{_EXPERT}model."),
    ("action_in_proj.", "action_in_proj."),
    ("action_out_proj.", "action_out_proj."),
    ("state_proj.", "state_proj."),
    ("action_time_mlp_in.", "action_time_mlp_in."),
    ("action_time_mlp_out.", "action_time_mlp_out."),
    ("time_mlp_in.", "time_mlp_in."),
    ("time_mlp_out.", "time_mlp_out."),
)
"""(our prefix, openpi's)."""

SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^model\."), ""),
    (re.compile(rf"^{re.escape(_PALIGEMMA)}language_model\.model\."), f"{_PALIGEMMA}model.language_model."),
    (re.compile(rf"^{re.escape(_PALIGEMMA)}language_model\.lm_head\."), f"{_PALIGEMMA}lm_head."),
    (re.compile(rf"^{re.escape(_PALIGEMMA)}(vision_tower|multi_modal_projector)\."), rf"{_PALIGEMMA}model.\1."),
    (re.compile(rf"^{re.escape(_PALIGEMMA)}model\.vision_tower\.(?!vision_model\.)"), _TOWER),
)
"""(what another layout writes, openpi's), applied one after another."""

EMBEDDING = "vlm.embed_tokens.weight"
TIED = f"{_PALIGEMMA}lm_head.weight"
DEAD_HEAD = f"{_EXPERT}lm_head.weight"
_STATISTICS = re.compile(r"^(normalize_inputs|normalize_targets|unnormalize_outputs)\.")


@dataclass(frozen=True)
class LoadReport:
    """What was read.

    Attributes:
        files: where from.
        dropped: names in the files that were left out, sorted.
    """

    files: tuple[Path, ...]
    dropped: tuple[str, ...]


# ---- names


def openpi_name(name: str) -> str:
    """Our parameter's name in openpi's files. Raises KeyError for what is no parameter of `Pi0`."""
    for ours, theirs in RULES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def canonical_name(key: str) -> str:
    """openpi's spelling of a name in any known layout; what is of none comes back as it is."""
    for pattern, replacement in SPELLINGS:
        key = pattern.sub(replacement, key)
    return key


def is_dead(canonical: str) -> bool:
    """Whether a name, spelt as openpi does, stands for nothing that the model uses."""
    return canonical == DEAD_HEAD or _STATISTICS.match(canonical) is not None


# ---- loading


def load_pi0(
    path: str | Path, config: Pi0Config, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> tuple[Pi0, LoadReport]:
    """A model with published weights.

    Args:
        path: a .safetensors file, or a folder with model.safetensors, with an index of shards
            (model.safetensors.index.json), or with several .safetensors files that together hold the weights.
        config: sizes.
        dtype: float32 or bfloat16, whatever the file's; see `stays_float32`.
        device: where the weights shall live.

    Raises CheckpointError, which lists every missing, unknown, repeated or misshapen name, or says which file is
    missing or damaged.
    """
    files = find_files(Path(path))
    model = empty_pi0(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = _survey(files)
    sources, dropped = _match(found, expected, Path(path), config)
    tensors: dict[str, Tensor] = {}
    # The largest first: what its conversion takes besides is then free again for the others.
    order = sorted(sources, key=lambda name: -_size(expected[name]))
    with ExitStack() as stack:
        opened = {file: stack.enter_context(_opened(file)) for file in files}
        for name in order:
            tensor = opened[sources[name].file].get_tensor(sources[name].key)
            tensors[name] = tensor.to(device, torch.float32 if stays_float32(name) else dtype)
    model.load_state_dict(tensors, assign=True)
    return model, LoadReport(tuple(files), tuple(sorted(dropped)))


def find_files(path: Path) -> list[Path]:
    """The files that hold the weights at a path. Raises CheckpointError where there are none or a shard is missing."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {REMEDY}")
    if not path.is_dir():
        return [path]
    if (path / FILE).is_file():
        return [path / FILE]
    if (path / INDEX).is_file():
        return _shards(path / INDEX)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds neither {FILE} nor {INDEX}; {REMEDY}")
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files; {REMEDY}") from error
    if strange := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names {strange[0]!r}, which is not a file beside it")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index.parent} lacks {', '.join(missing)}, which its index names; {REMEDY}")
    return [index.parent / name for name in names]


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def _survey(files: list[Path]) -> list[_Entry]:
    """Everything in the files' headers."""
    entries = []
    for file in files:
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(key)
                entries.append(_Entry(file, key, tuple(part.get_shape()), part.get_dtype()))
    return entries


def _match(
    found: list[_Entry], expected: Mapping[str, tuple[int, ...]], path: Path, config: Pi0Config
) -> tuple[dict[str, _Entry], list[str]]:
    """(our name → its tensor, keys to leave out). Raises CheckpointError listing all that does not fit."""
    ours = {openpi_name(name): name for name in expected}
    has_embedding = any(canonical_name(entry.key) == openpi_name(EMBEDDING) for entry in found)
    sources: dict[str, _Entry] = {}
    dropped: list[str] = []
    unknown, repeated, unfit = [], [], []
    for entry in found:
        canonical = canonical_name(entry.key)
        if is_dead(canonical) or (canonical == TIED and has_embedding):
            dropped.append(entry.key)
            continue
        name = EMBEDDING if canonical == TIED else ours.get(canonical)
        if name is None:
            unknown.append(entry.key)
        elif name in sources:
            repeated.append(entry.key)
        else:
            sources[name] = entry
            if entry.shape != expected[name]:
                unfit.append(f"{entry.key} is {list(entry.shape)} instead of {list(expected[name])}")
            elif entry.dtype not in ("F32", "F16", "BF16"):
                unfit.append(f"{entry.key} is of type {entry.dtype} instead of a float")
    missing = [openpi_name(name) for name in expected if name not in sources]
    lists = (("missing", missing), ("unknown", unknown), ("repeated", repeated), ("unfit", unfit))
    problems = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in lists if names]
    if problems:
        raise CheckpointError(
            f"{path} does not hold {_kind(config.pi05)}{_other(found, config)}: {'; '.join(problems)}"
        )
    return sources, dropped


def _kind(pi05: bool) -> str:
    return "the weights of this pi0.5" if pi05 else "the weights of this pi0"


def _other(found: list[_Entry], config: Pi0Config) -> str:
    """A hint where the weights are those of the other model."""
    names = {canonical_name(entry.key) for entry in found}
    other = "action_time_mlp_in.weight" if config.pi05 else "time_mlp_in.weight"
    return f" but those of {'pi0' if config.pi05 else 'pi0.5'}" if other in names else ""


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file read by plain reads: a memory map would count, and could vanish with the file."""
    try:
        with safe_open(file, framework="pt", backend="pread") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        if _is_pointer(file):
            raise CheckpointError(
                f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` beside it"
            ) from error
        raise CheckpointError(f"{file} cannot be read ({first_line(error)}); {REMEDY}") from error


def _is_pointer(file: Path) -> bool:
    """Whether git-lfs has left a note in the file's place, which begins with its version."""
    try:
        with file.open("rb") as stream:
            return stream.read(7) == b"version"
    except OSError:
        return False


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


# ---- saving


def save_pi0(model: Pi0, folder: str | Path) -> Path:
    """Write model.safetensors and config.json as openpi does, so that its loader and LeRobot's accept them.

    The token embedding is stored once, under the name of the tied `lm_head`; the expert's dead `lm_head`, which strict
    loaders insist on, as zeros. Parameters keep their types. Equal weights make equal files.

    Returns the file. Raises CheckpointError when it cannot be written.
    """
    folder = Path(folder)
    config = model.config
    tensors = {openpi_name(name): p.detach().contiguous() for name, p in model.named_parameters()}
    tied = openpi_name(EMBEDDING)
    tensors[TIED] = tensors.pop(tied)
    tensors[DEAD_HEAD] = torch.zeros(config.vocab_size, config.expert.width, dtype=tensors[TIED].dtype)
    settings = {
        "action_dim": config.action_dim,
        "action_horizon": config.action_horizon,
        "paligemma_variant": GEMMA_NAMES.get(config.vlm, "custom"),
        "action_expert_variant": GEMMA_NAMES.get(config.expert, "custom"),
        "precision": str(tensors[TIED].dtype).removeprefix("torch."),
    }
    file = folder / FILE
    part = file.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, part, {"format": "pt", tied: TIED})
        _sort_metadata(part)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        os.replace(part, file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} could not be written: {error}") from error
    return file


def _sort_metadata(file: Path) -> None:
    """Put the metadata of a safetensors file in order; safetensors writes them in one that changes with every call."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:  # the tensors' places are counted from its end
            stream.seek(8)
            stream.write(text)
