"""What each tensor of an artifact takes, for `skc info RUN` and `skc info ARTIFACT`."""

import os
from typing import Any

from core.console import Console
from core.export.artifact import ArtifactError, read_artifact
from core.export.codecs import tensor_sizes
from core.model.params import param_table
from core.training.run import Run


def tensor_bytes(path: str, say: Console) -> dict[str, Any] | None:
    """Show bits a value, entropy of codes and bytes of every tensor; return them as JSON, None without an artifact.

    An artifact that cannot be read is said, with what to do: the rest of what there is to say of a run is no less true.
    """
    file = path if os.path.isfile(path) else str(Run.open(path).artifact_path)
    say()
    if not os.path.lexists(file):
        say(f"no artifact yet: skc export {path}")
        return None
    try:
        artifact = read_artifact(file)
    except ArtifactError as error:
        say(str(error))
        return None
    found, rows = {}, []
    table = param_table(artifact.model)
    for name, size in tensor_sizes(artifact.stored, table).items():
        row = table[name]
        found[name] = {"bits": size.bits / row.size, "entropy": size.entropy, "bytes": size.bits / 8}
        entropy = "" if size.entropy is None else f"{size.entropy:.3f}"
        rows.append((name, row.storage, row.size, f"{size.bits / row.size:.3f}", entropy, round(size.bits / 8)))
    say.table(("tensor", "storage", "values", "bits a value", "entropy of its codes", "bytes"), rows)
    total = sum(tensor["bytes"] for tensor in found.values())
    say(f"{file}: {artifact.size:,} bytes, {artifact.size - total:,.0f} of them header and the coder's lanes")
    return found
