"""Files that are written whole or not at all, and read with their place in every error."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ple_jax.core.errors import UserError


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically; NaN and infinities become null and "inf"."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(plain(value), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content; None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged, or no file of a run ({error}); give another --workdir") from error
