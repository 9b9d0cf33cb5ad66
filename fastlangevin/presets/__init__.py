"""The samplers of published codebases, by name. Each one runs a :class:`LangevinSampler`.

A preset is a function or an object with the call signature and the return value of the original.
Its docstring states the equation, the source and the differences. Calls also take four keywords:

- ``seed`` or ``generator``, not both. By default the seed is drawn from torch's generator.
- ``noise``: standard normals [K, n, ...] that replace the preset's own, to prove that it computes
  the same chain as the original (:func:`fastlangevin.testing.compare`).
- ``first_chain``: rank * n if several processes share one seed. Without it they draw the same
  starts, slots and noise.
"""

from typing import TYPE_CHECKING, NoReturn

from fastlangevin.names import unknown_attribute
from fastlangevin.presets.anatomy import anatomy, anatomy_eval
from fastlangevin.presets.ebmkit import ebmkit
from fastlangevin.presets.igebm import igebm, improved_cd, openai_igebm
from fastlangevin.presets.jem import jem, jempp
from fastlangevin.presets.nae import nae, nae_mcmc, nae_v2
from fastlangevin.presets.ncsn import ncsn
from fastlangevin.presets.short_run import short_run
from fastlangevin.presets.torchebm import torchebm
from fastlangevin.presets.ula import ula
from fastlangevin.presets.uva import uva

__all__ = [
    "anatomy",
    "anatomy_eval",
    "ebmkit",
    "igebm",
    "improved_cd",
    "jem",
    "jempp",
    "nae",
    "nae_mcmc",
    "nae_v2",
    "ncsn",
    "openai_igebm",
    "short_run",
    "torchebm",
    "ula",
    "uva",
]

if not TYPE_CHECKING:  # a checker would take every name for one of this module

    def __getattr__(name: str) -> NoReturn:
        raise unknown_attribute(__name__, name, __all__)
