"""configs: the training configs in the package."""

from fastlangevin.cli.outputs import Result


def configs(name: str | None = None, /) -> Result:
    """List the training configs in the package, or print one as YAML.

    The YAML states every setting, with comments: a file to start your own config from.

    Args:
        name: Print this config.
    """
    from fastlangevin.learn.config import config_names, config_text

    return Result(config_text(name) if name else "\n".join(config_names()))
