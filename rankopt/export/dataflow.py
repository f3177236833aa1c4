"""The data flow between modules, observed in one forward pass; works for models that cannot be traced."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankopt.core.errors import TaskError
from rankopt.model.forward import hooked, inference, run
from rankopt.model.inventory import obstacle, weight_owners


class Dataflow(TorchDispatchMode):
    """The modules of a model in the order of their calls, and the modules that use each tensor.

    A tensor's user is the innermost module whose forward reads it in an operation; None stands for users outside of
    modules' forwards: the model's output and hooks. Only the path of the given example is seen: control flow that
    depends on the data may take others.

    Args:
        model: The model; it is run once in eval mode.
        x: An example input.

    Raises:
        TaskError: If the model does not run on the example.
    """

    def __init__(self, model: nn.Module, x: Any) -> None:
        super().__init__()
        owners = weight_owners(model)
        self.free = {m for m in model.modules() if obstacle(m, ["called"], owners) is None}  # type: ignore[list-item]
        self.calls: dict[nn.Module, list[tuple[Tensor, Tensor] | None]] = defaultdict(list)
        self.users: dict[int, set[nn.Module | None]] = defaultdict(set)
        self._alive: list[Any] = []  # keeps every tensor alive, so that ids are unique
        self._stack = [model]
        self._hooked = {m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks}
        hooks = hooked(model, model.modules(), on_input=self._enter, on_output=self._leave, outermost=True)
        try:
            with hooks, inference(model), self:
                self._use(run(model, x), None)
        except Exception as error:
            raise TaskError(f"the model does not run on example_input: {type(error).__name__}: {error}") from error

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

    # --- what may be replaced or joined ---

    def call(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Input and output of a module that may be replaced.

        Args:
            module: A module of the model.

        Returns:
            (input, output); None unless the module is called once, with a single tensor, and no other module reads
            its parameters.
        """
        own = [*module.parameters(), *module.buffers()]
        read_elsewhere = any(self.users[id(t)] - set(module.modules()) for t in own)
        calls = self.calls[module]
        return calls[0] if len(calls) == 1 and module in self.free and not read_elsewhere else None

    def follower(self, module: nn.Module) -> nn.Module | None:
        """The module that a module can be joined with.

        Args:
            module: A module of the model.

        Returns:
            The only user of the module's output, which takes it as its input; None if there is none, or one of the two
            may not be replaced.
        """
        call = self.call(module)
        if call is None or len(self.users[id(call[1])]) != 1:
            return None
        (user,) = self.users[id(call[1])]
        after = None if user is None else self.call(user)
        return user if after is not None and after[0] is call[1] else None
