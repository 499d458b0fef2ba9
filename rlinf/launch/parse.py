"""YAML and command line → one validated `Root`.

Hydra composes the files; pydantic validates the result once; nothing else in the package ever sees a raw
configuration. Everything that is wrong is reported together, with the place where it was written.

What an override can do:

    algorithm.gamma=0.9               set a value
    ~algorithm.demo_buffer            remove a key, so that its default applies
    model@actor.model=mlp_policy      choose another file of a group
    profile=cpu                       choose the sizes for this kind of machine (auto | cpu | gpu)
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from rlinf.core.errors import ConfigError
from rlinf.launch.aliases import ALIASES, apply_aliases, get, remedy_for
from rlinf.launch.config import Root
from rlinf.launch.registry import closest
from rlinf.launch.sources import SourceMap

Profile = Literal["cpu", "gpu"]
Schema = typing.TypeVar("Schema", bound=BaseModel)
_RENAMED = {alias.old: alias.new for alias in ALIASES if alias.convert is None}


def load_config(
    name: str,
    overrides: Sequence[str] = (),
    config_dir: str | os.PathLike[str] = "examples/embodiment/config",
    *,
    has_gpu: Callable[[], bool] | None = None,
) -> Root:
    """Compose `<config_dir>/<name>.yaml` with `overrides` and validate it; see `load_as`."""
    return load_as(Root, name, overrides, config_dir, has_gpu=has_gpu)


def load_as(
    schema: type[Schema],
    name: str,
    overrides: Sequence[str],
    config_dir: str | os.PathLike[str],
    *,
    has_gpu: Callable[[], bool] | None = None,
) -> Schema:
    """Compose `<config_dir>/<name>.yaml` with `overrides` and validate it.

    Args:
        schema: what the whole configuration is.
        has_gpu: answers whether `profile: auto` means `gpu`; by default torch is asked for a CUDA device.

    Raises:
        ConfigError: with one line per problem.
    """
    directory = Path(config_dir).resolve()
    name = name.removesuffix(".yaml")
    _require_recipe(name, directory)
    parsed = _parse_overrides(overrides)
    profile, parsed = _take_profile(parsed, name, directory, has_gpu or _cuda_is_available)
    arguments = _profile_choices(name, directory, profile) + [_for_hydra(item, directory) for item in parsed]
    tree = _compose(name, directory, arguments)
    if profile is not None:
        tree["profile"] = profile

    def sources() -> SourceMap:
        found = _sources(name, directory, arguments)
        for item in parsed:
            if not item.is_delete() and not _is_group(item, directory):
                found.add_override(_our_key(item), item.value(), item.input_line or "")
        return found

    return _validate(schema, name, tree, sources, {_our_key(item) for item in parsed})


# ---- composition


def _require_recipe(name: str, directory: Path) -> None:
    if (directory / f"{name}.yaml").is_file():
        return
    if not directory.is_dir():
        raise ConfigError(f"there is no configuration folder {directory}")
    there = sorted(path.stem for path in directory.glob("*.yaml"))
    near = closest(name, there, 0.5)
    hint = f"did you mean {near}?" if near else f"there are: {', '.join(there) or 'none'}"
    raise ConfigError(f"no configuration named {name!r} in {directory}; {hint}")


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for text in overrides:
        try:
            item = OverridesParser.create().parse_override(text)
        except HydraException:
            raise ConfigError(
                f"command line: {text!r} is no override; write key=value (quote it if it has spaces or braces)"
            ) from None
        if item.is_sweep_override():
            raise ConfigError(f"command line: {text!r} would start several runs; start one each")
        parsed.append(item)
    return parsed


def _is_group(item: Override, directory: Path) -> bool:
    return item.package is not None or (directory / item.key_or_group).is_dir()


def _our_key(item: Override) -> str:
    return _RENAMED.get(item.key_or_group, item.key_or_group)


def _for_hydra(item: Override, directory: Path) -> str:
    """The override as Hydra should see it: a value is forced, so that an unknown key reaches the schema."""
    text = item.input_line or ""
    if item.is_delete() or _is_group(item, directory):
        return text
    return f"++{_our_key(item)}={text.partition('=')[2]}"


def _compose(name: str, directory: Path, arguments: list[str]) -> dict[str, Any]:
    """The merged and interpolated tree."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(directory), version_base="1.3"):
            merged = compose(name, overrides=arguments)
        tree = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (
        HydraException,
        OmegaConfBaseException,
        yaml.YAMLError,
        ValueError,
    ) as problem:  # ValueError: Hydra's grammar
        raise ConfigError(f"configuration {name!r}: {_one_line(problem, directory)}") from None
    return typing.cast(dict[str, Any], tree)


