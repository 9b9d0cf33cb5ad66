from pathlib import Path

from fastlangevin.cli.options import Flag, Natural, Run
from fastlangevin.cli.outputs import Result, choose_out


def export(
    run: Run, /, *, out: Path | None = None, cooldown: Natural = 0, overwrite: Flag = False
) -> Result:
    """Write a run's averaged weights and settings as a small checkpoint.

    The checkpoint can be sampled from, but training cannot be resumed from it.

    Args:
        out: The file, a .safetensors (default: model.safetensors, or model-2.safetensors, ... if
            that exists).
        cooldown: Steps without noise to add to the model's chain. Their size falls from half of the
            step size to a twentieth, which makes samples cleaner.
        overwrite: Replace the file if it exists.
    """
    from fastlangevin.learn import model

    out = choose_out(out, "model.safetensors", overwrite, ".safetensors")
    model.export(run, out, cooldown)
    return Result(files=[out])
