from fastlangevin.cli.outputs import Result


def doctor() -> Result:
    """Show what is installed, which backends run here, and why the others do not."""
    from fastlangevin.doctor import report

    return Result(report())
