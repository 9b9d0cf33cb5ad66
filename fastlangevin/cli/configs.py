from fastlangevin.cli.outputs import Result


def configs(name: str | None = None, /) -> Result:
    """List the training configs in the package, or print one as YAML.

    The YAML has every setting, with comments, and can serve as a start for your own config.

    Args:
        name: Config to print (default: list the names of all configs).
    """
    from fastlangevin.learn.config import config_names, config_text

    return Result(config_text(name) if name else "\n".join(config_names()))
