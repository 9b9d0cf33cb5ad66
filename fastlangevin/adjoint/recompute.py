"""Differentiable steps of a chain that are stored as states and recomputed by the backward pass."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlangevin.adjoint.memory import Allocations, States
from fastlangevin.adjoint.one_step import (
    advance,
    arguments_of,
    explicit_graph,
    leaves_of,
    nodes_of,
    transition,
)
from fastlangevin.adjoint.schedules import Sizes, reverse, sweep
from fastlangevin.arguments import at_step
from fastlangevin.chain.chain import Chain
from fastlangevin.gradients.network import parameters_of, submodules_of
from fastlangevin.gradients.precision import network_precision
from fastlangevin.gradients.second_order import SecondOrderGradient
from fastlangevin.kernels import reference
from fastlangevin.kernels.memory import in_memory

_OP = "LangevinSampler"


class StoredSteps:
    """The last steps of a chain, with the states that a schedule stores for the backward pass.

    ``explicit`` allows the package's second-order pass in place of autograd's.
    """

    def __init__(
        self, chain: Chain, first: int, straight: bool, x: Tensor, explicit: bool = True
    ) -> None:
        self.chain, self.first, self.straight = chain, first, straight
        self.graph = explicit_graph(chain, x) if explicit else "it is not requested"
        self.explicit: SecondOrderGradient | None = None  # while steps are taken
        # If the given noise needs a gradient, each step reads its own entry as a leaf. A gradient
        # of the whole noise at every step would cost K^2 in total.
        stds = (at_step(chain.settings.noise_std, k) for k in range(first, chain.settings.steps))
        requires_grad = chain.noise is not None and chain.noise.requires_grad
        is_leaf = requires_grad and not all(map(reference.is_zero, stds))
        self.noise = chain.noise if is_leaf else None
        self.autocast = _autocast_state(x.device)
        self.mark = object()  # marks the nodes of the first step
        # torch.func.functional_call puts its tensors into these tables only for the forward pass.
        self.tables: list[tuple[dict[str, Any], str, Tensor]] = [
            (table, name, tensor)
            for module in submodules_of(chain.energy)
            # functional_call does not support scripted modules, whose tables are views.
            if not isinstance(module, torch.jit.ScriptModule)
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self.versions = [
            (tensor, tensor._version)
            for tensor in (x, *parameters_of(chain.energy), *arguments_of(chain))
            if not tensor.is_inference()
        ]

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Any]]:
        """Runs the first step with a graph and collects every tensor that receives a gradient.

        The graph also shows the tensors that closures read. Returns the state after the step, its
        energies, those tensors and the nodes of both graphs. (torch.utils.checkpoint needs no such
        list, but it evaluates each step twice in the forward pass, because the inner gradient needs
        the values that it has just discarded.)
        """
        self.pack(x)
        start, z = x.detach().requires_grad_(), self._noise(0)
        with torch.enable_grad():
            after, energies = self._step(start, 0, z)
        nodes = nodes_of(after)
        for node in nodes:
            node.metadata[self.mark] = True
        tensors = [leaf for leaf in leaves_of(nodes) if leaf is not start and leaf is not z]
        if self.noise is not None:
            tensors.append(self.noise)  # always the last one
        return after.detach(), energies.detach(), tensors, nodes + nodes_of(energies)

    def measure(self, x: Tensor) -> Sizes:
        """Runs one step and its backward pass to measure their memory."""
        with Allocations() as forward_pass:
            *_, tensors, nodes = self.begin(x)
            graph = forward_pass.live
            del nodes
        with Allocations() as backward_pass, torch.no_grad():
            self.pack(x)
            wanted = (True,) * (1 + len(tensors))
            self._step_back(x, tensors, 0, torch.ones_like(x), wanted)
        # In addition to the gradients of a step there are their sums over the steps.
        sums = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        sizes = Sizes(x.numel() * x.element_size(), graph, backward_pass.peak + sums)
        if self.explicit is None:
            return sizes
        # Graphs are stored by autograd alone; the explicit pass only recomputes steps.
        by_autograd = StoredSteps(self.chain, self.first, self.straight, x, explicit=False)
        return by_autograd.measure(x)._replace(again=sizes.step)

    def pack(self, x: Tensor) -> None:
        """Reads the weights, if the second-order pass is explicit."""
        if not isinstance(self.graph, str):
            self.explicit = None
            self.explicit = SecondOrderGradient(self.graph, x, self.chain.settings.precision)
            self.explicit.begin()

    def forward(
        self,
        x: Tensor,
        after: Tensor,
        energies: Tensor,
        tensors: list[Tensor],
        steps: int,
        states: int,
        offload: bool,
    ) -> tuple[Tensor, Tensor]:
        """Runs the rest of the chain after its first step and stores ``states`` states.

        Returns the last state and its energies.
        """
        self.steps, self.capacity = steps, states
        # autograd's saved tensors would not do: hooks, such as those of a checkpoint around the
        # chain, return copies of them, and the gradients must go to these very tensors.
        self.tensors = tensors
        self.versions += [(tensor, tensor._version) for tensor in tensors]
        self.states = States(x.device, offload)
        self.energies = [energies]
        state = x.detach()
        for kind, k in sweep(0, steps, states - 1):
            if kind == "store":
                self.states.put(k, state)
            else:
                state = after if k == 0 else self._advance(state, k)
        self.last: Tensor | None = state
        out = after if steps == 1 else self._advance(state, steps - 1)
        self.explicit = None
        return out, self.energies[-1]

    def backward(self, x: Tensor, grad: Tensor, wanted: tuple[bool, ...]) -> list[Tensor | None]:
        """The ``wanted`` gradients of x and the tensors, from the gradient of the last state."""
        state: Tensor | None
        state, self.last = self.last, None
        # A second backward pass starts from x alone, since the first has replaced the other states.
        stored = [0, *self.states] if state is not None else [0]
        if state is None:
            self.states.clear()
        sums: list[Tensor | None] = [None] * len(self.tensors)
        gaps = []
        self.pack(x)
        for kind, k in reverse(self.steps, self.capacity, stored, state is not None):
            if kind == "restore":
                state = x.detach() if k == 0 else self.states.get(k)
                continue
            if kind == "drop":
                if k:
                    self.states.drop(k)
                continue
            assert state is not None
            if kind == "store":
                self.states.put(k, state)
            elif kind == "advance":
                with self.autocast():
                    state = advance(self.chain, state, self.first + k, self.explicit)[0]
            else:
                need = (k > 0 or wanted[0], *wanted[1:])
                state_grad, step_grads, energies = self._step_back(
                    state, self.tensors, k, grad, need
                )
                grad = torch.zeros_like(grad) if state_grad is None else state_grad
                for i, step_grad in enumerate(step_grads):
                    total = sums[i]
                    if self.noise is not None and i == len(sums) - 1 and step_grad is not None:
                        sums[i] = total = torch.zeros_like(self.noise) if total is None else total
                        total[self.first + k] = step_grad
                    elif step_grad is not None:
                        # The first part is copied: autograd may return one tensor several times.
                        sums[i] = step_grad.clone() if total is None else total.add_(step_grad)
                del step_grads
                gaps.append((energies - self.energies[k]).abs().max())
        self.explicit = None
        self._check_again(gaps[::-1])
        return [grad if wanted[0] else None, *sums]

    def _step_back(
        self, x: Tensor, tensors: list[Tensor], k: int, grad: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, list[Tensor | None], Tensor]:
        """The gradients of step k with respect to x and the tensors, and its energies."""
        inputs, z = [x.detach().requires_grad_(), *tensors], self._noise(k)
        if z is not None:
            inputs[-1] = z
        with torch.enable_grad(), self.autocast():
            after, energies = self._step(inputs[0], k, z)
        nodes = nodes_of(after)
        if {id(leaf) for leaf in leaves_of(nodes)} - {id(tensor) for tensor in inputs}:
            raise RuntimeError(
                f"{_OP}: at step {self.first + k} the energy reads other tensors than at the "
                'first step; use checkpoint="none"'
            )
        # Parameters, coefficients and tensors of closures may have graphs of their own, which all
        # steps share and which must survive. Otherwise the pass frees a third of its memory early.
        inner_nodes = [node for node in nodes if not hasattr(node, "variable")]
        is_shared = any(self.mark in node.metadata for node in inner_nodes)
        del nodes, inner_nodes
        needed_inputs = [tensor for tensor, needed in zip(inputs, wanted, strict=True) if needed]
        settings, isolation = self.chain.settings, self.chain.isolation
        assert isolation is not None
        with isolation.backward(), network_precision(settings.precision, x.device):
            needed_grads = iter(
                torch.autograd.grad(
                    after, needed_inputs, grad, allow_unused=True, retain_graph=is_shared
                )
                if needed_inputs
                else ()
            )
        state_grad, *tensor_grads = [next(needed_grads) if needed else None for needed in wanted]
        return state_grad, tensor_grads, energies.detach()

    def _noise(self, k: int) -> Tensor | None:
        """The noise of step k as a leaf, if it needs a gradient."""
        return None if self.noise is None else self.noise[self.first + k].detach().requires_grad_()

    def _step(self, x: Tensor, k: int, z: Tensor | None) -> tuple[Tensor, Tensor]:
        k += self.first
        chain = self.chain
        if z is not None:
            chain = chain._replace(noise={k: z})  # type: ignore[arg-type]  # read as noise[k]
        return transition(chain, x, k, True, self.straight, self.explicit)

    def _advance(self, x: Tensor, k: int) -> Tensor:
        after, energies = advance(self.chain, x, self.first + k, self.explicit)
        self.energies.append(energies)
        return after

    @contextlib.contextmanager
    def tables_put_back(self) -> Iterator[None]:
        """A context in which the energy has the tensors that it had in the forward pass."""
        current = [(table, name, table.get(name)) for table, name, _ in self.tables]
        try:
            for table, name, tensor in self.tables:
                table[name] = tensor
            yield
        finally:
            for table, name, current_tensor in current:
                table[name] = current_tensor

    def check_versions(self) -> None:
        """RuntimeError if a tensor that a step reads has changed since the forward pass."""
        if any(tensor._version != version for tensor, version in self.versions):
            raise RuntimeError(
                f"{_OP}: x0, a parameter of the energy or an argument of the chain has been "
                "modified by an inplace operation between the chain and its backward pass, which "
                "recomputes the chain"
            )

    def _check_again(self, gaps: list[Tensor]) -> None:
        """RuntimeError if energies differ from the forward pass by much more than rounding."""
        before = torch.stack(self.energies)
        if not in_memory(before):
            return  # Python cannot branch on tensors without values, or on those of transforms
        is_half = self.autocast.keywords["enabled"] or before.dtype.itemsize < 4
        is_half |= self.chain.settings.precision in ("fp16", "bf16")
        # 2^-10 allows for TF32, which CUDA may use in one kernel and not in another.
        eps = 2**-7 if is_half else max(torch.finfo(before.dtype).eps, 2**-10 * before.is_cuda)
        differs = torch.stack(gaps) > eps**0.5 * before.abs().max()
        if bool(differs.any()):
            k = int(differs.nonzero()[0])
            values = "scores' norms" if self.chain.settings.gradient == "network" else "energies"
            raise RuntimeError(
                f"{_OP}: recomputed for the backward pass, the {values} of step "
                f"{self.first + k} differ by up to {float(gaps[k]):.3g} from those of the forward "
                "pass. Does the energy draw random numbers that are not torch's (those are seeded "
                "at every step), keep a state between calls, or run in another mode (train, eval) "
                'or with other weights now? checkpoint="none" recomputes nothing'
            )


class Adjoint(torch.autograd.Function):
    """The last state of the steps; its backward pass runs the chain again."""

    @staticmethod
    def forward(
        ctx: Any, stored_steps: StoredSteps, out: Tensor, x: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.stored_steps = stored_steps
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stored_steps.check_versions()
        (x,) = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.no_grad(), ctx.stored_steps.tables_put_back():
            grads = ctx.stored_steps.backward(x, grad, ctx.needs_input_grad[2:])
        if create_graph:
            present = [input_grad for input_grad in grads if input_grad is not None]
            inputs = (grad, x, *ctx.stored_steps.tensors)
            guarded = iter(_DifferentiableOnce.apply(len(present), *present, *inputs))
            grads = [input_grad if input_grad is None else next(guarded) for input_grad in grads]
        return None, None, *grads


class _DifferentiableOnce(torch.autograd.Function):
    """Gradients made under create_graph; differentiating them raises an error that explains why."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"{_OP}: a chain whose steps are recomputed can be differentiated once; second "
            'derivatives of a chain need checkpoint="none"'
        )


def _autocast_state(device: torch.device) -> functools.partial[torch.autocast]:
    """A context manager that restores the current autocast settings."""
    kind = "cpu" if device.type == "meta" else device.type  # torch has no autocast for meta
    return functools.partial(
        torch.autocast,
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
