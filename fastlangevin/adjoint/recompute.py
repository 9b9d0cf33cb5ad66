"""Chains that are stored as states; their backward pass recomputes the steps between these."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlangevin.adjoint.repeatable import RepeatableSteps
from fastlangevin.adjoint.schedules import reverse, sweep
from fastlangevin.adjoint.storage import States
from fastlangevin.kernels.memory import in_memory

_OP = "LangevinSampler"


def run_forward(
    steps: RepeatableSteps,
    x: Tensor,
    after: Tensor,
    energies: Tensor,
    tensors: list[Tensor],
    count: int,
    capacity: int,
    offload: bool,
) -> tuple[Tensor, "StoredRun"]:
    """Runs ``count`` steps from x and returns the last state, and the run for its backward pass.

    The first step has been run: ``after`` is the state after it, ``energies`` are those before it,
    and ``tensors`` receive gradients. At most ``capacity`` states are stored, x included.
    """
    steps.versions += [(tensor, tensor._version) for tensor in tensors]
    run = StoredRun(steps, count, capacity, tensors, States(x.device, offload), [energies])
    state = x.detach()
    for kind, k in sweep(0, count, capacity - 1):
        if kind == "store":
            run.states.put(k, state)
        else:
            state = after if k == 0 else run.advance(state, k)
    run.last = state
    out = after if count == 1 else run.advance(state, count - 1)
    steps.second_order = None
    return out, run


@dataclass(eq=False)
class StoredRun:
    """A forward pass through ``count`` steps, and its backward pass.

    ``tensors`` are the tensors themselves that receive gradients. autograd's saved tensors would
    not do: hooks, such as those of a checkpoint around the chain, return copies of them.
    """

    steps: RepeatableSteps
    count: int
    capacity: int
    tensors: list[Tensor]
    states: States
    energies: list[Tensor]  # before each step, to compare with those of the backward pass
    last: Tensor | None = None  # the state before the last step, until a backward pass takes it

    def advance(self, x: Tensor, k: int) -> Tensor:
        after, energies = self.steps.advance(x, k)
        self.energies.append(energies)
        return after

    def backward(self, x: Tensor, grad: Tensor, wanted: tuple[bool, ...]) -> list[Tensor | None]:
        """The ``wanted`` gradients of x and the tensors, from the gradient of the last state."""
        state, self.last = self.last, None
        in_hand = state is not None
        if not in_hand:
            self.states.clear()  # an earlier backward pass has replaced them
        sums: list[Tensor | None] = [None] * len(self.tensors)
        gaps = []
        self.steps.pack(x)
        for kind, k in reverse(self.count, self.capacity, [0, *self.states], in_hand):
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
                with self.steps.autocast():
                    state = self.steps.advance(state, k)[0]
            else:
                need = (k > 0 or wanted[0], *wanted[1:])
                state_grad, step_grads, energies = self.steps.step_back(
                    state, self.tensors, k, grad, need
                )
                grad = torch.zeros_like(grad) if state_grad is None else state_grad
                self._accumulate(sums, step_grads, k)
                del step_grads
                gaps.append((energies - self.energies[k]).abs().max())
        self.steps.second_order = None
        self._check_again(gaps[::-1])
        return [grad if wanted[0] else None, *sums]

    def _accumulate(
        self, sums: list[Tensor | None], step_grads: list[Tensor | None], k: int
    ) -> None:
        """Adds the gradients of step k to the sums over all steps."""
        noise = self.steps.noise
        place_of_noise = len(sums) - 1  # if it needs a gradient; see RepeatableSteps.begin
        for i, step_grad in enumerate(step_grads):
            if step_grad is None:
                continue
            total = sums[i]
            if noise is not None and i == place_of_noise:
                sums[i] = total = torch.zeros_like(noise) if total is None else total
                total[self.steps.first + k] = step_grad
            else:
                # The first part is copied: autograd may return one tensor several times.
                sums[i] = step_grad.clone() if total is None else total.add_(step_grad)

    def _check_again(self, gaps: list[Tensor]) -> None:
        """RuntimeError if energies differ from the forward pass by much more than rounding."""
        steps, before = self.steps, torch.stack(self.energies)
        if not in_memory(before):
            return  # Python cannot branch on tensors without values, or on those of transforms
        is_half = steps.autocast.keywords["enabled"] or before.dtype.itemsize < 4
        is_half |= steps.chain.settings.precision in ("fp16", "bf16")
        # 2^-10 allows for TF32, which CUDA may use in one kernel and not in another.
        eps = 2**-7 if is_half else max(torch.finfo(before.dtype).eps, 2**-10 * before.is_cuda)
        differs = torch.stack(gaps) > eps**0.5 * before.abs().max()
        if bool(differs.any()):
            k = int(differs.nonzero()[0])
            values = "scores' norms" if steps.chain.settings.gradient == "network" else "energies"
            raise RuntimeError(
                f"{_OP}: recomputed for the backward pass, the {values} of step "
                f"{steps.first + k} differ by up to {float(gaps[k]):.3g} from those of the forward "
                "pass. Does the energy draw random numbers that are not torch's (those are seeded "
                "at every step), keep a state between calls, or run in another mode (train, eval) "
                'or with other weights now? checkpoint="none" recomputes nothing'
            )


class Adjoint(torch.autograd.Function):
    """The last state of the steps; its backward pass runs the chain again."""

    @staticmethod
    def forward(ctx: Any, run: StoredRun, out: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run: StoredRun = ctx.run
        run.steps.check_versions()
        (x,) = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.no_grad(), run.steps.tables_put_back():
            grads = run.backward(x, grad, ctx.needs_input_grad[2:])
        if create_graph:
            present = [input_grad for input_grad in grads if input_grad is not None]
            inputs = (grad, x, *run.tensors)
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
