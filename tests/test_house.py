"""The rules of the house: layers, names, described configuration, documents that speak the truth."""

import ast
import functools
import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlinf"

# What each layer may import of ours besides itself; arrows only point down.
BELOW = {
    "core": set(),
    "functional": set(),
    "data": {"functional", "core"},
    "envs": {"core"},
    "models": {"functional", "core"},
    "algorithms": {"functional", "data", "core"},
    "runtime": {"core"},
    "metrics": {"core"},
    "workers": {"runtime", "data", "metrics", "functional", "core"},
    "runners": {"workers", "runtime", "data", "metrics", "functional", "core"},
}
TOP = {"launch", "__main__"}  # may import everything

# Packages that only the named part of the tree may import, however late.
KEPT_APART = {
    "mani_skill": "rlinf/envs/maniskill",
    "sapien": "rlinf/envs/maniskill",
    "gymnasium": "rlinf/envs",
    "mujoco": "rlinf/envs",
    "robosuite": "rlinf/envs/libero",
    "libero": "rlinf/envs/libero",
    "ray": "rlinf/runtime",
    "hydra": "rlinf/launch",
    "omegaconf": "rlinf/launch",
}
# What is imported of extras under a name that is not the distribution's.
IMPORTED_AS = {"franky", "panda_py", "cv2", "hid", "gym_hil", "sapien", "robosuite", "libero", "bddl"}
# Where modules may need an extra to be imported at all: what only its own recipes and commands load.
HOMES_OF_EXTRAS = (
    "rlinf.data.lerobot.",
    "rlinf.envs.frankasim.gym_env",
    "rlinf.envs.frankasim.kernel",
    "rlinf.envs.maniskill.twin_",
    "rlinf.runtime.ray_",
)
BANNED_MODULES = {"utils", "util", "common", "helpers", "helper", "manager", "managers", "misc"}