def _sources(name: str, directory: Path, arguments: list[str]) -> SourceMap:
    """Where every value of what `_compose` made of this was written. To find out takes as long as composing does."""
    GlobalHydra.instance().clear()
    sources = SourceMap()
    with initialize_config_dir(str(directory), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for entry in loader.compute_defaults_list(name, arguments, RunMode.RUN).defaults:
            path = directory / f"{entry.config_path}.yaml"
            if path.is_file():
                sources.add_file(path, f"{entry.config_path}.yaml", (entry.package or "").removeprefix("_global_"))
    return sources


def _read_yaml(name: str, directory: Path) -> dict[str, Any]:
    """The keys that one file itself holds."""
    try:
        with (directory / f"{name}.yaml").open(encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except yaml.YAMLError as problem:
        raise ConfigError(f"configuration {name!r}: {_one_line(problem, directory)}") from None
    return tree if isinstance(tree, dict) else {}


def _one_line(problem: Exception, directory: Path) -> str:
    if isinstance(problem, MissingConfigException) and problem.missing_cfg_file:
        group, _, choice = problem.missing_cfg_file.rpartition("/")
        options = [str(option) for option in problem.options or ()]
        near = closest(choice, options, 0.5)
        hint = f"did you mean {near}?" if near else f"there are: {', '.join(options) or 'none'}"
        return f"there is no {choice!r} in {group or 'the configuration folder'}; {hint}"
    if isinstance(problem, yaml.MarkedYAMLError) and problem.problem_mark is not None:
        mark = problem.problem_mark
        return f"{os.path.relpath(mark.name, directory)}:{mark.line + 1}: not valid YAML: {problem.problem}"
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    if problem.__cause__ is not None and isinstance(problem.__cause__, OmegaConfBaseException):
        lines += [line.strip() for line in str(problem.__cause__).splitlines()[:1]]
    path = getattr(problem, "full_key", None)
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type=")))
    return f"{path}: {text}" if path else text


# ---- profiles


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()


def _take_profile(
    parsed: list[Override], name: str, directory: Path, has_gpu: Callable[[], bool]
) -> tuple[Profile | None, list[Override]]:
    """The chosen profile (None: the file itself says it, as a resolved configuration does) and the other overrides."""
    asked = [item for item in parsed if item.key_or_group == "profile" and item.package is None]
    rest = [item for item in parsed if item not in asked]
    if asked:
        choice = asked[-1].value()
    else:
        if _read_yaml(name, directory).get("profile") in ("cpu", "gpu"):
            return None, rest
        choice = "auto"
    if choice == "auto":
        choice = "gpu" if has_gpu() else "cpu"
    if choice not in ("cpu", "gpu"):
        raise ConfigError(f"command line: profile={choice}: choose auto, cpu or gpu")
    return typing.cast(Profile, choice), rest


def _profile_choices(name: str, directory: Path, profile: Profile | None) -> list[str]:
    """Hydra overrides that fill every `profile/<recipe>` group of the recipe and of the recipes it builds on."""
    if profile is None:
        return []
    groups = _profile_groups(name, directory)
    return [f"{group}={profile}" for group in groups if (directory / group / f"{profile}.yaml").is_file()]


def _profile_groups(name: str, directory: Path) -> Iterator[str]:
    for entry in _read_yaml(name, directory).get("defaults") or []:
        if isinstance(entry, dict):
            yield from (key for key in entry if str(key).startswith("profile/"))
        elif entry != "_self_" and (directory / f"{entry}.yaml").is_file():
            yield from _profile_groups(entry, directory)


# ---- validation


@dataclass(frozen=True)
class _Problem:
    path: str
    text: str


def _validate(
    schema: type[Schema], name: str, tree: dict[str, Any], sources: Callable[[], SourceMap], typed: set[str]
) -> Schema:
    spelt, conflicts = apply_aliases(tree, typed)
    if isinstance(tree.get("algorithm"), dict):
        tree["algorithm"].setdefault("loss_type", "embodied_sac")
    problems = [_Problem(path, f"{path} {message}") for path, message in conflicts]
    try:
        root = schema.model_validate(tree)
    except ValidationError as failure:
        problems += _joined(_explain(failure, tree, spelt, schema))
    if not problems:
        return root
    lines, seen, written_at = [], set(), sources()
    for problem in problems:
        if problem in seen:
            continue
        seen.add(problem)
        written = spelt.get(problem.path, problem.path)
        source = written_at.find(written)
        lines.append(f"  {problem.text}" + (f"   [{source}]" if source else ""))
    count = f"{len(lines)} problem" + ("s" if len(lines) > 1 else "")
    raise ConfigError("\n".join([f"configuration {name!r} has {count}:", *lines]))


def _explain(
    failure: ValidationError, tree: dict[str, Any], spelt: dict[str, str], schema: type[BaseModel]
) -> Iterator[_Problem]:
    for error in failure.errors(include_url=False):
        path = _plain_path(error["loc"], tree)
        shown = spelt.get(path, path)
        kind, context = error["type"], error.get("ctx", {})
        if kind == "extra_forbidden":
            yield _Problem(path, f"{shown}: {_unknown_key(path, tree, schema)}")
        elif kind == "missing":
            yield _Problem(path, f"{shown}: this key is required and has no value")
        elif kind in ("model_type", "model_attributes_type"):
            yield _Problem(path, f"{shown} = {error['input']!r}: should be a section with keys of its own")
        elif kind == "cross_field":
            for first, text in context["problems"]:
                yield _Problem(first, text)
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            key = f"{path}.{context['discriminator'].strip(chr(39))}"
            tags = [tag.strip().strip("'") for tag in context.get("expected_tags", "").split(",")]
            yield _Problem(key, _wrong_choice(key, get(tree, key), tags))
        elif kind == "literal_error":
            choices = [choice.strip("', ") for choice in context["expected"].replace(" or ", ",").split(",")]
            yield _Problem(path, _wrong_choice(shown, error["input"], choices))
        else:
            message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
            value = "" if isinstance(error["input"], (dict, BaseModel)) else f" = {error['input']!r}"
            yield _Problem(path, f"{shown or 'configuration'}{value}: {message}")


def _joined(problems: Iterable[_Problem]) -> list[_Problem]:
    """What is wrong with one value, in one problem: a key of several types fails once for each of them."""
    texts: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        value, colon, message = problem.text.partition(": ")
        alternatives = texts.setdefault((problem.path, value + colon if " = " in value else problem.text), [])
        if " = " in value and message not in alternatives:
            alternatives.append(message)
    return [_Problem(path, head + "; or ".join(messages)) for (path, head), messages in texts.items()]


def _plain_path(location: tuple[int | str, ...], tree: Any) -> str:
    """Pydantic's location as the dotted path of the YAML, without the names of union members."""
    node, keys, entered = tree, [], False
    for part in location:
        if isinstance(node, dict):
            # The tag of a discriminated union comes first. A key may have the same name (model_type openpi has openpi).
            if entered and any(value == part and (key.endswith("_type") or part not in node)
                               for key, value in node.items()):  # fmt: skip
                entered = False
                continue
            node, entered = node.get(part), True
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part] if part < len(node) else None
        else:
            break
        keys.append(str(part))
    return ".".join(keys)


def _wrong_choice(path: str, value: Any, choices: list[str]) -> str:
    choose = "choose " + " or ".join(part for part in (", ".join(choices[:-1]), choices[-1]) if part)
    if value is None:
        return f"{path}: this key is required; {choose}"
    near = closest(str(value), choices)
    return f"{path} = {value!r}: " + (f"did you mean {near}? " if near else "") + choose


def _unknown_key(path: str, tree: dict[str, Any], schema: type[BaseModel]) -> str:
    remedy = remedy_for(path)
    if remedy is not None:
        return f"not used here; {remedy}"
    if path in key_paths(schema):
        inside = get(tree, path)
        retired = {key: remedy_for(f"{path}.{key}") for key in (inside if isinstance(inside, dict) else ())}
        remedies = "".join(f"; {key}: {remedy}" for key, remedy in retired.items() if remedy is not None)
        return f"not a key of {_chosen_member(path, tree)}{remedies}"
    suggestion = suggest(path, tree, schema)
    if suggestion is not None:
        return f"unknown key; did you mean {suggestion}?"
    parent = path.rpartition(".")[0]
    names = [key.rpartition(".")[2] for key in key_paths(schema, tree) if key.rpartition(".")[0] == parent]
    return f"unknown key; {parent or 'the configuration'} has {', '.join(dict.fromkeys(names))}"


def _chosen_member(path: str, tree: dict[str, Any]) -> str:
    """`model_type: flow_policy`, where that choice is why `path` is unknown."""
    while path:
        path = path.rpartition(".")[0]
        node = get(tree, path) if path else tree
        for name in node if isinstance(node, dict) else ():
            if name in ("model_type", "env_type", "loss_type"):
                return f"{name}: {node[name]}"
    return "this choice"


def suggest(path: str, tree: dict[str, Any], schema: type[BaseModel] = Root) -> str | None:
    """The known key that an unknown `path` probably means.

    Siblings come first, then the same last name elsewhere, then the most similar whole path. Where `tree` chooses a
    member of a union (`model_type`), only that member's keys count.
    """
    known = [key for key in dict.fromkeys(key_paths(schema, tree)) if not path.startswith(f"{key}.")]
    parent, _, leaf = path.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == parent]
    near = closest(leaf, siblings)
    if near:
        return f"{parent}.{near}" if parent else near
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    if elsewhere:
        return closest(path, elsewhere, 0.0)
    return closest(path, [key for key in known if key.rpartition(".")[0] != parent], 0.75)


def key_paths(model: type[BaseModel], tree: Any = None, prefix: str = "") -> Iterator[str]:
    """Every dotted key below `model`; `tree` narrows unions to the member that it chooses and says what lists hold."""
    for name, field in model.model_fields.items():
        yield prefix + name
        child = tree.get(name) if isinstance(tree, dict) else None
        members = list(models_in(field.annotation))
        if isinstance(child, dict) and len(members) > 1:
            members = [member for member in members if _is_chosen(member, child)] or members
        for member in members:
            if typing.get_origin(field.annotation) is tuple:
                for position, item in enumerate(child if isinstance(child, list) else []):
                    yield from key_paths(member, item, f"{prefix}{name}.{position}.")
            else:
                yield from key_paths(member, child, f"{prefix}{name}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configuration classes that an annotation mentions."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def _is_chosen(member: type[BaseModel], tree: dict[str, Any]) -> bool:
    """Whether a union's tag in `tree` (`model_type: flow_policy`) is one of `member`'s literals."""
    return any(
        typing.get_origin(field.annotation) is Literal and tree.get(name) in typing.get_args(field.annotation)
        for name, field in member.model_fields.items()
        if name.endswith("_type") and name in tree
    )
