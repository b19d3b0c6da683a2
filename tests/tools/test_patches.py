"""tools/apply_patches.sh and check_patches.sh, on a small stand-in for Megatron-LM's repository."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = "megatron/training/arguments.py"
BEFORE, ADDED, AFTER = "def parse_args():\n", "    # ours\n", "    return 1\n"
GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.fixture
def clone(tmp_path) -> Path:
    """A repository whose tag core_v1.2.3 has one file, beside our two tools and a patch for it."""
    (tmp_path / "tools").mkdir()
    for name in ("apply_patches.sh", "check_patches.sh"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    clone = tmp_path / "clone"
    (clone / FILE).parent.mkdir(parents=True)
    (clone / FILE).write_text(BEFORE + AFTER)
    (clone / "megatron/core").mkdir()
    (clone / "megatron/core/package_info.py").write_text("MAJOR = 1\nMINOR = 2\nPATCH = 3\nPRE_RELEASE = ''\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "core_v1.2.3"]):
        assert run(*GIT, *command, cwd=clone).returncode == 0
    (clone / FILE).write_text(BEFORE + ADDED + AFTER)
    save_patch(clone, "-U0")
    return clone


def save_patch(clone: Path, context: str) -> None:
    """Of what has changed in the clone, which is taken back."""
    folder = clone.parent / "patches/megatron/core_v1.2.3"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "0001-ours.patch").write_text(run("git", "diff", context, "--full-index", cwd=clone).stdout)
    assert run("git", "checkout", "-q", ".", cwd=clone).returncode == 0


def apply(clone: Path, *flags: str) -> subprocess.CompletedProcess:
    return run("bash", clone.parent / "tools/apply_patches.sh", *flags, clone, cwd=clone.parent)


def test_apply(clone):
    assert apply(clone, "--check").stdout == "core_v1.2.3/0001-ours.patch applies\n"
    assert (clone / FILE).read_text() == BEFORE + AFTER
    assert apply(clone).stdout == "core_v1.2.3/0001-ours.patch applied\n"
    assert (clone / FILE).read_text() == BEFORE + ADDED + AFTER
    for flags in ((), ("--check",)):
        assert apply(clone, *flags).stdout == "core_v1.2.3 is applied already\n"
    taken_back = run("git", "apply", "--unidiff-zero", "-R", clone.parent / "patches/megatron/core_v1.2.3/0001-ours.patch", cwd=clone)
    assert taken_back.returncode == 0, taken_back.stderr
    assert (clone / FILE).read_text() == BEFORE + AFTER


def test_apply_without_a_repository_inside_another_one(clone):
    shutil.rmtree(clone / ".git")
    assert run(*GIT, "init", "-q", cwd=clone.parent).returncode == 0
    assert apply(clone).returncode == 0
    assert (clone / FILE).read_text() == BEFORE + ADDED + AFTER


def test_what_is_not_a_tags_checkout_is_refused(clone):
    """Though git would add the lines anywhere: there is no context."""
    (clone / FILE).write_text("# new\n" + BEFORE + AFTER)
    result = apply(clone)
    assert result.returncode == 1
    assert "has the files of none of: core_v1.2.3" in result.stderr and "megatron_scalemoe.launch" in result.stderr
    assert (clone / FILE).read_text() == "# new\n" + BEFORE + AFTER
    (clone / "megatron/core/package_info.py").unlink()
    assert "is not a checkout of Megatron-LM" in apply(clone).stderr


def test_the_files_decide_not_the_version_in_them(clone):
    (clone / "megatron/core/package_info.py").write_text("MAJOR = 1\nMINOR = 9\nPATCH = 0\n")
    other = clone.parent / "patches/megatron/core_v0.0.1"
    shutil.copytree(clone.parent / "patches/megatron/core_v1.2.3", other)
    patch = other / "0001-ours.patch"
    patch.write_text(re.sub("^index .*", f"index {'0' * 40}..{'1' * 40} 100644", patch.read_text(), flags=re.MULTILINE))
    assert apply(clone).stdout == "core_v1.2.3/0001-ours.patch applied\n"


def test_check_patches(clone):
    check = ["bash", clone.parent / "tools/check_patches.sh", clone]
    assert run(*check, cwd=clone).stdout.endswith("core_v1.2.3: proved\n")
    (clone / FILE).write_text(BEFORE + ADDED + AFTER)
    save_patch(clone, "-U1")
    assert "must only add lines, without context" in run(*check, cwd=clone).stderr
    (clone / FILE).write_text(BEFORE + "not Python\n" + AFTER)
    save_patch(clone, "-U0")
    result = run(*check, cwd=clone)
    assert result.returncode != 0 and "not Python" in result.stderr


def test_check_patches_without_the_tag(clone):
    check = ["bash", clone.parent / "tools/check_patches.sh", clone]
    shutil.copytree(clone.parent / "patches/megatron/core_v1.2.3", clone.parent / "patches/megatron/core_v1.9.0")
    result = run(*check, cwd=clone)
    assert result.returncode == 0 and "core_v1.9.0: not proved" in result.stdout
    assert run("git", "tag", "-d", "core_v1.2.3", cwd=clone).returncode == 0
    assert run(*check, cwd=clone).returncode == 1


def test_the_patches_import_what_there_is():
    for patch in sorted((ROOT / "patches" / "megatron").rglob("*.patch")):
        module, name = re.search(r"^\+ *from (megatron_scalemoe\S*) import (\w+)$", patch.read_text(), re.MULTILINE).groups()
        assert importlib.util.find_spec(f"{module}.{name}"), patch
