"""Share a model on the Hugging Face hub, with a model card."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlangevin._version import __version__
from fastlangevin.learn.atomic import save_text
from fastlangevin.learn.checkpoint import read_checkpoint
from fastlangevin.learn.hub import MODEL, upload
from fastlangevin.learn.model import export, save
from fastlangevin.sampler import LangevinSampler


def push_to_hub(
    model: LangevinSampler | str | Path,
    repo: str,
    *,
    private: bool | None = None,
    message: str = "Add the model",
) -> str:
    """Upload a model to the Hugging Face hub, with a model card, and return its address.

    Args:
        model: A sampler, which is written as by :func:`save`, or a run or checkpoint, which is
            written as by ``fastlangevin export``.
        repo: The repository, "owner/name". It is made if it does not exist. Others load the model
            by ``load("hf:owner/name")``.
        private: Whether a new repository is private (default: as set on the hub).
        message: The message of the commit.

    You must be logged in on the hub (``hf auth login``). Raises ImportError without
    huggingface_hub, the errors of :func:`save`, and OSError if the hub refuses.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if isinstance(model, LangevinSampler):
            save(model, folder / MODEL)
        else:
            export(model, folder / MODEL)
        info = read_checkpoint(folder / MODEL)[1]
        save_text(folder / "README.md", _card(repo, info))
        return upload(repo, folder, private, message)


def _card(repo: str, info: Mapping[str, Any]) -> str:
    """Return the text of a model card: what the model is, how to load it, and its settings."""
    kind, settings = info.get("energy_class", "ConvEnergy"), info["energy"]
    is_custom = settings is None
    rows = {**(settings or {}), **(info.get("config") or {}), **info["sampler"]}
    if "start" in info:
        rows["start"] = "enlarged samples of a model of smaller images, which is in the file"
    return _CARD.format(
        name=repo.split("/")[-1],
        repo=repo,
        version=__version__,
        kind=kind,
        energy=", energy=MyEnergy()" if is_custom else "",
        hint=f"  # an instance of {kind}" if is_custom else "",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )


_CARD = """---
library_name: fastlangevin
tags:
- energy-based-model
- langevin-dynamics
---

# {name}

An energy-based model ({kind}), saved by fastlangevin {version}.

```python
import fastlangevin as fl

sampler = fl.load("hf:{repo}"{energy}){hint}
x = sampler(n=64, seed=0)
```

| setting | value |
|---|---|
{rows}
"""
