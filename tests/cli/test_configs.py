"""configs: the training configs in the package."""

from fastlangevin.learn.config import config_names, config_text
from tests.cli.shared import Command, assert_refused


def test_configs_lists_names_and_prints_files(command: Command) -> None:
    assert command("configs").stdout.split() == config_names()
    for name in config_names():
        assert command("configs", name).stdout == config_text(name) + "\n"
    assert_refused(command("configs", "mine"), "config must be one of .*, got 'mine'")
