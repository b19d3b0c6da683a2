"""Where the text is: files and folders of it, or what Megatron's preprocessing made of them."""

from __future__ import annotations

import pathlib
import sysconfig

from megatron_scalemoe.errors import ScaleMoEError

INDEXED_ENDINGS = (".bin", ".idx")


def is_indexed(prefix: str) -> bool:
    """Whether `prefix` names one of Megatron's indexed datasets, PREFIX.bin and PREFIX.idx."""
    return all(pathlib.Path(prefix + ending).is_file() for ending in INDEXED_ENDINGS)


def text_files(paths: list[str]) -> list[pathlib.Path]:
    """The given files and all in the given folders; without any, the Python standard library's sources.

    Raises `ScaleMoEError` for a path that does not exist, and for a file of an indexed dataset, whose bytes are no text.
    """
    given = [pathlib.Path(path) for path in paths] or [pathlib.Path(sysconfig.get_paths()["stdlib"])]
    missing = [str(path) for path in given if not path.exists()]
    if missing:
        raise ScaleMoEError("there is no text to read", found=f"no {', '.join(missing)}", try_="a text file or a folder of them")
    pattern = "**/*" if paths else "*.py"
    files = [file for path in given for file in (sorted(path.glob(pattern)) if path.is_dir() else [path]) if file.is_file()]
    indexed = [file for file in files if is_indexed(str(file.with_suffix(""))) and file.suffix in INDEXED_ENDINGS]
    if indexed:
        raise ScaleMoEError("an indexed dataset is named by its prefix", found=indexed[0], try_=indexed[0].with_suffix(""))
    return files
