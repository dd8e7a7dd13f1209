"""Values that a function makes of its weights alone: marked, to be computed once and not for every image.

* The function marks such values where it makes them (`once`).
* JAX traces the function to a list of equations (https://docs.jax.dev/en/latest/jaxpr.html), and any part of a
  list is a function, too: `prepare` is the part from the weights to the marks, `apply` that from the marks to
  the result.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.typing import DTypeLike

Variable = Any
"""Of a jaxpr; JAX does not name the type in public."""
_MARK = "once, kept as"


class Prepared(NamedTuple):
    """Weights and what was made of them."""

    values: list[jax.Array]
    """What is marked, in the order in which the function makes it."""
    others: list[jax.Array]
    """Those weights of which something is made that is not marked."""


def once(x: jax.Array, *, dtype: DTypeLike | None = None) -> jax.Array:
    """x, marked; no mark has an effect but on `prepare` and `apply`, and none inside a function under `jax.jit`.

    Args:
        dtype: what it may be rounded to when it is kept, because whoever reads it rounds it to that. None: as it is.
    """
    return checkpoint_name(x, f"{_MARK} {jnp.dtype(dtype or x.dtype).name}")


def prepare(function: Callable, weights: Any, *inputs: Any) -> Prepared:
    """Compute what is marked.

    Args:
        function: (weights, *inputs) -> result, and what is marked is made of weights alone.
        weights: a tree of arrays.
        inputs: of any shape that the function takes; arrays or shapes, whose values do not matter.

    Raises:
        ValueError: where a marked value is made of inputs, too.
    """
    cut = _Cut(function, weights, *inputs)
    if cut.missing(cut.weights, cut.marks):
        wrong = next(mark for mark in cut.marks if cut.missing(cut.weights, [mark]))
        raise ValueError(
            f"a value of shape {wrong.aval.shape} that is marked by `once` is made of the inputs, too"
        )
    values = cut.part(cut.weights, cut.marks)(*jax.tree.leaves(weights))
    leaves = dict(zip(cut.weights, jax.tree.leaves(weights), strict=True))
    kept = [value.astype(dtype) for value, dtype in zip(values, cut.dtypes, strict=True)]
    return Prepared(kept, [leaves[variable] for variable in cut.others])


def apply(function: Callable, weights: Any, prepared: Prepared, *inputs: Any) -> Any:
    """function(weights, *inputs), where only the shapes of the weights are known and what `prepare` made of them."""
    cut = _Cut(function, weights, *inputs)
    part = cut.part([*cut.marks, *cut.others, *cut.inputs], cut.results)
    values = [
        value.astype(mark.aval.dtype)
        for value, mark in zip(prepared.values, cut.marks, strict=True)
    ]
    results = part(*values, *prepared.others, *jax.tree.leaves(inputs))
    return jax.tree.unflatten(cut.structure, results)


class _Cut:
    """A traced function (weights, *inputs) -> result, and where it is marked."""

    def __init__(self, function: Callable, weights: Any, *inputs: Any):
        self._closed, shape = jax.make_jaxpr(function, return_shape=True)(weights, *inputs)
        jaxpr, num_weights = self._closed.jaxpr, len(jax.tree.leaves(weights))
        self.structure = jax.tree.structure(shape)
        self.weights, self.inputs = jaxpr.invars[:num_weights], jaxpr.invars[num_weights:]
        self.results = jaxpr.outvars
        self.marks, self.dtypes = [], []
        for equation in jaxpr.eqns:
            name = str(equation.params.get("name"))
            if equation.primitive.name == "name" and name.startswith(_MARK):
                self.marks += equation.outvars
                self.dtypes.append(name.removeprefix(_MARK).strip())
        self.others = self.missing([*self.marks, *self.inputs], self.results)

    def missing(self, known: Sequence[Variable], wanted: Sequence[Variable]) -> list[Variable]:
        """What else of the arguments the wanted variables are made of."""
        needed, _ = self._between(known, wanted)
        return [variable for variable in self._closed.jaxpr.invars if variable in needed]

    def part(self, known: Sequence[Variable], wanted: Sequence[Variable]) -> Callable:
        """The function from known variables to wanted ones."""
        jaxpr = self._closed.jaxpr
        _, equations = self._between(known, wanted)
        # Names of arguments and results are those of the whole function.
        unnamed = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
        part = Jaxpr(jaxpr.constvars, known, wanted, equations, jaxpr.effects, unnamed)
        return jaxpr_as_fun(ClosedJaxpr(part, self._closed.consts))

    def _between(
        self, known: Sequence[Variable], wanted: Sequence[Variable]
    ) -> tuple[set[Variable], list[JaxprEqn]]:
        """What the wanted variables are made of that is not known, and the equations that make them."""
        given = set(known)
        needed, equations = _variables(wanted) - given, []
        for equation in reversed(self._closed.jaxpr.eqns):
            if not needed.isdisjoint(equation.outvars):
                equations.append(equation)
                needed.difference_update(equation.outvars)
                needed |= _variables(equation.invars) - given
        return needed, equations[::-1]


def _variables(atoms: Sequence[Any]) -> set[Variable]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}
