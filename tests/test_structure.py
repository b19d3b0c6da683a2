"""The shape of the code base: who imports whom, how long files and functions are, and that importing does nothing else.

Each check is a small function that is also shown something bad, so that it is known to be able to fail.
"""

import ast
import importlib.metadata
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megatron_scalemoe
from megatron_scalemoe.environment import is_supported_megatron

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_scalemoe"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# The half that may need torch; everything else must import without it.
RUNTIME = {"ops", "dispatch", "faults", "balance", "mcore", "bench"}
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "megatron_scalemoe."))
TORCH_FREE = ["megatron_scalemoe", *(m for m in MODULES if m.split(".")[1] not in RUNTIME)]
SOURCES = sorted(p for folder in ("megatron_scalemoe", "examples", "tools", "tests") for p in (ROOT / folder).rglob("*.py"))

BLOCKER = """
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
importlib.import_module(sys.argv[1])
"""

SIDE_EFFECTS = """
import importlib, os, sys
import torch, torch.distributed
import megatron.core.models.gpt, megatron.core.transformer.moe.moe_layer, megatron.core.optimizer

def state():
    places = (torch, torch.cuda, torch.Tensor, torch.distributed, torch.nn.functional)
    functions = {(p.__name__, name): value for p in places for name, value in vars(p).items() if callable(value)}
    return functions, dict(os.environ), torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads()

functions, *rest = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
functions_after, *rest_after = state()
changed = [key for key, value in functions.items() if functions_after.get(key) is not value]
assert not changed, f"replaced on import: {changed}"
assert rest == rest_after, "environment variables, random state, default dtype or thread count changed on import"
"""


def run_python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_without_torch_and_megatron(module):
    result = run_python(BLOCKER, module)
    assert result.returncode == 0, result.stderr


def test_the_blocker_blocks():
    assert "torch is blocked" in run_python(BLOCKER, "megatron_scalemoe.ops.permute").stderr


def lint_imports(cwd: Path) -> subprocess.CompletedProcess:
    program = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert program, "lint-imports is not installed beside this Python: pip install -e '.[dev]'"
    return subprocess.run([program, "--no-cache"], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_import_contracts_hold():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("config.py", "import torch"),
        ("cli/bench/command.py", "def f():\n    import megatron.core"),
        ("ops/__init__.py", "import megatron_scalemoe.mcore"),
        ("balance/__init__.py", "import megatron_scalemoe.mcore"),
        ("faults/__init__.py", "import megatron_scalemoe.dispatch"),
        ("without_a_layer.py", ""),
    ],
)
def test_import_contracts_can_fail(tmp_path, module, line):
    shutil.copytree(PACKAGE, tmp_path / "megatron_scalemoe", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "megatron_scalemoe" / module, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode != 0
    assert "BROKEN" in result.stdout


def test_importing_any_module_changes_nothing():
    result = run_python(SIDE_EFFECTS, "megatron_scalemoe", *MODULES)
    assert result.returncode == 0, result.stderr


def test_side_effects_are_noticed(tmp_path):
    (tmp_path / "bad_module.py").write_text("import torch\ntorch.cuda.current_device = lambda: 'cpu'\n")
    result = run_python(SIDE_EFFECTS, "bad_module", cwd=tmp_path)
    assert "('torch.cuda', 'current_device')" in result.stderr


def long_functions(source: str) -> list[str]:
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f"{f.name} ({length} lines)" for f in functions if (length := f.end_lineno - f.lineno + 1) > MAX_FUNCTION_LINES]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    assert not long_functions(source)


def test_long_functions_are_noticed():
    body = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert not long_functions(f"def f():\n{body}")
    assert long_functions(f"class C:\n  def f(self):\n{body}    x = 1\n") == ["f (61 lines)"]


def pickle_uses(source: str) -> list[str]:
    """Modules that pickle, and arguments that let a file be unpickled."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [n for n in names if n.split(".")[0] in ("pickle", "cPickle", "cloudpickle", "dill", "shelve", "joblib")]
        for argument in node.keywords if isinstance(node, ast.Call) else []:
            unsafe = {"allow_pickle": True, "weights_only": False}.get(argument.arg, ...)
            if isinstance(argument.value, ast.Constant) and argument.value.value is unsafe:
                found.append(f"{argument.arg}={unsafe}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_package_does_not_pickle(path):
    assert not pickle_uses(path.read_text(encoding="utf-8"))


def test_pickle_is_noticed():
    source = "import pickle\nfrom dill import load\nf(x, allow_pickle=True)\nf(x, weights_only=False)\nf(x, weights_only=True)"
    assert pickle_uses(source) == ["pickle", "dill", "allow_pickle=True", "weights_only=False"]


@pytest.mark.parametrize(("name", "module"), megatron_scalemoe._PUBLIC.items())
def test_every_public_name_resolves(name, module):
    assert name in megatron_scalemoe.__all__
    assert getattr(megatron_scalemoe, name).__module__ == f"megatron_scalemoe.{module}"


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = megatron_scalemoe.nonsense


def test_pip_installs_the_same_versions_of_megatron_core_as_are_supported():
    wanted = next(found for found in map(Requirement, importlib.metadata.requires("megatron-scalemoe")) if found.name == "megatron-core")
    for version in ("0.16.0", "0.16.1", "0.16.2", "0.17.0", "0.17.1", "0.18.0", "0.18.2", "0.19.0", "0.19.2", "0.20.0", "1.0.0"):
        assert wanted.specifier.contains(version) == is_supported_megatron(version), version