SOURCES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """All of a file's syntax tree. Reading it takes longer than what any rule does with it."""
    return tuple(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imported_modules(path: Path) -> list[str]:
    """Absolute names of everything that a file imports, inside functions and type-checking blocks too."""
    found = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: relative import; write the absolute one"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    known = BELOW.keys() | TOP
    return parts[1] if parts[0] == "rlinf" and len(parts) > 1 and parts[1] in known else None


def layer_violations(path: Path, layer: str) -> list[str]:
    allowed = BELOW[layer] | {layer}
    used = {layer_of(module) for module in imported_modules(path)} - {None}
    return sorted(used - allowed)


# --- imports ------------------------------------------------------------------------------------------------


def test_every_module_belongs_to_a_known_layer():
    top_level = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"}
    assert top_level <= BELOW.keys() | TOP


@pytest.mark.parametrize("layer", BELOW)
def test_imports_point_down(layer):
    for path in (PACKAGE / layer).rglob("*.py"):
        assert not layer_violations(path, layer), f"{name(path)} imports from {layer_violations(path, layer)}"


def test_layer_check_sees_an_import_inside_a_function(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from rlinf.algorithms import sac\n    return sac\n")
    assert layer_violations(bad, "models") == ["algorithms"]


@pytest.mark.parametrize("package", KEPT_APART)
def test_package_is_imported_only_where_it_belongs(package):
    users = [p for p in SOURCES if any(m.split(".")[0] == package for m in imported_modules(p))]
    strangers = [name(p) for p in users if not name(p).startswith(KEPT_APART[package])]
    assert not strangers, f"{package} may be imported only under {KEPT_APART[package]}"


def test_import_of_the_package_is_quick_and_light():
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "import rlinf\n"
        "taken = time.perf_counter() - start\n"
        "heavy = {'torch', 'numpy', 'hydra', 'pydantic', 'sapien', 'mani_skill', 'ray', 'matplotlib'}\n"
        "assert taken < 0.3, f'import rlinf took {taken:.2f} s'\n"
        "assert not heavy & sys.modules.keys(), f'import rlinf draws in {heavy & sys.modules.keys()}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def optional_modules() -> set[str]:
    """What the extras install, as Python imports it; nothing that the package always has."""
    lines = importlib.metadata.requires("rlinf") or []
    named = {re.match(r"[\w-]+", line)[0] for line in lines}
    always = {re.match(r"[\w-]+", line)[0] for line in lines if "extra ==" not in line}
    return ({wanted.replace("-", "_") for wanted in named - always} | IMPORTED_AS) - {"rlinf"}


def test_a_recipe_needs_the_packages_of_its_own_extras_only():
    code = (
        "import importlib, importlib.abc, pkgutil, sys\n"
        "blocked, at_home, package = eval(sys.argv[1]), tuple(eval(sys.argv[2])), __import__('rlinf')\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "for module in pkgutil.walk_packages(package.__path__, 'rlinf.'):\n"
        "    if module.name.startswith(at_home) or module.name.endswith('__main__'):\n"
        "        continue\n"
        "    try:\n"
        "        importlib.import_module(module.name)\n"
        "    except Exception as problem:\n"
        "        print(f'{module.name}: {problem}')\n"
    )
    command = [sys.executable, "-c", code, repr(optional_modules()), repr(HOMES_OF_EXTRAS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, f"imported without the extras:\n{done.stdout}"


# --- names and sizes ----------------------------------------------------------------------------------------


def test_no_module_has_a_name_that_says_nothing():
    assert not [name(p) for p in SOURCES if p.stem in BANNED_MODULES]


def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{name(path)}: {node.name}", node)
        for path in SOURCES
        for node in nodes_of(path)
        if isinstance(node, ast.FunctionDef)
    ]


def test_files_and_functions_stay_short():
    assert not [name(p) for p in SOURCES if len(p.read_text().splitlines()) > 550]
    assert not [title for title, node in functions() if (node.end_lineno or 0) - node.lineno > 90]


def takes_anything(node: ast.FunctionDef) -> bool:
    """Whether **kwargs hides what may be given; forwarding the keywords of a typed callable (P.kwargs) does not."""
    keywords = node.args.kwarg
    typed = keywords and isinstance(keywords.annotation, ast.Attribute) and keywords.annotation.attr == "kwargs"
    return bool(keywords) and not typed and not node.name.startswith("_")


def test_no_public_signature_takes_arbitrary_keywords():
    assert not [title for title, node in functions() if takes_anything(node)]


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_names_a_package_registry():
    # Spelt in pieces, so that this file does not name one either.
    pieces = [
        "pypi org", "pythonhosted org", "download pytorch org", "download-r2 pytorch org",
        "conda anaconda org", "registry npmjs org", "ghcr io", "docker io",
        "deb debian org", "snapshot debian org", "archive ubuntu com",
        "tsinghua edu cn", "mirrors aliyun com", "mirrors ustc edu cn", "hf-mirror com",
    ]  # fmt: skip
    hosts = re.compile("|".join(re.escape(host.replace(" ", ".")) for host in pieces))
    found = []
    for path in tracked_files():
        text = path.read_bytes()
        if b"\0" not in text[:4096] and (match := hosts.search(text.decode(errors="replace"))):
            found.append(f"{name(path)}: {match.group()}")
    assert not found


def test_shell_scripts_parse_and_stop_at_errors():
    scripts = [p for p in tracked_files() if p.suffix == ".sh"]
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert "set -euo pipefail" in script.read_text(), f"{name(script)} goes on after errors"


# --- configuration ------------------------------------------------------------------------------------------


def config_classes() -> list[type]:
    from rlinf.core.config import Config

    for path in SOURCES:
        # Only files that define one are imported: others may need a simulator.
        if re.search(r"^class \w+\((\w*Config|Config)\):", path.read_text(), re.MULTILINE):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))

    def below(cls: type) -> list[type]:
        return [found for child in cls.__subclasses__() for found in (child, *below(child))]

    return [cls for cls in below(Config) if cls.__module__.startswith("rlinf.")]


def test_every_configuration_key_is_described():
    classes = config_classes()
    assert classes
    silent = [
        f"{cls.__module__}.{cls.__name__}.{key}"
        for cls in classes
        for key, field in cls.model_fields.items()
        if not (field.description or "").strip()
    ]
    assert not silent


# --- documents ----------------------------------------------------------------------------------------------

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"^[A-Z_]+$|[<>…*{}$]|\.\.\.")


