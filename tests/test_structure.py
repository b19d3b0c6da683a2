"""The shape of the code base: who imports whom, how long files and functions are, and that importing does nothing else."""

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

# Prints what cannot be imported where there is neither torch nor megatron.
WITHOUT_TORCH = """
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
"""

# Prints what importing modules replaces in torch, or changes in the process.
SIDE_EFFECTS = """
import importlib, os, sys
import torch, torch.distributed
import megatron.core.models.gpt, megatron.core.transformer.moe.moe_layer, megatron.core.optimizer

PLACES = (torch, torch.cuda, torch.Tensor, torch.distributed, torch.nn.functional)

def state():
    found = {f"{place.__name__}.{name}": value for place in PLACES for name, value in vars(place).items() if callable(value)}
    found |= {"environment": dict(os.environ), "random state": torch.get_rng_state().tolist()}
    return found | {"default dtype": torch.get_default_dtype(), "threads": torch.get_num_threads()}

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    after = state()
    for key, value in before.items():
        if after.get(key) is not value and after.get(key) != value:
            print(f"{name}: {key}")
    before = after
"""


def python_prints(code: str, *arguments: str, cwd: Path = ROOT) -> list[str]:
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_the_planner_half_imports_without_torch_and_megatron():
    failed = python_prints(WITHOUT_TORCH, *TORCH_FREE, "megatron_scalemoe.ops.permute")
    assert failed == ["megatron_scalemoe.ops.permute: torch is blocked"]


def test_importing_changes_nothing(tmp_path):
    (tmp_path / "bad_module.py").write_text("import torch\ntorch.cuda.current_device = lambda: 'cpu'\n")
    changed = python_prints(SIDE_EFFECTS, "megatron_scalemoe", *MODULES, "bad_module", cwd=tmp_path)
    assert changed == ["bad_module: torch.cuda.current_device"]


def test_import_contracts_can_fail(tmp_path):
    """That they hold .ci/run asks, which calls lint-imports itself."""
    program = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert program, "lint-imports is not installed beside this Python: pip install -e '.[dev]'"
    shutil.copytree(PACKAGE, tmp_path / "megatron_scalemoe", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    wrong = {
        "config.py": "import torch",
        "cli/main.py": "def f():\n    import megatron.core",
        "balance/__init__.py": "import megatron_scalemoe.mcore",
    }
    for module, line in wrong.items():
        with open(tmp_path / "megatron_scalemoe" / module, "a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    result = subprocess.run([program, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert result.stdout.count(" BROKEN") == len(wrong), result.stdout


def long_functions(source: str) -> list[str]:
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f"{f.name} ({length} lines)" for f in functions if (length := f.end_lineno - f.lineno + 1) > MAX_FUNCTION_LINES]


def test_files_and_functions_are_short():
    long = {}
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        lines = len(source.splitlines())
        if found := long_functions(source) + [f"{lines} lines"] * (lines > MAX_FILE_LINES):
            long[str(path.relative_to(ROOT))] = found
    assert not long
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert long_functions(f"class C:\n  def f(self):\n{body}") == ["f (61 lines)"]


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


def test_the_package_does_not_pickle():
    found = {path.name: uses for path in PACKAGE.rglob("*.py") if (uses := pickle_uses(path.read_text(encoding="utf-8")))}
    assert found == {"metadata.py": ["pickle"]}  # Megatron's checkpoints have pickles: this reads them without running them
    source = "import pickle\nfrom dill import load\nf(x, allow_pickle=True)\nf(x, weights_only=False)\nf(x, weights_only=True)"
    assert pickle_uses(source) == ["pickle", "dill", "allow_pickle=True", "weights_only=False"]


def test_public_names():
    assert set(megatron_scalemoe._PUBLIC) <= set(megatron_scalemoe.__all__)
    for name, module in megatron_scalemoe._PUBLIC.items():
        assert getattr(megatron_scalemoe, name).__module__ == f"megatron_scalemoe.{module}"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = megatron_scalemoe.nonsense


def test_pip_installs_the_same_versions_of_megatron_core_as_are_supported():
    wanted = next(found for found in map(Requirement, importlib.metadata.requires("megatron-scalemoe")) if found.name == "megatron-core")
    for version in ("0.16.0", "0.16.1", "0.16.2", "0.17.0", "0.17.1", "0.18.0", "0.18.2", "0.19.0", "0.19.2", "0.20.0", "1.0.0"):
        assert wanted.specifier.contains(version) == is_supported_megatron(version), version
