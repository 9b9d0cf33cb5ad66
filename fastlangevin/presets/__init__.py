"""The samplers of published codebases, by name: options of the one sampler.

Each is a function or an object with the call signature and the return value of the original, whose
equation and source its docstring states, along with what differs. What all of them take besides, by
keyword: ``seed`` or ``generator``, by default drawn from torch's generator; ``first_chain``, rank *
n where several processes have one seed, who else draw the same starts, slots and noise; and
``noise``, standard normals [K, n, ...] in place of their own, for proofs
(:func:`fastlangevin.testing.compare`).
"""

from fastlangevin.presets.igebm import igebm, improved_cd, openai_igebm
from fastlangevin.presets.jem import jem, jempp
from fastlangevin.presets.libraries import ebmkit, torchebm, ula
from fastlangevin.presets.nae import nae
from fastlangevin.presets.nae_v2 import nae_mcmc, nae_v2
from fastlangevin.presets.ncsn import ncsn
from fastlangevin.presets.paper import anatomy, anatomy_eval, short_run
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