def shell_lines(document: Path) -> list[str]:
    """Commands of the fenced shell blocks, without comments."""
    blocks = [body for language, body in FENCE.findall(document.read_text()) if language in ("bash", "sh")]
    lines = [re.sub(r"\s+#.*", "", line).strip() for body in blocks for line in body.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def commands(document: Path) -> list[str]:
    prose = FENCE.sub("", document.read_text())
    inline = re.findall(r"`([^`\n]+)`", prose)
    starts = ("bash ", "make ", "python ", ".venv/bin/python ")
    return shell_lines(document) + [text for text in inline if text.startswith(starts)]


@pytest.fixture(scope="module")
def subcommands() -> str:
    return subprocess.run(
        [sys.executable, "-m", "rlinf", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=True,
    ).stdout


def complaint(command: str, subcommands: str) -> str | None:
    """What is wrong with a documented command, or None."""
    words = command.split()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[0] == "make" and len(words) > 1 and words[1] not in targets:
        return f"no target {words[1]}"
    if words[0] == "bash" and not PLACEHOLDER.search(words[1]):
        if not (ROOT / words[1]).is_file():
            return f"no file {words[1]}"
        recipe = words[2] if len(words) > 2 and words[1].startswith("examples/embodiment/run_") else "…"
        if not PLACEHOLDER.search(recipe) and not (ROOT / f"examples/embodiment/config/{recipe}.yaml").is_file():
            return f"no recipe {recipe}"
    if words[0].endswith("python") and len(words) > 1:
        if words[1] == "-m" and words[2] == "rlinf" and len(words) > 3 and words[3] not in subcommands:
            return f"no subcommand {words[3]}"
        if words[1].endswith(".py") and not (ROOT / words[1]).is_file():
            return f"no file {words[1]}"
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_documented_commands_exist(document, subcommands):
    wrong = {c: reason for c in commands(document) if (reason := complaint(c, subcommands))}
    assert not wrong


def test_command_check_notices_what_does_not_exist():
    assert complaint("make tset", "") == "no target tset"
    assert complaint("bash requirements/instal.sh embodied", "") == "no file requirements/instal.sh"
    assert complaint("bash examples/embodiment/run_embodiment.sh nothing", "") == "no recipe nothing"
    assert complaint("python -m rlinf docter", "{doctor,plot}") == "no subcommand docter"


def mentioned_paths(document: Path) -> list[Path]:
    """Files and folders which a document names: links, `code` with a slash, lines of a drawn tree."""
    text = document.read_text()
    prose = FENCE.sub("", text)
    links = re.findall(r"\]\(([^)#\s]+)", prose)
    paths = [document.parent / link for link in links if "://" not in link and not link.startswith("mailto:")]
    top = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") or p.name == ".ci"}
    words = re.findall(r"`([\w./-]+/[\w./-]*)`", prose)
    paths += [ROOT / word for word in words if word.split("/")[0] in top - {"logs"}]
    return paths + [ROOT / path for path in tree_paths(text)]


def tree_paths(text: str) -> list[str]:
    """Paths drawn as a tree (├── name   comment) below a first line that names the root."""
    found: list[str] = []
    for _, body in FENCE.findall(text):
        stack: list[str] = []
        for line in body.splitlines():
            if match := re.match(r"^([│ ]*)[├└]── (\S+)", line):
                depth = len(match.group(1)) // 4
                stack = [*stack[:depth], match.group(2).rstrip("/")]
                found.append("/".join(stack))
    return [path for path in found if not PLACEHOLDER.search(path)]


def test_tree_reader_nests():
    assert tree_paths("```\n.\n├── a/   x\n│   └── b.py\n└── c\n```\n") == ["a", "a/b.py", "c"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_documented_paths_exist(document):
    missing = [str(p) for p in mentioned_paths(document) if not p.exists()]
    assert not missing


def test_both_readmes_give_the_same_commands_and_tree():
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    assert shell_lines(english) == shell_lines(chinese)
    assert shell_lines(english)
    assert tree_paths(english.read_text()) == tree_paths(chinese.read_text())
