from pathlib import Path

from fastlangevin.cli.options import Run
from fastlangevin.cli.outputs import Result, check_out


def export(run: Run, /, *, out: Path = Path("model.safetensors")) -> Result:
    """Write a run's averaged weights and settings as a small checkpoint.

    The checkpoint can be sampled from, but training cannot be resumed from it.

    Args:
        out: The file, a .safetensors.
    """
    from fastlangevin.learn import checkpoint

    check_out(out, ".safetensors")
    checkpoint.export(run, out)
    return Result(files=[out])
