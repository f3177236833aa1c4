"""Which module's output goes where, seen in one forward pass: also of models that cannot be traced."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankopt.core.errors import TaskError
from rankopt.model.forward import inference, run
from rankopt.model.inventory import obstacle, weight_owners


class Dataflow(TorchDispatchMode):
    """The modules of a model in the order of their calls, and which modules used each tensor.

    A tensor is used by the innermost module in whose forward an operation reads it, and by None where anything else
    may see it: as the model's output, or in a hook. What a forward does with other inputs is not seen: where it
    goes depends on the data, this is the way of the example alone.
    """

    def __init__(self, model: nn.Module, x: Any) -> None:
        """Runs the model, in eval mode, on one example. Raises TaskError where that fails."""
        super().__init__()
        owners = weight_owners(model)
        self.free = {m for m in model.modules() if obstacle(m, ["called"], owners) is None}  # type: ignore[list-item]
        self.calls: dict[nn.Module, list[tuple[Tensor, Tensor] | None]] = defaultdict(list)
        self.users: dict[int, set[nn.Module | None]] = defaultdict(set)
        self._alive: list[Any] = []  # every tensor seen, so that no id comes twice
        self._stack = [model]
        self._hooked = {m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks}
        handles = [m.register_forward_pre_hook(self._enter, prepend=True) for m in model.modules()]
        handles += [m.register_forward_hook(self._leave, with_kwargs=True, always_call=True) for m in model.modules()]
        try:
            with inference(model), self:
                self._use(run(model, x), None)
        except Exception as error:
            raise TaskError(f"the model does not run on example_input: {type(error).__name__}: {error}") from error
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._use((args, kwargs), self._stack[-1])
        out = func(*args, **(kwargs or {}))
        self._alive.append(out)
        return out

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        self._stack.pop()
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(out, Tensor)
        self.calls[module].append((args[0], out) if alone else None)
        if module in self._hooked:
            self._use((args, kwargs, out), None)

    def _use(self, values: Any, user: nn.Module | None) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self.users[id(value)].add(user)
                self._alive.append(value)

    # --- what may be joined ---

    def call(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Input and output of a module that is called once, with one tensor, and that nothing forbids to replace."""
        own = [*module.parameters(), *module.buffers()]
        read_elsewhere = any(self.users[id(t)] - set(module.modules()) for t in own)
        calls = self.calls[module]
        return calls[0] if len(calls) == 1 and module in self.free and not read_elsewhere else None

    def follower(self, module: nn.Module) -> nn.Module | None:
        """The module that alone uses a module's output, as its own input; None if there is no such pair to join."""
        call = self.call(module)
        if call is None or len(self.users[id(call[1])]) != 1:
            return None
        (user,) = self.users[id(call[1])]
        after = None if user is None else self.call(user)
        return user if after is not None and after[0] is call[1] else None
